"""Torch files made by hand: dtypes, views and checkpoints are read, invalid ones raise an error."""

import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from weights import forge, samples
from weights.forge import call, listed, mapping, name, number, sequence, text, whole

from nonlocal_jax.weights import FileFormatError, UnsafeFileError

ARRAYS = forge.example()


@pytest.mark.parametrize("make", [forge.zip_of, forge.legacy_of])
def test_tensors_of_any_dtype_and_layout(make, opened):
    arrays = {
        "bfloat16": np.array([1.5, -2], ml_dtypes.bfloat16),
        "int64": np.array(2**40),  # no axes
        "bool": np.array([[True], [False]]),
        "empty": np.zeros((0, 3), "float32"),
    }
    samples.assert_arrays(opened(make(arrays)).arrays, arrays)


def test_views_share_a_storage(opened):
    content = np.arange(12, dtype="float32")
    stored = forge.storage("0", 12)
    views = {
        "transposed": forge.tensor(stored, (3, 4), (1, 3)),
        "rows": forge.tensor(stored, (2, 4), (4, 1), offset=4),
        "expanded": forge.tensor(stored, (2, 3), (0, 1)),
        "last": forge.tensor(stored, (), (), offset=11),
        "one": forge.tensor(
            stored, (1, 1), (2**40, 2**62), offset=2
        ),  # strides that are never used
    }
    grid = content.reshape(4, 3)
    expected = {
        "transposed": grid.T,
        "rows": content[4:].reshape(2, 4),
        "expanded": np.stack([content[:3]] * 2),
        "last": content[11],
        "one": content[2].reshape(1, 1),
    }
    samples.assert_arrays(
        opened(forge.zipped(mapping(views), {"0": content.tobytes()})).arrays,
        expected | {"last": np.asarray(content[11])},
    )


def test_big_endian_files(opened):
    swapped = {"w": ARRAYS["conv1_w"].byteswap()}
    samples.assert_arrays(
        opened(forge.zip_of(swapped, order="big")).arrays, {"w": ARRAYS["conv1_w"]}
    )


@pytest.mark.parametrize("key", ["state_dict", "model_state", "model_state_dict", "model", "net"])
def test_state_dicts_are_found(key, opened):
    inner, contents = forge.state_dict(ARRAYS)
    optimiser = mapping(
        {"state": mapping({"step": forge.tensor(forge.storage("0", 6), (6,), (1,))})}
    )
    best = call(
        name("numpy._core.multiarray", "scalar"),
        forge.dtype("f8"),
        forge.data(struct.pack("<d", 0.5)),
    )
    tree = mapping(
        {
            "epoch": number(3),
            "optimizer": optimiser,
            key: inner,
            "best": best,
            "size": call(name("torch", "Size"), sequence()),
        }
    )
    checkpoint = opened(forge.zipped(tree, contents))
    samples.assert_arrays(checkpoint.arrays, ARRAYS)
    assert checkpoint.ignored == {
        "epoch": "not weights: int",
        "optimizer": "not weights: dict of 1",
        "best": "not weights: NumpyArray",
        "size": "not weights: tuple of 0",
    }


def test_entries_that_are_no_tensors_are_ignored(opened):
    code, contents = forge.state_dict(ARRAYS)
    code = code[:-1] + text("_extra_state") + b"Nu"
    metadata = call(name("collections", "OrderedDict"), listed(sequence(text("v"), number(1))))
    state = mapping({"_metadata": metadata})
    ordered = (
        call(name("collections", "OrderedDict")) + code[1:] + state + b"b"
    )  # as Module.state_dict returns it
    checkpoint = opened(forge.zipped(ordered, contents))
    samples.assert_arrays(checkpoint.arrays, ARRAYS)
    assert checkpoint.ignored == {"_extra_state": "not weights: NoneType"}


def view_of_storage(shape, strides, offset=0, size=6):
    return forge.torch_archive(
        mapping({"w": forge.tensor(forge.storage("0", size), shape, strides, offset)})
    )


