"""Files of every source become the variables they were made of; what does not fit is an error that names it."""

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
from nonlocal_jax.weights import export, load, load_report, save
from nonlocal_jax.weights.names import flatten

# The names of a source, and whether it has non-local blocks.
VIDEO = {
    "nonlocal_jax": True,
    "caffe2": True,
    "slowfast": True,
    "mmaction2": True,
    "pytorchvideo": False,
    "torchvision": False,
}
PLAIN = samples.network()
WITH_BLOCKS = samples.network(blocks=samples.BLOCKS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"


# What fits.


@pytest.mark.parametrize("names", VIDEO)
def test_what_is_saved_is_loaded(names, path):
    model = WITH_BLOCKS if VIDEO[names] else PLAIN
    variables = samples.weights(model)
    save(path, variables, names=names)
    samples.assert_equal(load(path, model), variables)
    assert load_report(path, model).source == names


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
    model = samples.network(blocks=samples.BLOCKS, preset="mmcv", instantiation="concatenation")
    variables = samples.weights(model)
    arrays = export(variables, "mmaction2")
    assert arrays["backbone.layer2.1.non_local_block.concat_project.conv.weight"].shape == (
        1,
        512,
        1,
        1,
    )
    # Without pooling, its names of φ and g are others.
    spelled = {re.sub(r"\.(phi|g)\.0\.", r".\1.", name): a for name, a in arrays.items()}
    assert spelled.keys() != arrays.keys()
    samples.assert_equal(load(samples.write(path, spelled), model), variables)


@pytest.mark.parametrize("layout", ["blobs", "bare"])
def test_pickle_of_caffe2(layout, path):
    variables = samples.weights(WITH_BLOCKS)
    arrays = export(variables, "caffe2")
    more = {"conv1_w_momentum": arrays["conv1_w"], "lr": np.float32(0.01), "model_iter": 400_000}
    path.write_bytes(
        pickle.dumps({"blobs": arrays | more} if layout == "blobs" else arrays | more, protocol=2)
    )
    samples.assert_equal(load(path, WITH_BLOCKS), variables)
    ignored = {
        w.source: w.transform for w in load_report(path, WITH_BLOCKS).weights if not w.target
    }
    assert ignored == dict.fromkeys(more, "training state")


def test_classifier_of_caffe2_as_a_convolution(path):
    variables = samples.weights(PLAIN)
    arrays = export(variables, "caffe2")
    arrays["pred_w"] = arrays["pred_w"][..., None, None, None]
    samples.assert_equal(load(samples.write(path, arrays), PLAIN), variables)


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
def test_prefixes_of_wrappers(prefix, path):
    variables = samples.weights(PLAIN)
    arrays = {prefix + name: a for name, a in export(variables, "slowfast").items()}
    arrays[prefix + "s1.pathway0_stem.bn.num_batches_tracked"] = np.array(3)
    samples.assert_equal(load(samples.write(path, arrays), PLAIN), variables)


def test_folder_of_orbax(tmp_path):
    variables = samples.weights(PLAIN)
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step", variables)
    samples.assert_equal(load(tmp_path / "step", PLAIN), variables)


def test_half_precision_becomes_the_networks(path):
    half = {
        name: a.astype(np.float16) for name, a in export(samples.weights(PLAIN), "slowfast").items()
    }
    loaded = load(samples.write(path, half), PLAIN)
    expected = half["head.projection.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(loaded["params"]["head"]["kernel"], expected)
    assert loaded["params"]["head"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("names", ["nonlocal_jax", "caffe2"])
def test_running_statistics_are_folded_into_a_frozen_network(names, path):
    variables = samples.weights(WITH_BLOCKS)
    save(path, variables, names=names)
    frozen = samples.network(blocks=samples.BLOCKS, frozen_bn=True)
    loaded, expected = flatten(load(path, frozen)), flatten(nl.layers.freeze_batch_norm(variables))
    assert loaded.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_allclose(loaded[name], leaf, rtol=1e-6, atol=1e-6, err_msg=name)
    assert (
        np.abs(loaded["params/conv1_norm/scale"] - variables["params"]["conv1_norm"]["scale"]).max()
        > 0.1
    )


def test_frozen_file_of_frozen_network(path):
    """The released networks of long clips: affine maps, and no norm in the non-local blocks."""
    model = samples.network(
        blocks=samples.BLOCKS, preset="caffe2", frozen_bn=True, block_options={"norm": None}
    )
    variables = samples.weights(model)
    save(path, variables, names="caffe2")
    samples.assert_equal(load(path, model), variables)


# Inflation.


def image_file(path, kind="c2d"):
    """Of an image network, whose kernels have no axis of time; and the variables of the same network of videos."""
    variables = samples.weights(samples.network(kind))
    arrays = export(variables, "torchvision")
    return samples.write(
        path, {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    ), variables


@pytest.mark.parametrize("kind", ["c2d", "i3d_3x1x1", "i3d_3x3x3"])
def test_image_kernels_are_inflated(kind, path):
    _, flat = image_file(path)
    loaded = load(path, samples.network(kind))
    for place, frames in {
        "conv1": {"c2d": 1}.get(kind, 5),
        "res2_0/conv_a": 3 if kind == "i3d_3x1x1" else 1,
        "res2_0/conv_b": 3 if kind == "i3d_3x3x3" else 1,
        "res3_1/conv_a": 1,
    }.items():
        kernel, of_image = (flatten(v)[f"params/{place}/kernel"] for v in (loaded, flat))
        assert kernel.shape[0] == frames
        np.testing.assert_array_equal(kernel, nl.weights.inflate(jnp.asarray(of_image[0]), frames))
    report = {w.source: w.transform for w in load_report(path, samples.network(kind)).weights}
    assert ("inflated to 5 frames" in report["conv1.weight"]) == (kind != "c2d")


@pytest.mark.parametrize("kind", ["i3d_3x1x1", "i3d_3x3x3"])
def test_static_clip_gets_the_answer_of_the_image(kind, path):
    """Away from the first and last frames, next to which kernels see padding."""
    image_file(path)
    image = jax.random.normal(jax.random.key(0), (1, 1, 24, 16, 3))
    clip = jnp.broadcast_to(image, (1, 9, 24, 16, 3))

    def res2(kind):
        model = samples.network(kind)
        run = jax.jit(
            lambda v: model.apply(v, clip, mutable=["intermediates"])[1]["intermediates"]["res2"][0]
        )
        return np.asarray(run(load(path, model)))

    of_image, of_video = res2("c2d"), res2(kind)
    np.testing.assert_allclose(of_video[:, 3:6], of_image[:, 3:6], rtol=1e-4, atol=1e-4)
    assert np.abs(of_video[:, 0] - of_image[:, 0]).max() > 0.01


def test_flat_video_kernels_are_inflated_on_request(path):
    flat = samples.weights(samples.network("c2d"))
    save(path, flat, names="slowfast")
    message = samples.error_of(path, samples.network("i3d_3x1x1"))
    assert (
        "s1.pathway0_stem.conv.weight 64×3×1×7×7 becomes 1×7×7×3×64; params/conv1/kernel has 5×7×7×3×64"
        in message
    )
    assert "It is flat: pass inflate_flat=True" in message
    loaded = load(path, samples.network("i3d_3x1x1"), inflate_flat=True)
    expected = nl.weights.inflate(jnp.asarray(flat["params"]["conv1"]["kernel"][0]), 5)
    np.testing.assert_array_equal(loaded["params"]["conv1"]["kernel"], expected)


def test_half_precision_is_inflated_in_float32(path):
    """A fifth of most numbers of float16 is none."""
    _, flat = image_file(path)
    half = {name: a.astype(np.float16) for name, a in nl.weights.read(path).arrays.items()}
    loaded = load(samples.write(path, half), samples.network())
    expected = flat["params"]["conv1"]["kernel"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(
        loaded["params"]["conv1"]["kernel"].sum(0, keepdims=True), expected, rtol=1e-6
    )


# What the file does not have.


def test_classifier_of_another_size(path):
    variables = samples.weights(PLAIN)
    save(path, variables, names="slowfast")
    other = samples.network(num_classes=11)
    assert (
        "head.projection.weight 7×2048 becomes 2048×7; params/head/kernel has 2048×11"
        in samples.error_of(path, other)
    )
    loaded = load(path, other, initialise=("classifier",), rng=jax.random.key(5))
    other_key = load(path, other, initialise=("classifier",))
    assert (other_key["params"]["head"]["kernel"] != loaded["params"]["head"]["kernel"]).any()
    assert float(loaded["params"]["head"]["kernel"].std()) == pytest.approx(0.01, rel=0.1)
    assert not loaded["params"]["head"]["bias"].any()
    samples.assert_equal(samples.without(loaded, "/head/"), samples.without(variables, "/head/"))
    reasons = {
        w.source: w.transform for w in load_report(path, other, initialise=("classifier",)).weights
    }
    assert reasons["head.projection.weight"] == "of another size than 2048×11"


def test_classifier_is_loaded_where_it_fits(path):
    variables = samples.weights(PLAIN)
    save(path, variables)
    samples.assert_equal(
        load(path, PLAIN, initialise=("classifier", "nonlocal", "statistics")), variables
    )


def test_without_a_classifier(path):
    save(path, samples.without(samples.weights(PLAIN), "/head/"))
    message = samples.error_of(path, PLAIN)
    assert (
        "params/head/kernel 2048×7 is not in the file; to leave the last layer as initialised, pass "
        in message
    )
    assert "initialise=('classifier',)" in message
    assert load(path, PLAIN, initialise=("classifier",))["params"]["head"]["kernel"].shape == (
        2048,
        7,
    )


def test_blocks_that_the_file_does_not_have_start_as_the_identity(path):
    variables = samples.weights(PLAIN)
    save(path, variables, names="slowfast")
    message = samples.error_of(path, WITH_BLOCKS)
    assert "params/nonlocal_res3_1/operation/g/kernel 512×256 is not in the file" in message
    assert "initialise=('nonlocal',)" in message
    loaded = load(path, WITH_BLOCKS, initialise=("nonlocal",))
    samples.assert_equal(samples.without(loaded, "nonlocal_"), variables)
    assert not loaded["params"]["nonlocal_res3_1"]["out_norm"]["scale"].any()
    assert loaded["params"]["nonlocal_res3_1"]["operation"]["theta"]["kernel"].any()
    assert (loaded["batch_stats"]["nonlocal_res3_1"]["out_norm"]["var"] == 1).all()


def test_statistics_that_the_file_does_not_have(path):
    """Also those of the non-local blocks, whose other weights are there."""
    variables = samples.weights(WITH_BLOCKS)
    save(path, {"params": variables["params"]}, names="caffe2")
    message = samples.error_of(path, WITH_BLOCKS)
    assert "batch_stats/conv1_norm/mean 64 is not in the file" in message
    assert "initialise=('statistics',)" in message
    loaded = load(path, WITH_BLOCKS, initialise=("statistics",))
    samples.assert_equal({"params": loaded["params"]}, {"params": variables["params"]})
    assert (loaded["batch_stats"]["conv1_norm"]["var"] == 1).all()
    assert not loaded["batch_stats"]["nonlocal_res3_1"]["out_norm"]["mean"].any()


@pytest.mark.usefixtures("as_users_see_it")
def test_initialise_knows_its_parts(path):
    save(path, samples.weights(PLAIN))
    with pytest.raises(ValueError, match=r"'classifier', 'nonlocal', 'statistics'; got 'head'"):
        load(path, PLAIN, initialise=("head",))


# The file and the model.


def test_suffix_does_not_count(tmp_path):
    """A file of torch.save under the suffix of a Caffe2 pickle."""
    model = nl.models.non_local_pytorch_mnist()
    variables = samples.weights(model)
    path = tmp_path / "net.pkl"
    arrays = {
        name: np.asarray(a, order="C") for name, a in export(variables, "non_local_pytorch").items()
    }
    path.write_bytes(forge.zip_of(arrays))
    samples.assert_equal(load(path, model), variables)


def test_model_without_an_example(path):
    model = nn.Dense(2)
    variables = {"params": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}}
    save(path, variables)
    with pytest.raises(TypeError, match=r"Dense has no example input; pass example="):
        load(path, model)
    samples.assert_equal(
        load(path, model, example=jax.ShapeDtypeStruct((1, 3), jnp.float32)), variables
    )
