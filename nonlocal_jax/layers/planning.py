"""What the non-local blocks of a network will need in memory, before anything is compiled."""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import ops
from nonlocal_jax.layers.block import OPERATIONS, NonLocalBlock
from nonlocal_jax.layers.instantiations import NonLocalOperation
from nonlocal_jax.ops.kernels import streaming
from nonlocal_jax.ops.platforms import host_platform
from nonlocal_jax.types import Array, Instantiation


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """One block's activations, in bytes at the peak, besides its input, its output, its parameters and their gradients.

    Attributes:
        place: the path of the block in the network; "" where the block itself is planned.
        instantiation: which pairwise function.
        queries: how many positions get a response, N, and of how many samples or groups.
        keys: how many positions are summed, M.
        chosen: the implementation that its operation will run.
        forward: of the answer in evaluation, by implementation.
        backward: of a training step, answer and gradients, by implementation.
    """

    place: str
    instantiation: Instantiation
    queries: int
    keys: int
    chosen: ops.Implementation
    forward: dict[ops.Implementation, int]
    backward: dict[ops.Implementation, int]

    def __str__(self) -> str:
        title = f"{self.place or 'block'}: {self.instantiation}, {self.queries:,} queries × {self.keys:,} keys"
        rows = (
            f"  {name:12s} {self.forward[name] / 1e6:10.1f} MB forward {self.backward[name] / 1e6:10.1f} MB with gradients"
            + (" <- runs" if name == self.chosen else "")
            for name in self.forward
        )
        return "\n".join((title, *rows))


def plan(
    input_shape: tuple[int, ...], blocks: nn.Module, *, dtype: Any = jnp.float32, **kwargs: Any
) -> tuple[BlockPlan, ...]:
    """Predict the activation bytes of every non-local block, for each implementation; nothing is computed or compiled.

    The prediction counts the arrays that XLA keeps at the peak of a block by itself, as a rule within 20% of what
    `compiled.memory_analysis().temp_size_in_bytes` then says on CPU. Inside a network the blocks' peaks do not add up, but
    what they keep for their gradients does.

    Args:
        input_shape: of the input of `blocks`, batch first, channels last.
        blocks: a `NonLocalBlock`, or a network that has some.
        dtype: of the input.
        **kwargs: more arguments of the network's `__call__`.

    Returns:
        One `BlockPlan` a block, in the order in which they run; empty where there is none.

    Raises:
        ValueError, TypeError: as the network does for an input of this shape.

    >>> from nonlocal_jax.layers import nonlocal_block
    >>> print(plan((1, 16, 28, 28, 512), nonlocal_block("dot_product"))[0])
    block: dot_product, 12,544 queries × 3,136 keys
      dense             163.8 MB forward      220.3 MB with gradients
      reassociated       38.5 MB forward       89.9 MB with gradients <- runs
    """
    found: dict[tuple[str, ...], BlockPlan] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if isinstance(module, NonLocalOperation) and context.method_name == "_respond":
            place = module.path[:-1] if isinstance(module.parent, NonLocalBlock) else module.path
            found.setdefault(place, _plan_operation("/".join(place), module, *args[:4]))
        return call(*args, **kwargs)

    def run(x: Any) -> Any:
        with nn.intercept_methods(record):
            return blocks.init_with_output(jax.random.key(0), x, **kwargs)

    jax.eval_shape(run, jax.ShapeDtypeStruct(input_shape, dtype))
    return tuple(found.values())


class _Peak(NamedTuple):
    """Arrays alive at once, in sizes of the affinity, of y, of pooled g and of a tile of "streaming"."""

    pairs: float
    queries: float
    keys: float
    tiles: float = 0


class _Setting(NamedTuple):
    """What of a block, besides the sizes, changes its peaks."""

    batch: int
    pooled: bool
    before: (
        bool  # x is pooled before it is embedded, so that φ and g of all positions are never made
    )
    many_keys: bool
    one_tile: bool  # a tile of "streaming" is the whole affinity of a sample
    kept: bool  # "streaming" keeps the affinity for the gradient
    scaled: bool
    biased: bool


