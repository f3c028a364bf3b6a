"""Chooses the kernel that runs, and explains the choice.

The choice depends on static shapes, the dtype and the platform alone. "auto" takes the kernel whose
own `cost` forecasts the least time; `python -m benchmarks` measures whether the forecasts are
right.
"""

import dataclasses
import math
from typing import Any, TypeAlias

import jax

from nonlocal_jax import checks
from nonlocal_jax.ops import arguments, kernels, platforms
from nonlocal_jax.ops.kernels.kernel import Kernel, Sizes
from nonlocal_jax.types import Array, Instantiation

# "auto", or the name of a kernel. A plain string, so that a new kernel needs no entry here.
Implementation: TypeAlias = str
Shaped: TypeAlias = Array | jax.ShapeDtypeStruct
# What symbolic sizes count as: 28 × 28 positions of 4 frames, and the inner channels.
SYMBOLIC_ROWS, SYMBOLIC_CHANNELS = 3136, 256


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What one implementation is forecast to cost.

    Attributes:
        implementation: Its name.
        flops: FLOPs of the response, and of the response with all gradients.
        temporary: Peak bytes of temporaries, without and with gradients.
        seconds: Forecast time of both together, on a platform as in `PLATFORMS`.
        refusal: Why it is not available, or why "auto" never takes it; None otherwise.
    """

    implementation: Implementation
    flops: tuple[int, int]
    temporary: tuple[int, int]
    seconds: float
    refusal: str | None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.implementation:12s} {self.refusal}"
        flops, gradient_flops = (count / 1e9 for count in self.flops)
        memory, gradient_memory = (count / 1e6 for count in self.temporary)
        return (
            f"{self.implementation:12s} {flops:10.3f} ({gradient_flops:.3f})   "
            f"{memory:14.1f} ({gradient_memory:.1f})"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation that runs and the reason. `print` shows a table of all alternatives.

    Attributes:
        implementation: The implementation that runs.
        reason: Why it was chosen.
        costs: Costs of every implementation of the operation.
    """

    implementation: Implementation
    reason: str
    costs: tuple[KernelCost, ...]

    def __str__(self) -> str:
        header = "implementation   GFLOP (with gradients)   temporary MB (with gradients)"
        title = f"{self.implementation}: {self.reason}"
        return "\n".join([title, header, *map(str, self.costs)])


def explain(
    instantiation: Instantiation,
    theta: Shaped,
    phi: Shaped,
    g: Shaped,
    *,
    masked: bool = False,
    implementation: Implementation = "auto",
    platform: str | None = None,
) -> Explanation:
    """Returns which implementation runs on arrays of these shapes, and why, without running it.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        theta: The queries (..., N, d), or a `jax.ShapeDtypeStruct` of them; for the Gaussian, x.
        phi: The keys (..., M, d), likewise.
        g: The values (..., M, e), likewise.
        masked: Whether there is a `key_mask`.
        implementation: The implementation that is requested.
        platform: "cpu", "gpu" (NVIDIA's), "rocm" (AMD's) or "tpu". None means that of JAX's default
            backend. "gpu" stands for a Hopper with cuDNN unless this host has another GPU. What
            runs is chosen for the platform that a program is lowered for.

    Returns:
        The choice, its reason, and the forecast FLOPs and temporary bytes of all implementations.

    Raises:
        ValueError: If the instantiation, the platform or the implementation is unknown, shapes do
            not match, or the implementation is not available for them.

    >>> import jax, jax.numpy as jnp
    >>> rows = lambda n: jax.ShapeDtypeStruct((1, n, 256), jnp.float32)
    >>> print(explain("dot_product", rows(12544), rows(3136), rows(3136), platform="cpu"))
    reassociated: forecast 21.3× as fast as dense; 0.051× its FLOPs, 0.00167× its temporary memory
    implementation   GFLOP (with gradients)   temporary MB (with gradients)
    dense            40.282 (120.846)            157.4 (314.7)
    reassociated      2.055 (6.166)              0.3 (0.5)
    """
    arguments.check_instantiation(instantiation)
    checks.one_of("platform", platform, (*platforms.PLATFORMS, None))
    shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (theta, phi, g))
    theta, phi, g = jax.eval_shape(_check_shapes, *shapes)
    sizes = sizes_of(instantiation, theta, phi, g, masked)
    _, explanation = choose_kernel(sizes, implementation, platform or platforms.default_platform())
    return explanation


