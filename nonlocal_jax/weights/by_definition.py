"""Comparing a network with the definitions of its layers.

The network runs twice: as it is, and with every convolution, dense layer, BatchNorm and non-local
    operation replaced by
its definition.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax import ops
from nonlocal_jax.layers import VideoConv
from nonlocal_jax.layers.response import PairwiseCall, tap
from nonlocal_jax.types import Array


def definition_differences(
    model: nn.Module, variables: Any, clip: Array
) -> tuple[dict[str, float | None], dict[str, float]]:
    """Computes how far a network is from the definitions of its layers.

    Args:
        model: The network.
        variables: Its variables.
        clip: An input.

    Returns:
        The difference of each layer on the same input, in the order in which they run, None where a
        layer has no definition to compare with; and the difference of each stage between the two
        runs of the whole network. A difference is the largest absolute one, relative to the largest
        absolute value.
    """
    order: list[str] = []
    stages: list[str] = []

    def compare(variables: Any, clip: Array) -> tuple[dict[str, Array], list[Array]]:
        layers: dict[str, Array] = {}
        expected = _stages(model, variables, clip)
        operations = functools.partial(_compare_operation, layers)
        modules = functools.partial(_compare_module, order, layers)
        with tap(operations), nn.intercept_methods(modules):
            defined = _stages(model, variables, clip)
        stages.extend(defined)
        return layers, [_difference(expected[name], y) for name, y in defined.items()]

    with jax.default_matmul_precision("highest"):
        layer_arrays, stage_arrays = jax.jit(compare)(variables, clip)
    layers = {
        name: finite_or_infinity(layer_arrays[name]) if name in layer_arrays else None
        for name in dict.fromkeys(order)
    }
    values = map(finite_or_infinity, stage_arrays)
    return layers, dict(zip(stages, values, strict=True))


def _compare_module(
    order: list[str], layers: dict[str, Array], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Records a layer's difference from its definition, and returns the definition's output."""
    module = context.module
    name = "/".join(module.path)
    order.append(name)
    output = call(*args, **kwargs)
    if context.method_name != "__call__":
        return output
    if isinstance(module, VideoConv):
        defined = _conv(module, *args)
    elif isinstance(module, nn.Dense):
        defined = _dense(module, *args)
    elif isinstance(module, nn.BatchNorm):
        defined = _batch_norm(module, *args[:1])
    else:
        return output
    layers[name] = _difference(output, defined)
    return defined


def _compare_operation(layers: dict[str, Array], call: PairwiseCall) -> Array:
    """Compares all available implementations with the dense definition, and returns the latter.

    All implementations are compared because "auto" itself chooses the dense one for an input as
    small as this.
    """
    defined = call.respond("dense")
    has_mask = call.key_mask is not None
    costs = ops.explain(call.instantiation, call.theta, call.phi, call.g, masked=has_mask).costs
    available = [cost.implementation for cost in costs if not cost.refusal]
    responses = [call.respond(), *map(call.respond, available)]
    differences = jnp.stack([_difference(response, defined) for response in responses])
    layers["/".join(call.module.path)] = differences.max()
    return defined


def _stages(model: nn.Module, variables: Any, clip: Array) -> dict[str, Array]:
    """Returns the outputs of the stages that a network sows, and its logits."""
    logits, state = model.apply(variables, clip, mutable=["intermediates"])
    sown = {
        name: value[-1]
        for name, value in state.get("intermediates", {}).items()
        if isinstance(value, tuple)
    }
    return {**sown, "logits": logits}


def _conv(module: VideoConv, x: Array) -> Array:
    """Computes y[p] = Σ_tap x[strides · p + tap] W[tap], by XLA's convolution over three axes."""
    kernel: Array = module.get_variable("params", "kernel")
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=module.dtype)
    return lax.conv_general_dilated(
        x,
        kernel,
        module.strides,
        padding=[(size // 2, size // 2) for size in module.kernel_size],
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=module.groups,
    )


def _dense(module: nn.Dense, x: Array) -> Array:
    """Computes y = x W + b."""
    params = module.variables["params"]
    kernel, bias = params["kernel"], params.get("bias")
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = jnp.einsum("...c,cf->...f", x, kernel)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def _batch_norm(module: nn.BatchNorm, x: Array) -> Array:
    """Computes y = (x − mean) / √(var + ε) · γ + β, with the running statistics."""
    leaves = {**module.variables["params"], **module.variables["batch_stats"]}
    mean, var, scale, bias = (
        jnp.expand_dims(leaves[name], range(x.ndim - 1))
        for name in ("mean", "var", "scale", "bias")
    )
    dtype = module.dtype or jnp.result_type(x.dtype, module.param_dtype)
    normalised = (x.astype(jnp.float32) - mean) / jnp.sqrt(var + module.epsilon)
    return (normalised * scale + bias).astype(dtype)


def _difference(y: Array, defined: Array) -> Array:
    y, defined = y.astype(jnp.float32), defined.astype(jnp.float32)
    largest = jnp.abs(defined).max()
    return jnp.abs(y - defined).max() / jnp.where(largest == 0, 1, largest)


def finite_or_infinity(difference: Any) -> float:
    """Returns a difference as a number, ∞ for NaN."""
    return float(difference) if math.isfinite(difference) else math.inf
