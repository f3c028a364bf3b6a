"""What each JAX primitive does to receptive fields: one rule for each group of primitives.

A rule maps the fields of the operands to those of the results, or raises a `GeometryError` that
names the obstacle, as the end of the sentence "receptive fields cannot be followed through ...".
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nonlocal_jax.visualize.geometry import Field, GeometryError

# The field along each dimension of an array; None along the batch, channels and constants.
Fields = tuple[Field | None, ...]
Rule = Callable[[Any, Sequence[Any]], Fields]  # equation of a jaxpr, fields of its operands


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _union(name: str, operands: Sequence[Fields]) -> Fields:
    """Returns the union of the fields of arrays of one shape, dimension by dimension."""

    def pair(left: Field | None, right: Field | None) -> Field | None:
        if left is None or right is None:
            return left or right
        if (union := left.union(right)) is None:
            raise GeometryError(f"{name} of maps whose strides differ")
        return union

    return tuple(functools.reduce(pair, dimension) for dimension in zip(*operands, strict=True))


def _pointwise(equation: Any, operands: Sequence[Fields]) -> Fields:
    shape = _shape(equation.outvars[0])
    # Some primitives, such as clamp and select_n, also take scalars, which have no positions.
    full = [
        fields
        for fields, atom in zip(operands, equation.invars, strict=True)
        if _shape(atom) == shape
    ]
    return _union(equation.primitive.name, full)


def _transpose(equation: Any, operands: Sequence[Fields]) -> Fields:
    return tuple(operands[0][i] for i in equation.params["permutation"])


def _squeeze(equation: Any, operands: Sequence[Fields]) -> Fields:
    removed = equation.params["dimensions"]
    return tuple(field for i, field in enumerate(operands[0]) if i not in removed)


def _reduction(equation: Any, operands: Sequence[Fields]) -> Fields:
    # What is summed over a whole axis depends on all of it: the field is dropped, as for a norm's
    # statistics.
    removed = equation.params["axes"]
    return tuple(field for i, field in enumerate(operands[0]) if i not in removed)


def _broadcast(equation: Any, operands: Sequence[Fields]) -> Fields:
    shape, source_shape = _shape(equation.outvars[0]), _shape(equation.invars[0])
    fields: list[Field | None] = [None] * len(shape)
    for i, target in enumerate(equation.params["broadcast_dimensions"]):
        if (
            source_shape[i] == shape[target]
        ):  # a dimension of size 1 that is repeated has no positions
            fields[target] = operands[0][i]
    return tuple(fields)


def _axis_operation(equation: Any, operands: Sequence[Fields]) -> Fields:
    """Operations that move or mix entries along some axes, which must not be positions."""
    name = equation.primitive.name
    axes = np.atleast_1d(equation.params[AXIS_PARAMETERS[name]]).tolist()
    if any(fields[axis] is not None for fields in operands for axis in axes):
        raise GeometryError(f"{name} along an axis of positions")
    return _union(name, operands)


def _map_dimensions(
    equation: Any, fields: Fields, parameters: Any, rule: Callable[..., Field | None]
) -> Fields:
    """Applies a rule (field, *parameters) to each dimension that has a field.

    A rule returns None where zeros are inserted between positions.
    """
    results: list[Field | None] = []
    for field, parameter in zip(fields, parameters, strict=True):
        result = None if field is None else rule(field, *parameter)
        if field is not None and result is None:
            raise GeometryError(f"{equation.primitive.name} that puts zeros between positions")
        results.append(result)
    return tuple(results)


def _pad(equation: Any, operands: Sequence[Fields]) -> Fields:
    def rule(field: Field, low: Any, high: Any, interior: Any) -> Field | None:
        return field.windowed(padding=(int(low), int(high))) if interior == 0 else None

    return _map_dimensions(equation, operands[0], equation.params["padding_config"], rule)


def _slice(equation: Any, operands: Sequence[Fields]) -> Fields:
    # A slice is a window of one tap whose padding crops.
    def rule(field: Field, start: int, limit: int, stride: int) -> Field:
        return field.windowed(1, stride, (-start, limit - len(field.first)))

    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    return _map_dimensions(equation, operands[0], zip(starts, limits, strides, strict=True), rule)


def _reduce_window(equation: Any, operands: Sequence[Fields]) -> Fields:
    def rule(
        field: Field, taps: int, stride: int, padding: Any, base: int, dilation: int
    ) -> Field | None:
        return field.windowed(taps, stride, padding, dilation) if base == 1 else None

    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    parameters = zip(*(equation.params[name] for name in names), strict=True)
    return _map_dimensions(equation, operands[0], parameters, rule)


def _convolution(equation: Any, operands: Sequence[Fields]) -> Fields:
    params, fields, kernel_shape = equation.params, operands[0], _shape(equation.invars[1])
    numbers = params["dimension_numbers"]
    batch, channel, *positions = numbers.lhs_spec
    if fields[channel] is not None or params["batch_group_count"] != 1:
        raise GeometryError("a convolution whose channels are positions")
    results: list[Field | None] = [None] * len(fields)
    results[numbers.out_spec[0]] = fields[batch]
    for i, (source, target) in enumerate(zip(positions, numbers.out_spec[2:], strict=True)):
        field, taps = fields[source], kernel_shape[numbers.rhs_spec[2:][i]]
        if field is None:
            continue
        if params["lhs_dilation"][i] != 1:
            raise GeometryError("a transposed convolution")
        stride, padding = params["window_strides"][i], params["padding"][i]
        results[target] = field.windowed(taps, stride, padding, params["rhs_dilation"][i])
    return tuple(results)


def _dot_general(equation: Any, operands: Sequence[Fields]) -> Fields:
    """Drops contracted dimensions. Batch dimensions come first and belong to both factors."""
    contracted, batch = equation.params["dimension_numbers"]
    factors = list(zip(operands, contracted, batch, strict=True))
    shared = [tuple(fields[i] for i in shared_axes) for fields, _, shared_axes in factors]
    free = [
        field
        for fields, contracted_axes, shared_axes in factors
        for i, field in enumerate(fields)
        if i not in (*contracted_axes, *shared_axes)
    ]
    return (*_union("dot_general", shared), *free)


def _reshape(equation: Any, operands: Sequence[Fields]) -> Fields:
    """An axis of positions may gain or lose neighbours of size 1, but not be merged or split."""
    fields, sizes = operands[0], _shape(equation.invars[0])
    new_sizes = _shape(equation.outvars[0])
    results: list[Field | None] = []
    for group, new_group in _axis_groups(sizes, new_sizes):
        if len(group) == len(new_group) == 1:
            results.append(fields[group[0]])
            continue
        large = [i for i in group if sizes[i] > 1]
        positions = [i for i in large if fields[i] is not None]
        if not positions:
            results += [None] * len(new_group)
            continue
        length = sizes[positions[0]]
        if len(large) > 1 or length not in [new_sizes[i] for i in new_group]:
            raise GeometryError("a reshape that merges or splits axes of positions")
        target = next(i for i in new_group if new_sizes[i] == length)
        results += [fields[positions[0]] if i == target else None for i in new_group]
    return tuple(results)


def _axis_groups(
    sizes: tuple[int, ...], new_sizes: tuple[int, ...]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields groups of axes before and after a reshape that have the same number of entries.

    Groups are as small as possible and in order: (6, 4, 5) -> (2, 3, 20) yields the axes 0 and
    0, 1, then 1, 2 and 2.
    """
    i = j = 0
    while i < len(sizes) or j < len(new_sizes):
        group = [i] if i < len(sizes) else []
        new_group = [j] if j < len(new_sizes) else []
        i, j = i + len(group), j + len(new_group)
        while True:
            entries = math.prod(sizes[k] for k in group)
            new_entries = math.prod(new_sizes[k] for k in new_group)
            if entries == new_entries:
                break
            if entries < new_entries:
                group.append(i)
                i += 1
            else:
                new_group.append(j)
                j += 1
        yield group, new_group


POINTWISE = (
    *("abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "cbrt", "ceil", "clamp"),
    *("convert_element_type", "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp"),
    *("exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p"),
    *("logistic", "lt", "max", "min", "mul", "name", "ne", "neg", "nextafter", "not"),
    *("optimization_barrier", "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt"),
    *("select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh"),
    "xor",
)
REDUCTIONS = (
    *("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod"),
    "reduce_sum",
)
WINDOWS = ("reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum")
# Operations along axes, and the parameter that holds the axes.
AXIS_PARAMETERS = {
    "concatenate": "dimension",
    "cumlogsumexp": "axis",
    "cummax": "axis",
    "cummin": "axis",
    "cumprod": "axis",
    "cumsum": "axis",
    "rev": "dimensions",
    "sort": "dimension",
    "split": "axis",
}
RULES: Mapping[str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(WINDOWS, _reduce_window),
    **dict.fromkeys(AXIS_PARAMETERS, _axis_operation),
    "broadcast_in_dim": _broadcast,
    "conv_general_dilated": _convolution,
    "dot_general": _dot_general,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "squeeze": _squeeze,
    "transpose": _transpose,
}
