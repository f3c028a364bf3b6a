"""The four pairwise functions of the paper as pure functions of arrays.

    y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)                                                    (Eq. 1)

θ is what attention calls the query, φ the key and g the value. `implementation` names how the sum is computed; all
implementations agree with `ops/definition.py`, which is called "dense":

| implementation | of | time | memory |
|---|---|---|---|
| "dense" | all | N·M·(d + e) | N·M |
| "streaming" | the two Gaussians | N·M·(d + e) | (N + M)·(d + e) |
| "cudnn" | the two Gaussians, in half precision on NVIDIA GPUs | N·M·(d + e) | (N + M)·(d + e) |
| "reassociated" | the dot product | (N + M)·d·e | d·e |
| "sorted" | the concatenation | (N + M)·(log M + e) | (N + M)·e |

"auto" takes the one that `ops/cost.py` forecasts to be the fastest; `explain` tells which and why. All have gradients;
forward-mode differentiation (`jax.jvp`) wants "dense" or "reassociated". With `axis_name`, positions are split over devices
(`ops/sharded.py`).
"""

import math
from typing import Any

import jax

from nonlocal_jax.ops import arguments, cost, definition, machine, sharded, softmax
from nonlocal_jax.ops import concatenation as sorted_keys
from nonlocal_jax.ops.cost import Explanation, Implementation
from nonlocal_jax.ops.dot_product import reassociated
from nonlocal_jax.types import (
    Affinity,
    AffinityToAll,
    Array,
    ConcatenationWeights,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)

__all__ = [
    "Explanation",
    "Implementation",
    "affinity",
    "concatenation",
    "dot_product",
    "embedded_gaussian",
    "explain",
    "gaussian",
]

Shaped = Array | jax.ShapeDtypeStruct


def gaussian(
    x: Queries,
    keys: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Gaussian: the response of each position by the similarity of the features themselves.

    f(x_i, x_j) = exp(x_i · x_j), C(x) = Σ_j f(x_i, x_j)                                   (Eq. 2)

    Args:
        x: (..., N, c), one row for each position that gets a response.
        keys: (..., M, c), the same features at the positions that are summed; `x` itself, or `x` subsampled.
        g: (..., M, e), the values.
        key_mask: (..., M) of bool. A key that is False is in neither the sum nor C(x), whatever it holds; as a query, the
            same position still needs finite features.
        implementation: how it is computed, never what.
        axis_name: the mapped axis over whose devices the positions are split; queries, keys, values and mask are then
            this device's, and the keys of all are summed.

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no queries or keys, or an implementation that is unknown or cannot serve.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 2.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(gaussian(x, x, jnp.array([[1.0], [0.0]])))  # e / (e + 1) and 1 / (e + 1)
    [[0.7310586 ]
     [0.26894143]]
    """
    x, keys, key_mask = arguments.check_pairs("x", x, "keys", keys, key_mask)
    g = arguments.check_values(g, keys, key_mask)
    return _run("gaussian", x, keys, g, key_mask, implementation, axis_name)


def embedded_gaussian(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Embedded Gaussian: softmax attention.

    f(x_i, x_j) = exp(scale · θ(x_i) · φ(x_j)), C(x) = Σ_j f(x_i, x_j)                     (Eq. 3)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        scale: multiplies the logits. The paper has 1; video-nonlocal-net and PySlowFast have d^-0.5.
        key_mask: (..., M) of bool. A key that is False is in neither the sum nor C(x).
        implementation: how it is computed, never what.
        axis_name: the mapped axis over whose devices the positions are split; queries, keys, values and mask are then
            this device's, and the keys of all are summed.

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no queries or keys, or an implementation that is unknown or cannot serve.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 3.

    >>> import jax.numpy as jnp
    >>> theta, phi = jnp.array([[2.0]]), jnp.array([[5.0], [5.0], [9.0]])
    >>> g = jnp.array([[1.0], [3.0], [7.0]])
    >>> print(embedded_gaussian(theta, phi, g, key_mask=jnp.array([True, True, False])))
    [[2.]]
    """
    arguments.check_scale(scale)
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    g = arguments.check_values(g, phi, key_mask)
    return _run(
        "embedded_gaussian", theta, phi, g, key_mask, implementation, axis_name, scale=scale
    )


def dot_product(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Dot product: the embedded similarity itself, without a softmax.

    f(x_i, x_j) = θ(x_i) · φ(x_j), C(x) = N                                                (Eq. 4)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        key_mask: (..., M) of bool. A key that is False is neither summed nor counted in N.
        implementation: how it is computed, never what.
        axis_name: the mapped axis over whose devices the positions are split; queries, keys, values and mask are then
            this device's, and the keys of all are summed.

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no queries or keys, or an implementation that is unknown or cannot serve.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 4. N is the number of keys that are summed, as in every published implementation.

    >>> import jax.numpy as jnp
    >>> dot_product(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]))
    Array([[4.]], dtype=float32)
    """
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    g = arguments.check_values(g, phi, key_mask)
    return _run("dot_product", theta, phi, g, key_mask, implementation, axis_name)


def concatenation(
    theta: Queries,
    phi: Keys,
    g: Values,
    w_f: ConcatenationWeights,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Concatenation: a learned projection of each pair, as in Relation Networks.

    f(x_i, x_j) = ReLU(w_f · [θ(x_i), φ(x_j)]), C(x) = N                                   (Eq. 5)

    Args:
        theta: (..., N, d), the embedded queries θ(x_i).
        phi: (..., M, d), the embedded keys φ(x_j).
        g: (..., M, e), the values.
        w_f: (2d,), the projection of a pair to a number; the first half meets θ, the second φ.
        key_mask: (..., M) of bool. A key that is False is neither summed nor counted in N.
        implementation: how it is computed, never what.
        axis_name: the mapped axis over whose devices the positions are split; queries, keys, values and mask are then
            this device's, and the keys of all are summed.

    Returns:
        (..., N, e) in g's dtype. A query whose keys are all masked gets 0.

    Raises:
        ValueError: shapes that do not fit, no queries or keys, or an implementation that is unknown or cannot serve.
        TypeError: inputs that are not floating point, or a mask that is not bool.

    Source: section 3.2, Eq. 5. N is the number of keys that are summed, as in every published implementation.

    >>> import jax.numpy as jnp
    >>> w_f = jnp.array([1.0, -1.0])
    >>> concatenation(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]), w_f)
    Array([[0.5]], dtype=float32)
    """
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    w_f = arguments.check_w_f(w_f, theta)
    g = arguments.check_values(g, phi, key_mask)
    return _run("concatenation", theta, phi, g, key_mask, implementation, axis_name, w_f=w_f)


