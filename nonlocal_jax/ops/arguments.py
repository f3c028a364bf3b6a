"""Checks of the arguments of the public functions, before anything is computed."""

from typing import get_args

import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.types import Array, Instantiation

MAX_ROWS = 2**31 - 1  # positions are counted in int32


def check_instantiation(instantiation: str) -> None:
    """Checks that `instantiation` names one of the four pairwise functions."""
    checks.one_of("instantiation", instantiation, get_args(Instantiation))


def check_scale(scale: float | Array) -> float | Array:
    """Checks that `scale` is one number, and converts it to a float or a JAX array."""
    if isinstance(scale, int | float):
        return float(scale)
    if jnp.ndim(scale) != 0:
        raise ValueError(f"scale must be one number; got an array of shape {jnp.shape(scale)}.")
    return _to_array(scale)


def check_pairs(
    theta_name: str, theta: Array, phi_name: str, phi: Array, key_mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Checks shapes and dtypes of queries, keys and mask, and converts them to JAX arrays."""
    theta, phi = _floating(theta_name, theta), _floating(phi_name, phi)
    if theta.ndim < 2 or phi.ndim != theta.ndim:
        raise ValueError(
            f"{theta_name} must have shape (..., N, d) and {phi_name} (..., M, d), of the same "
            f"rank; got {theta.shape} and {phi.shape}."
        )
    if theta.shape[:-2] != phi.shape[:-2] or theta.shape[-1] != phi.shape[-1]:
        expected = _shape_text(*theta.shape[:-2], "M", theta.shape[-1])
        raise ValueError(
            f"{phi_name} must have shape {expected}, with the leading axes and the channels of "
            f"{theta_name}; got {phi.shape}."
        )
    for name, x, row in ((theta_name, theta, "query"), (phi_name, phi, "key")):
        rows = x.shape[-2]
        if isinstance(rows, int) and not 1 <= rows <= MAX_ROWS:  # not a symbolic one
            raise ValueError(
                f"{name} must have at least one {row} and at most {MAX_ROWS:,}; "
                f"got shape {x.shape}."
            )
    return theta, phi, None if key_mask is None else _check_mask(key_mask, phi)


def check_values(g: Array, phi: Array) -> Array:
    """Checks that there is one value for each key, and converts them to a JAX array."""
    g = _floating("g", g)
    if g.shape[:-1] != phi.shape[:-1]:
        expected = _shape_text(*phi.shape[:-1], "e")
        raise ValueError(
            f"g must have shape {expected}, one value for each of the {phi.shape[-2]} keys; "
            f"got {g.shape}."
        )
    return g


def check_w_f(w_f: Array | None, theta: Array) -> Array:
    """Checks that `w_f` has a weight for each channel of θ and of φ."""
    expected = (2 * theta.shape[-1],)
    if w_f is None:
        raise ValueError(f"The concatenation needs w_f of shape {expected}; got None.")
    w_f = _floating("w_f", w_f)
    if w_f.shape != expected:
        raise ValueError(
            f"w_f must have shape {expected}, first the weights of theta, then those of phi; "
            f"got {w_f.shape}."
        )
    return w_f


def _check_mask(key_mask: Array, phi: Array) -> Array:
    key_mask = _to_array(key_mask)
    if key_mask.dtype != jnp.bool_:
        raise TypeError(f"key_mask must be bool, True for a real key; got {key_mask.dtype}.")
    if key_mask.shape != phi.shape[:-1]:
        raise ValueError(
            f"key_mask must have shape {phi.shape[:-1]}, one entry per key; got {key_mask.shape}. "
            "If the keys are pooled, pool the mask with them."
        )
    return key_mask


def _floating(name: str, x: Array) -> Array:
    x = _to_array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got {x.dtype}.")
    return x


def _to_array(x: Array) -> Array:
    # `jnp.asarray` takes as long as a small jitted function, even if there is nothing to convert.
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _shape_text(*sizes: int | str) -> str:
    return f"({', '.join(map(str, sizes))})"