def tensor_of_storage_type(storage_type):
    return forge.torch_archive(
        mapping({"w": forge.tensor(forge.storage("0", 6, storage_type), (6,), (1,))})
    )


INVALID = {
    "past the end": (
        view_of_storage((7,), (1,)),
        UnsafeFileError,
        "extends to byte 28 of a storage of 24",
    ),
    "far offset": (
        view_of_storage((6,), (1,), offset=1),
        UnsafeFileError,
        "extends to byte 28 of a storage of 24",
    ),
    "far stride": (
        view_of_storage((2, 3), (4, 1)),
        UnsafeFileError,
        "extends to byte 28 of a storage of 24",
    ),
    "negative stride": (
        view_of_storage((2,), (-1,), offset=1),
        FileFormatError,
        "integers from 0 to",
    ),
    "negative offset": (
        view_of_storage((2,), (1,), offset=-1),
        FileFormatError,
        "integers from 0 to",
    ),
    "negative size": (view_of_storage((-2,), (1,)), FileFormatError, "integers from 0 to"),
    "fewer strides": (
        view_of_storage((2, 3), (1,)),
        FileFormatError,
        "a tensor of 2 axes has 1 strides",
    ),
    "negative storage": (
        view_of_storage((2,), (1,), size=-6),
        FileFormatError,
        "integers from 0 to",
    ),
    "larger storage": (
        view_of_storage((2,), (1,), size=7),
        FileFormatError,
        "storage '0' must have 28 bytes; it has 24",
    ),
    "smaller storage": (
        view_of_storage((2,), (1,), size=5),
        UnsafeFileError,
        "has 24 bytes in its zip archive; expected at most 20",
    ),
    "huge storage": (
        view_of_storage((2,), (1,), size=2**79 - 1),
        FileFormatError,
        "integers from 0 to",
    ),
    "huge stride": (view_of_storage((2,), (2**79 - 1,)), FileFormatError, "integers from 0 to"),
    "two sizes": (
        forge.torch_archive(
            mapping(
                {
                    "a": forge.tensor(forge.storage("0", 6), (1,), (1,)),
                    "b": forge.tensor(forge.storage("0", 5), (1,), (1,)),
                }
            )
        ),
        FileFormatError,
        "storage '0' has two sizes, 24 and 20 bytes",
    ),
    "no storage": (
        forge.torch_archive(contents={"0": bytes(24)}),
        FileFormatError,
        "its zip archive lacks 'archive/data/1'",
    ),
    "complex": (
        tensor_of_storage_type("ComplexFloatStorage"),
        FileFormatError,
        "complex tensors .torch.ComplexFloatStorage., which are not supported",
    ),
    "quantised": (
        tensor_of_storage_type("QInt8Storage"),
        FileFormatError,
        "quantised tensors .torch.QInt8Storage., which are not supported",
    ),
    "sparse": (
        forge.torch_archive(name("torch._utils", "_rebuild_sparse_tensor")),
        FileFormatError,
        "sparse tensors",
    ),
    "script": (
        forge.torch_archive(extra=[("archive/constants.pkl", b"")]),
        FileFormatError,
        "a TorchScript archive",
    ),
    "code": (
        forge.torch_archive(extra=[("archive/code/x.py", b"")]),
        FileFormatError,
        "a TorchScript archive",
    ),
    "traversal": (
        forge.torch_archive(extra=[("archive/../../x", b"")]),
        UnsafeFileError,
        "a member outside it",
    ),
    "absolute": (
        forge.torch_archive(extra=[("/etc/passwd", b"")]),
        UnsafeFileError,
        "a member outside it",
    ),
    "bomb": (
        forge.torch_archive(contents={"0": bytes(2**20)}, compression=zipfile.ZIP_DEFLATED),
        UnsafeFileError,
        "'archive/data/0' in its zip archive expands from",
    ),
    "lzma": (
        forge.torch_archive(compression=zipfile.ZIP_LZMA),
        FileFormatError,
        "compressed by a method that torch cannot read",
    ),
    "byte order": (
        forge.torch_archive(order="middle"),
        FileFormatError,
        "its byte order must be little or big; got 'middle'",
    ),
    "content": (
        forge.torch_archive().replace(ARRAYS["conv1_w"].tobytes(), bytes(24)),
        FileFormatError,
        "'archive/data/0' is damaged in its zip archive .Bad CRC-32",
    ),
    "comment": (
        forge.torch_archive()[:-2] + b"\1\0!",
        FileFormatError,
        "a zip archive ends with its directory",
    ),
    "count": (
        forge.legacy(*forge.state_dict(ARRAYS, legacy=True), {"0": 6, "1": 4}),
        FileFormatError,
        "must have 5 elements; it has 4",
    ),
    "list of storages": (
        forge.legacy_of(ARRAYS, keys=whole(listed(text("2")))),
        FileFormatError,
        "its list of storages does not match",
    ),
    "listed too few": (
        forge.legacy_of(ARRAYS, keys=whole(listed(text("0")))),
        FileFormatError,
        "it lacks storage '1'",
    ),
    "protocol": (
        forge.legacy_of(ARRAYS, protocol=whole(number(1000))),
        FileFormatError,
        "is not one of protocol 1001",
    ),
    "legacy cut": (
        forge.legacy_of(ARRAYS)[:-1],
        FileFormatError,
        "truncated: 20 more bytes should follow, but only 19 do",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_files(case, refused):
    file, error, match = INVALID[case]
    refused(file, error, match=match)


def test_small_tensors_may_be_expanded(opened):
    """Up to 16 MiB from a file of any size, here 2**21 numbers from one."""
    bias = forge.tensor(forge.storage("0", 1), (2**11, 2**10), (0, 0))
    content = np.float32(1.5)
    checkpoint = opened(forge.zipped(mapping({"bias": bias}), {"0": content.tobytes()}))
    samples.assert_arrays(checkpoint.arrays, {"bias": np.full((2**11, 2**10), content)})


@pytest.mark.parametrize("length", [2**22 + 1, 2**27, 2**31 - 8])
@pytest.mark.parametrize("legacy", [False, True])
def test_large_tensors_may_not_be_expanded(length, legacy, refused):
    code = mapping({"w": forge.tensor(forge.storage("0", 4, legacy=legacy), (length,), (0,))})
    contents = {"0": bytes(16)}
    file = forge.legacy(code, contents, {"0": 4}) if legacy else forge.zipped(code, contents)
    match = f"its tensors would take {4 * length} bytes, which its size of {len(file)} bytes does"
    refused(file, UnsafeFileError, match=match)


@pytest.mark.parametrize(("count", "fits"), [(31, True), (33, False)])
def test_tensors_share_a_storage_as_far_as_the_size_explains(count, fits, opened, refused):
    """The tensors of a network with shared layers: each is the whole storage."""
    content = np.arange(2**18, dtype="float32")
    stored = forge.storage("0", content.size)
    tensors = {str(n): forge.tensor(stored, content.shape, (1,)) for n in range(count)}
    file = forge.zipped(mapping(tensors), {"0": content.tobytes()})
    if fits:
        samples.assert_arrays(opened(file).arrays, dict.fromkeys(tensors, content))
    else:
        refused(file, UnsafeFileError, match=f"its tensors would take {count * 2**20} bytes, which")


def test_deflated_storages_count(refused):
    """A storage that expands to 65 times its size, of which the tensor is one number."""
    noise = np.frombuffer(np.random.default_rng(0).bytes(2**19), "u1")
    content = np.concatenate([noise, np.zeros(2**25, "u1")])
    code = mapping({"w": forge.tensor(forge.storage("0", content.size, "ByteStorage"), (1,), (1,))})
    file = forge.zipped(code, {"0": content.tobytes()}, compression=zipfile.ZIP_DEFLATED)
    refused(file, UnsafeFileError, match="the storages of its tensors would take .* which its size")
