"""Pickles of Caffe2: a dict of blobs, or one that holds it under "blobs"."""

import io
import re
from typing import Any

from nonlocal_jax.weights.readers.errors import FileFormatError
from nonlocal_jax.weights.readers.numpy_objects import NumpyArray
from nonlocal_jax.weights.readers.pickles import ByteStream, read_pickle
from nonlocal_jax.weights.readers.values import (
    Contents,
    check_explained,
    check_size,
    describe_value,
    ignored_reason,
    text_keyed,
)

# Pickles have no magic number before protocol 2: these are the ways in which one with a dict of
# blobs can start.
PICKLE_START = re.compile(rb"\x80[\x00-\x05]|\([dl]p\d+\n|[}\]]q|\(?c[\w.]+\n[\w.]+\n")
TRAINING_STATE = ("lr", "model_iter")  # and every blob whose name ends in _momentum


def is_pickle(head: bytes) -> bool:
    """Whether a file that starts with these bytes can be a pickle."""
    return PICKLE_START.match(head) is not None


def read_caffe2(file: io.BufferedIOBase, size: int, max_bytes: int) -> Contents:
    """Reads the arrays of a pickle of blobs.

    Args:
        file: The file.
        size: Its size in bytes.
        max_bytes: Limit of what the arrays may take in memory.
    """
    check_size(size, max_bytes, "its pickle")
    tree = read_pickle(ByteStream(file, size))
    if not isinstance(tree, dict):
        raise FileFormatError(
            f"it is a pickle of {describe_value(tree)}; "
            "expected a dict of arrays, or one under 'blobs'."
        )
    blobs, ignored = text_keyed(tree), {}
    if isinstance(blobs.get("blobs"), dict):
        ignored = {name: ignored_reason(value) for name, value in blobs.items() if name != "blobs"}
        blobs = text_keyed(blobs["blobs"])
    weights: dict[str, NumpyArray] = {}
    for name, value in blobs.items():
        if reason := _reason_to_ignore(name, value):
            ignored[name] = reason
        else:
            weights[name] = value
    nbytes = sum(array.nbytes for array in weights.values())
    check_size(nbytes, max_bytes, "its arrays")
    check_explained(nbytes, size, "its arrays")
    # Frees the momentum, which is as large as the weights. Below, each array takes the place of its
    # source, which protocol 2 stores as text.
    del tree, blobs
    return {name: weights.pop(name).array() for name in list(weights)}, ignored


def _reason_to_ignore(name: str, value: Any) -> str | None:
    """Returns why a blob is not loaded; None for a weight."""
    if name in TRAINING_STATE or name.endswith("_momentum"):
        return "training state"
    if not isinstance(value, NumpyArray):
        return ignored_reason(value)
    return None if value.shape else "not weights: a number"
