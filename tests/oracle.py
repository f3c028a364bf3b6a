"""Eq. 1 in NumPy: a double loop over positions, straight from the paper, in float64 throughout."""

import numpy as np


def f(instantiation, theta_i, phi_j, w_f=None, scale=1.0):
    """Eq. 2 to 5."""
    match instantiation:
        case "gaussian":
            return np.exp(theta_i @ phi_j)
        case "embedded_gaussian":
            return np.exp(scale * (theta_i @ phi_j))
        case "dot_product":
            return theta_i @ phi_j
        case "concatenation":
            return max(w_f @ np.concatenate([theta_i, phi_j]), 0.0)


def nonlocal_operation(instantiation, theta, phi, g, w_f=None, scale=1.0, key_mask=None):
    """Returns the responses (B, N, e) and the affinity f/C (B, N, M)."""
    theta, phi, g = (np.asarray(x, np.float64) for x in (theta, phi, g))
    w_f = None if w_f is None else np.asarray(w_f, np.float64)
    (batch, n, _), m = theta.shape, phi.shape[1]
    key_mask = np.ones((batch, m), bool) if key_mask is None else np.asarray(key_mask)
    y, affinity = np.zeros((batch, n, g.shape[-1])), np.zeros((batch, n, m))
    for b in range(batch):
        real_keys = np.flatnonzero(key_mask[b])
        for i in range(n):
            for j in real_keys:
                affinity[b, i, j] = f(instantiation, theta[b, i], phi[b, j], w_f, scale)
            c = affinity[b, i].sum() if "gaussian" in instantiation else len(real_keys)
            affinity[b, i] = affinity[b, i] / c if len(real_keys) else 0.0
            for j in real_keys:
                y[b, i] += affinity[b, i, j] * g[b, j]
    return y, affinity
