"""Hostile pickles raise an error: nothing is executed, and no memory is allocated on trust."""

import io
import pickle
import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from weights import forge, samples
from weights.forge import call, dotted, listed, mapping, name, number, sequence, text, whole

from nonlocal_jax.weights import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.pickles import ByteStream, read_pickle

ARRAYS = forge.example()


MARKER = "nonlocal_jax_was_here"


TOUCH = f"touch {MARKER}"


FOREIGN = {  # opcodes that leave one object, and a part of the error
    "os": (call(name("os", "system"), text(TOUCH)), "os.system"),
    "posix": (call(name("posix", "system"), text(TOUCH)), "posix.system"),
    "subprocess": (call(name("subprocess", "Popen"), text(TOUCH)), "subprocess.Popen"),
    "eval": (
        call(name("builtins", "eval"), text("__import__('os').system('" + TOUCH + "')")),
        "builtins.eval",
    ),
    "eval of Python 2": (call(name("__builtin__", "eval"), text("1")), "__builtin__.eval"),
    "set of Python 2": (call(name("__builtin__", "set"), listed()), "__builtin__.set"),
    "getattr": (
        call(name("builtins", "getattr"), name("os", "path"), text("os")),
        "builtins.getattr",
    ),
    "reconstructor": (
        call(name("copy_reg", "_reconstructor"), name("__builtin__", "object")),
        "copy_reg._reconstructor",
    ),
    "f2py": (name("numpy.f2py", "compile"), "numpy.f2py.compile"),
    "numpy runs": (name("numpy.testing._private.utils", "runstring"), "runstring"),
    "numpy load": (name("numpy", "load"), "numpy.load"),
    "another numpy class": (name("numpy", "memmap"), "numpy.memmap"),
    "dotted": (dotted("numpy.core.multiarray", "sys.modules"), "numpy.core.multiarray.sys.modules"),
    "dotted to what is allowed": (
        dotted("numpy", "core.multiarray._reconstruct"),
        "numpy.core.multiarray._reconstruct",
    ),
    "dotted from what is allowed": (
        dotted("collections", "OrderedDict.__init__.__globals__"),
        "OrderedDict.__init__.__globals__",
    ),
    "torch load": (name("torch", "load"), "torch.load"),
    "torch bytes": (
        call(name("torch.storage", "_load_from_bytes"), forge.data(b"")),
        "torch.storage._load_from_bytes",
    ),
    "module": (name("torch.nn.modules.linear", "Linear"), "torch.nn.modules.linear.Linear"),
    "instance": (b"(" + text(TOUCH) + b"ios\nsystem\n", "os.system"),
    "extension 1": (b"\x82\x01", "EXT1"),
    "extension 4": (b"\x84\x01\0\0\0", "EXT4"),
    "text id": (b"Pstorage\n", "PERSID"),
    "buffer": (b"\x97", "NEXT_BUFFER"),
    "set": (b"\x8f", "EMPTY_SET"),
    "long integer": (b"\x8b\xff\xff\xff\x7f", "LONG4"),
    "state of a dict": (b"}" + mapping({"a": number(1)}) + b"b", "sets the state of dict of 0"),
}


MISUSED = {  # of allowed names
    "instance": (b"(icollections\nOrderedDict\n", "INST"),
    "object": (b"(" + name("collections", "OrderedDict") + b"o", "OBJ"),
    "new": (name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
    "new with keywords": (
        name("collections", "OrderedDict") + b")" + mapping({"a": number(1)}) + b"\x92",
        "NEWOBJ_EX",
    ),
    "state of a function": (
        name("_codecs", "encode") + mapping({"__code__": number(1)}) + b"b",
        "sets the state of function",
    ),
    "state of a class": (
        name("numpy", "ndarray") + mapping({"array": number(1)}) + b"b",
        "sets the state of type",
    ),
    "dict from a callable": (
        call(name("collections", "OrderedDict"), name("_codecs", "encode")),
        "OrderedDict must be made of pairs",
    ),
    "other encodings": (
        call(name("_codecs", "encode"), text("x"), text("hex")),
        "_codecs.encode may only be called",
    ),
    "objects": (forge.dtype("O8"), "numpy.dtype.'O8'"),
    "records": (forge.dtype("V8"), "numpy.dtype.'V8'"),
    "letters": (forge.dtype("U8"), "numpy.dtype.'U8'"),
    "list of fields": (call(name("numpy", "dtype"), listed()), "numpy.dtype.'list of 0'"),
    "fields": (
        call(name("numpy", "dtype"), text("f4"))
        + sequence(number(3), text("<"), b"N", listed(), b"N")
        + b"b",
        "state of a numpy dtype",
    ),
    "subclass": (
        call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "dtype"),
            sequence(number(0)),
            text("b"),
        ),
        "for an empty array",
    ),
    "not empty": (
        call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            sequence(number(9)),
            text("b"),
        ),
        "for an empty array",
    ),
    "array of objects": (
        forge.array(ARRAYS["conv1_w"], content=listed()),
        "state of a numpy array",
    ),
    "array filled twice": (
        forge.array(ARRAYS["conv1_w"])
        + sequence(number(1), sequence(), forge.dtype(), b"\x89", forge.data(b"1234"))
        + b"b",
        "state of a numpy array",
    ),
    "scalar object": (
        call(name("numpy.core.multiarray", "scalar"), forge.dtype(), listed()),
        "state of a numpy array",
    ),
}


