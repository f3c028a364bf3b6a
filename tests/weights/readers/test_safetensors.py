"""Safetensors files: every dtype is read, damaged files raise an error."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import forge

from nonlocal_jax.weights import FileFormatError

ARRAYS = forge.example()


def test_every_dtype(opened):
    arrays = {
        "a": np.array([1, 2], ml_dtypes.bfloat16),
        "b": np.array([True]),
        "c": np.zeros((0, 2), "f2"),
        "d": np.array(3),
        "e": np.ones(2, "u1"),
    }
    checkpoint = opened(safetensors.numpy.save(arrays, metadata={"format": "np"}))
    assert set(checkpoint.arrays) == set(arrays)
    for key, value in arrays.items():
        np.testing.assert_array_equal(checkpoint.arrays[key], value, strict=True)
    assert checkpoint.ignored == {"__metadata__": "not weights: dict of 1"}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda file: file[:-1], FileFormatError, "a damaged safetensors file"),
        (
            lambda file: file[:50],
            FileFormatError,
            "truncated: its header has .* bytes, of which 42 follow",
        ),
        (
            lambda file: file.replace(b'"F32"', b'"C64"', 1),
            FileFormatError,
            "is of C64, which is not supported|a damaged safetensors file",
        ),
        (
            lambda file: file.replace(b"[2,3]", b"[2,9]"),
            FileFormatError,
            "a damaged safetensors file",
        ),
    ],
)
def test_damaged_files(change, error, match, refused):
    refused(change(safetensors.numpy.save(ARRAYS)), error, match=match)


@pytest.mark.parametrize("shape", [[1] * 65, [0, 2**63], [0, 2**62], [0, 2**40, 2**40], [0, 2**64]])
def test_shapes_that_numpy_refuses(shape, refused):
    nbytes = 4 * math.prod(shape)
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, nbytes]}
    header = json.dumps({"w": tensor}).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(nbytes)
    refused(file, match="it is a damaged safetensors file")


def test_errors_escape_what_the_header_says(refused):
    header = rb'{"w":{"dtype":"\u001b[2J","shape":[1],"data_offsets":[0,4]}}'
    file = len(header).to_bytes(8, "little") + header + bytes(4)
    refused(file, match=r"unknown variant `\\x1b\[2J`")