def affinity(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    w_f: ConcatenationWeights | None = None,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    axis_name: str | None = None,
) -> Affinity | AffinityToAll:
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
        axis_name: the mapped axis over whose devices the positions are split; rows are then of this device's queries, columns
            of the keys of all.

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
    arguments.check_instantiation(instantiation)
    if w_f is not None and instantiation != "concatenation":
        raise ValueError(f"w_f belongs to the concatenation; {instantiation} has none.")
    if not (isinstance(scale, int | float) and scale == 1) and instantiation != "embedded_gaussian":
        raise ValueError(f"scale belongs to the embedded Gaussian; {instantiation} has none.")
    arguments.check_scale(scale)
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    if instantiation == "concatenation":
        w_f = arguments.check_w_f(w_f, theta)
    if axis_name is not None:
        key_mask, phi = sharded.gather(axis_name, key_mask, phi)
    return _affinity(instantiation, theta, phi, key_mask, scale, w_f)


def explain(
    instantiation: Instantiation,
    theta: Shaped,
    phi: Shaped,
    g: Shaped,
    *,
    masked: bool = False,
    implementation: Implementation = "auto",
    backend: str | None = None,
) -> Explanation:
    """Which implementation runs on arrays of these shapes, and why; nothing is computed.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        theta: (..., N, d), the queries, or a `jax.ShapeDtypeStruct` like them; for the Gaussian, x.
        phi: (..., M, d), the keys, likewise.
        g: (..., M, e), the values, likewise.
        masked: whether there is a `key_mask`.
        implementation: what would be asked for.
        backend: "cpu", "gpu" or "tpu"; None is JAX's own.

    Returns:
        The choice, its reason, and the predicted FLOPs and temporary bytes of all there was to choose from.

    Raises:
        ValueError: an unknown instantiation, backend or implementation; shapes that do not fit; an implementation that
            cannot serve, with those that can.

    >>> import jax, jax.numpy as jnp
    >>> rows = lambda n: jax.ShapeDtypeStruct((1, n, 256), jnp.float32)
    >>> print(explain("dot_product", rows(12544), rows(3136), rows(3136), backend="cpu"))
    reassociated: forecast 21.3× as fast as dense; 0.051× its FLOPs, 0.00167× its temporary memory
    implementation   GFLOP (with gradients)   temporary MB (with gradients)
    dense            40.282 (120.846)            157.4 (314.7)
    reassociated      2.055 (6.166)              0.3 (0.5)
    """
    arguments.check_instantiation(instantiation)
    if backend not in (None, *machine.MACHINES):
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, machine.MACHINES))}, or None; got {backend!r}."
        )
    theta, phi, g = jax.eval_shape(
        _checked, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (theta, phi, g))
    )
    return cost.choose(
        instantiation, _sizes(theta, phi, g, masked), implementation, backend or machine.backend()
    )


