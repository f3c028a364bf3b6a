"""Finds the receptive fields of the non-local blocks of a network by tracing it with JAX.

The network is never run. While it is traced, layers are replaced by simpler ones with the same
receptive fields, and the input of every module that evaluates Eq. 1 is marked; `receptive_fields`
then follows the traced program up to the marks. Any network has a geometry this way, as long as it
combines positions by windows: convolutions, pooling and slices.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nonlocal_jax.layers import PairwiseCall, VideoConv, tap
from nonlocal_jax.layers.model_functions import (
    fresh_trace,
    module_path,
    shape_of,
    split_arrays,
)
from nonlocal_jax.types import Array
from nonlocal_jax.visualize.geometry import Geometry, GeometryError
from nonlocal_jax.visualize.receptive_fields import batch_fields, find_marked

MARK = "nonlocal_jax.visualize:"


def geometries(
    apply: Callable[..., Any], variables: Any, x: Any, **kwargs: Any
) -> dict[str, Geometry | GeometryError]:
    """Returns the geometry of the input of every non-local block, by name, or the obstacle.

    What combines all positions is left out: other non-local blocks on the path and sums over whole
    axes, such as the statistics of norms.

    Args:
        apply: `model.apply` of any Linen module, or the function that `functional` returns.
        variables: The variables, or their shapes.
        x: (B, *positions, C), an input or its shape. A single sample is traced: arrays in `kwargs`
            of length B are taken as of length 1.
        **kwargs: Further arguments of `apply`: arrays or their shapes, and constants.

    >>> import jax
    >>> import nonlocal_jax as nl
    >>> model = nl.models.video_resnet(50, "c2d", 1, num_classes=7)
    >>> variables = jax.eval_shape(model.init, jax.random.key(0), model.example)
    >>> rows = geometries(model.apply, variables, model.example)["nonlocal_res4_4"].fields[1]
    >>> rows.stride, rows.size
    (16, 235)
    """
    batch, *size = x.shape[:-1]
    shapes = jax.tree.map(shape_of, kwargs)
    sample_shapes = jax.tree.map(lambda leaf: _shape_of_sample(leaf, batch), shapes)
    if "rngs" in kwargs:  # a raw PRNG key is an array of two numbers, not one for each sample
        sample_shapes["rngs"] = shapes["rngs"]
    arrays, fill = split_arrays((), sample_shapes)

    def run(variables: Any, arrays: Mapping[int, Array], x: Array) -> Any:
        _, sample_kwargs = fill(arrays)
        with fresh_trace(), tap(_queries_as_response), nn.intercept_methods(_simplify):
            return apply(variables, x, **sample_kwargs)

    sample = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
    jaxpr = jax.make_jaxpr(run)(variables, arrays, sample).jaxpr
    constants = [(None,) * len(variable.aval.shape) for variable in jaxpr.invars[:-1]]
    size = tuple(size)
    marked = find_marked(jaxpr, [*constants, batch_fields(size)], size, MARK)
    names = numbered(name for name, _ in marked)
    return {name: geometry for name, (_, geometry) in zip(names, marked, strict=True)}


def _shape_of_sample(leaf: Any, batch: int) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.shape[:1] != (batch,):
        return leaf
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)


def block_name(module: nn.Module) -> str:
    """Returns the name of a block or an operation: its path, as in `params`.

    A module that is the whole network is named after its class. In NNX the path is that of the
    attributes.
    """
    return "/".join(module_path(module)) or type(module).__name__


def numbered(names: Iterable[str]) -> list[str]:
    """Returns unique names: those of the second and later occurrences get a number.

    >>> numbered(["stem", "head", "head"])
    ['stem', 'head', 'head#2']
    """
    occurrences: dict[str, int] = {}
    unique = []
    for name in names:
        occurrences[name] = occurrences.get(name, 0) + 1
        unique.append(name if occurrences[name] == 1 else f"{name}#{occurrences[name]}")
    return unique


def _queries_as_response(call: PairwiseCall) -> Array:
    """Replaces Eq. 1 by one channel of θ: positions stay apart, and no pairs are traced."""
    return jnp.broadcast_to(call.theta[..., :1], (*call.theta.shape[:-1], call.g.shape[-1]))


def _simplify(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    """Interceptor that simplifies layers to their receptive fields and marks inputs of blocks."""
    module: Any = context.module
    if context.method_name != "__call__":
        return call(*args, **kwargs)
    if isinstance(module, VideoConv):
        return _plain_convolution(module, args[0])
    if isinstance(module, nn.Dense):
        return _first_channel(args[0], (*args[0].shape[:-1], module.features))

    blocks: list[str] = []

    def record(pairwise: PairwiseCall) -> None:
        if pairwise.module is module:
            blocks.append(block_name(pairwise.block or module))

    with tap(record):
        outputs = call(*args, **kwargs)
    if not blocks:
        return outputs
    x = next(iter((*args, *kwargs.values())))
    for block in blocks:  # one for each evaluation of Eq. 1
        x = checkpoint_name(x, MARK + block)
    # Positions of the output are those of the input. Inside the module they have become rows, which
    # no rule can follow.
    return jax.tree.map(
        lambda y: _first_channel(x, y.shape) if y.shape[:-1] == x.shape[:-1] else y, outputs
    )


def _plain_convolution(module: VideoConv, x: Array) -> Array:
    # VideoConv merges axes of positions for speed, which no rule can follow.
    kernel_shape = (*module.kernel_size, x.shape[-1] // module.groups, module.features)
    return jax.lax.conv_general_dilated(
        x,
        jnp.zeros(kernel_shape, x.dtype),
        module.strides,
        [(size // 2, size // 2) for size in module.kernel_size],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=module.groups,
    )


def _first_channel(x: Array, shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(x[..., :1], shape)
