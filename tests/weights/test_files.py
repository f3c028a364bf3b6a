"""Files of every kind give the arrays they were made of; hostile and damaged ones give an error, and nothing is run."""

import gzip
import io
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from weights import forge
from weights.forge import call, dotted, listed, mapping, name, number, sequence, text, whole

from nonlocal_jax.weights import unpickle
from nonlocal_jax.weights.files import read
from nonlocal_jax.weights.unpickle import FileFormatError, UnsafeFileError

ARRAYS = forge.example()


def bfloat16(*values):
    return np.array(values, ml_dtypes.bfloat16)


@pytest.fixture
def opened(tmp_path):
    """Reads bytes as a file whose suffix says nothing."""

    def open_bytes(content, **options):
        path = tmp_path / "weights.bin"
        path.write_bytes(content)
        return read(path, **options)

    return open_bytes


@pytest.fixture
def refused(opened):
    """The error of a file, which must name it."""

    def error_of(content, error=FileFormatError, match=None, **options):
        with pytest.raises(error, match=match) as raised:
            opened(content, **options)
        assert "weights.bin: " in str(raised.value)
        assert len(str(raised.value)) < 1000

    return error_of


def assert_arrays(found, wanted):
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, strict=True)
        assert found[key].dtype == value.dtype
        assert not found[key].flags.writeable


# Good files

GOOD = {
    **{f"caffe2 {protocol}": pickle.dumps({"blobs": ARRAYS}, protocol) for protocol in range(6)},
    **{f"caffe2 by Python 2, {protocol}": forge.python2(ARRAYS, protocol) for protocol in (0, 2)},
    "caffe2 without blobs": pickle.dumps(OrderedDict(ARRAYS)),
    "torch": forge.zip_of(ARRAYS),
    "torch deflated": forge.zip_of(ARRAYS, compression=zipfile.ZIP_DEFLATED),
    "torch legacy": forge.legacy_of(ARRAYS),
    "safetensors": safetensors.numpy.save(ARRAYS),
}


@pytest.mark.parametrize("case", GOOD)
def test_every_format_gives_its_arrays(case, opened):
    checkpoint = opened(GOOD[case])
    assert checkpoint.format == case.split()[0]
    assert checkpoint.ignored == {}
    assert_arrays(checkpoint.arrays, ARRAYS)


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
    assert_arrays(opened(pickle.dumps(arrays | swapped, protocol)).arrays, arrays | native)


@pytest.mark.parametrize("make", [forge.zip_of, forge.legacy_of])
def test_torch_tensors_of_any_dtype_and_layout(make, opened):
    arrays = {
        "bfloat16": bfloat16(1.5, -2),
        "int64": np.array(2**40),  # without axes
        "bool": np.array([[True], [False]]),
        "empty": np.zeros((0, 3), "float32"),
    }
    assert_arrays(opened(make(arrays)).arrays, arrays)


def test_torch_views_share_a_storage(opened):
    content = np.arange(12, dtype="float32")
    stored = forge.storage("0", 12)
    views = {
        "transposed": forge.tensor(stored, (3, 4), (1, 3)),
        "rows": forge.tensor(stored, (2, 4), (4, 1), offset=4),
        "expanded": forge.tensor(stored, (2, 3), (0, 1)),
        "last": forge.tensor(stored, (), (), offset=11),
        "one": forge.tensor(
            stored, (1, 1), (2**40, 2**62), offset=2
        ),  # a stride that is never taken
    }
    grid = content.reshape(4, 3)
    wanted = {
        "transposed": grid.T,
        "rows": content[4:].reshape(2, 4),
        "expanded": np.stack([content[:3]] * 2),
        "last": content[11],
        "one": content[2].reshape(1, 1),
    }
    assert_arrays(
        opened(forge.zipped(mapping(views), {"0": content.tobytes()})).arrays,
        wanted | {"last": np.asarray(content[11])},
    )


def test_big_endian_torch_files(opened):
    swapped = {"w": ARRAYS["conv1_w"].byteswap()}
    assert_arrays(opened(forge.zip_of(swapped, order="big")).arrays, {"w": ARRAYS["conv1_w"]})


