"""Which implementation serves which operation, what each costs, and which one "auto" takes.

The costs are predicted from static shapes, dtype and backend alone. FLOPs count a multiply-add as 2. Temporary bytes are
those besides inputs and results, at the peak. The forecast of time is a roofline: FLOPs over the rate of matrix products plus
bytes moved, where the temporaries leave the cache, over the rate of memory. Only its ratios matter; `python -m benchmarks`
measures what it decides.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from nonlocal_jax.ops import concatenation, softmax
from nonlocal_jax.ops.machine import MACHINES
from nonlocal_jax.types import Instantiation

Implementation = Literal["auto", "dense", "streaming", "cudnn", "reassociated", "sorted"]
IMPLEMENTATIONS: dict[Instantiation, tuple[Implementation, ...]] = {
    "gaussian": ("dense", "streaming", "cudnn"),
    "embedded_gaussian": ("dense", "streaming", "cudnn"),
    "dot_product": ("dense", "reassociated"),
    "concatenation": ("dense", "sorted"),
}


class Sizes(NamedTuple):
    """θ is (batch, n, d), φ (batch, m, d) and g (batch, m, e)."""

    batch: int
    n: int
    m: int
    d: int
    e: int
    dtype: Any
    masked: bool


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one implementation would need.

    Attributes:
        implementation: its name.
        flops: of the response, and of the response with all gradients.
        temporary: bytes at the peak, likewise.
        seconds: the forecast of both together, on a machine such as `MACHINES` has.
        refusal: why it cannot serve; None if it can.
    """

    implementation: Implementation
    flops: tuple[int, int]
    temporary: tuple[int, int]
    seconds: float
    refusal: str | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What was chosen and why; printed, a table of what was to choose from.

    Attributes:
        implementation: the one that runs.
        reason: why.
        costs: of every implementation of this operation.
    """

    implementation: Implementation
    reason: str
    costs: tuple[Cost, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.implementation}: {self.reason}",
            "implementation   GFLOP (with gradients)   temporary MB (with gradients)",
        ]
        for cost in self.costs:
            flops, megabytes = (
                tuple(x / 10**power for x in pair)
                for pair, power in ((cost.flops, 9), (cost.temporary, 6))
            )
            numbers = (
                f"{flops[0]:10.3f} ({flops[1]:.3f})   {megabytes[0]:14.1f} ({megabytes[1]:.1f})"
            )
            lines.append(f"{cost.implementation:12s} {cost.refusal or numbers}")
        return "\n".join(lines)


def choose(
    instantiation: Instantiation, sizes: Sizes, implementation: Implementation, backend: str
) -> Explanation:
    """The implementation that runs where `implementation` is asked for.

    Raises:
        ValueError: an implementation that this operation does not have, or one that cannot serve these sizes here.
    """
    known = IMPLEMENTATIONS[instantiation]
    if implementation not in ("auto", *known):
        expected = ", ".join(map(repr, ("auto", *known)))
        raise ValueError(
            f"implementation of {instantiation} must be one of {expected}; got {implementation!r}."
        )
    costs = tuple(_cost(instantiation, name, sizes, backend) for name in known)
    possible = [cost for cost in costs if cost.refusal is None]
    if implementation != "auto":
        refusal = next(cost.refusal for cost in costs if cost.implementation == implementation)
        if refusal:
            others = ", ".join(repr(cost.implementation) for cost in possible)
            raise ValueError(
                f"implementation {implementation!r} cannot serve here: {refusal}. Possible are 'auto', {others}."
            )
        return Explanation(implementation, "it was asked for", costs)
    chosen = min(possible, key=lambda cost: cost.seconds)
    dense = costs[0]
    if chosen is dense:
        return Explanation("dense", f"an affinity of {sizes.n} × {sizes.m} is small enough", costs)
    faster = dense.seconds / chosen.seconds
    flops, temporary = chosen.flops[1] / dense.flops[1], chosen.temporary[1] / dense.temporary[1]
    reason = f"forecast {faster:.3g}× as fast as dense; {flops:.3g}× its FLOPs, {temporary:.3g}× its temporary memory"
    return Explanation(chosen.implementation, reason, costs)


def _cost(
    instantiation: Instantiation, implementation: Implementation, sizes: Sizes, backend: str
) -> Cost:
    """One row of the table; bytes moved are those of temporaries only, since inputs and results are the same for all."""
    batch, n, m, d, e, dtype, _ = sizes
    item = jnp.promote_types(dtype, jnp.float32).itemsize
    pairs = batch * n * m
    machine, moved, overhead, refusal = MACHINES[backend], 0, 0.0, None
    match implementation:
        case "dense":
            products = pairs * e if instantiation == "concatenation" else pairs * (d + e)
            flops = (2 * products, 6 * products)
            passes, copies = {"concatenation": (8, (1, 2)), "dot_product": (6, (1, 2))}.get(
                instantiation, (12, (1, 3))
            )
            temporary = (copies[0] * pairs * item, copies[1] * pairs * item)
            moved = passes * pairs * item if pairs * item > machine.cache else 0
        case "streaming":
            kept = softmax.keeps(pairs * item, backend)
            flops = (2 * pairs * (d + e), 2 * pairs * ((3 if kept else 4) * d + 3 * e))
            tiles = softmax.tiling(batch, n, m, backend)
            tile = tiles.samples * tiles.queries * tiles.keys * item
            rows = batch * (n * (d + e) + m * (d + e)) * item
            temporary = (tile + batch * n * item, 2 * (pairs * item if kept else tile) + rows)
        case "cudnn":
            flops = (2 * pairs * (d + e), 2 * pairs * (d + e) + 2 * pairs * (3 * d + 2 * e))
            bias = 2 * pairs if sizes.masked else 0
            temporary = (4 * batch * n + bias, 4 * batch * n * (d + 2) + bias)
            refusal = cudnn_refusal(sizes, backend)
            machine = machine._replace(flops=4 * machine.flops)
            moved = 4 * bias
        case "reassociated":
            flops = (2 * batch * (n + m) * d * e, 6 * batch * (n + m) * d * e)
            temporary = (batch * d * e * item, 2 * batch * d * e * item)
            moved = 6 * batch * d * e * item
        case "sorted":
            table = (
                2 * concatenation.BLOCK // concatenation.LEAF + 2
            )  # multiply-adds for a row's number
            lookup = concatenation.LEAF + 1
            flops = (
                2 * batch * e * (table * m + lookup * n),
                2 * batch * e * (table * (2 * m + n) + 2 * lookup * (n + m)),
            )
            at_once = 1 if backend == "cpu" else max(batch, 1)  # samples
            temporary = (at_once * m * e * item // 2, at_once * max(n, m) * e * item // 2)
            moved = 6 * batch * (n + m) * e * item
            overhead = 5e-5 * batch / at_once
    seconds = sum(flops) / machine.flops + moved / machine.bandwidth + overhead
    return Cost(implementation, flops, temporary, seconds, refusal)


def cudnn_refusal(sizes: Sizes, backend: str) -> str | None:
    """Why NVIDIA's attention cannot serve; None if it can."""
    # As "9.0" on NVIDIA's GPUs, as "gfx942" on AMD's; where another machine is asked about, a Hopper.
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0")).split(".")[0]
    if backend != "gpu" or not capability.isdigit():
        return f"cuDNN needs an NVIDIA GPU, and the backend is {backend!r}"
    if sizes.dtype not in (jnp.float16, jnp.bfloat16):
        return f"cuDNN's attention takes float16 and bfloat16, and the inputs are {sizes.dtype}"
    if sizes.d != sizes.e:
        return (
            f"cuDNN's attention wants values as wide as keys; got {sizes.e} and {sizes.d} channels"
        )
    most = 256 if int(capability) >= 9 else 128
    if sizes.d > most or sizes.d % 8:
        return (
            f"cuDNN's head size is a multiple of 8 up to {most} on this GPU; got {sizes.d} channels"
        )
    return None
