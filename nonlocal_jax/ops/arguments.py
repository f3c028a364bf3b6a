"""What the public functions of `nonlocal_jax.ops` check of their arguments, before anything is computed."""

from typing import get_args

import jax.numpy as jnp

from nonlocal_jax.types import Array, Instantiation

MOST_ROWS = 2**31 - 1  # positions are counted in int32


def check_instantiation(instantiation: str) -> None:
    """One of the four names."""
    if instantiation not in get_args(Instantiation):
        expected = ", ".join(map(repr, get_args(Instantiation)))
        raise ValueError(f"instantiation must be one of {expected}; got {instantiation!r}.")


def check_scale(scale: float | Array) -> None:
    """One number."""
    if jnp.ndim(scale) != 0:
        raise ValueError(f"scale must be one number; got shape {jnp.shape(scale)}.")


def _floating(name: str, x: Array) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got {x.dtype}.")
    return x


def check_pairs(
    theta_name: str, theta: Array, phi_name: str, phi: Array, key_mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Shapes and dtypes of queries, keys and mask; masked keys become 0, so that not even a NaN in the padding counts."""
    theta, phi = _floating(theta_name, theta), _floating(phi_name, phi)
    if theta.ndim < 2 or phi.ndim != theta.ndim:
        raise ValueError(
            f"{theta_name} must have shape (..., N, d) and {phi_name} (..., M, d), of the same rank; "
            f"got {theta.shape} and {phi.shape}."
        )
    if theta.shape[:-2] != phi.shape[:-2] or theta.shape[-1] != phi.shape[-1]:
        expected = (*theta.shape[:-2], "M", theta.shape[-1])
        raise ValueError(
            f"{phi_name} must have shape ({', '.join(map(str, expected))}), with the leading axes and the channels "
            f"of {theta_name}; got {phi.shape}."
        )
    for name, x, row in ((theta_name, theta, "query"), (phi_name, phi, "key")):
        if not 1 <= x.shape[-2] <= MOST_ROWS:
            raise ValueError(
                f"{name} must hold at least one {row}, and at most {MOST_ROWS:,}; got shape {x.shape}."
            )
    if key_mask is None:
        return theta, phi, None
    key_mask = jnp.asarray(key_mask)
    if key_mask.dtype != jnp.bool_:
        raise TypeError(f"key_mask must be bool, True for a real key; got {key_mask.dtype}.")
    if key_mask.shape != phi.shape[:-1]:
        raise ValueError(
            f"key_mask must have shape {phi.shape[:-1]}, one entry per key; got {key_mask.shape}. "
            "Where keys are pooled, pool the mask with them."
        )
    return theta, _zero_masked(phi, key_mask), key_mask


def check_values(g: Array, phi: Array, key_mask: Array | None) -> Array:
    """A value for each key; those of masked keys become 0."""
    g = _floating("g", g)
    if g.shape[:-1] != phi.shape[:-1]:
        expected = (*phi.shape[:-1], "e")
        raise ValueError(
            f"g must have shape ({', '.join(map(str, expected))}), one value for each of the {phi.shape[-2]} keys; "
            f"got {g.shape}."
        )
    return g if key_mask is None else _zero_masked(g, key_mask)


def check_w_f(w_f: Array | None, theta: Array) -> Array:
    """Weights for the channels of θ and φ."""
    expected = (2 * theta.shape[-1],)
    if w_f is None:
        raise ValueError(f"the concatenation needs w_f of shape {expected}; got None.")
    w_f = _floating("w_f", w_f)
    if w_f.shape != expected:
        raise ValueError(
            f"w_f must have shape {expected}, first for theta, then for phi; got {w_f.shape}."
        )
    return w_f


def _zero_masked(x: Array, key_mask: Array) -> Array:
    return jnp.where(key_mask[..., None], x, 0)
