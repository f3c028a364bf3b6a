"""Files that do not fit a network, the load report, and saving."""

import re

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import export, load, load_report, save, sources

PLAIN = samples.network()
NONLOCAL = samples.network(blocks=samples.BLOCKS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.bin"


@pytest.fixture(scope="module")
def file_with_blocks(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "slowfast.bin"
    save(path, samples.weights(NONLOCAL), names="slowfast")
    return path


WRONG_NETWORKS = {
    "deeper": (
        {"depth": (1, 2, 3, 1)},
        "params/res4_2/conv_a/kernel 3×1×1×1024×16 is not in the file",
    ),
    "shallower": (
        {"depth": (1, 2, 1, 1)},
        "s4.pathway0_res1.branch2.a.weight 16×1024×1×1×1 belongs at params/res4_1/conv_a/kernel,",
    ),
    "c2d": ({"kind": "c2d"}, "5×7×7×3×64; params/conv1/kernel has 1×7×7×3×64"),
    "3x3x3": (
        {"kind": "i3d_3x3x3"},
        "3×1×1×64×4; params/res2_0/conv_a/kernel has 1×1×1×64×4",
    ),
    "wider": (
        {"width_per_group": 8},
        "3×1×1×64×4; params/res2_0/conv_a/kernel has 3×1×1×64×8",
    ),
    "groups": (
        {"groups": 2, "width_per_group": 2},
        "1×3×3×4×4; params/res2_0/conv_b/kernel has 1×3×3×2×4",
    ),
    "no-blocks": (
        {"blocks": None},
        "s3.pathway0_nonlocal1.bn.bias 512 belongs at params/nonlocal_res3_1/out_norm/bias, "
        "which the network does not have",
    ),
    "other-blocks": (
        {"blocks": {"res3": (0,), "res4": (0,)}},
        "params/nonlocal_res3_0/operation/g/bias 256 is not in the file; "
        "to keep the initial values of the non-local blocks, pass initialise=('nonlocal',)",
    ),
    "biases": (
        {"preset": "paper"},
        "belongs at params/nonlocal_res3_1/operation/g/bias, which the network does not have",
    ),
}


@pytest.mark.parametrize("case", WRONG_NETWORKS)
def test_another_network(case, file_with_blocks):
    options, message = WRONG_NETWORKS[case]
    model = samples.network(**{"blocks": samples.BLOCKS} | options)
    error = samples.error_of(file_with_blocks, model)
    assert message in error
    assert "named as in slowfast" in error
    assert len(error.splitlines()) <= 11


def test_unknown_names(path):
    samples.write(path, {"encoder.w": np.ones(3, np.float32), "decoder.w": np.ones(2, np.float32)})
    message = r"names of caffe2, slowfast.*; its first names are decoder\.w, encoder\.w"
    with pytest.raises(ValueError, match=message):
        load(path, PLAIN)


BIAS = "head.projection.bias"
ODD_ENTRIES = {
    "unknown": (
        "s1.fuse.conv.weight",
        np.ones((2, 3)),
        "s1.fuse.conv.weight 2×3 is not a weight of any network here",
    ),
    "second": (f"module.{BIAS}", np.ones(7), f"{BIAS} 7 is a second params/head/bias"),
    "integers": (BIAS, np.ones(7, np.int8), f"{BIAS} is of int8; convert it to a floating-point"),
    "two axes": (BIAS, np.ones((7, 2)), f"{BIAS} 7×2 becomes 7×2; params/head/bias has 7"),
    "a number": (BIAS, np.float32(1), f"{BIAS}  becomes ; params/head/bias has 7"),
}


@pytest.mark.parametrize("case", ODD_ENTRIES)
def test_an_entry_that_does_not_fit(case, path):
    key, value, message = ODD_ENTRIES[case]
    arrays = export(samples.weights(PLAIN), "slowfast")
    samples.write(path, arrays | {key: np.asarray(value)})
    assert message in samples.error_of(path, PLAIN)


def test_statistics_without_a_scale(path):
    arrays = export(samples.weights(PLAIN), "caffe2")
    del arrays["res_conv1_bn_s"]
    samples.write(path, arrays)
    error = samples.error_of(path, samples.network(frozen_bn=True))
    assert "params/conv1_norm/scale 64 is not in the file" in error


WEIGHTLESS = {
    "empty": (b"", "is empty"),
    "text": (b"conv1_w = 3\n" * 50, "looks like text"),
    "page": (b"<!DOCTYPE html><html>", "a web page"),
}


@pytest.mark.parametrize("case", WEIGHTLESS)
def test_no_weights(case, path):
    content, message = WEIGHTLESS[case]
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
    reported_sources = [weight.source for weight in report.weights if weight.source]
    reported_targets = [weight.target for weight in report.weights if weight.target]
    assert sorted(reported_sources) == sorted(arrays)
    assert sorted(reported_targets) == sorted(leaves)
    for weight in report.weights:
        assert not weight.source or weight.source_shape == arrays[weight.source].shape
        assert not weight.target or weight.shape == leaves[weight.target].shape
    transforms = {weight.source or weight.target: weight.transform for weight in report.weights}
    assert transforms["s1.pathway0_stem.bn.num_batches_tracked"] == "not a weight"
    assert transforms["params/head/bias"] == "keeps its initial value"
    folded = "folded into params/conv1_norm" if frozen else "(C,) → (C,)"
    assert transforms["s1.pathway0_stem.bn.running_mean"] == folded
    lines = str(report).splitlines()
    assert len(lines) == len(report.weights) + 1
    assert lines[-1].endswith("2 keep their initial value")
    [stem_line] = [line for line in lines if "stem.conv" in line]
    names = r"s1\.pathway0_stem\.conv\.weight +64×3×5×7×7 +params/conv1/kernel +5×7×7×3×64"
    assert re.fullmatch(names + r" +\(O, I, T, H, W\) → \(T, H, W, I, O\)", stem_line)


# Saving.


def test_a_save_that_fails_keeps_the_old_file(path, monkeypatch):
    save(path, {"params": {"a": np.ones(1, np.float32)}})
    contents = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"params": {"a": np.zeros(1, np.float32)}})
    assert path.read_bytes() == contents
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_leaf_without_a_name(path):
    variables = samples.without(samples.weights(NONLOCAL), "batch_stats")
    with pytest.raises(ValueError, match=r"torchvision has no name for params/nonlocal_res3_1/"):
        save(path, variables, names="torchvision")
    assert not path.exists()


def test_unknown_source():
    message = r"names must be one of 'nonlocal_jax', 'caffe2', .*; got 'timm'"
    with pytest.raises(ValueError, match=message):
        export({}, "timm")


def test_two_leaves_of_one_name(monkeypatch):
    """A mistake in a table, which would lose a weight."""
    words = {"theta": "theta", "phi": "theta", "g": "g"}
    monkeypatch.setitem(sources.CAFFE2.words, "embedding", words)
    message = r"the name nonlocal_conv3_1_theta_\w for params/nonlocal_res3_1/.* and for another"
    with pytest.raises(ValueError, match=message):
        export(samples.weights(NONLOCAL), "caffe2")
