"""Follows receptive fields through a traced network (a jaxpr), one primitive after another.

The rules of the primitives are in `field_rules`. Where there is no rule, or a rule names an
obstacle, the obstacle takes the place of the fields: it is reported only for feature maps that
depend on the result.
"""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from nonlocal_jax.visualize.field_rules import RULES, Fields
from nonlocal_jax.visualize.geometry import Field, Geometry, GeometryError

# What is known of an array: its fields, or the obstacle on the way to it.
Tracked = Fields | GeometryError


def batch_fields(size: tuple[int, ...]) -> Fields:
    """Returns the fields of an input (B, *positions, C) whose positions have this size."""
    return (None, *map(Field.identity, range(len(size)), size), None)


def find_marked(
    jaxpr: Any, inputs: Sequence[Tracked], size: tuple[int, ...], mark: str
) -> list[tuple[str, Geometry | GeometryError]]:
    """Returns the geometry of every array that is marked in a jaxpr.

    Arrays are marked by `jax.ad_checkpoint.checkpoint_name`, which leaves a primitive with a name
    in the jaxpr.

    Args:
        jaxpr: The traced network.
        inputs: Fields of its inputs.
        size: Size of the network's input, without batch and channels.
        mark: Prefix that tells these marks from checkpoint names of the network itself.

    Returns:
        The name after the prefix and the geometry, or the obstacle, in the order of the jaxpr.
    """
    marked: list[tuple[str, Tracked, tuple[int, ...]]] = []
    _follow(jaxpr, inputs, mark, marked)
    return [(name, _geometry(fields, shape[1:-1], size)) for name, fields, shape in marked]


def _follow(jaxpr: Any, inputs: Sequence[Tracked], mark: str, marked: list[Any]) -> list[Tracked]:
    """Returns what is known of the outputs of a jaxpr; appends marked arrays to `marked`."""
    environment: dict[Any, Tracked] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Tracked:
        constant = (None,) * len(atom.aval.shape)
        return constant if isinstance(atom, core.Literal) else environment.get(atom, constant)

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        primitive = equation.primitive.name
        results: Sequence[Tracked]
        if equation.params.get("branches_platforms"):  # of `platform_dependent`: all are equal
            inner, operands = equation.params["branches"][-1], operands[1:]
            results = _follow(inner.jaxpr, operands, mark, marked)
        # A loop or a branch applies its jaxpr more than once or not at all: it has no rule.
        elif inner is not None and primitive not in ("scan", "while", "cond"):
            results = _follow(getattr(inner, "jaxpr", inner), operands, mark, marked)
        elif any(map(_is_tracked, operands)):
            results = [_apply_rule(equation, operands)] * len(equation.outvars)
        else:
            results = [(None,) * len(output.aval.shape) for output in equation.outvars]
        if primitive == "name" and str(equation.params["name"]).startswith(mark):
            name = str(equation.params["name"]).removeprefix(mark)
            marked.append((name, operands[0], equation.invars[0].aval.shape))
        environment |= dict(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_tracked(fields: Tracked) -> bool:
    return isinstance(fields, GeometryError) or any(field is not None for field in fields)


def _apply_rule(equation: Any, operands: Sequence[Tracked]) -> Tracked:
    for operand in operands:
        if isinstance(operand, GeometryError):
            return operand
    name = equation.primitive.name
    try:
        if name not in RULES:
            raise GeometryError(name)
        return RULES[name](equation, operands)
    except GeometryError as obstacle:
        return obstacle


def _geometry(
    fields: Tracked, grid: tuple[int, ...], size: tuple[int, ...]
) -> Geometry | GeometryError:
    """Returns the geometry of a map (B, *grid, C), or why it has none."""
    if isinstance(fields, GeometryError):
        return GeometryError(f"receptive fields cannot be followed through {fields}.")
    batch, *positions, channels = fields
    if batch is not None:
        return GeometryError(
            "frames are folded into the batch, so the map belongs to one image; pass one frame "
            "at a time to the model."
        )
    lost = any(field is None and n > 1 for field, n in zip(positions, grid, strict=True))
    if lost or channels is not None:
        return GeometryError(
            f"each axis of the map {grid} must correspond to an axis of the input {size}."
        )
    return Geometry(tuple(positions), grid, size)
