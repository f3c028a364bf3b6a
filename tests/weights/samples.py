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
    """A video network of six residual blocks and, if any, two non-local ones; narrow, so that its files stay small."""
    options = {"num_classes": CLASSES, "width_per_group": 4, "depth": (1, 2, 2, 1)} | options
    return nl.models.video_resnet(kind=kind, nonlocal_blocks=blocks or 0, preset=preset, **options)


def shapes(model):
    """The leaves of a network by path."""
    if repr(model) not in SHAPES:  # models are not hashable: `nonlocal_blocks` is a dict
        SHAPES[repr(model)] = flatten(jax.eval_shape(model.init, jax.random.key(0), model.example))
    return SHAPES[repr(model)]


def weights(model, seed=0):
    """Random variables: every number another one, variances positive, activations of a size that float32 holds well."""
    draw = np.random.default_rng(seed).standard_normal
    leaves = {}
    for path, leaf in shapes(model).items():
        a = draw(leaf.shape).astype(np.float32)
        if path.endswith("/var"):
            a = 1 + np.abs(a) / 2
        elif path.endswith("/scale"):
            a = 1 + a / 5
        elif a.ndim > 1:
            a *= np.sqrt(2 / np.prod(a.shape[:-1]), dtype=np.float32)
        else:
            a /= 5
        leaves[path] = a
    return unflatten(leaves)


def write(path, arrays):
    """A safetensors file of any arrays."""
    safetensors.numpy.save_file(
        {name: np.asarray(a, order="C") for name, a in arrays.items()}, path
    )
    return path


def assert_equal(loaded, variables):
    """The same leaves, bit by bit."""
    loaded, variables = flatten(loaded), flatten(variables)
    assert loaded.keys() == variables.keys()
    for path, leaf in variables.items():
        assert loaded[path].dtype == jnp.float32
        np.testing.assert_array_equal(loaded[path], leaf, err_msg=path)


def assert_arrays(found, expected):
    """The same read-only arrays in the same order."""
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
        assert found[name].dtype == array.dtype
        assert not found[name].flags.writeable


def without(variables, *parts):
    """Variables less the leaves whose path has one of these parts."""
    return unflatten(
        {
            name: leaf
            for name, leaf in flatten(variables).items()
            if not any(part in name for part in parts)
        }
    )


def error_of(path, model, **options):
    """What loading a file that does not fit says."""
    with pytest.raises(ValueError, match=r"does not fit this ") as raised:
        load(path, model, **options)
    return str(raised.value)


def checkpoint(model, names):
    """What `read` would make of a file of a network, its numbers all 0 and without memory of their own."""
    zeros = {
        path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes(model).items()
    }
    return Checkpoint(Path("weights.bin"), "safetensors", export(unflatten(zeros), names), {})