def weight_files(code):
    """Yields files of every format that are valid except for the object among the weights."""
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


def legacy_files(code):
    """Yields legacy torch files with the object in a pickle where no name is allowed."""
    yield forge.legacy_of(ARRAYS, magic=b"\x80\x02" + forge.MAGIC[2:-1] + code + b"0.")
    for part in ("protocol", "machine", "keys"):
        yield forge.legacy_of(ARRAYS, **{part: whole(code)})


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_names_are_refused_and_nothing_runs(case, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, request = FOREIGN[case]
    for file in [*weight_files(code), *legacy_files(code)]:
        refused(file, UnsafeFileError, match=re.escape(request))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("case", MISUSED)
def test_allowed_names_cannot_be_misused(case, refused):
    code, message = MISUSED[case]
    for file in weight_files(code):
        refused(file, UnsafeFileError, match=message)
    for file in legacy_files(code):
        refused(file, UnsafeFileError)


def test_the_foreign_pickles_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(whole(FOREIGN["posix"][0]))
    assert Path(MARKER).exists()


def test_each_format_has_its_own_names(refused):
    code, contents = forge.state_dict(ARRAYS)
    refused(whole(code), UnsafeFileError, match="it asks for 'torch._utils._rebuild_tensor_v2")
    refused(
        whole(mapping({"w": text("storage") + b"Q"})),
        UnsafeFileError,
        match="refers to data outside itself",
    )
    pair = mapping({"w": sequence(text("module"), text("x")) + b"Q"})
    refused(
        forge.zipped(pair, contents),
        match="refers to tuple of 2 outside itself; expected a whole storage",
    )


LONG = struct.pack("<Q", 2**40)


BOMBS = {
    "bytearray": (
        whole(b"\x96" + LONG, 5),
        FileFormatError,
        "truncated: 1099511627776 more bytes should follow, but only 1 do",
    ),
    "bytes": (whole(b"\x8e" + LONG, 5), FileFormatError, "truncated"),
    "letters": (whole(b"\x8d" + LONG, 5), FileFormatError, "truncated"),
    "shape": (
        whole(forge.array(ARRAYS["conv1_w"], shape=sequence(number(2**60), number(2**60)))),
        FileFormatError,
        "too large to be addressed",
    ),
    "empty": (
        whole(
            forge.array(ARRAYS["conv1_w"], shape=sequence(number(0), number(2**60), number(2**60)))
        ),
        FileFormatError,
        "too large to be addressed",
    ),
    "huge key": (
        whole(b"}I0x" + b"f" * 9999 + b"\nNs"),
        FileFormatError,
        "a number of 64 bits; got int",
    ),
    "axes": (
        whole(forge.array(ARRAYS["conv1_w"], shape=sequence(*[number(1)] * 33))),
        FileFormatError,
        "up to 32 integers",
    ),
    "deep key": (
        whole(b"}" + text("a") + b"\x85" * 100_000 + b"Ns"),
        FileFormatError,
        "must be text or a number of 64 bits; got tuple of 1",
    ),
    "tensor": (
        forge.zipped(
            mapping({"w": forge.tensor(forge.storage("0", 1), (2**30, 2**10), (0, 0))}),
            {"0": b"1234"},
        ),
        UnsafeFileError,
        "its tensors would take 4398046511104 bytes, over max_bytes=8589934592",
    ),
    "storage": (
        forge.zipped(
            mapping({"w": forge.tensor(forge.storage("0", 2**40), (1,), (1,))}), {"0": b"1234"}
        ),
        UnsafeFileError,
        "the storages of its tensors would take 4398046511104 bytes",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")  # checking annotations takes memory and time
@pytest.mark.parametrize("case", BOMBS)
def test_declared_sizes_allocate_no_memory(case, refused):
    file, error, match = BOMBS[case]
    tracemalloc.start()
    refused(file, error, match=match)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(file) + 2**24


def test_the_number_of_steps_is_limited():
    """Copies that a pickle makes of a shared list count as steps, too: 20 of 100 pairs here."""
    pair = sequence(text("a"), b"N")
    copies = [call(name("collections", "OrderedDict"), b"h\0")] * 20
    blobs = {"list": listed(*[pair] * 100) + b"q\0", "dicts": listed(*copies)}
    file = whole(mapping(blobs))
    read_pickle(ByteStream(io.BytesIO(file), len(file)))
    with pytest.raises(UnsafeFileError, match="takes more than 2000 steps"):
        read_pickle(ByteStream(io.BytesIO(file), len(file), max_steps=2_000))
    single_list = whole(mapping({"list": blobs["list"]}))
    read_pickle(ByteStream(io.BytesIO(single_list), len(single_list), max_steps=2_000))


@pytest.mark.usefixtures("as_users_see_it")
def test_shared_and_nested_values_are_cheap(opened):
    lists = [b"](" + (b"h" + bytes([n])) * 100 + b"eq" + bytes([n + 1]) for n in range(50)]
    blobs = {
        "w": forge.array(ARRAYS["conv1_w"]),
        "laughs": listed(b"]q\0", *lists),
        "deep": b"]" * 200_000 + b"a" * 199_999,
        "memo": b"Nr\xff\xff\xff\xff",
    }
    checkpoint = opened(whole(mapping(blobs)))
    samples.assert_arrays(checkpoint.arrays, {"w": ARRAYS["conv1_w"]})
    assert list(checkpoint.ignored) == ["laughs", "deep", "memo"]