# Read off XLA's buffers of JAX 0.10 and 0.12, which agree; tests/layers/test_plan.py holds them to it. "streaming" and
# "sorted" go through several samples in a loop, which gathers answers and cuts its own copies of each sample's rows.
def _forward(
    instantiation: Instantiation, implementation: ops.Implementation, of: _Setting
) -> tuple[_Peak, ...]:
    """The largest peaks of an evaluation: at the embeddings, at the sum, at W_z and the norm."""
    alone, gaussian = of.batch == 1, instantiation == "gaussian"
    if implementation == "sorted":
        return (
            (_Peak(0, 2, 1 if of.biased else 0),)
            if of.before
            else (_Peak(0, 2, 1), _Peak(0, 2 if alone else 3, 0))
        )
    if implementation == "reassociated":
        return (_Peak(0, 2 if of.before and of.biased else 3, 0),)
    if implementation == "dense" or (of.one_tile and alone):
        if of.scaled:  # the logits twice
            sums = _Peak(2, 0, 1)
        elif instantiation == "dot_product" and of.before and of.biased:
            sums = _Peak(1, 1, 1)
        else:
            sums = _Peak(
                1, 0 if alone or of.many_keys else 1, 1 if instantiation == "concatenation" else 2
            )
        return sums, _Peak(0, 2, 0)
    if of.one_tile:
        return _Peak(0, 3, 0), _Peak(0, 1.2, 0.5, 1.05) if gaussian else _Peak(0, 2, 1, 1)
    if gaussian:
        return _Peak(0, 2.05, 0), _Peak(0, 1.1, 0.8, 1.2) if alone else _Peak(
            0, 1.3 + 1.2 / of.batch, 6 / of.batch, 1
        )
    if of.before:
        return (_Peak(0, 2.05, 1, 0.4) if alone else _Peak(0, 1.9, 0.5 + 3 / of.batch, 1),)
    return _Peak(0, 3, 1), _Peak(0, 2, 1.5, 1.15) if alone else _Peak(
        0, 2.2, 1 + 4 / of.batch, 1.15
    )


def _backward(
    instantiation: Instantiation, implementation: ops.Implementation, of: _Setting
) -> tuple[_Peak, ...]:
    """The same of a training step."""
    gaussian = instantiation == "gaussian"
    if implementation == "reassociated":
        return (_Peak(0, 5 if of.before else 7, 0),)
    if implementation == "sorted":
        return (_Peak(0, 5.5 if of.before else 7.2, 0),)
    if implementation == "dense":
        if gaussian:
            return (
                (_Peak(2, 4, 0), _Peak(0, 5, 0))
                if of.before
                else (_Peak(2, 4.5, 0), _Peak(0, 5.8, 0))
            )
        affinities = 2 if instantiation == "embedded_gaussian" else 1
        if of.before:
            return (_Peak(affinities, 5, 0),)
        return _Peak(affinities, 4.9 if of.pooled else 6.1, 0), _Peak(0, 7, 0)
    less = 1.2 if of.before else 0.8 if of.pooled else 0
    if of.kept:
        return _Peak(0, 7 - less, 0), _Peak(2, 3.5 - less, 0) if of.batch == 1 else _Peak(
            1 + 2 / of.batch, 6.4 - less, 0
        )
    if of.batch == 1:
        return _Peak(0, 8 - less, 0), _Peak(0, 6.8 - less, 1, 2)
    return (_Peak(0, 7 - less, (12 if gaussian else 7) / of.batch, 2),)


def _plan_operation(
    place: str,
    operation: NonLocalOperation,
    theta: Array,
    phi: Array,
    g: Array,
    key_mask: Array | None,
) -> BlockPlan:
    (instantiation,) = (name for name, kind in OPERATIONS.items() if isinstance(operation, kind))
    choice = ops.explain(
        instantiation,
        theta,
        phi,
        g,
        masked=key_mask is not None,
        implementation=operation.implementation,
    )
    possible = [cost.implementation for cost in choice.costs if cost.refusal is None]
    batch, n, m, e = math.prod(theta.shape[:-2]), theta.shape[-2], phi.shape[-2], g.shape[-1]
    limits = streaming.LIMITS[host_platform()]
    tiles = streaming.tiling(batch, n, m, limits)
    numbers = (batch * n * m, batch * n * e, batch * m * e, math.prod(tiles))
    items = (4, g.dtype.itemsize, g.dtype.itemsize, 4)
    setting = _Setting(
        batch,
        pooled=m < n,
        before=m < n and operation.pool_order == "before",
        many_keys=m > 2 * e,
        one_tile=tiles[1:] == (n, m),
        kept=streaming.stores_affinity(batch * n * m * 4, limits),
        scaled=getattr(operation, "use_scale", False),
        biased=operation.use_bias,
    )

    def bytes_of(name: ops.Implementation) -> tuple[int, ...]:
        return tuple(
            round(
                max(sum(map(math.prod, zip(peak, numbers, items, strict=True))) for peak in peaks)
            )
            for peaks in (
                _forward(instantiation, name, setting),
                _backward(instantiation, name, setting),
            )
        )

    predicted = {name: bytes_of(name) for name in possible}
    return BlockPlan(
        place,
        instantiation,
        queries=n,
        keys=m,
        chosen=choice.implementation,
        forward={name: forward for name, (forward, _) in predicted.items()},
        backward={name: backward for name, (_, backward) in predicted.items()},
    )
