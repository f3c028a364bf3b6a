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


def channels(name: str, shape: tuple[Any, ...], expected: int) -> None:
    """Checks that an array (B, *positions, C) has the `expected` number of channels.

    >>> channels("x", (2, 64, 14, 14), 64)
    Traceback (most recent call last):
    ValueError: x must have 64 channels in its last axis; got shape (2, 64, 14, 14). Axis 1 has 64,
    as in PyTorch: pass jnp.moveaxis(x, 1, -1).
    """
    if shape[-1] != expected:
        raise ValueError(
            f"{name} must have {expected} channels in its last axis; got shape {shape}."
            f"{channels_hint(name, shape, expected)}"
        )


def channels_hint(name: str, shape: tuple[Any, ...], expected: int) -> str:
    """Returns a hint, to be added to an error, if an array has its channels in axis 1."""
    if len(shape) < 3 or shape[1] != expected or shape[-1] == expected:
        return ""
    return f" Axis 1 has {expected}, as in PyTorch: pass jnp.moveaxis({name}, 1, -1)."
