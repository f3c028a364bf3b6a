"""Whether a network has the non-local blocks that it should.

A new block is the identity, so a network that lacks one gives the same answers.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.model_functions import fresh_trace, functional, module_path
from nonlocal_jax.layers.residual_ratio import RESIDUAL_RATIO, report_residual_ratios
from nonlocal_jax.layers.response import PairwiseCall, tap
from nonlocal_jax.types import Array, Scalar

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BlockDescription:
    """One non-local block of a network, or one operation that is in no block.

    Attributes:
        place: Path of the module, as in `params`.
        operation: Class of the module that evaluates Eq. 1.
        parameters: Number of trained parameters.
        ratio: ‖W_z y‖ / ‖x‖ on the given input, 0 while the block is the identity. None where the
            module does not offer it (`sow_residual_ratio`), such as an operation without a block.
    """

    place: str
    operation: str
    parameters: int
    ratio: float | None

    def __str__(self) -> str:
        ratio = "None" if self.ratio is None else f"{self.ratio:.3g}"
        return (
            f"{self.place}: {self.operation}, {self.parameters:,} parameters, "
            f"‖block output‖/‖input‖ {ratio}"
        )


def describe(
    model: Any, variables: Any, x: Array, *, expected: int | None = None, **kwargs: Any
) -> tuple[BlockDescription, ...]:
    """Describes every non-local block of a network, in the order in which they run.

    Operations without a block around them are listed and counted as well, and so are blocks of
    other libraries that call `nonlocal_response` inside `enclosing_block`.

    Args:
        model: Any Linen module, or an NNX module that contains blocks through `nnx.bridge.ToNNX`.
        variables: Its variables; None for an NNX module, which holds its own.
        x: Input on which the ratios are measured.
        expected: Number of blocks that there must be. None does not check.
        **kwargs: More arguments of `model.apply`, or of the call of an NNX module.

    Returns:
        One `BlockDescription` for each block; empty when the network has none.

    Raises:
        ValueError: If the number of blocks is not `expected`, or a block is inside `nn.scan`,
            `nnx.scan` or a similar transformation, where blocks have no places of their own.
            Describe the transformed module instead.
        TypeError: A model that is neither Linen nor NNX, a Linen module without variables, or an
            NNX module with.

    >>> import jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> model = nn.Sequential([nn.Dense(8), nonlocal_block("dot_product"), nn.Dense(3)])
    >>> x = jnp.ones((1, 6, 6, 2))
    >>> for block in describe(model, model.init(jax.random.key(0), x), x, expected=1):
    ...     print(block)
    layers_1: DotProduct, 144 parameters, ‖block output‖/‖input‖ 0
    """
    apply, variables = functional(model, variables)
    is_linen = isinstance(model, nn.Module)
    params = variables.get("params", {}) if is_linen else _nnx_params(variables)
    operations: dict[Path, str] = {}
    transformed: set[Path] = set()

    def record(call: PairwiseCall) -> Array:
        module = call.module if call.block is None else call.block
        path = module_path(module)
        operations.setdefault(path, type(call.module).__name__)
        # Inside nn.scan a module sees one layer of the stacked parameters.
        if _shapes(module.variables.get("params", {})) != _shapes(_lookup(params, path)):
            transformed.add(path)
        # `fresh_trace` disables jit, which would unroll the loops of implementations.
        with jax.disable_jit(False):
            return call.respond()

    def ratios(variables: Any, x: Array) -> dict[Path, Array | None]:
        reported: dict[Path, Array] = {}

        def record_ratio(block: nn.Module, ratio: Scalar) -> None:
            reported[module_path(block)] = ratio

        # A jitted method of an NNX module may have been traced before, and then reports nothing.
        tracing = contextlib.nullcontext() if is_linen else fresh_trace()
        with tracing, tap(record), report_residual_ratios(record_ratio):
            _, state = apply(variables, x, mutable=["intermediates"], **kwargs)
        if transformed:
            raise ValueError(_transformed_blocks(operations, is_linen))
        # What is sown leaves Linen's transformations, such as nn.remat, as their outputs.
        sown = state.get("intermediates", {})
        find = (lambda path: _sown_ratio(sown, path)) if is_linen else reported.get
        return {path: find(path) for path in operations}

    try:  # under jit, the other intermediates (the affinity maps) are never computed
        values = jax.jit(ratios)(variables, x)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(_transformed_blocks(operations, is_linen)) from error
    if expected is not None and len(operations) != expected:
        places = ", ".join(map("/".join, operations)) or "none"
        raise ValueError(
            f"expected must be the number of non-local blocks of {type(model).__name__}; "
            f"got {expected}, but it has {len(operations)}: {places}."
        )
    return tuple(
        BlockDescription(
            place="/".join(path),
            operation=operation,
            parameters=_size(_lookup(params, path)),
            ratio=None if values[path] is None else float(values[path]),
        )
        for path, operation in operations.items()
    )


def _transformed_blocks(paths: Iterable[Path], is_linen: bool) -> str:
    places = ", ".join(map("/".join, paths))
    around = "nn.scan" if is_linen else "nnx.scan, nnx.vmap or nnx.remat"
    return f"The blocks must not be inside {around}; got {places}. Describe the module inside it."


def _nnx_params(state: Any) -> Any:
    """Returns the trained parameters of an NNX state as nested dicts, with the names as text."""
    from flax import nnx  # imports optax

    params: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        if not isinstance(variable, nnx.Param):
            continue
        *places, name = map(str, path)
        module = params
        for place in places:
            module = module.setdefault(place, {})
        module[name] = variable[...]
    return params


def _sown_ratio(intermediates: Any, path: Path) -> Array | None:
    sown = _lookup(intermediates, path).get(RESIDUAL_RATIO)
    return None if sown is None else sown[-1]


def _lookup(tree: Any, path: Path) -> Any:
    """The part of a tree of nested dicts at `path`; empty where there is none."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]


def _size(tree: Any) -> int:
    return sum(jnp.size(leaf) for leaf in jax.tree.leaves(tree))
