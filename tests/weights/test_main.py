"""The command line: what it prints, what it writes, and its exit codes."""

import pickle
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights import export, files, load, read, save
from nonlocal_jax.weights.__main__ import Names, main
from nonlocal_jax.weights.entries import NATIVE
from nonlocal_jax.weights.sources import SOURCES

DIGITS = nl.models.non_local_pytorch_mnist("concatenation")


@pytest.fixture
def digits(tmp_path):
    save(tmp_path / "digits", samples.weights(DIGITS), names="non_local_pytorch")
    return tmp_path / "digits"


@pytest.fixture
def image(tmp_path):
    """A pickle of Caffe2, of an image network with its state of training."""
    arrays = export(samples.weights(samples.network("c2d")), "caffe2")
    blobs = {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    (tmp_path / "image.pkl").write_bytes(
        pickle.dumps({"blobs": {**blobs, "lr": 0.1, "conv1_w_momentum": blobs["conv1_w"]}}, 2)
    )
    return tmp_path / "image.pkl"


@pytest.fixture
def run(capsys):
    """The exit code, what was printed and what the errors say."""

    def run_main(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_main


def line_of(out, *parts):
    """The only line with all of these words, as words."""
    [line] = [line for line in out.splitlines() if all(part in line.split() for part in parts)]
    return line.split()


def assert_one_line(err, *parts):
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


# inspect


def test_inspect(run, image):
    code, out, err = run("inspect", image)
    assert (code, err) == (0, "")
    assert f"{image}: caffe2, 117 arrays, " in out
    assert "names: caffe2\n" in out
    assert (
        "network: nl.models.video_resnet((1, 2, 2, 1), 'c2d', nonlocal_blocks=0, clip='8x8', preset='caffe2', num_classes=7, "
        "groups=1, width_per_group=4)\n"
    ) in out
    assert "the file does not tell the clip: layouts have the same weights; 8x8 is taken" in out
    assert "the file does not tell the kind: an image network" in out
    assert line_of(out, "conv1_w") == ["conv1_w", "64×3×7×7", "float32", "params/conv1/kernel"]
    assert line_of(out, "lr")[:2] == ["lr", "training"]
    assert line_of(out, "conv1_w_momentum")[1:] == ["training", "state"]


def test_inspect_takes_choices(run, image):
    out = run("inspect", image, "--kind", "i3d_3x3x3", "--clip", "32x2", "--preset", "slowfast")[1]
    assert "'i3d_3x3x3', nonlocal_blocks=0, clip='32x2', preset='slowfast'" in out
    assert "does not tell" not in out


def test_inspect_shows_the_entries_of_files_of_nobody(run, tmp_path):
    samples.write(
        tmp_path / "other",
        {"encoder.w": np.ones((2, 3), np.float32), "decoder.w": np.ones(3, np.float16)},
    )
    code, out, err = run("inspect", tmp_path / "other")
    assert code == 2
    assert line_of(out, "encoder.w") == ["encoder.w", "2×3", "float32", "unknown"]
    assert_one_line(err, "has the names of none of caffe2")


def test_inspect_shows_the_entries_of_odd_files(run, tmp_path):
    arrays = export(samples.weights(samples.network()), "caffe2")
    samples.write(
        tmp_path / "odd", {name.replace("res4_1", "res4_2"): a for name, a in arrays.items()}
    )
    code, out, err = run("inspect", tmp_path / "odd")
    assert code == 2
    assert line_of(out, "res4_2_branch2a_w")[-1] == "params/res4_2/conv_a/kernel"
    assert "network:" not in out
    assert_one_line(err, "res4 has a residual block 2 but no 1")


# convert


def test_names_are_all_there_are():
    assert get_args(Names) == (NATIVE, *(source.name for source in SOURCES))


@pytest.mark.parametrize(
    "names", [NATIVE, "non_local_pytorch", "non_local_pytorch (first version)"]
)
def test_convert(names, run, digits, tmp_path):
    out_file = tmp_path / "converted.safetensors"
    code, out, err = run("convert", digits, out_file, "--names", names)
    assert (code, err) == (0, "")
    assert "network: nl.models.non_local_pytorch_mnist('concatenation')" in out
    assert (
        f"48 weights loaded by the names of non_local_pytorch, 402,266 numbers; written to {out_file} by the names of {names}"
        in out
    )
    assert read(out_file).arrays.keys() == export(samples.weights(DIGITS), names).keys()
    samples.assert_equal(load(out_file, DIGITS), samples.weights(DIGITS))


def test_convert_inflates(run, image, tmp_path):
    assert (
        run("convert", image, tmp_path / "out", "--kind", "i3d_3x1x1", "--names", "slowfast")[0]
        == 0
    )
    kernel = read(tmp_path / "out").arrays["s1.pathway0_stem.conv.weight"]
    assert kernel.shape == (64, 3, 5, 7, 7)
    np.testing.assert_allclose(kernel.sum(2), read(image).arrays["conv1_w"], rtol=1e-5, atol=1e-6)


def test_convert_folds(run, image, tmp_path):
    assert run("convert", image, tmp_path / "out", "--fold")[0] == 0
    folded = load(tmp_path / "out", samples.network("c2d", frozen_bn=True))
    expected = nl.layers.freeze_batch_norm(samples.weights(samples.network("c2d")))
    np.testing.assert_allclose(
        folded["params"]["conv1_norm"]["bias"], expected["params"]["conv1_norm"]["bias"], rtol=1e-5
    )
    assert "batch_stats" not in folded


def test_convert_makes_nothing_up(run, tmp_path):
    """Without a classifier there, there is none here."""
    samples.write(
        tmp_path / "trunk",
        export(samples.without(samples.weights(samples.network()), "/head/"), "slowfast"),
    )
    assert run("convert", tmp_path / "trunk", tmp_path / "out")[0] == 0
    converted = read(tmp_path / "out").arrays
    assert len(converted) == len(read(tmp_path / "trunk").arrays)
    assert not any("head" in name for name in converted)


def test_convert_replaces_nothing_unasked(run, digits, tmp_path):
    out_file = tmp_path / "out"
    out_file.write_bytes(b"precious")
    code, _, err = run("convert", digits, out_file)
    assert code == 2
    assert_one_line(err, f"{out_file} is there already; --overwrite replaces a file.")
    assert out_file.read_bytes() == b"precious"
    assert run("convert", digits, out_file, "--overwrite")[0] == 0
    samples.assert_equal(load(out_file, DIGITS), samples.weights(DIGITS))


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_convert_replaces_no_folder(flags, run, digits, tmp_path):
    (tmp_path / "folder").mkdir()
    code, _, err = run("convert", digits, tmp_path / "folder", *flags)
    assert code == 2
    assert_one_line(err, "folder is there already")


def test_convert_to_where_there_is_no_folder(run, digits, tmp_path):
    code, _, err = run("convert", digits, tmp_path / "none" / "out")
    assert code == 2
    assert_one_line(err, f"{tmp_path / 'none'} is no folder")


def test_convert_to_names_that_there_are_not(run, digits, tmp_path):
    code, _, err = run("convert", digits, tmp_path / "out", "--names", "torchvision")
    assert code == 2
    assert_one_line(err, "torchvision has no name for")
    assert not (tmp_path / "out").exists()


def test_convert_of_another_kind(run, tmp_path):
    """Nothing makes a C2D of an I3D."""
    save(tmp_path / "i3d", samples.weights(samples.network()))
    code, _, err = run("convert", tmp_path / "i3d", tmp_path / "out", "--kind", "c2d")
    assert code == 2
    assert "params/conv1/kernel has 1×7×7×3×64" in err
    assert not (tmp_path / "out").exists()


# verify


def test_verify(run, digits):
    code, out, err = run("verify", digits)
    assert (code, err) == (0, "")
    assert line_of(out, "fc2", "256×10")[:4] == ["fc2", "2", "256×10", "0"]
    assert "largest difference, weights: 0" in out
    assert out.endswith("verified, tolerance 0.0001\n")


def test_verify_of_numbers_that_are_not_finite(run, digits, tmp_path):
    arrays = dict(read(digits).arrays)
    arrays["fc.3.bias"] = np.full(10, np.nan, np.float32)
    code, out, err = run("verify", samples.write(tmp_path / "broken", arrays))
    assert (code, err) == (1, "")
    assert "wrong: params/fc2/bias has 10 values that are not finite" in out
    assert "NOT VERIFIED" in out


def test_verify_with_a_tolerance(run, digits):
    assert run("verify", digits, "--tolerance", "1e-10")[0] == 1


def test_verify_of_an_entry_without_a_place(run, digits, tmp_path):
    arrays = {**read(digits).arrays, "nl_3.theta.weight": np.ones((2, 2), np.float32)}
    code, out, err = run("verify", samples.write(tmp_path / "more", arrays))
    assert code == 1
    assert "nl_3.theta.weight 2×2 is no weight of these networks" in err
    assert "verified" not in out


# All.


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
def test_a_file_is_read_once(command, run, digits, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(files, "read", lambda path: calls.append(path) or read(path))
    more = [tmp_path / "out"] if command == "convert" else []
    assert run(command, digits, *more)[0] == 0
    assert calls == [digits]


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"<html>", "a web page"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "it asks for 'os.system'"),
    ],
    ids=["nothing", "empty", "page", "hostile"],
)
def test_bad_files(command, content, message, run, tmp_path):
    path = tmp_path / "weights.pkl"
    if content is not None:
        path.write_bytes(content)
    more = [tmp_path / "out"] if command == "convert" else []
    code, out, err = run(command, path, *more)
    assert (code, out) == (2, "")
    assert_one_line(err, str(path), message)


def test_choices_that_do_not_fit(run, digits):
    code, _, err = run("inspect", digits, "--kind", "c2d")
    assert code == 2
    assert_one_line(err, "has no kind to choose")


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["inspect", "x", "--knd", "c2d"], ["convert", "x"], ["open", "x"]],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_as_a_program(digits):
    """Help in a few lines; the exit code is the process's."""
    program = [sys.executable, "-m", "nonlocal_jax.weights"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert all(
        f"python -m nonlocal_jax.weights {command}" in shown.stdout
        for command in ("inspect", "convert", "verify")
    )
    failed = subprocess.run(
        [*program, "inspect", digits.parent / "nothing"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
