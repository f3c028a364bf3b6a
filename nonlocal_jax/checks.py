"""Argument checks that every part of the package shares.

Each raises a `ValueError` that names the argument, what was expected, and what was passed.
"""

from collections.abc import Collection
from typing import Any


def one_of(name: str, value: Any, options: Collection[Any]) -> None:
    """Checks that `value` is one of `options`.

    >>> one_of("axes", "depth", ("space", "time"))
    Traceback (most recent call last):
    ValueError: axes must be one of 'space', 'time'; got 'depth'.
    """
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}.")


def at_least(name: str, value: Any, minimum: int | float) -> None:
    """Checks that the number `value` is not smaller than `minimum`.

    >>> at_least("batch_size", 0, 1)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1; got 0.
    """
    if not value >= minimum:  # written so that NaN fails as well
        raise ValueError(f"{name} must be at least {minimum}; got {value}.")
