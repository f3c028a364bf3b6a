"""What does not fit is an error that names it; the report accounts for everything; saving is whole or not at all."""

import re

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import export, load, load_report, save, sources

PLAIN = samples.network()
WITH_BLOCKS = samples.network(blocks=samples.BLOCKS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": (1, 2, 3, 1)}, "params/res4_2/conv_a/kernel 3×1×1×1024×16 is not in the file"),
        ({"depth": (1, 2, 1, 1)}, "s4.pathway0_res1.branch2.a.weight 16×1024×1×1×1 would be params/res4_1/conv_a/kernel, which"),
        ({"kind": "c2d"}, "5×7×7×3×64; params/conv1/kernel has 1×7×7×3×64"),
        ({"kind": "i3d_3x3x3"}, "3×1×1×64×4; params/res2_0/conv_a/kernel has 1×1×1×64×4"),
        ({"width_per_group": 8}, "3×1×1×64×4; params/res2_0/conv_a/kernel has 3×1×1×64×8"),
        ({"groups": 2, "width_per_group": 2}, "1×3×3×4×4; params/res2_0/conv_b/kernel has 1×3×3×2×4"),
        ({"blocks": None}, "s3.pathway0_nonlocal1.bn.bias 512 would be params/nonlocal_res3_1/out_norm/bias, which the network does not have"),
        ({"blocks": {"res3": (0,), "res4": (0,)}}, "params/nonlocal_res3_0/operation/g/bias 256 is not in the file; to leave the non-local blocks as initialised"),
        ({"preset": "paper"}, "would be params/nonlocal_res3_1/operation/g/bias, which the network does not have"),
    ],
    ids=["deeper", "shallower", "c2d", "3x3x3", "wider", "groups", "no-blocks", "other-blocks", "biases"],
)  # fmt: skip
def test_another_network(other, message, path):
    save(path, samples.weights(WITH_BLOCKS), names="slowfast")
    shown = samples.error_of(path, samples.network(**{"blocks": samples.BLOCKS} | other))
    assert message in shown
    assert "named as in slowfast" in shown
    assert len(shown.splitlines()) <= 11


def test_names_of_nobody(path):
    samples.write(path, {"encoder.w": np.ones(3, np.float32), "decoder.w": np.ones(2, np.float32)})
    with pytest.raises(
        ValueError, match=r"names of none of caffe2, slowfast.*its first are decoder\.w, encoder\.w"
    ):
        load(path, PLAIN)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "s1.fuse.conv.weight",
            np.ones((2, 3)),
            "s1.fuse.conv.weight 2×3 is no weight of these networks",
        ),
        (
            "module.head.projection.bias",
            np.ones(7),
            "head.projection.bias 7 is a second params/head/bias",
        ),
        (
            "head.projection.bias",
            np.ones(7, np.int8),
            "head.projection.bias is of int8; weights are floating point",
        ),
        (
            "head.projection.bias",
            np.ones((7, 2)),
            "head.projection.bias 7×2 becomes 7×2; params/head/bias has 7",
        ),
        (
            "head.projection.bias",
            np.float32(1),
            "head.projection.bias  becomes ; params/head/bias has 7",
        ),
    ],
    ids=["unknown", "second", "integers", "two axes", "a number"],
)
def test_an_entry_that_does_not_fit(key, value, message, path):
    arrays = export(samples.weights(PLAIN), "slowfast")
    samples.write(path, arrays | {key: np.asarray(value)})
    assert message in samples.error_of(path, PLAIN)


def test_statistics_without_a_scale(path):
    arrays = export(samples.weights(PLAIN), "caffe2")
    del arrays["res_conv1_bn_s"]
    samples.write(path, arrays)
    assert "params/conv1_norm/scale 64 is not in the file" in samples.error_of(
        path, samples.network(frozen_bn=True)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"conv1_w = 3\n" * 50, "looks like text"),
        (b"<!DOCTYPE html><html>", "a web page"),
    ],
    ids=["empty", "text", "page"],
)
def test_no_weights(content, message, path):
    path.write_bytes(content)
    with pytest.raises(nl.weights.FileFormatError, match=message):
        load(path, PLAIN)


def test_truncated(path):
    save(path, samples.weights(PLAIN))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(nl.weights.FileFormatError, match=r"weights\.bin: "):
        load(path, PLAIN)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing", PLAIN)


# The report.


@pytest.mark.parametrize("frozen", [False, True])
def test_report_has_every_entry_and_every_leaf_once(frozen, path):
    arrays = export(samples.without(samples.weights(PLAIN), "/head/"), "slowfast")
    arrays["s1.pathway0_stem.bn.num_batches_tracked"] = np.array(3)
    samples.write(path, arrays)
    model = samples.network(frozen_bn=frozen)
    leaves = samples.shapes(model)
    report = load_report(path, model, initialise=("classifier",))
    sources = [w.source for w in report.weights if w.source]
    assert sorted(sources) == sorted([*arrays])
    assert sorted(w.target for w in report.weights if w.target) == sorted(leaves)
    for w in report.weights:
        assert not w.source or w.source_shape == arrays[w.source].shape
        assert not w.target or w.shape == leaves[w.target].shape
    reasons = {w.source or w.target: w.transform for w in report.weights}
    assert reasons["s1.pathway0_stem.bn.num_batches_tracked"] == "not a weight"
    assert reasons["params/head/bias"] == "left at its initialisation"
    assert reasons["s1.pathway0_stem.bn.running_mean"] == (
        "folded into params/conv1_norm" if frozen else "(C,) → (C,)"
    )
    lines = str(report).splitlines()
    assert len(lines) == len(report.weights) + 1
    assert lines[-1].endswith("2 left at their initialisation")
    assert re.fullmatch(
        r"s1\.pathway0_stem\.conv\.weight +64×3×5×7×7 +params/conv1/kernel +5×7×7×3×64 +\(O, I, T, H, W\) → \(T, H, W, I, O\)",
        next(line for line in lines if "stem.conv" in line),
    )


# Saving.


def test_a_save_that_fails_leaves_the_old_file(path, monkeypatch):
    save(path, {"params": {"a": np.ones(1, np.float32)}})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"params": {"a": np.zeros(1, np.float32)}})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_leaf_without_a_name(path):
    with pytest.raises(ValueError, match=r"torchvision has no name for params/nonlocal_res3_1/"):
        save(
            path, samples.without(samples.weights(WITH_BLOCKS), "batch_stats"), names="torchvision"
        )
    assert not path.exists()


def test_source_without_a_name():
    with pytest.raises(
        ValueError, match=r"names must be one of 'nonlocal_jax', 'caffe2', .*; got 'timm'"
    ):
        export({}, "timm")


def test_two_leaves_of_one_name(monkeypatch):
    """What a slip in a table would do."""
    monkeypatch.setitem(
        sources.CAFFE2.words, "embedding", {"theta": "theta", "phi": "theta", "g": "g"}
    )
    with pytest.raises(
        ValueError, match=r"params/nonlocal_res3_1/.* would be a second nonlocal_conv3_1_theta_"
    ):
        export(samples.weights(WITH_BLOCKS), "caffe2")
