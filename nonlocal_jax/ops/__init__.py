"""The four pairwise functions of the paper as pure functions of arrays.

    y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)                                                    (Eq. 1)

θ is what attention calls the query, φ the key and g the value. `implementation` names how the sum is computed; all
implementations agree with `ops/definition.py`, which is called "dense". "auto" chooses.
"""

from typing import Literal, get_args

import jax.numpy as jnp

from nonlocal_jax.ops import definition
from nonlocal_jax.types import (
    Affinity,
    Array,
    ConcatenationWeights,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)

Implementation = Literal["auto", "dense"]

__all__ = ["Implementation", "affinity", "concatenation", "dot_product", "embedded_gaussian", "gaussian"]


def gaussian(
    x: Queries,
    keys: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
) -> Responses:
    """Gaussian: the response of each position by the similarity of the features themselves.

    f(x_i, x_j) = exp(x_i · x_j), C(x) = Σ_j f(x_i, x_j)                                   (Eq. 2)

    Args:
        x: (..., N, c), one row for each position that gets a response.
        keys: (..., M, c), the same features at the positions that are summed; `x` itself, or `x` subsampled.
        g: (..., M, e), the values.
        key_mask: (..., M) of bool. A key that is False is in neither the sum nor C(x), whatever it holds; as a query, the
            same position still needs finite features.
        implementation: how it is computed, never what: "auto" or "dense".

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no keys, or an unknown implementation.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 2.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(gaussian(x, x, jnp.array([[1.0], [0.0]])))  # e / (e + 1) and 1 / (e + 1)
    [[0.7310586 ]
     [0.26894143]]
    """
    _check_implementation("gaussian", implementation)
    x, keys, key_mask = _check_pairs("x", x, "keys", keys, key_mask)
    return definition.respond(definition.gaussian(x, keys, key_mask), _check_values(g, keys, key_mask))


def embedded_gaussian(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
) -> Responses:
    """Embedded Gaussian: softmax attention.

    f(x_i, x_j) = exp(scale · θ(x_i) · φ(x_j)), C(x) = Σ_j f(x_i, x_j)                     (Eq. 3)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        scale: multiplies the logits. The paper has 1; video-nonlocal-net and PySlowFast have d^-0.5.
        key_mask: (..., M) of bool. A key that is False is in neither the sum nor C(x).
        implementation: how it is computed, never what: "auto" or "dense".

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no keys, or an unknown implementation.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 3.

    >>> import jax.numpy as jnp
    >>> theta, phi = jnp.array([[2.0]]), jnp.array([[5.0], [5.0], [9.0]])
    >>> g = jnp.array([[1.0], [3.0], [7.0]])
    >>> print(embedded_gaussian(theta, phi, g, key_mask=jnp.array([True, True, False])))
    [[2.]]
    """
    _check_implementation("embedded_gaussian", implementation)
    _check_scale(scale)
    theta, phi, key_mask = _check_pairs("theta", theta, "phi", phi, key_mask)
    return definition.respond(definition.embedded_gaussian(theta, phi, scale, key_mask), _check_values(g, phi, key_mask))


def dot_product(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
) -> Responses:
    """Dot product: the embedded similarity itself, without a softmax.

    f(x_i, x_j) = θ(x_i) · φ(x_j), C(x) = N                                                (Eq. 4)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        key_mask: (..., M) of bool. A key that is False is neither summed nor counted in N.
        implementation: how it is computed, never what: "auto" or "dense".

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no keys, or an unknown implementation.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 4. N is the number of keys that are summed, as in every published implementation.

    >>> import jax.numpy as jnp
    >>> dot_product(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]))
    Array([[4.]], dtype=float32)
    """
    _check_implementation("dot_product", implementation)
    theta, phi, key_mask = _check_pairs("theta", theta, "phi", phi, key_mask)
    return definition.respond(definition.dot_product(theta, phi, key_mask), _check_values(g, phi, key_mask))


