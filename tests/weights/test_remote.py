"""Weights at remote paths: read with the same checks as local ones, and saved atomically."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from weights import forge, samples

import nonlocal_jax as nl
from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read
from nonlocal_jax.weights.__main__ import main

ARRAYS = forge.example()
GOOD = {
    "caffe2": pickle.dumps({"blobs": ARRAYS}),
    "torch": forge.zip_of(ARRAYS),
    "torch legacy": forge.legacy_of(ARRAYS),
    "safetensors": safetensors.numpy.save(ARRAYS),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_format(case, remote):
    file = remote / "weights.bin"
    file.write_bytes(GOOD[case])
    checkpoint = read(str(file))
    assert (checkpoint.path, checkpoint.format) == (file, case.split()[0])
    samples.assert_arrays(checkpoint.arrays, ARRAYS)
    file.write_bytes(GOOD[case][:-40])
    with pytest.raises(FileFormatError, match=rf"{file}: "):
        read(file)


@pytest.mark.parametrize("case", GOOD)
def test_sizes_are_checked_before_a_file_is_fetched(case, remote, monkeypatch):
    file = remote / "weights.bin"
    file.write_bytes(GOOD[case])
    monkeypatch.setattr(type(file), "download", None)  # a call would raise a TypeError
    size = len(GOOD[case])
    with pytest.raises(UnsafeFileError, match=rf"{file}: the remote file would take {size} bytes"):
        read(file, max_bytes=size - 1)


def test_nothing_in_a_file_is_executed(remote):
    file = remote / "weights.pkl"
    file.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsafeFileError, match=rf"{file}: .*os"):
        read(file)


def test_other_files_are_not_fetched(remote, monkeypatch):
    (remote / "page.html").write_text("<!DOCTYPE html>" + "x" * 10_000)
    monkeypatch.setattr(type(remote), "download", None)  # a call would raise a TypeError
    with pytest.raises(FileFormatError, match=rf"{remote}/page.html: it looks like a web page"):
        read(remote / "page.html")


def test_wrong_paths(remote):
    with pytest.raises(FileNotFoundError, match=rf"No such file or directory: '{remote}/no.bin'"):
        read(f"{remote}/no.bin")
    with pytest.raises(OSError, match="no connection"):
        read("unreachable://bucket/a.bin")
    with pytest.raises(ValueError, match="got nosuch://"):
        read("nosuch://bucket/a.bin")
    (remote / "orbax/_METADATA").write_text("{}")
    with pytest.raises(FileFormatError, match=r"Orbax reads local folders and gs:// only; got mem"):
        read(remote / "orbax")


def test_weights_are_saved_and_loaded(remote):
    model = nl.models.non_local_pytorch_mnist()
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    variables = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5, leaf.dtype), shapes)
    file = remote / "runs/digits.safetensors"
    nl.weights.save(str(file), variables)
    loaded = nl.weights.load(str(file), model)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
    assert nl.weights.load_report(file, model).summary


def test_commands(remote, capsys):
    model = nl.models.non_local_pytorch_mnist()
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape, leaf.dtype),
        jax.eval_shape(model.init, jax.random.key(0), model.example),
    )
    source, target = str(remote / "in.safetensors"), str(remote / "new/out.safetensors")
    nl.weights.save(source, variables)
    assert main(["inspect", source]) == 0
    assert capsys.readouterr().out.startswith(f"{source}: safetensors")
    names = ["--names", "non_local_pytorch"]
    assert main(["convert", source, target, *names]) == 0
    assert "conv_1.0.weight" in read(target).arrays
    assert main(["convert", source, target, *names]) == 2
    assert f"{target} exists already" in capsys.readouterr().err
    assert main(["inspect", f"{remote}/no"]) == 2
    assert capsys.readouterr().err == f"error: {remote}/no: No such file or directory\n"
