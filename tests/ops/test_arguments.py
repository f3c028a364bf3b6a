"""Bad input raises before anything is computed."""

import numpy as np
import pytest

from nonlocal_jax import ops

theta, phi, g, w_f = (np.ones(shape, np.float32) for shape in ((2, 7, 3), (2, 5, 3), (2, 5, 11), 6))
mask = np.ones((2, 5), bool)
BAD_INPUT = {
    "rank": (
        lambda: ops.dot_product(theta[0, 0], phi, g),
        ValueError,
        r"theta must have shape \(\.\.\., N, d\).*got \(3,\)",
    ),
    "ranks": (
        lambda: ops.gaussian(theta, phi[0], g),
        ValueError,
        r"same rank; got \(2, 7, 3\) and \(5, 3\)",
    ),
    "channels": (
        lambda: ops.dot_product(theta, phi[..., :2], g),
        ValueError,
        r"phi must have shape \(2, M, 3\).*got \(2, 5, 2\)",
    ),
    "gaussian's channels": (
        lambda: ops.gaussian(theta, phi[..., :2], g),
        ValueError,
        r"keys must have shape",
    ),
    "batch": (
        lambda: ops.dot_product(theta, phi[:1], g[:1]),
        ValueError,
        r"phi must have shape \(2, M, 3\).*got \(1, 5, 3\)",
    ),
    "keys": (
        lambda: ops.dot_product(theta, phi, g[:, :4]),
        ValueError,
        r"g must have shape \(2, 5, e\).*5 keys; got \(2, 4, 11\)",
    ),
    "no queries": (
        lambda: ops.concatenation(theta[:, :0], phi, g, w_f),
        ValueError,
        r"theta must have at least one query.*got shape \(2, 0, 3\)",
    ),
    "no keys": (
        lambda: ops.concatenation(theta, phi[:, :0], g[:, :0], w_f),
        ValueError,
        r"phi must have at least one key.*got shape \(2, 0, 3\)",
    ),
    "mask's shape": (
        lambda: ops.gaussian(theta, phi, g, key_mask=mask[:, :4]),
        ValueError,
        r"key_mask must have shape \(2, 5\).*got \(2, 4\).*pool the mask",
    ),
    "mask's dtype": (
        lambda: ops.gaussian(theta, phi, g, key_mask=mask.astype(np.float32)),
        TypeError,
        r"key_mask must be bool.*got float",
    ),
    "dtype": (
        lambda: ops.gaussian(theta.astype(np.int32), phi, g),
        TypeError,
        r"x must be floating point; got int",
    ),
    "w_f": (
        lambda: ops.concatenation(theta, phi, g, w_f[:3]),
        ValueError,
        r"w_f must have shape \(6,\).*got \(3,\)",
    ),
    "no w_f": (
        lambda: ops.affinity("concatenation", theta, phi),
        ValueError,
        r"needs w_f of shape \(6,\)",
    ),
    "w_f elsewhere": (
        lambda: ops.affinity("gaussian", theta, phi, w_f),
        ValueError,
        r"w_f belongs to the concatenation",
    ),
    "scale elsewhere": (
        lambda: ops.affinity("gaussian", theta, phi, scale=2.0),
        ValueError,
        r"scale belongs to the embedded",
    ),
    "scale": (
        lambda: ops.embedded_gaussian(theta, phi, g, scale=np.ones(5)),
        ValueError,
        r"scale must be one number; got an array of shape \(5,\)",
    ),
    "implementation": (
        lambda: ops.dot_product(theta, phi, g, implementation="fast"),
        ValueError,
        r"dot_product must be one of 'auto', 'dense', 'reassociated'; got 'fast'",
    ),
    "instantiation": (
        lambda: ops.affinity("cosine", theta, phi),
        ValueError,
        r"instantiation must be one of 'gaussian', .*got 'cosine'",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(("function", "error", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_raises_what_was_expected_and_what_was_passed(function, error, message):
    with pytest.raises(error, match=message):
        function()
