"""Errors of one process are raised by all, in place of waiting for it."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from nonlocal_jax.training.distributed import on_every_process


class MinorError(Exception):
    """An error that another process may outrank."""


class MajorError(Exception):
    """An error that is listed last."""


def raising(error):
    def read():
        if error is None:
            return "content"
        raise error

    return read


@pytest.fixture
def processes(monkeypatch):
    """Returns a function that sets which process this is, and the errors of all."""

    def set_up(own, errors):
        kinds = [
            0 if error is None else 1 + (MinorError, MajorError).index(type(error))
            for error in errors
        ]

        def gather(kind):
            assert kind.tolist() == [kinds[own]]
            return np.array(kinds)[:, None]

        def broadcast(buffer, is_source):
            source = kinds.index(max(kinds))
            assert is_source == (source == own)
            text = str(errors[source]).encode()
            return np.frombuffer(text.ljust(len(buffer), b"\0"), np.uint8)

        monkeypatch.setattr(jax, "process_count", lambda: len(errors))
        monkeypatch.setattr(jax, "process_index", lambda: own)
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)

    return set_up


@pytest.mark.parametrize("own", range(4))
def test_the_error_that_is_listed_last_is_raised_by_all(own, processes):
    errors = [
        None,
        MinorError("the file is short"),
        MajorError("no connection"),
        MinorError("it is empty"),
    ]
    processes(own, errors)
    with pytest.raises(MajorError, match="no connection") as raised:
        on_every_process(raising(errors[own]), MinorError, MajorError)
    assert (str(raised.value) == "process 2: no connection") == (own != 2)


@pytest.mark.parametrize("own", range(2))
def test_all_succeed(own, processes):
    processes(own, [None, None])
    assert on_every_process(raising(None), MinorError, MajorError) == "content"


def test_other_errors_are_not_shared(processes):
    processes(0, [None, None])
    with pytest.raises(KeyError):
        on_every_process(raising(KeyError("name")), MinorError)
