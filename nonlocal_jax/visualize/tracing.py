"""The receptive fields of any network, by tracing it.

The network is traced, never run, and each step of what JAX traced is followed from field to field; so any network has its
geometry, as long as what it does to positions is done in windows: convolutions, poolings, slices.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata
from jax.extend import core

from nonlocal_jax.layers import NonLocalBlock, VideoConv
from nonlocal_jax.layers.instantiations import NonLocalOperation
from nonlocal_jax.types import Array
from nonlocal_jax.visualize.geometry import Field, Geometry, GeometryError

MARK = "nonlocal_jax.visualize:"
TRACES = itertools.count()


def applied(model: Any, variables: Any) -> tuple[Callable[..., Any], Any]:
    """`model.apply` and its variables; of an NNX model the same, made of its state. Raises TypeError for anything else."""
    if isinstance(model, nn.Module):
        if variables is None:
            raise TypeError(
                "variables of a Linen module must be those that `init` gives; got None."
            )
        return model.apply, variables
    from flax import nnx  # which loads optax

    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Linen or an NNX module; got {type(model).__name__}.")
    if variables is not None:
        raise TypeError(
            f"variables of an NNX module must be None, as it holds its own; got {type(variables).__name__}."
        )
    definition, state = nnx.split(model)

    def apply(state: Any, x: Array, *, mutable: Any = False, **kwargs: Any) -> Any:
        merged = nnx.merge(definition, state)
        for path, module in nnx.iter_modules(merged):
            if isinstance(module, nnx.bridge.ToNNX):  # Linen modules in it are told where they are
                module.to_nnx__module = module.to_nnx__module.clone(
                    name=MARK + "/".join(map(str, path))
                )
        y = merged(x, **kwargs)
        return (y, {}) if mutable else y

    return apply, state


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Every method of a module runs in Python, those too of which JAX has a trace already, as under `nnx.jit`."""
    with jax.disable_jit(), set_xla_metadata(nonlocal_jax_trace=str(next(TRACES))):
        yield


def geometries(
    apply: Callable[..., Any], variables: Any, x: Any, **kwargs: Any
) -> dict[str, Geometry | GeometryError]:
    """The geometry of the input of every non-local block, or what is in the way, by the block's name.

    Left out is what mixes all positions: the non-local blocks on the way and sums over whole axes, such as norms' statistics.

    Args:
        apply: `model.apply` of any Linen module, or what `applied` gives.
        variables: its variables, or their shapes.
        x: (B, *positions, C), an input, or its shape. One clip is traced: of arrays in `kwargs` that are B long, one entry.
        **kwargs: more arguments of `apply`.

    >>> import jax
    >>> import nonlocal_jax as nl
    >>> model = nl.models.video_resnet(50, "c2d", 1, num_classes=7)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    >>> rows = geometries(model.apply, variables, model.example)["nonlocal_res4_4"].fields[1]
    >>> rows.stride, rows.size
    (16, 235)
    """

    def run(variables: Any, x: Array) -> Any:
        with untraced(), nn.intercept_methods(_as_windows):
            return apply(variables, x, **of_one)

    batch, *size = x.shape[:-1]
    of_one = jax.tree.map(
        lambda leaf: leaf[:1] if jnp.ndim(leaf) and len(leaf) == batch else leaf, kwargs
    )
    of_one |= {"rngs": kwargs["rngs"]} if "rngs" in kwargs else {}  # keys are arrays too
    traced = jax.make_jaxpr(run)(variables, jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)).jaxpr
    of_input: Known = (None, *map(Field.of_input, range(len(size)), size), None)
    known: list[Known] = [(None,) * len(var.aval.shape) for var in traced.invars[:-1]]
    followed: dict[str, Geometry | GeometryError] = {}
    _follow(traced, [*known, of_input], tuple(size), followed)
    return followed


