"""Whether a network has the non-local blocks that it should: a new block is the identity, which hides a missing one."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.tap import PairwiseCall, tap
from nonlocal_jax.types import Array


@dataclasses.dataclass(frozen=True)
class BlockDescription:
    """One non-local block of a network.

    Attributes:
        place: the path of the module, as in `params`.
        operation: the class of the operation.
        parameters: how many numbers are trained in it.
        ratio: ‖W_z y‖ / ‖x‖ on the input given; 0 as long as the block is the identity.
    """

    place: str
    operation: str
    parameters: int
    ratio: float

    def __str__(self) -> str:
        return f"{self.place}: {self.operation}, {self.parameters:,} parameters, ‖block output‖/‖input‖ {self.ratio:.3g}"


def describe(
    model: nn.Module, variables: Any, x: Array, *, expected: int | None = None, **kwargs: Any
) -> tuple[BlockDescription, ...]:
    """Every non-local block of a network, in the order in which they run.

    Args:
        model: any Linen module.
        variables: its variables.
        x: an input; the ratios are of this input.
        expected: how many blocks there must be; None does not check.
        **kwargs: more arguments of `model.apply`.

    Returns:
        One `BlockDescription` a block; empty when the network has none.

    Raises:
        ValueError: the network has another number of blocks than `expected`, or one inside `nn.scan`, where the blocks
            have no places of their own; describe the scanned module by itself.

    >>> import jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> model = nn.Sequential([nn.Dense(8), nonlocal_block("dot_product"), nn.Dense(3)])
    >>> x = jnp.ones((1, 6, 6, 2))
    >>> for block in describe(model, model.init(jax.random.key(0), x), x, expected=1):
    ...     print(block)
    layers_1: DotProduct, 144 parameters, ‖block output‖/‖input‖ 0
    """
    operations: dict[tuple[str, ...], str] = {}

    def record(call: PairwiseCall) -> None:
        if call.block is not None:
            operations.setdefault(call.block.path, type(call.module).__name__)

    def ratios(variables: Any, x: Array) -> dict[tuple[str, ...], Array]:
        with tap(record):
            sown = model.apply(variables, x, mutable=["intermediates"], **kwargs)[1].get(
                "intermediates", {}
            )
        try:
            return {path: _at(sown, path)["residual_ratio"][-1].reshape(()) for path in operations}
        except (KeyError, TypeError) as error:
            places = ", ".join(map("/".join, operations))
            raise ValueError(
                f"the blocks must not be inside nn.scan; got {places}. Describe the scanned module."
            ) from error

    # Under jit, what is sown beside the ratios (the affinity maps) is never computed.
    values = jax.jit(ratios)(variables, x)
    if expected is not None and len(operations) != expected:
        places = ", ".join("/".join(path) for path in operations) or "none"
        raise ValueError(
            f"expected {expected} non-local blocks; {type(model).__name__} has {len(operations)}: {places}."
        )
    return tuple(
        BlockDescription(
            place="/".join(path),
            operation=operation,
            parameters=sum(
                jnp.size(leaf) for leaf in jax.tree.leaves(_at(variables["params"], path))
            ),
            ratio=float(values[path]),
        )
        for path, operation in operations.items()
    )


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree
