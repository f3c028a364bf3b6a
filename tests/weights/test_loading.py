"""Files of every source become the variables they were made of."""

import pickle
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
from weights import forge, samples

import nonlocal_jax as nl
from nonlocal_jax.weights import export, load, save
from nonlocal_jax.weights.loading import load_with_report
from nonlocal_jax.weights.names import flatten

# For each source, whether its networks have non-local blocks.
VIDEO_SOURCES = {
    "nonlocal_jax": True,
    "caffe2": True,
    "slowfast": True,
    "mmaction2": True,
    "pytorchvideo": False,
    "torchvision": False,
}
PLAIN = samples.network()
NONLOCAL = samples.network(blocks=samples.BLOCKS)
# Where something is compiled, one residual block in each stage is enough.
TINY = samples.tiny_network()
TINY_BLOCKS = {"res3": (0,)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"


def transforms(report):
    """The transform of each entry of the file."""
    return {weight.source: weight.transform for weight in report.weights if weight.source}


# Names and formats.


@pytest.mark.parametrize("names", VIDEO_SOURCES)
def test_what_is_saved_is_loaded(names, path):
    model = NONLOCAL if VIDEO_SOURCES[names] else PLAIN
    variables = samples.weights(model)
    save(path, variables, names=names)
    loaded, report = load_with_report(path, model)
    samples.assert_equal(loaded, variables)
    assert report.source == names


@pytest.mark.parametrize(
    "names", ["nonlocal_jax", "non_local_pytorch", "non_local_pytorch (first version)"]
)
@pytest.mark.parametrize("instantiation", ["gaussian", "embedded_gaussian", "concatenation"])
def test_digits(names, instantiation, path):
    model = nl.models.non_local_pytorch_mnist(instantiation)
    variables = samples.weights(model)
    save(path, variables, names=names)
    samples.assert_equal(load(path, model), variables)


def test_concatenation_of_mmaction2(path):
    """Without pooling, φ and g have other names."""
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv", instantiation="concatenation")
    variables = samples.weights(model)
    arrays = export(variables, "mmaction2")
    w_f = arrays["backbone.layer2.1.non_local_block.concat_project.conv.weight"]
    assert w_f.shape == (1, 512, 1, 1)
    unpooled = {re.sub(r"\.(phi|g)\.0\.", r".\1.", name): array for name, array in arrays.items()}
    assert unpooled.keys() != arrays.keys()
    model = samples.network(
        blocks=samples.BLOCKS,
        preset="mmcv",
        instantiation="concatenation",
        block_options={"subsample": False},
    )
    samples.assert_equal(load(samples.write(path, unpooled), model), variables)


@pytest.mark.parametrize("layout", ["blobs", "bare"])
def test_pickle_of_caffe2(layout, path):
    variables = samples.weights(NONLOCAL)
    arrays = export(variables, "caffe2")
    solver = {"conv1_w_momentum": arrays["conv1_w"], "lr": np.float32(0.01), "model_iter": 400_000}
    tree = arrays | solver
    path.write_bytes(pickle.dumps({"blobs": tree} if layout == "blobs" else tree, protocol=2))
    loaded, report = load_with_report(path, NONLOCAL)
    samples.assert_equal(loaded, variables)
    ignored = {w.source: w.transform for w in report.weights if not w.target}
    assert ignored == dict.fromkeys(solver, "training state")


def test_classifier_of_caffe2_as_a_convolution(path):
    variables = samples.weights(PLAIN)
    arrays = export(variables, "caffe2")
    arrays["pred_w"] = arrays["pred_w"][..., None, None, None]
    samples.assert_equal(load(samples.write(path, arrays), PLAIN), variables)


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
def test_prefixes_of_wrappers(prefix, path):
    variables = samples.weights(PLAIN)
    arrays = {prefix + name: array for name, array in export(variables, "slowfast").items()}
    arrays[prefix + "s1.pathway0_stem.bn.num_batches_tracked"] = np.array(3)
    samples.assert_equal(load(samples.write(path, arrays), PLAIN), variables)


def test_folder_of_orbax(tmp_path):
    variables = samples.weights(PLAIN)
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", variables)
    samples.assert_equal(load(tmp_path / "step", PLAIN), variables)


def test_suffix_does_not_count(tmp_path):
    """A file of torch.save under the suffix of a Caffe2 pickle."""
    model = nl.models.non_local_pytorch_mnist()
    variables = samples.weights(model)
    path = tmp_path / "net.pkl"
    arrays = export(variables, "non_local_pytorch")
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    path.write_bytes(forge.zip_of(contiguous))
    samples.assert_equal(load(path, model), variables)


def test_half_precision_becomes_that_of_the_network(path):
    arrays = export(samples.weights(PLAIN), "slowfast")
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    kernel = load(samples.write(path, half), PLAIN)["params"]["head"]["kernel"]
    expected = half["head.projection.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(kernel, expected)
    assert kernel.dtype == jnp.float32


# Frozen norms.


def test_running_statistics_are_folded_into_a_frozen_network(path):
    variables = samples.weights(samples.tiny_network(blocks=TINY_BLOCKS))
    frozen = samples.tiny_network(blocks=TINY_BLOCKS, frozen_bn=True)
    expected = flatten(nl.layers.freeze_batch_norm(variables))
    for names in ("nonlocal_jax", "caffe2"):
        save(path, variables, names=names)
        loaded = flatten(load(path, frozen))
        assert loaded.keys() == expected.keys()
        for name, leaf in expected.items():
            np.testing.assert_allclose(loaded[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)
        scale = variables["params"]["conv1_norm"]["scale"]
        assert np.abs(loaded["params/conv1_norm/scale"] - scale).max() > 0.1


def test_frozen_file_of_frozen_network(path):
    """The released networks for long clips: affine maps, and no norm in the non-local blocks."""
    options = {"preset": "caffe2", "frozen_bn": True, "block_options": {"norm": None}}
    model = samples.network(blocks=samples.BLOCKS, **options)
    variables = samples.weights(model)
    save(path, variables, names="caffe2")
    samples.assert_equal(load(path, model), variables)


# Inflation.


def image_file(path):
    """Writes the weights of an image network, whose kernels have no time axis.

    Returns the variables of the C2D with the same weights.
    """
    variables = samples.weights(samples.tiny_network("c2d"))
    arrays = export(variables, "torchvision")
    flat = {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    samples.write(path, flat)
    return variables


@pytest.mark.parametrize("kind", ["c2d", "i3d_3x1x1", "i3d_3x3x3"])
def test_image_kernels_are_inflated(kind, path):
    image = image_file(path)
    loaded, report = load_with_report(path, samples.tiny_network(kind))
    for layer, frames in {
        "conv1": {"c2d": 1}.get(kind, 5),
        "res2_0/conv_a": 3 if kind == "i3d_3x1x1" else 1,
        "res2_0/conv_b": 3 if kind == "i3d_3x3x3" else 1,
        "res5_0/conv_a": 1,
    }.items():
        path_of_kernel = f"params/{layer}/kernel"
        kernel, image_kernel = (flatten(v)[path_of_kernel] for v in (loaded, image))
        assert kernel.shape[0] == frames
        expected = nl.weights.inflate(jnp.asarray(image_kernel[0]), frames)
        np.testing.assert_array_equal(kernel, expected)
    assert ("inflated to 5 frames" in transforms(report)["conv1.weight"]) == (kind != "c2d")


@pytest.mark.networks
def test_static_clip_gets_the_response_of_the_image(path):
    """Away from the first and last frames, next to which kernels see padding."""
    image_file(path)
    image = np.random.default_rng(0).standard_normal((1, 1, 24, 16, 3)).astype(np.float32)
    clip = jnp.broadcast_to(image, (1, 9, 24, 16, 3))

    def res2(kind):
        model = samples.tiny_network(kind)

        @jax.jit
        def run(variables):
            _, state = model.apply(variables, clip, mutable=["intermediates"])
            return state["intermediates"]["res2"][0]

        return np.asarray(run(load(path, model)))

    image_response = res2("c2d")
    for kind in ("i3d_3x1x1", "i3d_3x3x3"):
        response = res2(kind)
        np.testing.assert_allclose(
            response[:, 3:6], image_response[:, 3:6], rtol=1e-4, atol=1e-4, err_msg=kind
        )
        assert np.abs(response[:, 0] - image_response[:, 0]).max() > 0.01


def test_flat_video_kernels_are_inflated_on_request(path):
    flat = samples.weights(samples.tiny_network("c2d"))
    save(path, flat, names="slowfast")
    message = samples.error_of(path, TINY)
    sizes = "64×3×1×7×7 becomes 1×7×7×3×64; params/conv1/kernel has 5×7×7×3×64"
    assert f"s1.pathway0_stem.conv.weight {sizes}" in message
    assert "The kernel is flat: pass inflate_flat=True" in message
    loaded = load(path, TINY, inflate_flat=True)
    expected = nl.weights.inflate(jnp.asarray(flat["params"]["conv1"]["kernel"][0]), 5)
    np.testing.assert_array_equal(loaded["params"]["conv1"]["kernel"], expected)


def test_half_precision_is_inflated_in_float32(path):
    """A fifth of most float16 numbers is not a float16 number."""
    image = image_file(path)
    half = {name: a.astype(np.float16) for name, a in nl.weights.read(path).arrays.items()}
    loaded = load(samples.write(path, half), TINY)
    expected = image["params"]["conv1"]["kernel"].astype(np.float16).astype(np.float32)
    kernel_sum = loaded["params"]["conv1"]["kernel"].sum(0, keepdims=True)
    np.testing.assert_allclose(kernel_sum, expected, rtol=1e-6)


# Parts that the file does not have.


def test_classifier_of_another_size(path):
    variables = samples.weights(TINY)
    save(path, variables, names="slowfast")
    new_classes = samples.tiny_network(num_classes=11)
    sizes = "7×2048 becomes 2048×7; params/head/kernel has 2048×11"
    assert f"head.projection.weight {sizes}" in samples.error_of(path, new_classes)
    loaded = load(path, new_classes, initialise=("classifier",), rng=jax.random.key(5))
    default, report = load_with_report(path, new_classes, initialise=("classifier",))
    head, default_head = loaded["params"]["head"], default["params"]["head"]
    assert (default_head["kernel"] != head["kernel"]).any()
    assert float(np.std(head["kernel"])) == pytest.approx(0.01, rel=0.1)
    assert not head["bias"].any()
    samples.assert_equal(samples.without(loaded, "/head/"), samples.without(variables, "/head/"))
    reason = transforms(report)["head.projection.weight"]
    assert reason == "the leaf has another size, 2048×11"


def test_classifier_is_loaded_where_it_fits(path):
    variables = samples.weights(PLAIN)
    save(path, variables)
    loaded = load(path, PLAIN, initialise=("classifier", "nonlocal", "statistics"))
    samples.assert_equal(loaded, variables)


def test_without_a_classifier(path):
    save(path, samples.without(samples.weights(TINY), "/head/"))
    message = samples.error_of(path, TINY)
    assert "params/head/kernel 2048×7 is not in the file; " in message
    assert (
        "to keep the initial values of the last layer, pass initialise=('classifier',)" in message
    )
    loaded = load(path, TINY, initialise=("classifier",))
    assert loaded["params"]["head"]["kernel"].shape == (2048, 7)


def test_blocks_that_the_file_does_not_have_start_as_the_identity(path):
    variables = samples.weights(TINY)
    save(path, variables, names="slowfast")
    nonlocal_model = samples.tiny_network(blocks=TINY_BLOCKS)
    message = samples.error_of(path, nonlocal_model)
    assert "params/nonlocal_res3_0/operation/g/kernel 512×256 is not in the file" in message
    assert "initialise=('nonlocal',)" in message
    loaded = load(path, nonlocal_model, initialise=("nonlocal",))
    samples.assert_equal(samples.without(loaded, "nonlocal_"), variables)
    block = loaded["params"]["nonlocal_res3_0"]
    assert not block["out_norm"]["scale"].any()
    assert block["operation"]["theta"]["kernel"].any()
    assert (loaded["batch_stats"]["nonlocal_res3_0"]["out_norm"]["var"] == 1).all()


def test_statistics_that_the_file_does_not_have(path):
    """Also those of the non-local blocks, whose other weights are in the file."""
    model = samples.tiny_network(blocks=TINY_BLOCKS)
    variables = samples.weights(model)
    save(path, {"params": variables["params"]}, names="caffe2")
    message = samples.error_of(path, model)
    assert "batch_stats/conv1_norm/mean 64 is not in the file" in message
    assert "initialise=('statistics',)" in message
    loaded = load(path, model, initialise=("statistics",))
    samples.assert_equal({"params": loaded["params"]}, {"params": variables["params"]})
    assert (loaded["batch_stats"]["conv1_norm"]["var"] == 1).all()
    assert not loaded["batch_stats"]["nonlocal_res3_0"]["out_norm"]["mean"].any()


@pytest.mark.usefixtures("as_users_see_it")
def test_initialise_accepts_only_its_parts(path):
    save(path, samples.weights(PLAIN))
    with pytest.raises(ValueError, match=r"'classifier', 'nonlocal', 'statistics'; got 'head'"):
        load(path, PLAIN, initialise=("head",))


def test_model_without_an_example(path):
    model = nn.Dense(2)
    variables = {"params": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
    save(path, variables)
    with pytest.raises(TypeError, match=r"Dense has no example input; pass example="):
        load(path, model)
    loaded = load(path, model, example=jax.ShapeDtypeStruct((1, 3), jnp.float32))
    samples.assert_equal(loaded, variables)
