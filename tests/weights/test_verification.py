"""Verification finds faults in the weights, in the naming tables and in the layers."""

import dataclasses
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.layers import PairwiseCall, VideoConv, nonlocal_block, video_conv
from nonlocal_jax.weights import export, save, sources, verification
from nonlocal_jax.weights.loading import load_checkpoint
from nonlocal_jax.weights.names import CONV2D, VECTOR

SHAPE = (1, 8, 32, 24, 3)  # T, H and W differ
DIGITS = nl.models.non_local_pytorch_mnist("dot_product")
VIDEO = samples.tiny_network(blocks={"res3": (0,)}, preset="caffe2")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "digits"
    save(path, samples.weights(DIGITS), names="non_local_pytorch")
    return path


@pytest.fixture(scope="module")
def verified_digits(digits):
    return nl.weights.verify(digits, DIGITS)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A file of a network with a non-local block, with the names of Caffe2."""
    path = tmp_path_factory.mktemp("weights") / "video"
    save(path, samples.weights(VIDEO), names="caffe2")
    return path


def layers_of(result):
    return {layer.place: layer for layer in result.layers}


@pytest.mark.networks
def test_a_video_network(video):
    result = nl.weights.verify(video, VIDEO, shape=SHAPE)
    assert result.ok
    assert list(result.stages) == ["pool1", "res2", "pool2", "res3", "res4", "res5", "logits"]
    layers = layers_of(result)
    modules = {"/".join(leaf.split("/")[1:-1]) for leaf in samples.shapes(VIDEO)}
    assert modules <= layers.keys()
    assert all(layer.weights == 0 for layer in layers.values() if layer.shapes)
    assert layers["conv1"].shapes == ((5, 7, 7, 3, 64),)
    # Layers and definitions are computed in different ways, so they differ in the last bits.
    for place in ("conv1", "res3_0/conv_a", "nonlocal_res3_0/operation", "conv1_norm"):
        assert 0 < layers[place].output < 1e-5
    assert result.largest["weights"][0] == 0
    assert 0 < max(result.stages.values()) < 1e-5
    places = ["res3_0/norm_c", "nonlocal_res3_0/operation", "res4_0/conv_a"]
    assert [place for place in layers if place in places] == places
    text = str(result)
    assert re.search(r"res3_0/conv_a +1 +3×1×1×\d+×8 +0 +\d\.\de-0\d", text)
    assert text.endswith("verified, tolerance 0.0001")


@pytest.mark.networks
def test_inflated_and_folded(tmp_path):
    """Kernels are summed over their frames, and norms are folded independently."""
    flat = samples.tiny_network("c2d", preset="caffe2")
    arrays = export(samples.weights(flat), "caffe2")
    image = {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    samples.write(tmp_path / "image", image)
    model = samples.tiny_network("i3d_3x1x1", preset="caffe2", frozen_bn=True)
    result = nl.weights.verify(tmp_path / "image", model, shape=SHAPE)
    assert result.ok
    layers = layers_of(result)
    assert 0 < layers["conv1"].weights < 1e-6
    assert 0 < layers["conv1_norm"].weights < 1e-6
    assert layers["res5_0/conv_a"].weights == 0  # this one has one frame


def test_digits(verified_digits):
    assert verified_digits.ok
    assert list(verified_digits.stages) == ["logits"]
    assert layers_of(verified_digits)["nonlocal1/operation"].output > 0


@pytest.fixture(scope="module")
def small_block(tmp_path_factory):
    """Makes a file of a single block; returns its path, the block, and an example input."""

    def make(instantiation):
        block = nonlocal_block(instantiation)
        example = jax.ShapeDtypeStruct((1, 7, 5, 6), jnp.float32)
        leaves = jax.eval_shape(block.init, jax.random.key(0), example)
        draw = np.random.default_rng(0).uniform
        variables = jax.tree.map(lambda a: draw(0.5, 1.5, a.shape).astype(np.float32), leaves)
        path = tmp_path_factory.mktemp("weights") / instantiation
        save(path, variables)
        return path, block, example

    return make


@pytest.mark.parametrize(
    "instantiation", ["gaussian", "embedded_gaussian", "dot_product", "concatenation"]
)
def test_instantiations(instantiation, small_block):
    """Implementations other than the dense one are run, whose last bits differ."""
    path, block, example = small_block(instantiation)
    result = nl.weights.verify(path, block, example=example)
    assert result.ok
    assert 0 < layers_of(result)["operation"].output < 1e-5


# Faults.


@pytest.mark.networks
def test_a_broken_convolution(video, monkeypatch):
    """Kernels in time are reversed."""
    module = sys.modules[VideoConv.__module__]

    def broken(x, kernel, *arguments, **options):
        is_temporal = kernel.shape[1:3] == (1, 1)
        return video_conv(x, kernel[::-1] if is_temporal else kernel, *arguments, **options)

    monkeypatch.setattr(module, "video_conv", broken)
    result = nl.weights.verify(video, VIDEO, shape=SHAPE)
    assert not result.ok
    wrong = {place for place, layer in layers_of(result).items() if (layer.output or 0) > 1e-4}
    assert wrong == {"res2_0/conv_a", "res3_0/conv_a", "res4_0/conv_a"}
    assert result.largest["layers"][1] in wrong
    assert result.stages["pool1"] < 1e-5
    assert result.stages["res2"] > 1e-4
    assert str(result).endswith("NOT VERIFIED, tolerance 0.0001")


def test_a_broken_non_local_operation(small_block, monkeypatch):
    """Also in an implementation that "auto" does not choose for an input as small as this."""
    respond = PairwiseCall.respond

    def broken(call, implementation=None):
        factor = 1.01 if implementation == "reassociated" else 1
        return factor * respond(call, implementation)

    monkeypatch.setattr(PairwiseCall, "respond", broken)
    path, block, example = small_block("dot_product")
    result = nl.weights.verify(path, block, example=example)
    assert layers_of(result)["operation"].output == pytest.approx(0.01, rel=0.1)
    assert not result.ok


def break_row(monkeypatch, table, template, **changes):
    """Makes a mistake in one row of a table."""
    rows = tuple(
        dataclasses.replace(row, **changes) if row.source == template else row for row in table.rows
    )
    assert rows != table.rows
    broken = dataclasses.replace(table, rows=rows)
    monkeypatch.setattr(sources, "NAMING_TABLES", (broken,))


def test_a_transform_that_flips_kernels(digits, monkeypatch):
    flipped = dataclasses.replace(CONV2D, import_array=lambda a: CONV2D.import_array(a)[::-1])
    break_row(monkeypatch, sources.NON_LOCAL_PYTORCH, "{conv}.weight", transform=flipped)
    result = nl.weights.verify(digits, DIGITS)
    wrong = {place for place, layer in layers_of(result).items() if layer.weights}
    assert wrong == {"conv1", "conv2", "conv3"}
    assert not result.ok


def test_a_name_that_differs_on_export(digits, monkeypatch):
    """The statistics are read under one name and exported under another."""

    class Slipped(dict):
        def get(self, word, default):
            return {"mean": "running_var"}.get(word) or super().get(word, default)

    table = sources.NON_LOCAL_PYTORCH
    words = {**table.words, "stat": Slipped(table.words["stat"])}
    slipped = dataclasses.replace(table, words=words)
    monkeypatch.setattr(sources, "NAMING_TABLES", (slipped,))
    result = nl.weights.verify(digits, DIGITS)
    assert layers_of(result)["conv1_norm"].weights == math.inf
    assert layers_of(result)["conv1"].weights == 0


def test_an_array_that_is_scaled(digits, monkeypatch):
    doubled = dataclasses.replace(VECTOR, import_array=lambda a: 2 * VECTOR.import_array(a))
    break_row(monkeypatch, sources.NON_LOCAL_PYTORCH, "fc.3.bias", transform=doubled)
    result = nl.weights.verify(digits, DIGITS)
    assert layers_of(result)["fc2"].weights == 1
    assert result.largest["weights"] == (1, "fc2")
    assert not result.ok


def test_numbers_that_are_not_finite(digits, tmp_path):
    arrays = {name: np.array(a) for name, a in nl.weights.read(digits).arrays.items()}
    arrays["conv_2.0.bias"][3:5] = np.nan
    arrays["conv_3.0.bias"][7] = np.inf
    result = nl.weights.verify(samples.write(tmp_path / "broken", arrays), DIGITS)
    assert set(result.problems) == {
        "params/conv2/bias has 2 values that are not finite",
        "params/conv3/bias has 1 values that are not finite",
    }
    assert layers_of(result)["conv2"].weights == 0  # it equals the file
    assert layers_of(result)["conv3"].weights == 0
    assert not result.ok
    assert "wrong: params/conv2/bias has 2 values that are not finite" in str(result)


def test_an_entry_that_is_not_reported(digits, monkeypatch):
    def forgetful(*args, **options):
        variables, report = load_checkpoint(*args, **options)
        return variables, dataclasses.replace(report, weights=report.weights[1:])

    monkeypatch.setattr(verification, "load_checkpoint", forgetful)
    result = nl.weights.verify(digits, DIGITS)
    assert any("is not accounted for exactly once" in problem for problem in result.problems)
    assert not result.ok


def test_tolerance(verified_digits):
    assert verified_digits.tolerance == 1e-4
    assert not dataclasses.replace(verified_digits, tolerance=1e-9).ok


def test_a_file_that_does_not_fit_raises_the_errors_of_load(digits):
    with pytest.raises(ValueError, match=r"does not fit this NonLocalMnist"):
        nl.weights.verify(digits, nl.models.non_local_pytorch_mnist("gaussian"))


def test_another_seed_draws_another_clip(digits, verified_digits):
    second = nl.weights.verify(digits, DIGITS, seed=1)
    differences = [
        layers_of(result)["nonlocal1/operation"].output for result in (verified_digits, second)
    ]
    assert differences[0] != differences[1]
    assert np.isfinite(differences).all()
