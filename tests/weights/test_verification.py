"""Verification notices what is wrong: in the weights, in the tables of names, in how a layer is computed."""

import dataclasses
import importlib
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.layers.convolution import layer as convolution_layer
from nonlocal_jax.weights import export, save, sources
from nonlocal_jax.weights.loading import load_checkpoint
from nonlocal_jax.weights.names import CONV, VECTOR
from nonlocal_jax.weights.verification import verify

SHAPE = (1, 8, 32, 24, 3)  # T, H and W differ
DIGITS = nl.models.non_local_pytorch_mnist("dot_product")


@pytest.fixture
def digits(tmp_path):
    save(tmp_path / "digits", samples.weights(DIGITS), names="non_local_pytorch")
    return tmp_path / "digits"


@pytest.fixture
def video(tmp_path):
    """A file of a network with blocks, by the names of Caffe2."""
    model = samples.network(blocks=samples.BLOCKS, preset="caffe2")
    save(tmp_path / "video", samples.weights(model), names="caffe2")
    return tmp_path / "video", model


def by_place(verification):
    return {layer.place: layer for layer in verification.layers}


def test_a_video_network(video):
    path, model = video
    verification = verify(path, model, shape=SHAPE)
    assert verification.ok
    assert list(verification.stages) == ["pool1", "res2", "pool2", "res3", "res4", "res5", "logits"]
    layers = by_place(verification)
    assert {"/".join(leaf.split("/")[1:-1]) for leaf in samples.shapes(model)} <= layers.keys()
    assert all(layer.weights == 0 for layer in layers.values() if layer.shapes)
    assert layers["conv1"].shapes == ((5, 7, 7, 3, 64),)
    assert (
        0 < layers["res3_0/conv_b"].output < 1e-5
    )  # they are computed in different ways, so not to the last bit alike
    assert 0 < layers["nonlocal_res3_1/operation"].output < 1e-5
    assert 0 < layers["conv1_norm"].output < 1e-5
    assert verification.largest["weights"][0] == 0
    assert 0 < max(verification.stages.values()) < 1e-5
    order = list(layers)
    assert (
        order.index("res3_1/norm_c")
        < order.index("nonlocal_res3_1/operation")
        < order.index("res4_0/conv_a")
    )
    text = str(verification)
    assert re.search(r"res3_0/conv_b +1 +1×3×3×8×8 +0 +\d\.\de-0\d", text)
    assert text.endswith("verified, tolerance 0.0001")