def test_caffe2_leaves_out_training_state(opened):
    blobs = {
        "w": ARRAYS["conv1_w"],
        "w_momentum": ARRAYS["conv1_w"],
        "lr": np.ones(1),
        "model_iter": 7,
        "note": "x",
        "n": np.float64(1),
    }
    checkpoint = opened(pickle.dumps({"cfg": {"a": 1}, "blobs": blobs}, 2))
    assert_arrays(checkpoint.arrays, {"w": ARRAYS["conv1_w"]})
    assert checkpoint.ignored == {
        "cfg": "not weights: dict of 1",
        "w_momentum": "training state",
        "lr": "training state",
        "model_iter": "training state",
        "note": "not weights: str",
        "n": "not weights: a number",
    }


def test_names_of_bytes_become_text(opened, refused):
    assert_arrays(opened(pickle.dumps({b"w": ARRAYS["conv1_w"]})).arrays, {"w": ARRAYS["conv1_w"]})
    refused(
        pickle.dumps({b"w": ARRAYS["conv1_w"], "w": ARRAYS["conv1_w"]}),
        match="two of its entries have the same name",
    )


@pytest.mark.parametrize("key", ["state_dict", "model_state", "model_state_dict", "model", "net"])
def test_torch_state_dicts_are_found(key, opened):
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
    assert_arrays(checkpoint.arrays, ARRAYS)
    assert checkpoint.ignored == {
        "epoch": "not weights: int",
        "optimizer": "not weights: dict of 1",
        "best": "not weights: NumpyArray",
        "size": "not weights: tuple of 0",
    }


def test_torch_entries_that_are_no_tensors_are_left_out(opened):
    code, contents = forge.state_dict(ARRAYS)
    code = code[:-1] + text("_extra_state") + b"Nu"
    metadata = call(name("collections", "OrderedDict"), listed(sequence(text("v"), number(1))))
    state = mapping({"_metadata": metadata})
    ordered = (
        call(name("collections", "OrderedDict")) + code[1:] + state + b"b"
    )  # as Module.state_dict gives it
    checkpoint = opened(forge.zipped(ordered, contents))
    assert_arrays(checkpoint.arrays, ARRAYS)
    assert checkpoint.ignored == {"_extra_state": "not weights: NoneType"}


