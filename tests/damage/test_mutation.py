import collections
import json

import pytest
from damage import mutation

from nonlocal_jax.files import as_path

DATA = bytes(range(256)) * 5


def test_mutations_differ_and_can_be_repeated():
    versions = list(mutation.mutations(DATA, 200))
    assert versions == list(mutation.mutations(DATA, 200))
    assert versions != list(mutation.mutations(DATA, 200, seed=1))
    assert len({*versions, DATA}) > 180


@pytest.mark.parametrize("change", mutation.CHANGES)
@pytest.mark.parametrize("data", [b"", b"x", DATA])
def test_every_change_takes_any_file(change, data):
    generator = mutation.np.random.default_rng(0)
    versions = [change(data, generator) for _ in range(50)]
    assert all(isinstance(version, bytes) for version in versions)
    assert len(data) < 2 or len(set(versions)) > 1


def read_json(path):
    try:
        return json.loads(as_path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def test_outcomes_are_counted(tmp_path):
    found = mutation.outcomes(read_json, tmp_path / "a.json", b'{"a": [1, 2]}', 200, (ValueError,))
    assert isinstance(found, collections.Counter)
    assert found.total() == 200
    assert min(found["read"], found["ValueError"]) > 10


def test_undocumented_errors_fail(tmp_path):
    with pytest.raises(AssertionError, match=r"mutation 0 of .*a.json, seed 0: KeyError"):
        mutation.outcomes(lambda path: {}["a"], tmp_path / "a.json", DATA, 1, (ValueError,))


def test_errors_must_name_the_file(tmp_path):
    def read(path):
        raise ValueError("damaged")

    with pytest.raises(AssertionError, match="damaged"):
        mutation.outcomes(read, tmp_path / "a.json", DATA, 1, (ValueError,))


def test_slow_readers_fail(tmp_path):
    with pytest.raises(AssertionError, match="took"):
        mutation.outcomes(lambda _: None, tmp_path / "a", DATA, 1, (), seconds=-1.0)
