"""Naming tables: every row in both directions, and the whole network of every source.

The names of the whole networks are written here by rule, independently of the tables.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import names
from nonlocal_jax.weights.names import flatten, unflatten, variable_path
from nonlocal_jax.weights.sources import (
    CAFFE2,
    MMACTION2,
    NAMING_TABLES,
    PYTORCHVIDEO,
    SLOWFAST,
    TORCHVISION,
)

ROWS = [
    pytest.param(table, row, id=f"{table.name}-{row.example[0]}")
    for table in NAMING_TABLES
    for row in table.rows
]
# mmaction2 has other names for φ and g where no pooling follows. Weights are saved with pooling.
SECOND_SPELLINGS = (
    "backbone.{stage}.{i}.non_local_block.{pooled}.conv.weight",
    "backbone.{stage}.{i}.non_local_block.{pooled}.conv.bias",
)


@pytest.mark.parametrize(("table", "row"), ROWS)
def test_rows_translate_in_both_directions(table, row):
    source_name, native_name = row.example
    assert table.native_name(source_name) == (native_name, row)
    saved_name, saved_row = table.source_name(native_name)
    if row.source in SECOND_SPELLINGS:
        assert saved_name.replace(".0.conv.", ".conv.") == source_name
        assert table.rows.index(saved_row) < table.rows.index(row)
    else:
        assert (saved_name, saved_row) == (source_name, row)


@pytest.mark.parametrize("table", NAMING_TABLES, ids=lambda table: table.name)
def test_no_two_rows_share_a_name(table):
    """A row whose example another row matches as well would make the order of rows decide."""
    examples = [row.example[0] for row in table.rows]
    assert len(set(examples)) == len(examples)
    for row in table.rows:
        remaining = tuple(candidate for candidate in table.rows if candidate is not row)
        smaller_table = dataclasses.replace(table, rows=remaining)
        assert smaller_table.native_name(row.example[0]) is None


@pytest.mark.parametrize("table", NAMING_TABLES, ids=lambda table: table.name)
def test_only_second_spellings_repeat_a_native_name(table):
    targets = [row.native for row in table.rows if row.source not in SECOND_SPELLINGS]
    assert len(set(targets)) == len(targets)


@pytest.mark.parametrize(
    "source_name",
    [
        "res1_0_branch2a_w",
        "res2_00_branch2a_w",
        "res2_0_branch2d_w",
        "res2_0_branch2a_w ",
        "xres2_0_branch2a_w",
        "conv1xw",
        "conv1_w_momentum",
    ],
)
def test_similar_names_are_unknown(source_name):
    assert CAFFE2.native_name(source_name) is None


def test_weights_that_a_source_does_not_have():
    assert TORCHVISION.source_name("nonlocal_res3_1/out/kernel") is None
    assert CAFFE2.source_name("res6_0/conv_a/kernel") is None
    assert SLOWFAST.source_name("res2_0/conv_a/bias") is None


def test_counters_are_no_weights():
    assert SLOWFAST.holds_no_weights("s1.pathway0_stem.bn.num_batches_tracked")
    assert not SLOWFAST.holds_no_weights("s1.pathway0_stem.bn.running_mean")
    assert not CAFFE2.holds_no_weights("conv1_w")


# Arrays.

# The transform, the shape in the source and here, and one index in both, worked out by hand.
TRANSFORMS = {
    "vector": (names.VECTOR, (5,), (5,), (4,), (4,)),
    "conv": (names.CONV, (2, 3, 5, 7, 11), (5, 7, 11, 3, 2), (1, 2, 4, 6, 10), (4, 6, 10, 2, 1)),
    "conv of an image": (names.CONV2D, (2, 3, 5, 7), (5, 7, 3, 2), (1, 2, 4, 6), (4, 6, 2, 1)),
    "dense": (names.DENSE, (2, 3), (3, 2), (1, 2), (2, 1)),
    "pointwise": (names.POINTWISE, (2, 3, 1, 1, 1), (3, 2), (1, 2, 0, 0, 0), (2, 1)),
    "pointwise of an image": (names.POINTWISE2D, (2, 3, 1, 1), (3, 2), (1, 2, 0, 0), (2, 1)),
    "w_f": (names.W_F, (1, 6, 1, 1), (6,), (0, 4, 0, 0), (4,)),
    # Channel 2 of 3, row 4 of 5, column 5 of 7.
    "dense of a map": (
        names.flattened_dense(3, 5, 7),
        (2, 105),
        (105, 2),
        (1, 2 * 35 + 4 * 7 + 5),
        (4 * 21 + 5 * 3 + 2, 1),
    ),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_have_an_inverse(case):
    transform, source_shape, native_shape, source_index, native_index = TRANSFORMS[case]
    array = np.arange(np.prod(source_shape)).reshape(source_shape)
    native_array = transform.import_array(array)
    assert native_array.shape == native_shape
    assert native_array[native_index] == array[source_index]
    np.testing.assert_array_equal(transform.export_array(native_array), array, strict=True)


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_leave_other_shapes_unchanged(case):
    """Loading then reports their shape."""
    transform, _, native_shape, _, _ = TRANSFORMS[case]
    odd = np.zeros((2, 3, 2, 2, 2, 2))
    assert transform.import_array(odd).ndim != len(native_shape)


def test_image_kernels_become_kernels_of_one_frame():
    array = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    np.testing.assert_array_equal(
        names.CONV.import_array(array), array.transpose(2, 3, 1, 0)[None], strict=True
    )


def test_norms_of_four_axes_are_vectors():
    np.testing.assert_array_equal(
        names.VECTOR.import_array(np.arange(3).reshape(3, 1, 1, 1)), np.arange(3), strict=True
    )


def test_paths():
    variables = {"params": {"a": {"kernel": 1, "bias": 2}}, "batch_stats": {"a": {"mean": 3}}}
    assert flatten(variables) == {"params/a/kernel": 1, "params/a/bias": 2, "batch_stats/a/mean": 3}
    assert unflatten(flatten(variables)) == variables
    assert [variable_path(name) for name in ("a/kernel", "a/mean", "b/var")] == [
        "params/a/kernel",
        "batch_stats/a/mean",
        "batch_stats/b/var",
    ]


# Whole networks.

BLOCKS = (3, 4, 6, 3)
# For each stage, counted from res2, the residual blocks that a non-local block follows.
NONLOCAL = {
    1: (1, 3),
    2: (1, 3, 5),
}
TORCH = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def residual_blocks():
    """Yields stage, number, channels (input, inside, output) and frames of each residual block."""
    inputs = 64
    for s, count in enumerate(BLOCKS):
        for i in range(count):
            inflated = s == 0 or i % 2 == (1 if s == 3 else 0)
            yield s, i, inputs, 64 << s, 256 << s, 3 if inflated else 1
            inputs = 256 << s


def keys_of(conv, norm, block, shortcut, head, nonlocal_block=None, flat=False):
    """Yields keys and shapes, given how a source names each kind of layer."""

    def kernel(outputs, inputs, t, size):
        return (outputs, inputs, size, size) if flat else (outputs, inputs, t, size, size)

    yield conv[0], kernel(64, 3, 5, 7)
    yield from ((key, (64,)) for key in norm(conv[1]))
    for s, i, inputs, inner, outputs, t in residual_blocks():
        shapes = (
            kernel(inner, inputs, t, 1),
            kernel(inner, inner, 1, 3),
            kernel(outputs, inner, 1, 1),
        )
        for x, shape in enumerate(shapes):
            name, norm_name = block(s, i, x)
            yield name, shape
            yield from ((key, shape[:1]) for key in norm(norm_name))
        if i == 0:
            name, norm_name = shortcut(s)
            yield name, kernel(outputs, inputs, 1, 1)
            yield from ((key, (outputs,)) for key in norm(norm_name))
        if nonlocal_block and i in NONLOCAL.get(s, ()):
            yield from nonlocal_block(s, i, outputs)
    yield head.format("weight"), (400, 2048)
    yield head.format("bias"), (400,)


def torch_norm(name):
    return [f"{name}.{leaf}" for leaf in TORCH]


def caffe2():
    def norm(name):
        return [f"{name}_bn_{leaf}" for leaf in ("s", "b", "rm", "riv")]

    def nonlocal_block(s, i, c):
        name = f"nonlocal_conv{s + 2}_{i}"
        for x in ("theta", "phi", "g"):
            yield from ((f"{name}_{x}_w", (c // 2, c, 1, 1, 1)), (f"{name}_{x}_b", (c // 2,)))
        yield from ((f"{name}_out_w", (c, c // 2, 1, 1, 1)), (f"{name}_out_b", (c,)))
        yield from ((key, (c,)) for key in norm(name))

    def block(s, i, x):
        name = f"res{s + 2}_{i}_branch2{'abc'[x]}"
        return f"{name}_w", name

    keys = dict(
        keys_of(
            ("conv1_w", "res_conv1"),
            norm,
            block,
            lambda s: (f"res{s + 2}_0_branch1_w", f"res{s + 2}_0_branch1"),
            "pred_{}",
            nonlocal_block,
        )
    )
    return {
        {"pred_weight": "pred_w", "pred_bias": "pred_b"}.get(key, key): shape
        for key, shape in keys.items()
    }


def slowfast():
    def nonlocal_block(s, i, c):
        name = f"s{s + 2}.pathway0_nonlocal{i}"
        for x in ("theta", "phi", "g"):
            yield from (
                (f"{name}.conv_{x}.weight", (c // 2, c, 1, 1, 1)),
                (f"{name}.conv_{x}.bias", (c // 2,)),
            )
        yield from (
            (f"{name}.conv_out.weight", (c, c // 2, 1, 1, 1)),
            (f"{name}.conv_out.bias", (c,)),
        )
        yield from ((key, (c,)) for key in torch_norm(f"{name}.bn"))

    def block(s, i, x):
        name = f"s{s + 2}.pathway0_res{i}.branch2.{'abc'[x]}"
        return f"{name}.weight", f"{name}_bn"

    def shortcut(s):
        return f"s{s + 2}.pathway0_res0.branch1.weight", f"s{s + 2}.pathway0_res0.branch1_bn"

    stem = ("s1.pathway0_stem.conv.weight", "s1.pathway0_stem.bn")
    return dict(keys_of(stem, torch_norm, block, shortcut, "head.projection.{}", nonlocal_block))


def mmaction2():
    def nonlocal_block(s, i, c):
        name = f"backbone.layer{s + 1}.{i}.non_local_block"
        for x in ("theta", "phi.0", "g.0"):
            yield from (
                (f"{name}.{x}.conv.weight", (c // 2, c, 1, 1, 1)),
                (f"{name}.{x}.conv.bias", (c // 2,)),
            )
        yield f"{name}.conv_out.conv.weight", (c, c // 2, 1, 1, 1)
        yield from ((key, (c,)) for key in torch_norm(f"{name}.conv_out.bn"))

    def block(s, i, x):
        name = f"backbone.layer{s + 1}.{i}.conv{x + 1}"
        return f"{name}.conv.weight", f"{name}.bn"

    def shortcut(s):
        name = f"backbone.layer{s + 1}.0.downsample"
        return f"{name}.conv.weight", f"{name}.bn"

    stem = ("backbone.conv1.conv.weight", "backbone.conv1.bn")
    return dict(keys_of(stem, torch_norm, block, shortcut, "cls_head.fc_cls.{}", nonlocal_block))


def pytorchvideo():
    places = (1, 3, 4, 5)  # block 2 is a pooling

    def block(s, i, x):
        name = f"blocks.{places[s]}.res_blocks.{i}.branch2"
        return f"{name}.conv_{'abc'[x]}.weight", f"{name}.norm_{'abc'[x]}"

    def shortcut(s):
        name = f"blocks.{places[s]}.res_blocks.0.branch1"
        return f"{name}_conv.weight", f"{name}_norm"

    return dict(
        keys_of(
            ("blocks.0.conv.weight", "blocks.0.norm"),
            torch_norm,
            block,
            shortcut,
            "blocks.6.proj.{}",
        )
    )


def torchvision():
    def block(s, i, x):
        return f"layer{s + 1}.{i}.conv{x + 1}.weight", f"layer{s + 1}.{i}.bn{x + 1}"

    def shortcut(s):
        return f"layer{s + 1}.0.downsample.0.weight", f"layer{s + 1}.0.downsample.1"

    return dict(keys_of(("conv1.weight", "bn1"), torch_norm, block, shortcut, "fc.{}", flat=True))


NETWORKS = {
    "caffe2": (CAFFE2, caffe2, "caffe2", 5, 327),
    "slowfast": (SLOWFAST, slowfast, "slowfast", 5, 385),
    "mmaction2": (MMACTION2, mmaction2, "mmcv", 5, 380),
    "pytorchvideo": (PYTORCHVIDEO, pytorchvideo, "slowfast", 0, 320),
    "torchvision": (TORCHVISION, torchvision, "slowfast", 0, 320),
}


@pytest.mark.parametrize(
    ("table", "keys", "preset", "blocks", "count"), NETWORKS.values(), ids=NETWORKS.keys()
)
def test_a_whole_network(table, keys, preset, blocks, count):
    """The keys of a source's R50 become exactly the leaves of the network, with their shapes."""
    keys = keys()
    assert len(keys) == count  # counted in the source's own network
    leaves = samples.shapes(nl.models.video_resnet(50, "i3d_3x1x1", blocks, preset=preset))
    found = {}
    for key, shape in keys.items():
        if table.holds_no_weights(key):
            continue
        native_name, row = table.native_name(key)
        assert table.source_name(native_name) == (key, row)
        array = np.broadcast_to(np.float32(0), shape)
        found[variable_path(native_name)] = row.transform.import_array(array).shape
    expected = {path: leaf.shape for path, leaf in leaves.items()}
    if table is TORCHVISION:  # its kernels have no time axis
        expected = {
            path: (1, *shape[1:]) if len(shape) == 5 else shape for path, shape in expected.items()
        }
    assert found == expected


@pytest.mark.parametrize(("network", "candidate"), list(itertools.permutations(NETWORKS, 2)))
def test_no_network_is_taken_for_that_of_another_source(network, candidate):
    keys = NETWORKS[network][1]()
    table = NETWORKS[candidate][0]
    count = sum(table.native_name(key) is not None for key in keys)
    assert count < len(keys) / 4
