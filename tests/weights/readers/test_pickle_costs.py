"""Pickles cost what the size of the file explains, and errors escape what a pickle says."""

import io
import pickle
import time

import numpy as np
import pytest
from weights import forge, samples
from weights.forge import call, listed, mapping, name, number, text, whole

from nonlocal_jax.weights import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.readers.pickles import ByteStream, explained_steps, read_pickle

ARRAYS = forge.example()
LONG_TUPLE = b"(" + b"N" * 100_000 + b"tq\2"
NUMBER = forge.storage("0", 6) + number(0) + b"))" + b"\x89N"  # first arguments of a tensor
PAIRS = listed(*[listed(text(str(n)), b"N") for n in range(5_000)])
STEPS = "steps, more than weights ever need"
# A value, the opcodes that copy it again and again, and the error.
REPEATED = {
    "arguments": (
        name("torch._utils", "_rebuild_tensor_v2") + b"q\1(" + NUMBER + LONG_TUPLE[1:],
        b"h\1h\2R0",
        UnsafeFileError,
        STEPS,
    ),
    "arguments with a type": (
        name("torch._utils", "_rebuild_tensor_v3")
        + b"q\1("
        + NUMBER
        + name("torch", "float32")
        + LONG_TUPLE[1:],
        b"h\1h\2R0",
        UnsafeFileError,
        STEPS,
    ),
    "wrong arguments": (
        name("numpy.core.multiarray", "_reconstruct") + b"q\1" + LONG_TUPLE,
        b"h\1h\2R0",
        FileFormatError,
        "its pickle is damaged .TypeError",
    ),
    "pairs": (
        name("collections", "OrderedDict") + b"q\1" + PAIRS + b"\x85q\2",
        b"h\1h\2R",
        UnsafeFileError,
        STEPS,
    ),
    "storages": (LONG_TUPLE, b"h\2Q0", FileFormatError, "expected a whole storage"),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize("case", REPEATED)
def test_repeated_copies_are_refused(case, refused):
    value, copies, error, match = REPEATED[case]
    code, contents = forge.state_dict(ARRAYS)
    tree = code[:-1] + text("x") + b"(" + value + copies * 50_000 + b"tu"
    start = time.process_time()
    refused(forge.zipped(tree, contents), error, match=match)
    assert time.process_time() - start < 10


@pytest.mark.usefixtures("as_users_see_it")
def test_steps_are_limited_by_the_size():
    """A deflated pickle may take 250,000 steps more than its file has bytes."""
    file = whole(b"](" + b"}" * 300_000 + b"e")
    read_pickle(ByteStream(io.BytesIO(file), len(file), explained_steps(60_000)))
    with pytest.raises(UnsafeFileError, match=f"takes more than 290000 {STEPS}"):
        read_pickle(ByteStream(io.BytesIO(file), len(file), explained_steps(40_000)))
    assert explained_steps(2**30) == 5_000_000


def test_arrays_may_share_their_content_as_far_as_the_size_explains(opened, refused):
    content = np.zeros(10**6, "u1")
    shared = pickle.dumps(dict.fromkeys(map(str, range(30)), content))
    assert len(opened(shared).arrays) == 30
    refused(
        pickle.dumps(dict.fromkeys(map(str, range(40)), content)),
        UnsafeFileError,
        match="its arrays would take 40000000 bytes, which its size of 10[0-9]{5} bytes does not",
    )
    # 40 arrays of the same bytes.
    first = forge.array(content, "u1", content=forge.data(bytes(10**6)) + b"q\7")
    others = {str(n): forge.array(content, "u1", content=b"h\7") for n in range(39)}
    refused(
        whole(mapping({"first": first} | others)),
        UnsafeFileError,
        match="its arrays would take 40000000 bytes, which its size of",
    )


def test_numbers_are_keys_by_their_text(opened, refused):
    """A dict of numbers could be made of those whose hashes collide."""
    arrays = {n: np.full(3, n) for n in (7, 2**64 - 1, -1, 0.5)}
    found = opened(pickle.dumps(arrays)).arrays
    samples.assert_arrays(found, {str(key): value for key, value in arrays.items()})
    refused(pickle.dumps({1: arrays[7], "1": arrays[7]}), match="two of its entries have the same")
    file = pickle.dumps({"x": {1: "a", 2.5: "b", "1": "c", None: "d", b"e": "f"}})
    tree = read_pickle(ByteStream(io.BytesIO(file), len(file)))
    assert tree == {"x": {("1",): "a", ("2.5",): "b", "1": "c", None: "d", b"e": "f"}}


def test_long_numbers_are_read_in_linear_time(refused):
    """Decimal digits take quadratic time, so Python limits them; others do not."""
    for code in (
        b"L" + b"9" * 10**6 + b"L\n",
        b"I" + b"9" * 10**6 + b"\n",
        b"F1" + b"0" * 10**6 + b"\n",
    ):
        start = time.process_time()
        refused(whole(b"}" + text("a") + code + b"s", 2))
        assert time.process_time() - start < 2


CONTROL = [
    name("os\x1b[2J", "sys\x07tem"),
    b"S\x1b\n",
    b"S'\\\x1b'\n",
    b"I\x1b[2J\n",
    b"I\x1b[2J",
    call(name("numpy", "dtype"), text("\x1b[2J")),
    b"\x1b",
]


@pytest.mark.parametrize("code", CONTROL)
def test_errors_escape_what_the_file_says(code, opened):
    with pytest.raises((FileFormatError, UnsafeFileError)) as raised:
        opened(whole(mapping({"w": code})))
    assert str(raised.value).isprintable()
