"""The four operations and their gradients in float64 NumPy, as the reference for errors."""

from collections.abc import Iterator, Sequence

import numpy as np

from benchmarks.cases import Floats
from nonlocal_jax.types import Instantiation

ROWS = 1024  # queries per block, so that 12544 × 12544 pairs fit in memory


def response(instantiation: Instantiation, arrays: Sequence[Floats]) -> Floats:
    """Computes the response to θ (1, N, d), φ (1, M, d), g (1, M, e) and optionally w_f (2d,)."""
    theta, phi, g, *w_f = (_float64(array) for array in arrays)
    return np.concatenate([_affinity(instantiation, rows, phi, w_f) @ g for rows in _rows(theta)])[
        None
    ]


def gradients(
    instantiation: Instantiation, arrays: Sequence[Floats], cotangent: Floats
) -> list[Floats]:
    """Computes the gradients of all `arrays`, by the formulas of each pairwise function."""
    theta, phi, g, *w_f = (_float64(array) for array in arrays)
    dy = _float64(cotangent)
    affinity = _affinity(instantiation, theta, phi, w_f)
    daffinity, dg = dy @ g.T, affinity.T @ dy
    if instantiation == "concatenation":
        dpairs = daffinity * (affinity > 0) / len(phi)
        da, db = dpairs.sum(1), dpairs.sum(0)
        w_theta, w_phi = np.split(w_f[0], 2)
        return [
            np.outer(da, w_theta)[None],
            np.outer(db, w_phi)[None],
            dg[None],
            np.concatenate([da @ theta, db @ phi]),
        ]
    if instantiation == "dot_product":
        dlogits = daffinity / len(phi)
    else:
        dlogits = affinity * (daffinity - (affinity * daffinity).sum(1, keepdims=True))
    return [(dlogits @ phi)[None], (dlogits.T @ theta)[None], dg[None]]


def relative_error(value: Floats, exact: Floats) -> float:
    """Computes ‖value − exact‖ / ‖exact‖."""
    return float(
        np.linalg.norm(np.subtract(value, exact, dtype=np.float64)) / np.linalg.norm(exact)
    )


def _affinity(
    instantiation: Instantiation, theta: Floats, phi: Floats, w_f: Sequence[Floats]
) -> Floats:
    if instantiation == "concatenation":
        w_theta, w_phi = np.split(w_f[0], 2)
        return np.maximum((theta @ w_theta)[:, None] + phi @ w_phi, 0) / len(phi)
    logits = theta @ phi.T
    if instantiation == "dot_product":
        return logits / len(phi)
    f = np.exp(logits - logits.max(1, keepdims=True))
    return f / f.sum(1, keepdims=True)


def _rows(theta: Floats) -> Iterator[Floats]:
    return (theta[start : start + ROWS] for start in range(0, len(theta), ROWS))


def _float64(array: Floats) -> Floats:
    array = array.astype(np.float64)
    return array[0] if array.ndim == 3 else array