def test_inflated_and_folded(tmp_path):
    """Kernels are summed over their frames, norms computed anew."""
    flat = samples.network("c2d", preset="caffe2")
    arrays = export(samples.weights(flat), "caffe2")
    samples.write(
        tmp_path / "image", {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    )
    verification = verify(
        tmp_path / "image",
        samples.network("i3d_3x1x1", preset="caffe2", frozen_bn=True),
        shape=SHAPE,
    )
    assert verification.ok
    layers = by_place(verification)
    assert 0 < layers["conv1"].weights < 1e-6
    assert 0 < layers["conv1_norm"].weights < 1e-6
    assert layers["res3_1/conv_a"].weights == 0  # this one has one frame


def test_digits(digits):
    verification = verify(digits, DIGITS)
    assert verification.ok
    assert list(verification.stages) == ["logits"]
    assert by_place(verification)["nonlocal1/operation"].output > 0


@pytest.mark.parametrize("instantiation", ["gaussian", "embedded_gaussian", "concatenation"])
def test_instantiations(instantiation, tmp_path):
    model = nl.models.non_local_pytorch_mnist(instantiation)
    save(tmp_path / "digits", samples.weights(model))
    verification = verify(tmp_path / "digits", model)
    assert verification.ok
    assert (
        0 < by_place(verification)["nonlocal2/operation"].output < 1e-5
    )  # something other than the dense one was run


# What is wrong.


def test_a_broken_convolution(video, monkeypatch):
    """A kernel along time turned round."""
    path, model = video
    video_conv = convolution_layer.video_conv

    def broken(x, kernel, *options):
        return video_conv(x, kernel[::-1] if kernel.shape[1:3] == (1, 1) else kernel, *options)

    monkeypatch.setattr(convolution_layer, "video_conv", broken)
    verification = verify(path, model, shape=SHAPE)
    assert not verification.ok
    wrong = {place for place, layer in by_place(verification).items() if (layer.output or 0) > 1e-4}
    assert wrong == {"res2_0/conv_a", "res3_0/conv_a", "res4_0/conv_a"}
    assert verification.largest["layers"][1] in wrong
    assert verification.stages["pool1"] < 1e-5 < 1e-4 < verification.stages["res2"]
    assert str(verification).endswith("NOT VERIFIED, tolerance 0.0001")


def test_a_broken_non_local_operation(digits, monkeypatch):
    """Of the implementations that "auto" does not take on a clip as small as this, too."""
    reassociated = nl.ops.reassociated
    monkeypatch.setattr(nl.ops, "reassociated", lambda *args: 1.01 * reassociated(*args))
    verification = verify(digits, DIGITS)
    assert by_place(verification)["nonlocal1/operation"].output == pytest.approx(0.01, rel=0.1)
    assert not verification.ok


def module(name):
    """The module of that name, in whose package a function has the same name."""
    return importlib.import_module(f"nonlocal_jax.weights.{name}")


def with_source(monkeypatch, source):
    for name in ("entries", "save"):
        monkeypatch.setattr(module(name), "SOURCES", (source,))


def with_row(monkeypatch, source, theirs, **changes):
    """A slip in one row of a table."""
    rows = tuple(
        dataclasses.replace(row, **changes) if row.theirs == theirs else row for row in source.rows
    )
    assert rows != source.rows
    with_source(monkeypatch, dataclasses.replace(source, rows=rows))


def test_a_transform_that_turns_kernels_over(video, monkeypatch):
    path, model = video
    turned = dataclasses.replace(CONV, to_ours=lambda a: CONV.to_ours(a)[:, ::-1])
    with_row(monkeypatch, sources.CAFFE2, "res{stage}_{i}_branch2{x}_w", transform=turned)
    verification = verify(path, model, shape=SHAPE)
    wrong = {place for place, layer in by_place(verification).items() if layer.weights}
    assert wrong == {
        f"{stage}/conv_b" for stage in ("res2_0", "res3_0", "res3_1", "res4_0", "res4_1", "res5_0")
    }
    assert not verification.ok


def test_a_name_that_is_another_on_the_way_back(digits, monkeypatch):
    """The statistics are read under one name and written under another."""

    class Slipped(dict):
        def get(self, word, default):
            return {"mean": "running_var"}.get(word) or super().get(word, default)

    words = {
        **sources.NON_LOCAL_PYTORCH.words,
        "stat": Slipped(sources.NON_LOCAL_PYTORCH.words["stat"]),
    }
    with_source(monkeypatch, dataclasses.replace(sources.NON_LOCAL_PYTORCH, words=words))
    verification = verify(digits, DIGITS)
    assert by_place(verification)["conv1_norm"].weights == math.inf
    assert by_place(verification)["conv1"].weights == 0


def test_an_array_that_is_scaled(digits, monkeypatch):
    doubled = dataclasses.replace(VECTOR, to_ours=lambda a: 2 * VECTOR.to_ours(a))
    with_row(monkeypatch, sources.NON_LOCAL_PYTORCH, "fc.3.bias", transform=doubled)
    verification = verify(digits, DIGITS)
    assert by_place(verification)["fc2"].weights == 1
    assert verification.largest["weights"] == (1, "fc2")
    assert not verification.ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(value, digits, tmp_path):
    arrays = {name: np.array(a) for name, a in nl.weights.read(digits).arrays.items()}
    arrays["conv_2.0.bias"][3:5] = value
    verification = verify(samples.write(tmp_path / "broken", arrays), DIGITS)
    assert verification.problems == ("params/conv2/bias has 2 values that are not finite",)
    assert by_place(verification)["conv2"].weights == 0  # it is what the file says
    assert not verification.ok
    assert "wrong: params/conv2/bias has 2 values that are not finite" in str(verification)


def test_an_account_with_a_gap(digits, monkeypatch):
    def forgetful(*args, **options):
        variables, report = load_checkpoint(*args, **options)
        return variables, dataclasses.replace(report, weights=report.weights[1:])

    monkeypatch.setattr(module("verification"), "load_checkpoint", forgetful)
    verification = verify(digits, DIGITS)
    assert any("is not accounted for exactly once" in problem for problem in verification.problems)
    assert not verification.ok


def test_tolerance(digits):
    assert not verify(digits, DIGITS, tolerance=1e-9).ok


def test_what_does_not_fit_is_the_errors_of_load(digits):
    with pytest.raises(ValueError, match=r"does not fit this NonLocalMnist"):
        verify(digits, nl.models.non_local_pytorch_mnist("gaussian"))


def test_the_clip_is_drawn_anew_for_another_seed(digits):
    one, other = (
        by_place(verify(digits, DIGITS, seed=seed))["nonlocal1/operation"].output for seed in (0, 1)
    )
    assert one != other
    assert jnp.isfinite(one)