def test_safetensors_of_every_dtype(opened):
    arrays = {
        "a": bfloat16(1, 2),
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


@pytest.fixture(scope="module")
def orbax_folders(tmp_path_factory):
    """Of a tree that lies on four devices, by the checkpointer and by the manager."""
    import orbax.checkpoint as ocp

    root = tmp_path_factory.mktemp("orbax")
    mesh = jax.sharding.Mesh(jax.devices()[:4], "d")
    spread = jax.device_put(
        jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    )
    tree = {
        "params": {
            "conv": {"kernel": spread, "bias": jnp.ones(3, jnp.bfloat16)},
            "list": [jnp.zeros((2, 5))],
        },
        "step": 3,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "plain", tree)
    with ocp.CheckpointManager(root / "managed") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    return root


@pytest.mark.parametrize("folder", ["plain", "managed/7", "managed/7/default"])
def test_orbax_folders(folder, orbax_folders):
    checkpoint = read(orbax_folders / folder)
    assert checkpoint.format == "orbax"
    wanted = {
        "params/conv/bias": bfloat16(1, 1, 1),
        "params/conv/kernel": np.arange(8, dtype="f4"),
        "params/list/0": np.zeros((2, 5), "f4"),
    }
    assert_arrays(checkpoint.arrays, wanted)
    assert checkpoint.ignored == {"step": "not weights: int"}


def test_orbax_errors(orbax_folders, tmp_path):
    with pytest.raises(
        FileFormatError, match="managed: it is a folder without the _METADATA of Orbax; it has 7"
    ):
        read(orbax_folders / "managed")
    with pytest.raises(
        UnsafeFileError, match="plain: its arrays would take 86 bytes, over max_bytes=85"
    ):
        read(orbax_folders / "plain", max_bytes=85)
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(FileFormatError, match="Orbax cannot read it"):
        read(tmp_path)


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, nonlocal_jax.weights.files; print([m for m in ('torch', 'safetensors', 'orbax') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"


# Hostile pickles

MARKER = "nonlocal_jax_was_here"
TOUCH = f"touch {MARKER}"
FOREIGN = {  # opcodes that leave one object, and what the error must name
    "os": (call(name("os", "system"), text(TOUCH)), "os.system"),
    "posix": (call(name("posix", "system"), text(TOUCH)), "posix.system"),
    "subprocess": (call(name("subprocess", "Popen"), text(TOUCH)), "subprocess.Popen"),
    "eval": (call(name("builtins", "eval"), text("__import__('os').system('" + TOUCH + "')")), "builtins.eval"),
    "eval of Python 2": (call(name("__builtin__", "eval"), text("1")), "__builtin__.eval"),
    "set of Python 2": (call(name("__builtin__", "set"), listed()), "__builtin__.set"),
    "getattr": (call(name("builtins", "getattr"), name("os", "path"), text("os")), "builtins.getattr"),
    "reconstructor": (call(name("copy_reg", "_reconstructor"), name("__builtin__", "object")), "copy_reg._reconstructor"),
    "f2py": (name("numpy.f2py", "compile"), "numpy.f2py.compile"),
    "numpy runs": (name("numpy.testing._private.utils", "runstring"), "runstring"),
    "numpy load": (name("numpy", "load"), "numpy.load"),
    "another numpy class": (name("numpy", "memmap"), "numpy.memmap"),
    "dotted": (dotted("numpy.core.multiarray", "sys.modules"), "numpy.core.multiarray.sys.modules"),
    "dotted to what is allowed": (dotted("numpy", "core.multiarray._reconstruct"), "numpy.core.multiarray._reconstruct"),
    "dotted from what is allowed": (dotted("collections", "OrderedDict.__init__.__globals__"), "OrderedDict.__init__.__globals__"),
    "torch load": (name("torch", "load"), "torch.load"),
    "torch bytes": (call(name("torch.storage", "_load_from_bytes"), forge.data(b"")), "torch.storage._load_from_bytes"),
    "module": (name("torch.nn.modules.linear", "Linear"), "torch.nn.modules.linear.Linear"),
    "instance": (b"(" + text(TOUCH) + b"ios\nsystem\n", "os.system"),
    "extension 1": (b"\x82\x01", "EXT1"),
    "extension 4": (b"\x84\x01\0\0\0", "EXT4"),
    "text id": (b"Pstorage\n", "PERSID"),
    "buffer": (b"\x97", "NEXT_BUFFER"),
    "set": (b"\x8f", "EMPTY_SET"),
    "long integer": (b"\x8b\xff\xff\xff\x7f", "LONG4"),
    "state of a dict": (b"}" + mapping({"a": number(1)}) + b"b", "sets the state of dict of 0"),
}  # fmt: skip
MISUSED = {  # of names that are in the table
    "instance": (b"(icollections\nOrderedDict\n", "INST"),
    "object": (b"(" + name("collections", "OrderedDict") + b"o", "OBJ"),
    "new": (name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
    "new with keywords": (name("collections", "OrderedDict") + b")" + mapping({"a": number(1)}) + b"\x92", "NEWOBJ_EX"),
    "state of a function": (name("_codecs", "encode") + mapping({"__code__": number(1)}) + b"b", "sets the state of function"),
    "state of a class": (name("numpy", "ndarray") + mapping({"array": number(1)}) + b"b", "sets the state of type"),
    "dict from a callable": (call(name("collections", "OrderedDict"), name("_codecs", "encode")), "OrderedDict is made of"),
    "other encodings": (call(name("_codecs", "encode"), text("x"), text("hex")), "_codecs.encode is asked for"),
    "objects": (forge.dtype("O8"), "numpy.dtype.'O8'"),
    "records": (forge.dtype("V8"), "numpy.dtype.'V8'"),
    "letters": (forge.dtype("U8"), "numpy.dtype.'U8'"),
    "list of fields": (call(name("numpy", "dtype"), listed()), "numpy.dtype.'list of 0'"),
    "fields": (call(name("numpy", "dtype"), text("f4")) + sequence(number(3), text("<"), b"N", listed(), b"N") + b"b", "state of a numpy dtype"),
    "subclass": (call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "dtype"), sequence(number(0)), text("b")), "empty array"),
    "not empty": (call(name("numpy.core.multiarray", "_reconstruct"), name("numpy", "ndarray"), sequence(number(9)), text("b")), "empty array"),
    "array of objects": (forge.array(ARRAYS["conv1_w"], content=listed()), "state of a numpy array"),
    "array filled twice": (forge.array(ARRAYS["conv1_w"]) + sequence(number(1), sequence(), forge.dtype(), b"\x89", forge.data(b"1234")) + b"b", "state of a numpy array"),
    "scalar object": (call(name("numpy.core.multiarray", "scalar"), forge.dtype(), listed()), "state of a numpy array"),
}  # fmt: skip


def amid_weights(code):
    """Files that are good but for the object in them."""
    inner, contents = forge.state_dict(ARRAYS)
    inner_legacy, _ = forge.state_dict(ARRAYS, legacy=True)
    blobs = mapping({"conv1_w": forge.array(ARRAYS["conv1_w"]), "bad": code})
    yield whole(code, 4)
    yield whole(mapping({"blobs": blobs}))
    yield forge.zipped(code, {})
    yield forge.zipped(mapping({"state_dict": inner, "optimizer": listed(code)}), contents)
    yield forge.legacy(
        mapping({"state_dict": inner_legacy, "args": code}), contents, {"0": 6, "1": 5}
    )


def in_front(code):
    """Old torch files with the object in one of the pickles around the state dict, where no name at all belongs."""
    yield forge.legacy_of(ARRAYS, magic=b"\x80\x02" + forge.MAGIC[2:-1] + code + b"0.")
    for part in ("protocol", "machine", "keys"):
        yield forge.legacy_of(ARRAYS, **{part: whole(code)})


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_names_are_refused_and_nothing_runs(case, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, tried = FOREIGN[case]
    for file in [*amid_weights(code), *in_front(code)]:
        refused(file, UnsafeFileError, match=re.escape(tried))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("case", MISUSED)
def test_allowed_names_do_nothing_else(case, refused):
    code, tried = MISUSED[case]
    for file in amid_weights(code):
        refused(file, UnsafeFileError, match=tried)
    for file in in_front(code):
        refused(file, UnsafeFileError)


def test_the_hostile_pickles_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(whole(FOREIGN["posix"][0]))
    assert Path(MARKER).exists()


def test_each_format_has_its_own_names(refused):
    code, contents = forge.state_dict(ARRAYS)
    refused(whole(code), UnsafeFileError, match="it asks for 'torch._utils._rebuild_tensor_v2")
    refused(
        whole(mapping({"w": text("storage") + b"Q"})),
        UnsafeFileError,
        match="refers to data outside it",
    )
    pair = mapping({"w": sequence(text("module"), text("x")) + b"Q"})
    refused(
        forge.zipped(pair, contents),
        match="refers to tuple of 2 outside it; expected a whole storage",
    )


def test_what_is_set_on_an_ordered_dict_is_left_out(opened):
    state = mapping({"__class__": number(1), "_metadata": b"}", "items": number(2)})
    blobs = (
        call(
            name("collections", "OrderedDict"),
            listed(listed(text("w"), forge.array(ARRAYS["conv1_w"]))),
        )
        + state
        + b"b"
    )
    assert_arrays(opened(whole(blobs)).arrays, {"w": ARRAYS["conv1_w"]})


# Memory and time

LONG = struct.pack("<Q", 2**40)
BOMBS = {
    "bytearray": (whole(b"\x96" + LONG, 5), FileFormatError, "cut short: 1099511627776 more bytes should follow, 1 do"),
    "bytes": (whole(b"\x8e" + LONG, 5), FileFormatError, "cut short"),
    "letters": (whole(b"\x8d" + LONG, 5), FileFormatError, "cut short"),
    "shape": (whole(forge.array(ARRAYS["conv1_w"], shape=sequence(number(2**60), number(2**60)))), FileFormatError, "beyond what can be"),
    "empty": (whole(forge.array(ARRAYS["conv1_w"], shape=sequence(number(0), number(2**60), number(2**60)))), FileFormatError, "beyond what can be"),
    "huge key": (whole(b"}I0x" + b"f" * 9999 + b"\nNs"), FileFormatError, "a number of 64 bits; got int"),
    "axes": (whole(forge.array(ARRAYS["conv1_w"], shape=sequence(*[number(1)] * 33))), FileFormatError, "up to 32 integers"),
    "deep key": (whole(b"}" + text("a") + b"\x85" * 100_000 + b"Ns"), FileFormatError, "must be text or a number of 64 bits; got tuple of 1"),
    "tensor": (
        forge.zipped(mapping({"w": forge.tensor(forge.storage("0", 1), (2**30, 2**10), (0, 0))}), {"0": b"1234"}),
        UnsafeFileError,
        "its tensors would take 4398046511104 bytes, over max_bytes=8589934592",
    ),
    "storage": (
        forge.zipped(mapping({"w": forge.tensor(forge.storage("0", 2**40), (1,), (1,))}), {"0": b"1234"}),
        UnsafeFileError,
        "the storages of its tensors would take 4398046511104 bytes",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("as_users_see_it")  # checked annotations take memory and time of their own
@pytest.mark.parametrize("case", BOMBS)
def test_no_memory_is_taken_on_trust(case, refused):
    file, error, match = BOMBS[case]
    tracemalloc.start()
    refused(file, error, match=match)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(file) + 2**24


def test_a_pickle_has_a_number_of_steps(opened, refused, monkeypatch):
    pair = sequence(text("a"), b"N")
    dicts = [call(name("collections", "OrderedDict"), b"h\0")] * 20
    file = whole(
        mapping(
            {
                "w": forge.array(ARRAYS["conv1_w"]),
                "list": listed(*[pair] * 100) + b"q\0",
                "dicts": listed(*dicts),
            }
        )
    )
    opened(file)
    monkeypatch.setattr(
        unpickle, "MAX_STEPS", 2_000
    )  # it is read in fewer, but 20 copies of 100 pairs count as well
    refused(file, UnsafeFileError, match="takes more than 2000 steps")


@pytest.mark.usefixtures("as_users_see_it")
def test_shared_and_nested_values_cost_nothing(opened):
    lists = [b"](" + (b"h" + bytes([n])) * 100 + b"eq" + bytes([n + 1]) for n in range(50)]
    blobs = {
        "w": forge.array(ARRAYS["conv1_w"]),
        "laughs": listed(b"]q\0", *lists),
        "deep": b"]" * 200_000 + b"a" * 199_999,
        "memo": b"Nr\xff\xff\xff\xff",
    }
    checkpoint = opened(whole(mapping(blobs)))
    assert_arrays(checkpoint.arrays, {"w": ARRAYS["conv1_w"]})
    assert list(checkpoint.ignored) == ["laughs", "deep", "memo"]


def test_arrays_count_once_for_each_name(opened, refused):
    shared = pickle.dumps(dict.fromkeys("abcdefghij", np.ones(1000)))
    opened(shared, max_bytes=80_000)
    refused(
        shared,
        UnsafeFileError,
        match="its arrays would take 80000 bytes, over max_bytes=79999",
        max_bytes=79_999,
    )
    refused(
        shared,
        UnsafeFileError,
        match="its pickle would take 8[0-9]{3} bytes, over max_bytes=8000",
        max_bytes=8_000,
    )
    opened(forge.zip_of(ARRAYS), max_bytes=44)
    refused(
        forge.zip_of(ARRAYS),
        UnsafeFileError,
        match="its tensors would take 44 bytes, over max_bytes=43",
        max_bytes=43,
    )
    refused(
        safetensors.numpy.save(ARRAYS), UnsafeFileError, match="over max_bytes=100", max_bytes=100
    )


# Damaged and foreign files


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "it is empty. Supported are"),
        (b"<!DOCTYPE html><html>", "looks like a web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a pointer of Git LFS in place of the file; `git lfs pull`",
        ),
        (
            b"layer,mean\nconv1,0.5\n" * 9,
            re.escape("text that starts with 'layer,mean\\nconv1,0.5\\nlayer,mean\\nconv1,0.'"),
        ),
        (gzip.compress(b"x", mtime=0), "compressed with gzip; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "looks like HDF5"),
        (b"\x93NUMPY\x01\0", "a NumPy .npy file"),
        (b"sys_info".ljust(257, b"\0") + b"ustar", "a tar archive, as torch wrote before"),
        (
            b"\0\1\2\3\xff\xfe\xfd\xfc",
            "an unknown kind that starts with the bytes 00 01 02 03 ff fe fd fc",
        ),
        (b"PK\3\4" + bytes(200), "cut short: a zip archive ends with its directory"),
        (b"(dp0\nS'\\q'\nNs.", "its pickle is damaged .DeprecationWarning: invalid escape"),
        (b"\xff\xfe\xfd", "an unknown kind that starts with the bytes ff fe fd"),
        (whole(b"]"), "a pickle of list of 0; expected a dict of arrays"),
        (whole(b"}"), "it holds no weights, but nothing"),
        (
            whole(mapping({"a": number(1)})),
            re.escape("it holds no weights, but 'a' (not weights: int)"),
        ),
        (whole(mapping({"a": number(1)})[:-1] + b"a"), "its pickle is damaged"),
        (forge.zipped(b"]", {}), "torch.save was given list of 0; expected a state dict"),
        (forge.zipped(b"K\1", {}), "torch.save was given int"),
        (
            forge.zipped(mapping({"epoch": number(1)}), {}),
            re.escape("it holds no weights, but 'epoch' (not weights: int)"),
        ),
    ],
)
def test_other_files_are_named(content, match, refused):
    refused(content, match=match)


def test_other_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="pipe: it is neither a file nor a folder"):
        read(tmp_path / "pipe")


def torch_file(code=None, contents=None, **parts):
    code, contents = (
        code or forge.state_dict(ARRAYS)[0],
        forge.state_dict(ARRAYS)[1] if contents is None else contents,
    )
    return forge.zipped(code, contents, **parts)


def one(shape, strides, offset=0, size=6):
    return torch_file(
        mapping({"w": forge.tensor(forge.storage("0", size), shape, strides, offset)})
    )


def kept(kind):
    return torch_file(mapping({"w": forge.tensor(forge.storage("0", 6, kind), (6,), (1,))}))


BAD_TORCH = {
    "past the end": (one((7,), (1,)), UnsafeFileError, "reaches to byte 28 of a storage of 24"),
    "far offset": (one((6,), (1,), offset=1), UnsafeFileError, "reaches to byte 28 of a storage of 24"),
    "far stride": (one((2, 3), (4, 1)), UnsafeFileError, "reaches to byte 28 of a storage of 24"),
    "negative stride": (one((2,), (-1,), offset=1), FileFormatError, "integers from 0 to"),
    "negative offset": (one((2,), (1,), offset=-1), FileFormatError, "integers from 0 to"),
    "negative size": (one((-2,), (1,)), FileFormatError, "integers from 0 to"),
    "fewer strides": (one((2, 3), (1,)), FileFormatError, "a tensor of 2 axes has 1 strides"),
    "negative storage": (one((2,), (1,), size=-6), FileFormatError, "integers from 0 to"),
    "larger storage": (one((2,), (1,), size=7), FileFormatError, "storage '0' must have 28 bytes; it has 24"),
    "smaller storage": (one((2,), (1,), size=5), UnsafeFileError, "has 24 bytes in its zip archive; expected at most 20"),
    "huge storage": (one((2,), (1,), size=2**79 - 1), FileFormatError, "integers from 0 to"),
    "huge stride": (one((2,), (2**79 - 1,)), FileFormatError, "integers from 0 to"),
    "two sizes": (
        torch_file(mapping({"a": forge.tensor(forge.storage("0", 6), (1,), (1,)), "b": forge.tensor(forge.storage("0", 5), (1,), (1,))})),
        FileFormatError,
        "storage '0' is said to have 24 bytes and to have 20",
    ),
    "no storage": (torch_file(contents={"0": bytes(24)}), FileFormatError, "its zip archive lacks 'archive/data/1'"),
    "complex": (kept("ComplexFloatStorage"), FileFormatError, "complex tensors .torch.ComplexFloatStorage., which are not read"),
    "quantised": (kept("QInt8Storage"), FileFormatError, "quantised tensors .torch.QInt8Storage., which are not read"),
    "sparse": (torch_file(name("torch._utils", "_rebuild_sparse_tensor")), FileFormatError, "sparse tensors"),
    "script": (torch_file(extra=[("archive/constants.pkl", b"")]), FileFormatError, "a TorchScript archive"),
    "code": (torch_file(extra=[("archive/code/x.py", b"")]), FileFormatError, "a TorchScript archive"),
    "traversal": (torch_file(extra=[("archive/../../x", b"")]), UnsafeFileError, "a member outside it"),
    "absolute": (torch_file(extra=[("/etc/passwd", b"")]), UnsafeFileError, "a member outside it"),
    "bomb": (
        torch_file(contents={"0": bytes(2**20)}, compression=zipfile.ZIP_DEFLATED),
        UnsafeFileError,
        "'archive/data/0' in its zip archive expands from",
    ),
    "lzma": (torch_file(compression=zipfile.ZIP_LZMA), FileFormatError, "compressed otherwise than torch can read"),
    "byte order": (torch_file(order="middle"), FileFormatError, "its byte order must be little or big; got 'middle'"),
    "content": (
        torch_file().replace(ARRAYS["conv1_w"].tobytes(), bytes(24)),
        FileFormatError,
        "'archive/data/0' is damaged in its zip archive .Bad CRC-32",
    ),
    "comment": (torch_file()[:-2] + b"\1\0!", FileFormatError, "a zip archive ends with its directory"),
    "count": (forge.legacy(*forge.state_dict(ARRAYS, legacy=True), {"0": 6, "1": 4}), FileFormatError, "must have 5 elements; it has 4"),
    "list of storages": (forge.legacy_of(ARRAYS, keys=whole(listed(text("2")))), FileFormatError, "its list of storages"),
    "listed too few": (forge.legacy_of(ARRAYS, keys=whole(listed(text("0")))), FileFormatError, "it lacks storage '1'"),
    "protocol": (forge.legacy_of(ARRAYS, protocol=whole(number(1000))), FileFormatError, "not as one of protocol 1001"),
    "legacy cut": (forge.legacy_of(ARRAYS)[:-1], FileFormatError, "cut short: 20 more bytes should follow, 19 do"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TORCH)
def test_bad_torch_files(case, refused):
    file, error, match = BAD_TORCH[case]
    refused(file, error, match=match)


def patched(file, member, offset, value):
    """The entry of a member in the zip directory, changed."""
    at = file.rindex(b"PK\1\2", 0, file.rindex(member)) + offset
    return file[:at] + value + file[at + len(value) :]


def test_zip_directories_that_lie(refused):
    file = torch_file(extra=[("archive/copy", b"x")])
    start = struct.pack("<I", file.index(b"PK\3\4", 10))
    refused(
        patched(file, b"archive/copy", 42, start), UnsafeFileError, match="overlaps what follows it"
    )
    refused(
        patched(file, b"archive/copy", 42, struct.pack("<I", 5)),
        UnsafeFileError,
        match="overlaps what follows it",
    )
    refused(patched(file, b"archive/copy", 8, b"\1"), match="is encrypted")
    refused(
        patched(file, b"archive/copy", 24, struct.pack("<I", 2)),
        UnsafeFileError,
        match="expands from 1 to 2 bytes",
    )
    long = struct.pack("<I", 2**31)
    refused(
        file[:-10] + long + file[-6:],
        UnsafeFileError,
        match="its zip directory has 2147483648 bytes",
    )


def test_zip_members_have_different_names(refused):
    file = torch_file(extra=[("archive/data/x", b"24")])
    refused(
        file.replace(b"archive/data/x", b"archive/data/0"),
        UnsafeFileError,
        match="several members of the same name",
    )


def test_zip_archives_of_others(refused):
    out = io.BytesIO()
    np.savez(out, a=np.ones(3))
    refused(out.getvalue(), match="torch.save did not write: it has no data.pkl, but 'a.npy'")
    refused(b"PK\5\6" + bytes(18), match="torch.save did not write")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda file: file[:-1], FileFormatError, "a damaged safetensors file"),
        (
            lambda file: file[:50],
            FileFormatError,
            "cut short: its header has .* bytes, of which 42 follow",
        ),
        (
            lambda file: file.replace(b'"F32"', b'"C64"', 1),
            FileFormatError,
            "is of C64, which is not read|a damaged safetensors file",
        ),
        (
            lambda file: file.replace(b"[2,3]", b"[2,9]"),
            FileFormatError,
            "a damaged safetensors file",
        ),
    ],
)
def test_bad_safetensors(change, error, match, refused):
    refused(change(safetensors.numpy.save(ARRAYS)), error, match=match)


def damaged(file):
    """Cut at 80 places; one to three bytes changed, 250 times."""
    rng = random.Random(len(file))
    yield from (file[: len(file) * n // 80] for n in range(80))
    for _ in range(250):
        changed = bytearray(file)
        for _ in range(rng.randint(1, 3)):
            changed[rng.randrange(min(len(file), rng.choice([64, 10**6])))] = rng.choice(
                [0, 1, 46, 128, 255, rng.randrange(256)]
            )
        yield bytes(changed)


@pytest.mark.parametrize("case", GOOD)
def test_damage_gives_an_error_that_names_the_file(case, opened):
    refusals = successes = 0
    for file in damaged(GOOD[case]):
        try:
            opened(file)
        except (FileFormatError, UnsafeFileError) as error:
            refusals += "weights.bin: " in str(error)
        else:
            successes += 1
    assert refusals > 100
    assert refusals + successes == 330
