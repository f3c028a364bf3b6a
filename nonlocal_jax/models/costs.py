"""What a network costs: its parameters and the multiply-adds of one forward pass, layer by layer."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.layers.convolution import VideoConv
from nonlocal_jax.layers.norm import Affine
from nonlocal_jax.layers.tap import PairwiseCall, tap
from nonlocal_jax.types import Array


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One layer.

    Attributes:
        place: the path of the module, as in `params`; a non-local operation's own row has the sums over pairs alone, its
            embeddings have theirs.
        kind: the class of the module.
        output: shape of the output.
        parameters: how many numbers are trained in it.
        multiply_adds: of the matrix products and convolutions.
    """

    place: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one forward pass.

    Attributes:
        parameters: how many numbers are trained.
        norm_parameters: those of them that belong to norms, which the paper's counts leave out.
        multiply_adds: of the matrix products and convolutions; the papers of this field call this FLOPs.
        layers: what has parameters or multiplies, in the order in which it runs.
    """

    parameters: int
    norm_parameters: int
    multiply_adds: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        rows = [
            f"{layer.place:<42} {layer.kind:<18} {'×'.join(map(str, layer.output)):<22} {layer.parameters:>12,} "
            f"{layer.multiply_adds / 1e6:>12,.1f} M"
            for layer in self.layers
        ]
        total = f"{self.parameters:,} parameters, {self.multiply_adds / 1e9:.2f} G multiply-adds"
        return "\n".join([*rows, total])


def cost(model: nn.Module, shape: tuple[int, ...], **kwargs: Any) -> Cost:
    """Parameters and multiply-adds of one forward pass; nothing is computed.

    Counted are the products of convolutions, dense layers and non-local operations, the last as their definition has
    them: N·M·(d + e) for the pairs and their sum (for the concatenation, (N + M)·d + N·M·e). Norms, activations and
    poolings are not, as in the paper. Zeros at borders count like any other input.

    Args:
        model: any Linen module of one array.
        shape: of the input, such as (1, 32, 224, 224, 3).
        **kwargs: more arguments of `model.apply`.

    Returns:
        The totals, and a row for each layer; `print` shows the table.

    >>> import nonlocal_jax as nl
    >>> model = nl.models.video_resnet(101, "c2d", 0, clip="32x2", preset="caffe2", stride_at="conv_a")
    >>> total = cost(model, (1, 32, 224, 224, 3))
    >>> f"{(total.parameters - total.norm_parameters) / 1e6:.1f} M, {total.multiply_adds / 1e9:.1f} B"  # Table 2e
    '43.2 M, 34.2 B'
    """
    rows: list[LayerCost] = []
    pairs: dict[tuple[str, ...], int] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        out = call(*args, **kwargs)
        module, method = context.module, context.method_name
        if method != "__call__":
            return out
        shape = tuple(jax.tree.leaves(out)[0].shape)
        multiplies = (
            pairs[module.path] if module.path in pairs else _of_layer(module, args[0], shape)
        )
        own = sum(
            math.prod(leaf.shape)
            for leaf in module.variables.get("params", {}).values()
            if hasattr(leaf, "shape")
        )
        if multiplies or own:
            place = "/".join(module.path) or type(module).__name__
            rows.append(LayerCost(place, type(module).__name__, shape, own, multiplies))
        return out

    def record_pairs(call: PairwiseCall) -> None:
        pairs[call.module.path] = _of_pairs(call)

    def run(x: Array) -> Any:
        with tap(record_pairs), nn.intercept_methods(record):
            return model.init_with_output(
                {"params": jax.random.key(0), "dropout": jax.random.key(0)}, x, **kwargs
            )[0]

    jax.eval_shape(run, jax.ShapeDtypeStruct(shape, jnp.float32))
    norms = (nn.BatchNorm.__name__, nn.LayerNorm.__name__, nn.GroupNorm.__name__, Affine.__name__)
    return Cost(
        parameters=sum(row.parameters for row in rows),
        norm_parameters=sum(row.parameters for row in rows if row.kind in norms),
        multiply_adds=sum(row.multiply_adds for row in rows),
        layers=tuple(rows),
    )


def _of_pairs(call: PairwiseCall) -> int:
    """Multiply-adds of f over all pairs and of the sum of g."""
    theta, phi, g = call.theta, call.phi, call.g
    pairs = math.prod(theta.shape[:-1]) * phi.shape[-2]
    if call.instantiation == "concatenation":
        return math.prod(theta.shape) + math.prod(phi.shape) + pairs * g.shape[-1]
    return pairs * (theta.shape[-1] + g.shape[-1])


def _of_layer(module: nn.Module, x: Array, out: tuple[int, ...]) -> int:
    if isinstance(module, nn.Dense):
        return math.prod(out) * x.shape[-1]
    if isinstance(module, VideoConv | nn.Conv):
        return math.prod(out) * math.prod(module.variables["params"]["kernel"].shape[:-1])
    return 0