def _checked(theta: Array, phi: Array, g: Array) -> tuple[Array, Array, Array]:
    theta, phi, _ = arguments.check_pairs("theta", theta, "phi", phi, None)
    return theta, phi, arguments.check_values(g, phi, None)


def _run(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    g: Values,
    key_mask: KeyMask | None,
    implementation: Implementation,
    axis_name: str | None,
    *,
    scale: float | Array = 1.0,
    w_f: Any = None,
) -> Responses:
    batch, devices = theta.shape[:-2], 1 if axis_name is None else jax.lax.axis_size(axis_name)
    sizes = _sizes(theta, phi, g, key_mask is not None)
    sizes = sizes._replace(m=devices * sizes.m)
    if sizes.batch == 1:  # matrix products without a batch are faster on CPU
        theta, phi, g = (x.reshape(x.shape[-2:]) for x in (theta, phi, g))
        key_mask = None if key_mask is None else key_mask.reshape(-1)
    chosen: str = cost.choose(
        instantiation, sizes, implementation, machine.backend()
    ).implementation
    if axis_name is not None:
        if instantiation == "dot_product" and implementation != "dense":
            chosen = (
                "reassociated"  # one small sum crosses between devices, whatever is fastest on one
            )
        elif chosen == "streaming" and sharded.takes_ring(phi, g, axis_name):
            chosen = "ring"
        elif chosen != "sorted":
            key_mask, phi, g = sharded.gather(axis_name, key_mask, phi, g)
    match chosen:
        case "streaming":
            y = softmax.streaming(theta, phi, g, scale, key_mask)
        case "ring":
            y = sharded.ring(theta, phi, g, scale, key_mask, str(axis_name))
        case "cudnn":
            y = softmax.cudnn(theta, phi, g, scale, key_mask)
        case "reassociated":
            y = reassociated(theta, phi, g, key_mask, axis_name)
        case "sorted":
            a, b = definition.project(theta, phi, w_f)
            if axis_name is not None:
                key_mask, b, g = sharded.gather(axis_name, key_mask, b[..., None], g)
                b = b[..., 0]
            y = sorted_keys.respond(a, b, definition.widen(g), key_mask)
        case _:
            y = definition.respond(_affinity(instantiation, theta, phi, key_mask, scale, w_f), g)
    return y.reshape(*batch, *y.shape[-2:]).astype(g.dtype)


def _affinity(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    key_mask: KeyMask | None,
    scale: float | Array,
    w_f: Any,
) -> Affinity:
    match instantiation:
        case "gaussian":
            return definition.gaussian(theta, phi, key_mask)
        case "embedded_gaussian":
            return definition.embedded_gaussian(theta, phi, scale, key_mask)
        case "dot_product":
            return definition.dot_product(theta, phi, key_mask)
        case "concatenation":
            return definition.concatenation(theta, phi, w_f, key_mask)


def _sizes(theta: Shaped, phi: Shaped, g: Shaped, masked: bool) -> cost.Sizes:
    batch = math.prod(theta.shape[:-2])
    return cost.Sizes(
        batch, theta.shape[-2], phi.shape[-2], theta.shape[-1], g.shape[-1], g.dtype, masked
    )