def place(block: nn.Module) -> str:
    """The name of a block: its path, as in `params`; that of the operation where it stands alone; in NNX that of attributes."""
    root: Any = block
    while isinstance(root.parent, nn.Module):
        root = root.parent
    in_nnx = (root.name or "").removeprefix(MARK) if (root.name or "").startswith(MARK) else ""
    return "/".join(filter(None, [in_nnx, *block.path])) or type(block).__name__


def _block(operation: nn.Module) -> nn.Module:
    return operation.parent if isinstance(operation.parent, NonLocalBlock) else operation


def numbered(name: str, index: int) -> str:
    """The name of a block that is called again: `block`, `block#2`, ..."""
    return name if index == 0 else f"{name}#{index + 1}"


def _as_windows(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Layers that compute windows in a roundabout way do it plainly; the input of every block is marked."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(module, VideoConv):
        kernel = jnp.zeros(
            (*module.kernel_size, args[0].shape[-1] // module.groups, module.features),
            args[0].dtype,
        )
        padding = [(size // 2, size // 2) for size in module.kernel_size]
        return jax.lax.conv_general_dilated(
            args[0], kernel, module.strides, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=module.groups,
        )  # fmt: skip
    if isinstance(module, nn.Dense):
        return jnp.broadcast_to(args[0][..., :1], (*args[0].shape[:-1], module.features))
    if isinstance(module, NonLocalOperation):
        x = checkpoint_name(args[0], MARK + place(_block(module)))
        features = (
            max(x.shape[-1] // 2, 1) if module.inner_features is None else module.inner_features
        )
        y = jnp.broadcast_to(x[..., :1], (*x.shape[:-1], features))
        return (y, call(*args, **kwargs)[1]) if kwargs.get("return_map") else y
    return call(*args, **kwargs)


# What is known of an array: for each of its dimensions the field that runs along it; or what was in the way of knowing.
Known = tuple[Field | None, ...] | str

POINTWISE = frozenset([
    "abs", "acos", "add", "add_any", "and", "asin", "atan", "atan2", "cbrt", "ceil", "clamp", "convert_element_type",
    "copy", "cos", "cosh", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "name", "ne", "neg",
    "nextafter", "not", "optimization_barrier", "or", "pow", "real", "reduce_precision", "rem", "round", "rsqrt",
    "select_n", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
])  # fmt: skip
REDUCTIONS = frozenset(
    [
        "argmax",
        "argmin",
        "reduce_and",
        "reduce_max",
        "reduce_min",
        "reduce_or",
        "reduce_prod",
        "reduce_sum",
    ]
)
WINDOWS = frozenset(
    ["reduce_window", "reduce_window_max", "reduce_window_min", "reduce_window_sum"]
)
# What moves along axes, and the parameter that names them.
CUMULATIVE = ("cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum")
ALONG = {"rev": "dimensions", "sort": "dimension", **dict.fromkeys(CUMULATIVE, "axis")}


def _follow(
    jaxpr: Any, known: Sequence[Known], size: tuple[int, ...], found: dict[str, Any]
) -> list[Known]:
    """What is known of the outputs of a jaxpr, from what is known of its inputs; blocks that are marked go to `found`."""
    of: dict[Any, Known] = dict(zip(jaxpr.invars, known, strict=True))

    def look(atom: Any) -> Known:
        nothing = (None,) * len(atom.aval.shape)
        return nothing if isinstance(atom, core.Literal) else of.get(atom, nothing)

    for equation in jaxpr.eqns:
        name, inputs = equation.primitive.name, [look(atom) for atom in equation.invars]
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        outputs: Sequence[Known]
        if inner is not None and name not in ("scan", "while", "cond"):
            outputs = _follow(getattr(inner, "jaxpr", inner), inputs, size, found)
        elif not any(map(_has_fields, inputs)):
            outputs = [(None,) * len(out.aval.shape) for out in equation.outvars]
        else:
            try:
                outputs = [
                    _step(name, equation, inputs, out.aval.shape) for out in equation.outvars
                ]
            except GeometryError as error:
                outputs = [str(error)] * len(equation.outvars)
        if name == "name" and str(equation.params["name"]).startswith(MARK):
            of_block = _geometry(inputs[0], equation.invars[0].aval.shape[1:-1], size)
            block = str(equation.params["name"]).removeprefix(MARK)
            found[
                next(n for i in range(len(found) + 1) if (n := numbered(block, i)) not in found)
            ] = of_block
        of |= dict(zip(equation.outvars, outputs, strict=True))
    return [look(atom) for atom in jaxpr.outvars]


def _has_fields(known: Known) -> bool:
    return isinstance(known, str) or any(field is not None for field in known)


def _geometry(
    known: Known, grid: tuple[int, ...], size: tuple[int, ...]
) -> Geometry | GeometryError:
    if isinstance(known, str):
        return GeometryError(f"receptive fields cannot be followed through {known}.")
    fields = known[1:-1]
    if known[0]:
        return GeometryError(
            "frames are folded into the batch: the map is of an image; give the model one frame at a time."
        )
    if any(field is None and n > 1 for field, n in zip(fields, grid, strict=True)) or known[-1]:
        return GeometryError(
            f"the axes of a map of {grid} must each run along an axis of the input {size}."
        )
    return Geometry(fields, grid, size)


def _step(name: str, equation: Any, inputs: Sequence[Known], shape: tuple[int, ...]) -> Known:
    """What is known of the output of one primitive. Raises GeometryError, saying what is in the way."""
    params = equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    if name in POINTWISE:
        return functools.reduce(
            functools.partial(_hull, name),
            [one for one, s in zip(inputs, shapes, strict=True) if s == shape],
        )
    if any(isinstance(one, str) for one in inputs):
        raise GeometryError(next(one for one in inputs if isinstance(one, str)))
    first: Any = inputs[0]
    match name:
        case "transpose":
            return tuple(first[i] for i in params["permutation"])
        case "squeeze":
            return tuple(field for i, field in enumerate(first) if i not in params["dimensions"])
        case "broadcast_in_dim":
            to = dict(
                zip(params["broadcast_dimensions"], zip(first, shapes[0], strict=True), strict=True)
            )
            fields = [to.get(i, (None, 1)) for i in range(len(shape))]
            return tuple(
                field if size == n else None for (field, size), n in zip(fields, shape, strict=True)
            )
        case "reshape":
            return _reshape(first, shapes[0], shape)
        case _ if name in REDUCTIONS:
            return tuple(field for i, field in enumerate(first) if i not in params["axes"])
        case "pad":
            return _by_dim(name, first, params["padding_config"], _border)
        case "slice":
            cut = zip(
                params["start_indices"],
                params["limit_indices"],
                params["strides"] or (1,) * len(shape),
                strict=True,
            )
            return _by_dim(
                name, first, cut, lambda f, p: f.through(1, p[2], (-p[0], p[1] - len(f.first)))
            )
        case "split" | "concatenate":
            axis = params["axis" if name == "split" else "dimension"]
            if any(one[axis] is not None for one in inputs if isinstance(one, tuple)):
                raise GeometryError(f"{name} along an axis of positions")
            return functools.reduce(functools.partial(_hull, name), inputs)
        case _ if name in ALONG:
            axes = np.atleast_1d(params[ALONG[name]]).tolist()
            if any(first[axis] is not None for axis in axes):
                raise GeometryError(f"{name} along an axis of positions")
            return first
        case _ if name in WINDOWS:
            windows = zip(
                params["window_dimensions"], params["window_strides"], params["padding"],
                params["base_dilation"], params["window_dilation"], strict=True,
            )  # fmt: skip
            return _by_dim(name, first, windows, _window)
        case "conv_general_dilated":
            return _convolution(first, shapes[1], params)
        case "dot_general":
            return _product(inputs, params["dimension_numbers"])
    raise GeometryError(name)


def _by_dim(
    name: str, fields: Any, params: Any, rule: Callable[[Field, Any], Field | None]
) -> Known:
    out = tuple(
        None if field is None else rule(field, p) for field, p in zip(fields, params, strict=True)
    )
    if any(new is None and old is not None for new, old in zip(out, fields, strict=True)):
        raise GeometryError(f"{name} that puts zeros between positions")
    return out


def _border(field: Field, p: Any) -> Field | None:
    before, behind, between = map(int, p)
    return field.through(padding=(before, behind)) if between == 0 else None


def _window(field: Field, p: Any) -> Field | None:
    taps, stride, padding, base, dilation = p
    return field.through(taps, stride, padding, dilation) if base == 1 else None


def _convolution(fields: Any, kernel: tuple[int, ...], params: Any) -> Known:
    numbers = params["dimension_numbers"]
    batch, channel, *spatial = numbers.lhs_spec
    if fields[channel] is not None or params["batch_group_count"] != 1:
        raise GeometryError("a convolution whose channels are positions")
    out: list[Field | None] = [None] * len(fields)
    out[numbers.out_spec[0]] = fields[batch]
    for i, (at, to) in enumerate(zip(spatial, numbers.out_spec[2:], strict=True)):
        field, taps = fields[at], kernel[numbers.rhs_spec[2:][i]]
        if field is not None:
            if params["lhs_dilation"][i] != 1:
                raise GeometryError("a transposed convolution")
            out[to] = field.through(
                taps, params["window_strides"][i], params["padding"][i], params["rhs_dilation"][i]
            )
    return tuple(out)


def _product(inputs: Sequence[Any], numbers: Any) -> Known:
    """Axes that are summed over are gone; those of a batch are in both."""
    (of_left, of_right), (in_left, in_right) = numbers
    left, right = inputs
    batch = _hull("dot_general", tuple(left[i] for i in in_left), tuple(right[i] for i in in_right))
    if isinstance(batch, str):
        raise GeometryError(batch)
    free_left = [field for i, field in enumerate(left) if i not in (*of_left, *in_left)]
    free_right = [field for i, field in enumerate(right) if i not in (*of_right, *in_right)]
    return (*batch, *free_left, *free_right)


def _hull(name: str, left: Known, right: Known) -> Known:
    """Those of a sum."""
    if isinstance(left, str) or isinstance(right, str):
        return left if isinstance(left, str) else right
    fields = tuple(
        a.joined(b) if a is not None and b is not None else a or b
        for a, b in zip(left, right, strict=True)
    )
    if any(a is not None and joined is None for a, joined in zip(left, fields, strict=True)):
        raise GeometryError(f"{name} of maps whose strides differ")
    return fields


def _reshape(fields: Any, old: tuple[int, ...], new: tuple[int, ...]) -> Known:
    """An axis may gain and lose axes of size 1 beside it; positions that are merged or split cannot be followed."""
    out: list[Field | None] = []
    for before, after in _chunks(old, new):
        inside = [fields[i] for i in before if fields[i] is not None and old[i] > 1]
        if len(before) == len(after) == 1:
            out.append(fields[before[0]])
        elif not inside:
            out += [None] * len(after)
        elif (
            len(inside) == 1
            and (length := math.prod(old[i] for i in before)) in [new[i] for i in after]
            and (sum(old[i] > 1 for i in before) == 1)
        ):
            at = next(i for i in after if new[i] == length)
            out += [inside[0] if i == at else None for i in after]
        else:
            raise GeometryError("a reshape that merges or splits axes of positions")
    return tuple(out)


def _chunks(old: tuple[int, ...], new: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest groups of axes, before and after a reshape, of which each holds as many numbers."""
    i = j = 0
    while i < len(old) or j < len(new):
        before, after = [i] if i < len(old) else [], [j] if j < len(new) else []
        i, j = i + len(before), j + len(after)
        while (a := math.prod(old[k] for k in before)) != (b := math.prod(new[k] for k in after)):
            if a < b:
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        yield before, after
