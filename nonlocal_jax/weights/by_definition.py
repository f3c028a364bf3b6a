"""A network computed by the definitions of its layers, beside the network as it runs."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from nonlocal_jax import ops
from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.tap import PairwiseCall, tap
from nonlocal_jax.types import Array


def against_definition(
    model: nn.Module, variables: Any, clip: Array
) -> tuple[dict[str, float | None], dict[str, float]]:
    """How far a network is from its definitions: every convolution, dense layer, BatchNorm and non-local operation.

    Args:
        model: the network.
        variables: its variables.
        clip: an input.

    Returns:
        The layers in the order in which they run, each with the difference on the same input, None where there is nothing
        to compare; and the stages of the whole, which is run twice. A difference is the largest, over the largest value.
    """
    order: list[str] = []

    def run(variables: Any, clip: Array) -> tuple[dict[str, Array], list[Array]]:
        layers: dict[str, Array] = {}
        as_it_runs = _stages(model, variables, clip)
        operations = functools.partial(_nonlocal_by_definition, layers)
        with (
            tap(operations),
            nn.intercept_methods(functools.partial(_by_definition, order, layers)),
        ):
            defined = _stages(model, variables, clip)
        stages.extend(defined)
        return layers, [_relative_to(as_it_runs[name], y) for name, y in defined.items()]

    stages: list[str] = []
    with jax.default_matmul_precision("highest"):
        of_layers, of_stages = jax.jit(run)(variables, clip)
    differences = {
        name: or_infinite(of_layers[name]) if name in of_layers else None
        for name in dict.fromkeys(order)
    }
    return differences, {
        name: or_infinite(difference) for name, difference in zip(stages, of_stages, strict=True)
    }


def _by_definition(
    order: list[str], layers: dict[str, Array], call: Any, args: Any, kwargs: Any, context: Any
) -> Any:
    """Runs a layer as it is, notes how far that is from its definition, and goes on with the definition's answer."""
    module, method = context.module, context.method_name
    place = "/".join(module.path)
    order.append(place)
    answer = call(*args, **kwargs)
    if method != "__call__":
        return answer
    if isinstance(module, VideoConv):
        defined = _conv(module, *args)
    elif isinstance(module, nn.Dense):
        defined = _dense(module, *args)
    elif isinstance(module, nn.BatchNorm):
        defined = _batch_norm(module, *args[:1])
    else:
        return answer
    layers[place] = _relative_to(answer, defined)
    return defined


def _nonlocal_by_definition(layers: dict[str, Array], call: PairwiseCall) -> Array:
    """The dense definition, compared with what every other implementation makes of the same input.

    "auto" alone would not do: on a clip as small as this it takes the dense one itself.
    """
    defined = call.respond("dense")
    masked = call.key_mask is not None
    costs = ops.explain(call.instantiation, call.theta, call.phi, call.g, masked=masked).costs
    available = [cost.implementation for cost in costs if not cost.refusal]
    answers = [call.respond(), *(call.respond(name) for name in available)]
    layers["/".join(call.module.path)] = jnp.stack(
        [_relative_to(y, defined) for y in answers]
    ).max()
    return defined


def _stages(model: nn.Module, variables: Any, clip: Array) -> dict[str, Array]:
    """What the stages of a network put out, and its logits."""
    logits, state = model.apply(variables, clip, mutable=["intermediates"])
    sown = {
        name: value[-1]
        for name, value in state.get("intermediates", {}).items()
        if isinstance(value, tuple)
    }
    return {**sown, "logits": logits}


def _conv(module: VideoConv, x: Array) -> Array:
    """y[p] = Σ_tap x[strides · p + tap] W[tap], by XLA's convolution of three axes."""
    x, kernel = nn.dtypes.promote_dtype(
        x, module.get_variable("params", "kernel"), dtype=module.dtype
    )
    padding = [(size // 2, size // 2) for size in module.kernel_size]
    numbers = ("NDHWC", "DHWIO", "NDHWC")
    return lax.conv_general_dilated(
        x,
        kernel,
        module.strides,
        padding,
        dimension_numbers=numbers,
        feature_group_count=module.groups,
    )


def _dense(module: nn.Dense, x: Array) -> Array:
    params = module.variables["params"]
    x, kernel, bias = nn.dtypes.promote_dtype(
        x, params["kernel"], params.get("bias"), dtype=module.dtype
    )
    y = jnp.einsum("...c,cf->...f", x, kernel)
    return y if bias is None else y + jnp.expand_dims(bias, range(y.ndim - 1))


def _batch_norm(module: nn.BatchNorm, x: Array) -> Array:
    """(x − mean) / √(var + ε) · γ + β, of the running statistics."""
    leaves = {**module.variables["params"], **module.variables["batch_stats"]}
    mean, var, scale, bias = (
        jnp.expand_dims(leaves[name], range(x.ndim - 1))
        for name in ("mean", "var", "scale", "bias")
    )
    dtype = module.dtype or jnp.result_type(x.dtype, module.param_dtype)
    return ((x.astype(jnp.float32) - mean) / jnp.sqrt(var + module.epsilon) * scale + bias).astype(
        dtype
    )


def _relative_to(y: Array, defined: Array) -> Array:
    y, defined = y.astype(jnp.float32), defined.astype(jnp.float32)
    size = jnp.abs(defined).max()
    return jnp.abs(y - defined).max() / jnp.where(size == 0, 1, size)


def or_infinite(difference: Any) -> float:
    """A number, ∞ where it is none."""
    return float(difference) if math.isfinite(difference) else math.inf
