"""Pickles of Caffe2: NumPy arrays of any layout, and what is no weight."""

import pickle

import numpy as np
import pytest
from weights import forge, samples
from weights.forge import call, listed, mapping, name, number, text, whole

ARRAYS = forge.example()


@pytest.mark.parametrize("protocol", range(6))
def test_numpy_arrays_of_any_layout(protocol, opened):
    base = np.arange(30.0).reshape(2, 3, 5)
    arrays = {
        "fortran": np.asfortranarray(base),
        "permuted": base.transpose(1, 2, 0),
        "strided": base[:, ::2],
        "empty": base[:0],
        "int8": np.array([-3], "int8"),
        "bool": np.array([True, False]),
        "half": np.array([1.5], "float16"),
    }
    swapped = {"big": np.arange(3, dtype=">i4"), "little": np.arange(3, dtype="<i4")}
    native = {key: value.astype("i4") for key, value in swapped.items()}
    samples.assert_arrays(opened(pickle.dumps(arrays | swapped, protocol)).arrays, arrays | native)


def test_training_state_is_ignored(opened):
    blobs = {
        "w": ARRAYS["conv1_w"],
        "w_momentum": ARRAYS["conv1_w"],
        "lr": np.ones(1),
        "model_iter": 7,
        "note": "x",
        "n": np.float64(1),
    }
    checkpoint = opened(pickle.dumps({"cfg": {"a": 1}, "blobs": blobs}, 2))
    samples.assert_arrays(checkpoint.arrays, {"w": ARRAYS["conv1_w"]})
    assert checkpoint.ignored == {
        "cfg": "not weights: dict of 1",
        "w_momentum": "training state",
        "lr": "training state",
        "model_iter": "training state",
        "note": "not weights: str",
        "n": "not weights: a number",
    }


def test_names_of_bytes_become_text(opened, refused):
    samples.assert_arrays(
        opened(pickle.dumps({b"w": ARRAYS["conv1_w"]})).arrays, {"w": ARRAYS["conv1_w"]}
    )
    refused(
        pickle.dumps({b"w": ARRAYS["conv1_w"], "w": ARRAYS["conv1_w"]}),
        match="two of its entries have the same name",
    )


def test_attributes_of_an_ordered_dict_are_ignored(opened):
    state = mapping({"__class__": number(1), "_metadata": b"}", "items": number(2)})
    blobs = (
        call(
            name("collections", "OrderedDict"),
            listed(listed(text("w"), forge.array(ARRAYS["conv1_w"]))),
        )
        + state
        + b"b"
    )
    samples.assert_arrays(opened(whole(blobs)).arrays, {"w": ARRAYS["conv1_w"]})
