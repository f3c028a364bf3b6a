"""Small networks with random weights, and files of them under any names."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import nonlocal_jax as nl
from nonlocal_jax.weights import Checkpoint, export, load
from nonlocal_jax.weights.names import flatten, unflatten

BLOCKS = {"res3": (1,), "res4": (0,)}
CLASSES = 7
SHAPES = {}


def network(kind="i3d_3x1x1", blocks=None, preset="slowfast", **options):
    """Builds a video network of six residual blocks, narrow so that its files stay small."""
    options = {"num_classes": CLASSES, "width_per_group": 4, "depth": (1, 2, 2, 1)} | options
    return nl.models.video_resnet(kind=kind, nonlocal_blocks=blocks or 0, preset=preset, **options)


def tiny_network(kind="i3d_3x1x1", blocks=None, **options):
    """Builds a video network of one residual block in each stage, which compiles in seconds."""
    return network(kind, blocks, **{"depth": (1, 1, 1, 1)} | options)


def shapes(model):
    """Returns the leaves of a network by path, with shape and dtype."""
    if repr(model) not in SHAPES:  # models are not hashable: `nonlocal_blocks` is a dict
        SHAPES[repr(model)] = flatten(jax.eval_shape(model.init, jax.random.key(0), model.example))
    return SHAPES[repr(model)]


def weights(model, seed=0):
    """Draws variables: distinct numbers, positive variances, activations of order 1."""
    draw = np.random.default_rng(seed).standard_normal
    leaves = {}
    for path, leaf in shapes(model).items():
        array = draw(leaf.shape).astype(np.float32)
        if path.endswith("/var"):
            array = 1 + np.abs(array) / 2
        elif path.endswith("/scale"):
            array = 1 + array / 5
        elif array.ndim > 1:
            array *= np.sqrt(2 / np.prod(array.shape[:-1]), dtype=np.float32)
        else:
            array /= 5
        leaves[path] = array
    return unflatten(leaves)


def write(path, arrays):
    """Writes a safetensors file of any arrays."""
    safetensors.numpy.save_file(
        {name: np.asarray(a, order="C") for name, a in arrays.items()}, path
    )
    return path


def assert_equal(loaded, variables):
    """Checks that all leaves are equal bit by bit."""
    loaded, variables = flatten(loaded), flatten(variables)
    assert loaded.keys() == variables.keys()
    for path, leaf in variables.items():
        assert loaded[path].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def assert_arrays(found, expected):
    """Checks that arrays are equal, in the same order, and read-only."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found[name].dtype == array.dtype
        assert not found[name].flags.writeable


def without(variables, *parts):
    """Returns the variables without the leaves whose path has one of these parts."""
    return unflatten(
        {
            name: leaf
            for name, leaf in flatten(variables).items()
            if not any(part in name for part in parts)
        }
    )


def error_of(path, model, **options):
    """Returns the error message for a file that does not fit."""
    with pytest.raises(ValueError, match=r"does not fit this ") as raised:
        load(path, model, **options)
    return str(raised.value)


def checkpoint(model, names):
    """Returns what `read` returns for a file of a network, with arrays of 0 that take no memory."""
    zeros = {
        path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes(model).items()
    }
    return Checkpoint(Path("weights.bin"), "safetensors", export(unflatten(zeros), names), {})
