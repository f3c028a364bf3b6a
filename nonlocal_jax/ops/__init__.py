"""The four pairwise functions of the paper as pure functions of arrays.

    y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)                                                    (Eq. 1)

θ is what attention calls the query, φ the key and g the value. `implementation` names how the sum
is computed. All implementations agree with the definition (`ops/definition.py`), which is "dense":

| implementation | operations | time | memory |
|---|---|---|---|
| "dense" | all | N·M·(d + e) | N·M |
| "streaming" | the two Gaussians | N·M·(d + e) | (N + M)·(d + e) |
| "cudnn" | the two Gaussians, half precision, NVIDIA GPUs | N·M·(d + e) | (N + M)·(d + e) |
| "flash" | the two Gaussians, on request, TPUs | N·M·(d + e) | (N + M)·(d + e) |
| "reassociated" | the dot product | (N + M)·d·e | d·e |
| "sorted" | the concatenation | (N + M)·(log M + e) | (N + M)·e |

"auto" takes the one that is forecast to be the fastest; `explain` shows which that is, and why. It
never takes "flash", a Pallas kernel of JAX's, because its time on a TPU is not known. All have
gradients. Forward-mode differentiation (`jax.jvp`) requires "dense" or "reassociated". With
`axis_name`, positions are split over devices (`ops/sharded.py`).
"""

from nonlocal_jax.ops.choose import Explanation, Implementation, KernelCost, explain
from nonlocal_jax.ops.pairwise import (
    affinity,
    concatenation,
    dot_product,
    embedded_gaussian,
    gaussian,
)

__all__ = [
    "Explanation",
    "Implementation",
    "KernelCost",
    "affinity",
    "concatenation",
    "dot_product",
    "embedded_gaussian",
    "explain",
    "gaussian",
]