def choose_kernel(
    sizes: Sizes,
    implementation: Implementation,
    platform: str,
    *,
    split: bool = False,
    tracing: bool = False,
) -> tuple[Kernel, Explanation]:
    """Returns the kernel that runs for a requested implementation, and the explanation.

    Args:
        sizes: Sizes of the operands.
        implementation: The name of a kernel, or "auto".
        platform: Name of the platform in `PLATFORMS`.
        split: Whether positions are split over devices.
        tracing: Whether the kernel is traced on this host, which limits what it can be.

    Raises:
        ValueError: If the operation has no such implementation, or it is not available here.
    """
    check_implementation(sizes.instantiation, implementation)
    rows = kernels_of(sizes.instantiation)
    names = [kernel.name for kernel in rows]
    costs = tuple(_forecast(kernel, sizes, platform, tracing) for kernel in rows)
    if implementation == "auto":
        costs = tuple(map(_refuse_unrequested, rows, costs))
    if sizes.is_empty:
        return rows[0], Explanation(rows[0].name, "a size is 0", costs)
    available = [name for name, cost in zip(names, costs, strict=True) if cost.refusal is None]
    if implementation != "auto":
        index = names.index(implementation)
        if refusal := costs[index].refusal:
            options = ", ".join(map(repr, ("auto", *available)))
            raise ValueError(
                f"implementation {implementation!r} is not available here: {refusal}. "
                f"Available: {options}."
            )
        return rows[index], Explanation(implementation, "it was requested", costs)
    if split:
        for kernel in rows:
            if kernel.preferred_when_split and kernel.name in available:
                reason = "it communicates the least between devices"
                return kernel, Explanation(kernel.name, reason, costs)
    fastest = min(available, key=lambda name: costs[names.index(name)].seconds)
    index = names.index(fastest)
    return rows[index], Explanation(fastest, _reason(sizes, costs[index], costs[0]), costs)


def check_implementation(instantiation: Instantiation, implementation: Implementation) -> None:
    """Checks that a pairwise function has an implementation of this name."""
    names = (kernel.name for kernel in kernels_of(instantiation))
    checks.one_of(f"implementation of {instantiation}", implementation, ("auto", *names))


def kernels_of(instantiation: Instantiation) -> list[Kernel]:
    """Returns the kernels that implement a pairwise function, the definition first."""
    return [kernel for kernel in kernels.KERNELS if instantiation in kernel.instantiations]


def sizes_of(
    instantiation: Instantiation,
    theta: Shaped,
    phi: Shaped,
    g: Shaped,
    masked: bool,
    devices: int = 1,
) -> Sizes:
    """Returns the sizes of operands whose keys are split over a number of devices."""
    *batch, n, d = theta.shape
    m, e = phi.shape[-2], g.shape[-1]
    # Sizes of `jax.export` may be symbolic. Such a batch counts as one sample, on which the choice
    # hardly depends, and other sizes as those of res3 in the paper's networks.
    samples = math.prod(_number(size, 1) for size in batch)
    n, m = _number(n, SYMBOLIC_ROWS), devices * _number(m, SYMBOLIC_ROWS)
    d, e = _number(d, SYMBOLIC_CHANNELS), _number(e, SYMBOLIC_CHANNELS)
    static = all(
        isinstance(size, int) for size in (*theta.shape[-2:], *phi.shape[-2:], *g.shape[-1:])
    )
    return Sizes(instantiation, samples, n, m, d, e, g.dtype, masked, static)


def _number(size: Any, default: int) -> int:
    return size if isinstance(size, int) else default


def _check_shapes(theta: Array, phi: Array, g: Array) -> tuple[Array, Array, Array]:
    theta, phi, _ = arguments.check_pairs("theta", theta, "phi", phi, None)
    return theta, phi, arguments.check_values(g, phi)


def _forecast(kernel: Kernel, sizes: Sizes, platform: str, tracing: bool) -> KernelCost:
    flops, temporary, seconds = kernel.cost(sizes, platform)
    refusal = kernel.refusal(sizes, platform)
    if kernel.needs_static_sizes and not sizes.static:
        refusal = "N, M, d and e must not be symbolic"
    if refusal is None and tracing:
        refusal = kernel.untraceable(sizes)
    return KernelCost(kernel.name, flops, temporary, seconds, refusal)


def _refuse_unrequested(kernel: Kernel, cost: KernelCost) -> KernelCost:
    if cost.refusal is not None or kernel.only_on_request is None:
        return cost
    return dataclasses.replace(cost, refusal=f"only on request: {kernel.only_on_request}")


def _reason(sizes: Sizes, chosen: KernelCost, dense: KernelCost) -> str:
    if chosen is dense and not sizes.static:
        return "it takes symbolic sizes"
    if chosen is dense:
        return f"an affinity of {sizes.n} × {sizes.m} is small enough"
    speedup = dense.seconds / chosen.seconds
    flops = chosen.flops[1] / dense.flops[1]
    reason = f"forecast {speedup:.3g}× as fast as dense; {flops:.3g}× its FLOPs"
    if not dense.temporary[1]:
        return reason
    return f"{reason}, {chosen.temporary[1] / dense.temporary[1]:.3g}× its temporary memory"
