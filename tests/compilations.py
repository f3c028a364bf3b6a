"""Counts what XLA compiles."""

import contextlib

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"  # reported for cached programs as well
_names = []


def _listen(event, seconds, fun_name="unknown", **_):
    if event == _COMPILED:
        _names.append(fun_name)


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def compilations():
    """Context manager that gives the list of the functions that are compiled inside it."""
    names = []
    before = len(_names)
    try:
        yield names
    finally:
        names += _names[before:]


def compiles_nothing_again(function):
    """Calls a function twice, and checks that only the first call compiles."""
    with compilations() as first:
        function()
    assert first, "the first call compiled nothing, so this cannot fail"
    with compilations() as second:
        result = function()
    assert second == [], f"compiled again: {second}"
    return result
