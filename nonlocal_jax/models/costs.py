"""The cost of a network: parameters and multiply-adds of one forward pass, layer by layer."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.norm import Affine
from nonlocal_jax.layers.response import PairwiseCall, tap
from nonlocal_jax.types import Array

Norm = nn.BatchNorm | nn.LayerNorm | nn.GroupNorm | Affine


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """The cost of one layer.

    Attributes:
        place: Path of the module, as in `params`. The row of a non-local operation has the sums
            over pairs only; its embeddings have their own rows.
        kind: Name of the module's class.
        output: Shape of the output.
        parameters: Number of trained parameters that the layer owns.
        multiply_adds: Multiply-adds of the matrix products and convolutions.
    """

    place: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int

    def __str__(self) -> str:
        shape = "×".join(map(str, self.output))
        millions = self.multiply_adds / 1e6
        numbers = f"{self.parameters:>12,} {millions:>12,.1f} M"
        return f"{self.place:<42} {self.kind:<18} {shape:<22} {numbers}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one forward pass. `print` shows it as a table.

    Attributes:
        parameters: Number of trained parameters.
        norm_parameters: Those that belong to norms, which the counts of the paper leave out.
        multiply_adds: Multiply-adds of the matrix products and convolutions, which the papers of
            this field call FLOPs.
        layers: The layers that have parameters or multiply, in the order in which they run.
    """

    parameters: int
    norm_parameters: int
    multiply_adds: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        billions = self.multiply_adds / 1e9
        total = f"{self.parameters:,} parameters, {billions:.2f} G multiply-adds"
        return "\n".join([*map(str, self.layers), total])


def cost(model: nn.Module, shape: tuple[int, ...], **kwargs: Any) -> Cost:
    """Counts the parameters and multiply-adds of one forward pass without computing it.

    The count has the products of convolutions, dense layers and non-local operations. Those of the
    last are counted by their definition: N·M·(d + e) for the pairs and their sum, and for the
    concatenation (N + M)·d + N·M·e. As in the paper, norms, activations and poolings do not count,
    and zeros at the borders count like any other input.

    Args:
        model: Any Linen module with one array as its input.
        shape: Shape of the input, such as (1, 32, 224, 224, 3).
        **kwargs: Further arguments of `model.apply`.

    Returns:
        The totals, and a row for each layer.

    Raises:
        TypeError: If the model is not a Linen module.

    >>> import nonlocal_jax as nl
    >>> options = {"clip": "32x2", "preset": "caffe2", "stride_at": "conv_a"}
    >>> model = nl.models.video_resnet(101, "c2d", 0, **options)
    >>> total = cost(model, (1, 32, 224, 224, 3))
    >>> parameters = total.parameters - total.norm_parameters
    >>> f"{parameters / 1e6:.1f} M, {total.multiply_adds / 1e9:.1f} B"  # Table 2e
    '43.2 M, 34.2 B'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a Linen module; got {type(model).__name__}.")
    counter = _Counter()

    def run(x: Array) -> Any:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        with tap(counter.count_pairs), nn.intercept_methods(counter.count_layer):
            return model.init_with_output(rngs, x, **kwargs)[0]

    jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
    return Cost(
        parameters=sum(layer.parameters for layer in counter.layers),
        norm_parameters=counter.norm_parameters,
        multiply_adds=sum(layer.multiply_adds for layer in counter.layers),
        layers=tuple(counter.layers),
    )


class _Counter:
    """Adds a row for each layer that runs."""

    def __init__(self) -> None:
        self.layers: list[LayerCost] = []
        self.norm_parameters = 0
        self._pairwise: dict[tuple[str, ...], int] = {}  # multiply-adds by path of the operation

    def count_pairs(self, call: PairwiseCall) -> None:
        """Listener of `tap`. It runs before the operation returns to `count_layer`."""
        self._pairwise[call.module.path] = _pairwise_multiply_adds(call)

    def count_layer(
        self, call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        """Interceptor of `nn.intercept_methods`."""
        result = call(*args, **kwargs)
        if context.method_name != "__call__":
            return result
        module = context.module
        output = tuple(jax.tree.leaves(result)[0].shape)
        if module.path in self._pairwise:
            multiply_adds = self._pairwise[module.path]
        else:
            multiply_adds = _layer_multiply_adds(module, args[0], output)
        parameters = _parameter_count(module)
        if isinstance(module, Norm):
            self.norm_parameters += parameters
        if multiply_adds or parameters:
            kind = type(module).__name__
            place = "/".join(module.path) or kind
            self.layers.append(LayerCost(place, kind, output, parameters, multiply_adds))
        return result


def _parameter_count(module: nn.Module) -> int:
    """Counts the parameters of a module without those of its submodules."""
    params = module.variables.get("params", {}).values()
    return sum(math.prod(leaf.shape) for leaf in params if hasattr(leaf, "shape"))


def _pairwise_multiply_adds(call: PairwiseCall) -> int:
    """Counts f over all pairs, and the sum of g."""
    theta, phi, g = call.theta, call.phi, call.g
    pairs = math.prod(theta.shape[:-1]) * phi.shape[-2]
    if call.instantiation == "concatenation":
        # w_f · [θ_i, φ_j] is a sum of one number for each query and one for each key.
        return math.prod(theta.shape) + math.prod(phi.shape) + pairs * g.shape[-1]
    return pairs * (theta.shape[-1] + g.shape[-1])


def _layer_multiply_adds(module: nn.Module, x: Array, output: tuple[int, ...]) -> int:
    if isinstance(module, nn.Dense):
        return math.prod(output) * x.shape[-1]
    if isinstance(module, VideoConv | nn.Conv):
        kernel_shape = module.variables["params"]["kernel"].shape
        return math.prod(output) * math.prod(kernel_shape[:-1])
    return 0