def concatenation(
    theta: Queries,
    phi: Keys,
    g: Values,
    w_f: ConcatenationWeights,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
) -> Responses:
    """Concatenation: a learned projection of each pair, as in Relation Networks.

    f(x_i, x_j) = ReLU(w_f · [θ(x_i), φ(x_j)]), C(x) = N                                   (Eq. 5)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        w_f: (2d,), the projection of a pair to a number; the first half meets θ, the second φ.
        key_mask: (..., M) of bool. A key that is False is neither summed nor counted in N.
        implementation: how it is computed, never what: "auto" or "dense".

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no keys, or an unknown implementation.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 5. N is the number of keys that are summed, as in every published implementation.

    >>> import jax.numpy as jnp
    >>> w_f = jnp.array([1.0, -1.0])
    >>> concatenation(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]), w_f)
    Array([[0.5]], dtype=float32)
    """
    _check_implementation("concatenation", implementation)
    theta, phi, key_mask = _check_pairs("theta", theta, "phi", phi, key_mask)
    w_f = _check_w_f(w_f, theta)
    return definition.respond(definition.concatenation(theta, phi, w_f, key_mask), _check_values(g, phi, key_mask))


def affinity(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    w_f: ConcatenationWeights | None = None,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
) -> Affinity:
    """The map f(x_i, x_j) / C(x): how much each position i takes from each position j.

    y = affinity @ g is Eq. 1. Rows of the two Gaussians are non-negative and sum to 1; those of the dot product are signed;
    those of the concatenation are non-negative and unbounded.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        theta: (..., N, d), the queries; for the Gaussian, x.
        phi: (..., M, d), the keys; for the Gaussian, x or x subsampled.
        w_f: (2d,), for the concatenation only.
        scale: multiplies the logits of the embedded Gaussian.
        key_mask: (..., M) of bool. The column of a key that is False is 0.

    Returns:
        (..., N, M), float32 or wider.

    Raises:
        ValueError: an unknown instantiation, shapes that do not fit, no keys, or `w_f` or `scale` where none belongs.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.1, Eq. 1.

    >>> import jax.numpy as jnp
    >>> affinity("dot_product", jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]))
    Array([[1., 3.]], dtype=float32)
    """
    if instantiation not in get_args(Instantiation):
        raise ValueError(f"instantiation must be one of {_listed(Instantiation)}; got {instantiation!r}.")
    if w_f is not None and instantiation != "concatenation":
        raise ValueError(f"w_f belongs to the concatenation; {instantiation} has none.")
    if not (isinstance(scale, int | float) and scale == 1) and instantiation != "embedded_gaussian":
        raise ValueError(f"scale belongs to the embedded Gaussian; {instantiation} has none.")
    _check_scale(scale)
    theta, phi, key_mask = _check_pairs("theta", theta, "phi", phi, key_mask)
    match instantiation:
        case "gaussian":
            return definition.gaussian(theta, phi, key_mask)
        case "embedded_gaussian":
            return definition.embedded_gaussian(theta, phi, scale, key_mask)
        case "dot_product":
            return definition.dot_product(theta, phi, key_mask)
        case "concatenation":
            return definition.concatenation(theta, phi, _check_w_f(w_f, theta), key_mask)


def _listed(literal: object) -> str:
    return ", ".join(map(repr, get_args(literal)))


def _check_implementation(instantiation: Instantiation, implementation: str) -> None:
    if implementation not in get_args(Implementation):
        expected = _listed(Implementation)
        raise ValueError(f"implementation of {instantiation} must be one of {expected}; got {implementation!r}.")


def _check_scale(scale: float | Array) -> None:
    if jnp.ndim(scale) != 0:
        raise ValueError(f"scale must be one number; got shape {jnp.shape(scale)}.")


def _floating(name: str, x: Array) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point; got {x.dtype}.")
    return x


def _check_pairs(
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
    if phi.shape[-2] == 0:
        raise ValueError(f"{phi_name} must hold at least one key; got shape {phi.shape}.")
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


def _check_values(g: Array, phi: Array, key_mask: Array | None) -> Array:
    g = _floating("g", g)
    if g.shape[:-1] != phi.shape[:-1]:
        expected = (*phi.shape[:-1], "e")
        raise ValueError(
            f"g must have shape ({', '.join(map(str, expected))}), one value for each of the {phi.shape[-2]} keys; "
            f"got {g.shape}."
        )
    return g if key_mask is None else _zero_masked(g, key_mask)


def _check_w_f(w_f: Array | None, theta: Array) -> Array:
    expected = (2 * theta.shape[-1],)
    if w_f is None:
        raise ValueError(f"the concatenation needs w_f of shape {expected}; got None.")
    w_f = _floating("w_f", w_f)
    if w_f.shape != expected:
        raise ValueError(f"w_f must have shape {expected}, first for theta, then for phi; got {w_f.shape}.")
    return w_f


def _zero_masked(x: Array, key_mask: Array) -> Array:
    return jnp.where(key_mask[..., None], x, 0)
