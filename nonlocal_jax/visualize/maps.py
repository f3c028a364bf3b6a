"""Affinity maps of every non-local block of a network."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nonlocal_jax.layers import PairwiseCall, SumLayout, tap
from nonlocal_jax.layers.instantiations import to_rows
from nonlocal_jax.layers.model_functions import (
    fresh_trace,
    functional,
    is_hashable,
    shape_of,
    split_arrays,
)
from nonlocal_jax.types import Array, Instantiation
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.geometry import Geometry, GeometryError
from nonlocal_jax.visualize.tracing import (
    block_name,
    geometries,
    numbered,
)

SOWN_NAME = "nonlocal_operands"


class NoBlocksError(ValueError):
    """Raised for a model without non-local blocks."""


def affinities(
    model: Any, variables: Any, clip: Any, blocks: Sequence[str] | str | None = None, **kwargs: Any
) -> dict[str, AffinityMap]:
    """Returns the affinity of the non-local blocks of any network on a batch of clips.

    The network runs once. Rows of f / C are computed on request, so 10,000 × 10,000 pairs are never
    stored. The first call compiles the network. Later calls with an equal model and equal shapes do
    not.

    Blocks are found if they evaluate Eq. 1 by `nl.layers.nonlocal_response`, as every block of this
    library does.

    Args:
        model: Any Linen module, or an NNX module that contains blocks through `nnx.bridge.ToNNX`.
        variables: Its variables; None for an NNX module, which holds its own.
        clip: (B, T, H, W, C), (B, H, W, C) or (B, N, C), the input of the model.
        blocks: Names of the blocks, which are their paths in `params`; None for all.
        **kwargs: Further arguments of the model.

    Returns:
        An `AffinityMap` for each block by name, in the order in which the blocks run. The second
        call of a block is named `block#2`.

    Raises:
        NoBlocksError: The model has no non-local blocks.
        ValueError: A name that does not exist (the message lists the names), a clip that the model
            does not take, or blocks that are split over devices or inside `nn.scan`, `nn.vmap`,
            `nnx.remat` and similar transformations. Raised before the network runs.
        TypeError: A model that is neither Linen nor NNX, a Linen module without variables, or an
            NNX module with.

    Source: Section 3.1, Eq. 1, and Figures 1 and 3.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import nonlocal_jax as nl
    >>> block = nl.layers.nonlocal_block("embedded_gaussian")
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), block])
    >>> image = jax.random.normal(jax.random.key(0), (1, 24, 24, 3))
    >>> maps = affinities(model, model.init(jax.random.key(1), image), image)
    >>> maps["layers_1"].queries, maps["layers_1"].keys
    ((12, 12), (6, 6))
    >>> row = maps["layers_1"].rows((5, 7))[0, 0]  # what row 5, column 7 attends to
    >>> row.shape, round(float(row.sum()), 4)
    ((6, 6), 1.0)
    """
    if jnp.ndim(clip) < 3:
        raise ValueError(
            "clip must have shape (B, *positions, C), as the model takes it; got "
            f"{jnp.shape(clip)}."
        )
    apply, variables = functional(model, variables)
    leaves, structure = jax.tree.flatten((variables, jnp.asarray(clip), kwargs))
    signature = (apply, isinstance(model, nn.Module), structure, tuple(map(shape_of, leaves)))
    make_program = _program if is_hashable(signature) else _program.__wrapped__
    program = make_program(*signature)
    selected = _select(program.names, blocks, type(model).__name__)
    operands = program.compute_operands(tuple(selected), leaves)
    return {name: program.affinity_map(name, operands[name]) for name in selected}


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """What a network computes θ and φ with, and where its blocks are.

    Attributes:
        calls: The evaluations of Eq. 1 by name, in the order in which they run.
        run: Computes the operands of the evaluations with the names in its first argument from the
            arrays of a call of the network, which are numbered among its leaves.
        geometries: The geometry of each block that has one.
        obstacle: Why the others have none.
    """

    calls: dict[str, "_RecordedCall"]
    run: Callable[[tuple[str, ...], dict[int, Array]], dict[str, Any]]
    geometries: dict[str, Geometry | GeometryError]
    obstacle: GeometryError

    @property
    def names(self) -> list[str]:
        """The names of all evaluations."""
        return list(self.calls)

    def compute_operands(self, names: tuple[str, ...], leaves: list[Any]) -> dict[str, Any]:
        """Runs the network once."""
        arrays = {i: leaf for i, leaf in enumerate(leaves) if shape_of(leaf) is not leaf}
        try:
            return self.run(names, arrays)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "blocks must not be inside nnx.remat, nnx.scan or nnx.vmap; at least one of "
                f"{', '.join(self.names)} is."
            ) from error

    def affinity_map(self, name: str, operands: Any) -> AffinityMap:
        """Returns the affinity of one evaluation."""
        return _affinity_map(
            name, self.calls[name], operands, self.geometries.get(name, self.obstacle)
        )


@functools.lru_cache(maxsize=16)
def _program(
    apply: Callable[..., Any], is_linen: bool, structure: Any, leaves: tuple[Any, ...]
) -> _Program:
    """Traces a network for arguments of these shapes, once for all calls with equal ones."""
    shapes, fill = split_arrays(jax.tree.unflatten(structure, leaves), {})

    def evaluate(arrays: Mapping[int, Array]) -> tuple[list[_RecordedCall], list[Any]]:
        recorded: list[tuple[_RecordedCall, Any]] = []
        (variables, clip, kwargs), _ = fill(arrays)
        with fresh_trace(), tap(functools.partial(_record, recorded)):
            outputs = apply(variables, clip, mutable=["intermediates"], **kwargs)
        sown = outputs[1].get("intermediates", {}) if is_linen else None
        operands = [call.operands(traced, sown) for call, traced in recorded]
        return [call for call, _ in recorded], operands

    calls: list[_RecordedCall] = []

    def record_calls(arrays: Mapping[int, Array]) -> list[Any]:
        calls[:], operands = evaluate(arrays)
        return operands

    jax.eval_shape(record_calls, shapes)
    names = numbered(call.block for call in calls)

    # Under jit, what the modules themselves sow (such as N×M maps) is never computed.
    @functools.partial(jax.jit, static_argnums=0)
    def run(selected: tuple[str, ...], arrays: dict[int, Array]) -> dict[str, Any]:
        operands = dict(zip(names, evaluate(arrays)[1], strict=True))
        return {name: operands[name] for name in selected}

    (variables, clip, kwargs), _ = fill(shapes)
    found, obstacle = _trace_geometries(apply, variables, clip, kwargs)
    return _Program(dict(zip(names, calls, strict=True)), run, found, obstacle)


def _select(names: list[str], blocks: Sequence[str] | str | None, model_name: str) -> list[str]:
    """Returns the names that are requested, in the order of `names`, and checks that they exist."""
    if not names:
        raise NoBlocksError(f"the model must have non-local blocks; {model_name} has none.")
    if blocks is None:
        return names
    selected = [blocks] if isinstance(blocks, str) else list(blocks)
    if unknown := [name for name in selected if name not in names]:
        raise ValueError(
            f"blocks must be among {', '.join(names)}; got {', '.join(map(repr, unknown))}."
        )
    return [name for name in names if name in selected]


def _trace_geometries(
    apply: Any, variables: Any, clip: Any, kwargs: dict[str, Any]
) -> tuple[dict[str, Geometry | GeometryError], GeometryError]:
    """Returns the geometries by name, and the error of blocks that have none."""
    try:
        found = geometries(apply, variables, clip, **kwargs)
    # A model may raise anything for a batch of one, and maps do not need the geometry.
    except Exception as error:
        return {}, GeometryError(f"the network cannot be traced with a single clip: {error}")
    return found, GeometryError("the block did not run when the network was traced.")


@dataclasses.dataclass(frozen=True)
class _RecordedCall:
    """One evaluation of Eq. 1 while the network is traced."""

    block: str
    index: int  # of the evaluation, among those of the same module
    path: tuple[str, ...]  # of the module
    instantiation: Instantiation
    layout: SumLayout | None

    def operands(self, traced: Any, sown: Any) -> Any:
        """Returns θ, φ, the mask of the keys, w_f and the scale.

        For a Linen model these are the sown arrays, which leave transformations such as
        `nn.remat` as outputs, whereas the traced arrays are valid only inside.
        """
        if sown is None:
            return traced
        try:
            arrays = functools.reduce(operator.getitem, self.path, sown)[SOWN_NAME][self.index]
        except (LookupError, TypeError):
            arrays = None
        # nn.scan and nn.vmap stack what is sown along a new axis.
        if arrays is None or arrays[0].shape != traced[0].shape:
            raise ValueError(
                f"blocks must not be inside nn.scan, nn.vmap or nnx.bridge.ToLinen; {self.block} "
                "is."
            )
        return arrays


def _record(recorded: list[tuple[_RecordedCall, Any]], call: PairwiseCall) -> Array:
    """Listener that appends a call and its operands to `recorded` and computes its response."""
    name = block_name(call.block or call.module)
    axis_name = call.axis_name or getattr(call.module, "axis_name", None)
    if axis_name is not None:
        raise ValueError(f"{name} must not be split over devices; got axis_name={axis_name!r}.")
    _check_layout(name, call)
    index = sum(earlier.path == call.module.path for earlier, _ in recorded)
    arrays = (call.theta, call.phi, call.key_mask, call.w_f, call.scale)
    evaluation = _RecordedCall(name, index, call.module.path, call.instantiation, call.layout)
    recorded.append((evaluation, arrays))
    call.module.sow("intermediates", SOWN_NAME, arrays)
    # `fresh_trace` disables jit, which would unroll the loops of the streaming implementations.
    with jax.disable_jit(False):
        return call.respond()


def _check_layout(name: str, call: PairwiseCall) -> None:
    """Checks that the layout, if there is one, has as many positions as θ and φ have rows."""
    if call.layout is None:
        return
    sizes = {"theta": call.layout.positions, "phi": _pooled_size(call.layout)}
    for operand, size in sizes.items():
        rows = math.prod(getattr(call, operand).shape[1:-1])
        if rows != math.prod(size):
            raise ValueError(
                f"layout of {name} must have as many positions as {operand} has rows, {rows}; got "
                f"{size}."
            )


def _pooled_size(layout: SumLayout) -> tuple[int, ...]:
    return tuple(n // size for n, size in zip(layout.positions, layout.window, strict=True))


def _affinity_map(
    name: str, call: _RecordedCall, operands: Any, geometry: Geometry | GeometryError
) -> AffinityMap:
    theta, phi, key_mask, w_f, scale = operands
    layout = call.layout
    if layout is None:  # rows are numbered in the order in which the module has them
        queries, keys = theta.shape[1:-1], phi.shape[1:-1]
        window = (1,) * len(queries)
        query_ids = np.arange(math.prod(queries)).reshape(-1, queries[-1])
        key_ids = np.arange(math.prod(keys)).reshape(-1, keys[-1])
    else:
        queries, keys, window = layout.positions, _pooled_size(layout), layout.window
        query_ids, key_ids = _flat_positions(layout, queries), _flat_positions(layout, keys)

    def stack_sums(rows: Array) -> Array:
        """(B, *outer, N, d) -> (B, S, N, d)."""
        return rows.reshape(rows.shape[0], -1, *rows.shape[-2:])

    return AffinityMap(
        block=name,
        instantiation=call.instantiation,
        queries=queries,
        keys=keys,
        window=window,
        batch=theta.shape[0],
        _geometry=_geometry_of_rows(layout, geometry),
        _theta=stack_sums(theta),
        _phi=stack_sums(phi),
        _w_f=w_f,
        _key_mask=None if key_mask is None else stack_sums(key_mask[..., None])[..., 0],
        _scale=scale,
        _query_ids=query_ids,
        _key_ids=key_ids,
    )


def _flat_positions(layout: SumLayout, size: tuple[int, ...]) -> Any:
    """Returns the flat positions (S, N) that meet in each sum, for a map of this size."""
    positions = jnp.arange(math.prod(size)).reshape(1, *size, 1)
    rows = np.asarray(to_rows(positions, layout.axes, layout.groups))
    return rows.reshape(-1, rows.shape[-2])


def _geometry_of_rows(
    layout: SumLayout | None, geometry: Geometry | GeometryError
) -> Geometry | GeometryError:
    """Returns the geometry of the module's input if the rows of θ are its positions."""
    if layout is None:
        return GeometryError(
            "the module does not say which positions its rows are; pass "
            "layout=nl.layers.SumLayout(...) to nl.layers.nonlocal_response."
        )
    if isinstance(geometry, Geometry) and geometry.grid != layout.positions:
        return GeometryError(
            f"the layout must have the positions of the module's input, {geometry.grid}; got "
            f"{layout.positions}. Compute θ from the input of the module that calls "
            "nl.layers.nonlocal_response."
        )
    return geometry
