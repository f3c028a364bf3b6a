"""Damaged files of weights raise the documented errors, in bounded time."""

import collections
import itertools
import json
import pickle
import pickletools
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from damage import mutation
from weights import forge

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read

# Checking annotations takes ten times longer than reading.
pytestmark = pytest.mark.usefixtures("as_users_see_it")

ERRORS = (FileFormatError, UnsafeFileError)
SECONDS = 5.0
ARRAYS = forge.example() | {"steps": np.array([[7], [11]])}
PICKLES = {
    **{f"protocol {n}": pickle.dumps({"blobs": ARRAYS, "lr": 0.1}, n) for n in (0, 4)},
    "Python 2": forge.python2(forge.example(), 2),
}
FILES = {
    **{f"caffe2, {name}": data for name, data in PICKLES.items()},
    "torch": forge.zip_of(ARRAYS),
    "torch legacy": forge.legacy_of(ARRAYS),
    "safetensors": safetensors.numpy.save(ARRAYS, {"format": "pt"}),
}
# Opcodes that the pickles above lack: other types, other ways to write them, and memo entries.
FOREIGN_OPCODES = [
    *(bytes([code]) for code in b"N\x88()]}012tldeaRboQ\x81\x85\x86\x87\x8f\x91\x93\x94"),
    *(b"h\0", b"h\1", b"h\2", b"h\5", b"q\0", b"q\1", b"g3\n", b"p4\n", b"r\xff\xff\xff\xff"),
    *(b"K\0", b"J\xff\xff\xff\xff", b"\x8a\4\xff\xff\xff\x7f", b"G\x7f\xf0\0\0\0\0\0\0"),
    *(b"I01\n", b"L99999999999999999999L\n", b"F-1e999\n", b"V\\ud800\n", b"S'a'\n", b"U\0"),
    *(b"X\0\0\0\0", b"C\4abcd", b"\x96\4\0\0\0\0\0\0\0abcd", b"ccollections\nOrderedDict\n"),
    *(b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"ctorch\nFloatStorage\n"),
]


def check_counts(counts, total):
    """Checks that every file gave an outcome, and that the mutations did damage."""
    print(dict(counts))  # shown by `pytest -s`
    assert counts.total() == total
    assert total < 100 or total - counts["read"] > total / 10


@pytest.mark.parametrize("name", FILES)
def test_bytes(name, tmp_path, mutated_files):
    counts = mutation.outcomes(
        read, tmp_path / "weights.bin", FILES[name], mutated_files, ERRORS, seconds=SECONDS
    )
    check_counts(counts, mutated_files)


def rebuilt(build):
    """Returns a reader of files that are built from a mutated part."""

    def read_rebuilt(path):
        path.write_bytes(build(path.read_bytes()))
        return read(path)

    return read_rebuilt


def test_pickles_in_archives(tmp_path, mutated_files):
    """The archive around the pickle is undamaged, so that its check sums are right."""
    code, contents = forge.state_dict(ARRAYS)

    def archive(part):
        return forge.zipped(part[2:-1], contents)

    path = tmp_path / "weights.bin"
    counts = mutation.outcomes(
        rebuilt(archive), path, forge.whole(code), mutated_files, ERRORS, seconds=SECONDS
    )
    check_counts(counts, mutated_files)


def test_headers_of_safetensors(tmp_path, mutated_files):
    """The length of the header is right."""
    data = FILES["safetensors"]
    length = int.from_bytes(data[:8], "little")

    def file(header):
        return len(header).to_bytes(8, "little") + header + data[8 + length :]

    path, header = tmp_path / "weights.bin", data[8 : 8 + length]
    counts = mutation.outcomes(rebuilt(file), path, header, mutated_files, ERRORS, seconds=SECONDS)
    check_counts(counts, mutated_files)


def opcodes(code):
    """Returns the opcodes of a pickle, each with its argument."""
    starts = [start for _, _, start in pickletools.genops(code)]
    return [code[a:b] for a, b in itertools.pairwise([*starts, len(code)])]


CODE, CONTENTS = forge.state_dict(ARRAYS)
LEGACY_CODE, _ = forge.state_dict(ARRAYS, legacy=True)
SIZES = {str(key): value.size for key, value in enumerate(ARRAYS.values())}
PROGRAMS = {
    **{f"caffe2, {name}": (data, lambda code: code) for name, data in PICKLES.items()},
    "torch": (forge.whole(CODE), lambda code: forge.zipped(code[2:-1], CONTENTS)),
    "torch legacy": (
        forge.whole(LEGACY_CODE),
        lambda code: forge.legacy(code[2:-1], CONTENTS, SIZES),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_opcodes(name, tmp_path, mutated_files):
    """Opcodes are left out, repeated, exchanged and moved as a whole."""
    code, build = PROGRAMS[name]
    own = opcodes(code)
    known = [*own, *FOREIGN_OPCODES]
    assert len(known) < 256

    def spliced(numbers):
        return build(b"".join(known[number % len(known)] for number in numbers))

    path, numbers = tmp_path / "weights.bin", bytes(range(len(own)))
    counts = mutation.outcomes(
        rebuilt(spliced), path, numbers, mutated_files, ERRORS, seconds=SECONDS
    )
    check_counts(counts, mutated_files)


@pytest.fixture(scope="module", params=["zarr", "zarr3", "ocdbt"])
def checkpoint(request, tmp_path_factory):
    """A folder of Orbax, in each of the three ways in which arrays are stored."""
    import orbax.checkpoint as ocp

    folder = tmp_path_factory.mktemp("orbax") / request.param
    tree = {"conv": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(5, jnp.bfloat16)}, "step": 3}
    options = {"use_ocdbt": request.param == "ocdbt", "use_zarr3": request.param == "zarr3"}
    with ocp.PyTreeCheckpointer(**options) as checkpointer:
        checkpointer.save(folder, tree)
    return folder


def kind(file):
    """Returns the kind of a file, given its path in the folder; "" if it is not read."""
    if file.name in ("_METADATA", "manifest.ocdbt", ".zarray", "zarr.json"):
        return "" if file.parts[0].startswith("ocdbt.process") else file.name
    is_content = file.parts[0] in ("d", "conv.kernel", "conv.bias")
    return "content" if is_content else ""


def test_files_of_orbax(checkpoint, tmp_path, mutated_files):
    folder = tmp_path / "folder"
    shutil.copytree(checkpoint, folder)
    assert set(read(folder).arrays) == {"conv/kernel", "conv/bias"}
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]

    def read_folder(file):
        try:
            return read(folder)
        except ERRORS as error:
            # The error names the folder, where `outcomes` expects the file.
            raise type(error)(str(error).replace(f"{folder}: ", f"{file.name}: ")) from error

    count = -(-mutated_files // (10 * len(files)))
    refused = collections.Counter()
    for file in files:
        data, name = file.read_bytes(), kind(file.relative_to(folder))
        # A few mutations of any file are harmless.
        number = max(count, 10) if name else count
        counts = mutation.outcomes(read_folder, file, data, number, ERRORS, seconds=SECONDS)
        file.write_bytes(data)
        assert counts.total() == number
        refused[name] += counts.total() - counts["read"]
        print(file.relative_to(folder), dict(counts))
    assert refused.pop("") == 0
    kinds = {kind(file.relative_to(folder)) for file in files} - {""}
    assert len(kinds) == 3
    assert set(+refused) == kinds, refused
    assert json.loads((folder / "_METADATA").read_bytes())
