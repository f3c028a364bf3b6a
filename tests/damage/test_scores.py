"""Files of scores that are damaged, or were made to do harm."""

import io
import pickle
import zipfile

import numpy as np
import pytest
from damage.mutation import outcomes

from nonlocal_jax.evaluation import ScoreFolder

ERRORS = (ValueError,)


@pytest.fixture
def part(tmp_path):
    """A file of scores."""
    stored = ScoreFolder(tmp_path)
    for video in (3, 5, 11):
        stored.add(video, {"single": np.linspace(0, 1, 4), "many": np.full(4, 0.25, np.float32)})
    stored.fail(7, "7.mp4: it is damaged.")
    stored.write()
    (file,) = tmp_path.glob("*.npz")
    return file


def test_mutated_files(part, mutated_files):
    found = outcomes(
        lambda file: ScoreFolder(file.parent), part, part.read_bytes(), mutated_files, ERRORS
    )
    print(dict(found))
    assert found["ValueError"] > 0.5 * mutated_files
    assert set(found) == {"read", "ValueError"}


def test_damage_of_the_directory(part):
    whole = part.read_bytes()
    directory = whole.index(b"PK\1\2")
    for place, value, message in (
        (directory + 10, whole[directory + 10] ^ 64, "its arrays must not be compressed"),
        (directory + 6, 255, "zip file version"),
        (directory + 8, whole[directory + 8] | 1, "encrypted"),
    ):
        part.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(
            ValueError, match=rf"(?s){part.name} must be a file of scores: .*{message}.*Delete it"
        ):
            ScoreFolder(part.parent)


GOOD = {"videos": np.arange(2), "failures": np.array("{}"), "single": np.zeros((2, 3))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"videos": np.arange(4)}, r"'single' must be numbers of shape \(4 videos, classes\)"),
        ({"videos": np.array(7)}, "'videos' must be a list of numbers"),
        ({"videos": np.zeros(2)}, "'videos' must be a list of numbers"),
        ({"videos": np.array([0, -1])}, "'videos' must be a list of numbers"),
        ({"failures": np.array("[]")}, "'failures' must be an object of reasons"),
        ({"failures": np.array('{"x": "y"}')}, "'failures' must be an object of reasons"),
        ({"failures": np.array('{"1": 2}')}, "'failures' must be an object of reasons"),
        ({"failures": np.array(3)}, "'failures' must be text"),
        ({"failures": np.array("[" * 100_000)}, "maximum recursion depth"),
        ({"failures": None}, "'failures'"),
        ({"single": None}, "must have scores of its videos"),
        ({"single": np.zeros(2)}, "'single' must be numbers"),
        ({"single": np.full((2, 3), "a")}, "'single' must be numbers"),
        ({"many": np.zeros((3, 3))}, "'many' must be numbers"),
    ],
)
def test_arrays_that_are_no_scores(part, changes, message):
    arrays = {name: array for name, array in (GOOD | changes).items() if array is not None}
    np.savez(part, **arrays)
    with pytest.raises(ValueError, match=rf"{part.name} must be a file of scores: .*{message}"):
        ScoreFolder(part.parent)


def test_files_that_do_not_match(part):
    np.savez(part.with_name("a.npz"), **GOOD)
    with pytest.raises(
        ValueError, match=r"a\.npz must be .*: all videos must have the same scores"
    ):
        ScoreFolder(part.parent)


def test_a_bomb_is_not_unpacked(part):
    np.savez_compressed(part, **GOOD, many=np.zeros((2, 50_000_000), np.uint8))
    assert part.stat().st_size < 1_000_000
    with pytest.raises(ValueError, match=f"{part.name} must be .*must not be compressed"):
        ScoreFolder(part.parent)


def test_a_shape_that_the_file_does_not_hold(part):
    header = io.BytesIO()
    claimed = {"descr": "<f8", "fortran_order": False, "shape": (2, 10**12)}
    np.lib.format.write_array_header_1_0(header, claimed)
    np.savez(part, **GOOD)
    with zipfile.ZipFile(part, "a") as archive:
        archive.writestr("many.npy", header.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=f"{part.name} must be a file of scores: cannot reshape"):
        ScoreFolder(part.parent)


class Harmful:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def test_no_pickle_is_loaded(part):
    np.savez(part, **GOOD)
    with zipfile.ZipFile(part, "a") as archive:
        archive.writestr("many.npy", pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=f"{part.name} must be a file of scores"):
        ScoreFolder(part.parent)
    objects = np.array([[Harmful()]] * 2)
    np.savez(part, **GOOD, many=objects)
    with pytest.raises(ValueError, match="must not hold Python objects"):
        ScoreFolder(part.parent)
