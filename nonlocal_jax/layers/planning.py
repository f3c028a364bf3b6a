"""The memory of a network's non-local blocks, by implementation, as the compiler reports it."""

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import ops
from nonlocal_jax.layers.block import NonLocalBlock
from nonlocal_jax.layers.instantiations import NonLocalOperation
from nonlocal_jax.layers.model_functions import (
    fresh_trace,
    functional,
    module_path,
    shape_of,
    split_arrays,
)
from nonlocal_jax.layers.response import PairwiseCall, tap
from nonlocal_jax.types import Array, Instantiation

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Temporary memory of one block: bytes besides its arguments and its results.

    Attributes:
        place: Path of the block in the network, or of an operation that is in no block; "" for the
            planned module itself.
        instantiation: The pairwise function.
        queries: Number of positions of one sum that get a response, N.
        keys: Number of positions that are summed, M.
        chosen: The implementation that its operation runs.
        forward: Bytes in evaluation, by implementation.
        backward: Bytes in a training step (output and gradients), by implementation.
        seconds: Seconds that its compilations took; 0 where an equal block was compiled before.
    """

    place: str
    instantiation: Instantiation
    queries: int
    keys: int
    chosen: ops.Implementation
    forward: Mapping[ops.Implementation, int]
    backward: Mapping[ops.Implementation, int]
    seconds: float = 0.0

    def __str__(self) -> str:
        note = f"compiled in {self.seconds:.1f} s" if self.seconds else "equal to a block above"
        lines = [
            f"{self.place or 'block'}: {self.instantiation}, "
            f"{self.queries:,} queries × {self.keys:,} keys ({note})"
        ]
        for name in self.forward:
            forward, backward = self.forward[name] / 1e6, self.backward[name] / 1e6
            mark = " <- runs" if name == self.chosen else ""
            lines.append(
                f"  {name:12s} {forward:10.1f} MB forward {backward:10.1f} MB with gradients{mark}"
            )
        return "\n".join(lines)


def plan(
    input_shape: tuple[int, ...], model: Any, *, dtype: Any = jnp.float32, **kwargs: Any
) -> tuple[BlockPlan, ...]:
    """Reports the memory of every non-local block of a network, for each implementation.

    Each block is compiled alone, in evaluation and in a training step, with every implementation
    that is available for it on this machine; the bytes are those of
    `compiled.memory_analysis().temp_size_in_bytes`. Nothing is computed. Blocks with equal
    attributes and inputs are compiled once, so a network with five blocks needs seconds. Inside a
    network the blocks' peaks do not add up, but what they keep for their gradients does.

    Args:
        input_shape: Shape of the input of `model`, batch first, channels last.
        model: A network with non-local operations, a `NonLocalBlock`, or an operation: a Linen
            module, or an NNX module that contains blocks through `nnx.bridge.ToNNX`.
        dtype: Dtype of the input.
        **kwargs: More arguments of the network's `__call__`.

    Returns:
        One `BlockPlan` for each operation, in the order in which they run; empty where there is
        none.

    Raises:
        ValueError, TypeError: As the network does for an input of this shape.
        TypeError: If the model is neither a Linen nor an NNX module.

    >>> from nonlocal_jax.layers import nonlocal_block
    >>> print(plan((1, 4, 14, 14, 32), nonlocal_block("dot_product"))[0])  # doctest: +ELLIPSIS
    block: dot_product, 784 queries × 196 keys (compiled in ... s)
      dense         ... MB forward ... MB with gradients
      reassociated  ... MB forward ... MB with gradients <- runs
    """
    measured: dict[Any, _Memory] = {}
    plans = []
    for operation in _find_operations(model, jax.ShapeDtypeStruct(input_shape, dtype), kwargs):
        start = time.perf_counter()
        key = operation.key()
        is_new = key not in measured
        if is_new:
            measured[key] = _measure(operation)
        memory = measured[key]
        plans.append(
            BlockPlan(
                place="/".join(operation.place),
                instantiation=operation.instantiation,
                queries=operation.queries,
                keys=operation.keys,
                chosen=operation.chosen,
                forward=memory.forward,
                backward=memory.backward,
                seconds=time.perf_counter() - start if is_new else 0.0,
            )
        )
    return tuple(plans)


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Compiles a function and returns the bytes that it needs besides its arguments and results.

    Args:
        function: A function of arrays.
        *arguments: Its arguments, or `jax.ShapeDtypeStruct`s of them.

    Raises:
        NotImplementedError: If the platform's compiler does not report memory.

    >>> temporary_bytes(lambda x: x + 1, jax.ShapeDtypeStruct((1000,), jnp.float32))
    0
    """
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if analysis is None:
        raise NotImplementedError(
            f"The compiler for {jax.default_backend()!r} must report its memory; it does not."
        )
    return int(analysis.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class _Memory:
    forward: Mapping[ops.Implementation, int]
    backward: Mapping[ops.Implementation, int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Operation:
    """One operation of a network, with an unbound copy of the block around it.

    Attributes:
        place: Path of the block in the network.
        module: The copy of the block, or of the operation where there is no block.
        path: Path of the operation in `module`.
        args: Positional arguments that the block was called with; arrays are ShapeDtypeStructs.
        kwargs: Keyword arguments, likewise.
        instantiation: The pairwise function.
        queries: N.
        keys: M.
        chosen: The implementation that the operation runs.
        implementations: The implementations that are available for it.
    """

    place: Path
    module: nn.Module
    path: Path
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    instantiation: Instantiation
    queries: int
    keys: int
    chosen: ops.Implementation
    implementations: tuple[ops.Implementation, ...]

    def key(self) -> Any:
        """Equal for blocks that compile to the same program."""
        leaves, structure = jax.tree.flatten((self.args, dict(self.kwargs)))
        key = (self.module, self.path, self.implementations, structure, tuple(leaves))
        try:
            hash(key)
        except TypeError:
            return object()  # attributes that cannot be compared: equal to no other block
        return key


def _find_operations(
    model: Any, x: jax.ShapeDtypeStruct, kwargs: Mapping[str, Any]
) -> list[_Operation]:
    inputs: dict[Path, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    operations: dict[Path, _Operation] = {}

    def record_inputs(
        method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        if context.method_name == "__call__":
            inputs[module_path(context.module)] = args, kwargs
        return method(*args, **kwargs)

    def record_operation(call: PairwiseCall) -> Array:
        path = module_path(call.module)
        if path not in operations:
            operations[path] = operation_of(call)
        # `fresh_trace` disables jit, which would unroll the loops of implementations.
        with jax.disable_jit(False):
            return call.respond()

    def operation_of(call: PairwiseCall) -> _Operation:
        block = call.module if call.block is None else call.block
        place = module_path(block)
        args, kwargs = jax.tree.map(shape_of, inputs[place])
        explanation = ops.explain(
            call.instantiation,
            call.theta,
            call.phi,
            call.g,
            masked=call.key_mask is not None,
            implementation=call.implementation,
        )
        available = (cost for cost in explanation.costs if cost.refusal is None)
        return _Operation(
            place=place,
            module=_drop_axis_name(block.unbind()[0]),
            path=call.module.path[len(block.path) :],
            args=args,
            kwargs=kwargs,
            instantiation=call.instantiation,
            queries=call.theta.shape[-2],
            keys=call.phi.shape[-2],
            chosen=explanation.implementation,
            implementations=tuple(cost.implementation for cost in available),
        )

    is_linen = isinstance(model, nn.Module)
    if is_linen:
        apply, variables = model.init_with_output, jax.random.key(0)
    else:
        apply, variables = functional(model, None)

    def trace(variables: Any, x: Array) -> Any:
        # A jitted method of an NNX module may have been traced before, and then reports nothing.
        tracing = contextlib.nullcontext() if is_linen else fresh_trace()
        with tracing, tap(record_operation), nn.intercept_methods(record_inputs):
            return apply(variables, x, **kwargs)

    jax.eval_shape(trace, variables, x)
    return list(operations.values())


def _drop_axis_name(module: nn.Module) -> nn.Module:
    """The module on one device: a block is planned outside the map that names the axis."""
    if isinstance(module, NonLocalBlock):
        return module.clone(operation=module.operation.clone(axis_name=None))
    return module.clone(axis_name=None) if isinstance(module, NonLocalOperation) else module


def _measure(operation: _Operation) -> _Memory:
    names = operation.implementations
    return _Memory(
        forward={name: _forward_bytes(operation, name) for name in names},
        backward={name: _backward_bytes(operation, name) for name in names},
    )


def _forward_bytes(operation: _Operation, implementation: ops.Implementation) -> int:
    apply, arrays = _make_apply(operation, implementation, train=False)
    variables = _variables(operation)
    return temporary_bytes(lambda variables, arrays: apply(variables, arrays)[0], variables, arrays)


def _backward_bytes(operation: _Operation, implementation: ops.Implementation) -> int:
    """Bytes of the output, the updated statistics, and the gradients of parameters and inputs."""
    apply, arrays = _make_apply(operation, implementation, train=True)
    variables = _variables(operation)
    inputs = {i: a for i, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.inexact)}
    masks = {i: a for i, a in arrays.items() if i not in inputs}

    def step(variables: Any, inputs: Any, masks: Any, cotangent: Any) -> Any:
        def loss(params: Any, inputs: Any) -> Any:
            return apply({**variables, "params": params}, inputs | masks)

        params = variables.get("params", {})
        z, pullback, state = jax.vjp(loss, params, inputs, has_aux=True)
        return z, pullback(cotangent), state

    z, _ = jax.eval_shape(apply, variables, arrays)
    return temporary_bytes(step, variables, inputs, masks, z)


def _make_apply(
    operation: _Operation, implementation: ops.Implementation, train: bool
) -> tuple[Callable[[Any, Any], tuple[Any, Any]], dict[int, jax.ShapeDtypeStruct]]:
    """A function of the block's variables and arrays, and the shapes of the arrays.

    The function returns the block's output and those of its variables that it updated.
    """
    module = operation.module
    signature = inspect.signature(type(module).__call__)
    call = signature.bind(module, *operation.args, **operation.kwargs)
    if "train" in signature.parameters:
        call.arguments["train"] = train
    arrays, fill = split_arrays(call.args[1:], call.kwargs)

    def use_implementation(call: PairwiseCall) -> Array | None:
        return call.respond(implementation) if call.module.path == operation.path else None

    def apply(variables: Any, arrays: Mapping[int, Array]) -> tuple[Any, Any]:
        args, kwargs = fill(arrays)
        mutable = [name for name in variables if name != "params"] if train else []
        rngs = {"dropout": jax.random.key(0)}
        with tap(use_implementation):
            return module.apply(variables, *args, **kwargs, mutable=mutable, rngs=rngs)

    return apply, arrays


def _variables(operation: _Operation) -> Any:
    """The shapes of the block's variables."""
    arrays, fill = split_arrays(operation.args, operation.kwargs)

    def init(arrays: Mapping[int, Array]) -> Any:
        args, kwargs = fill(arrays)
        return operation.module.init(jax.random.key(0), *args, **kwargs)

    return jax.eval_shape(init, arrays)
