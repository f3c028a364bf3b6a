"""The definition itself, which builds the whole N×M affinity: the fastest where that is small."""

from typing import get_args

from nonlocal_jax.ops import definition, sharded
from nonlocal_jax.ops.kernels.kernel import Forecast, Kernel, Operands, Sizes
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.types import Instantiation, Responses


def respond(operands: Operands, settings: None) -> Responses:
    """Computes y = (f/C) g."""
    instantiation, theta, phi, g, key_mask, scale, w_f = operands
    affinity = definition.affinity(instantiation, theta, phi, key_mask, scale, w_f)
    return definition.respond(affinity, g)


def respond_split(operands: Operands, settings: None, axis_name: str) -> Responses:
    """Gathers keys and values of all devices; for the concatenation, b_j instead of the keys."""
    instantiation, theta, phi, g, key_mask, _, w_f = operands
    if instantiation != "concatenation":
        return respond(operands.gather_keys(axis_name), settings)
    assert w_f is not None
    a, b = definition.project(theta, phi, w_f)
    key_mask, b, g = sharded.gather(axis_name, key_mask, b[..., None], g)
    affinity = definition.concatenation_of_projections(a, b[..., 0], key_mask)
    return definition.respond(affinity, g)


def cost(sizes: Sizes, platform: str) -> Forecast:
    """Forecasts two products over all pairs, and the traffic of the affinity."""
    # Passes over the affinity in memory, and copies of it that live at once without and with
    # gradients. The softmax reads and writes it most often.
    match sizes.instantiation:
        case "concatenation" if platform == "tpu":
            passes, copies = 0, (0, 0)  # XLA:TPU fuses ReLU(a_i + b_j) into the product
        case "concatenation":
            passes, copies = 8, (1, 2)
        case "dot_product":
            passes, copies = 6, (1, 2)
        case _:
            passes, copies = 12, (1, 3)
    # The logits of a concatenation are sums a_i + b_j, not products over d channels.
    channels = sizes.e if sizes.instantiation == "concatenation" else sizes.d + sizes.e
    products = sizes.pairs * channels
    flops = (2 * products, 6 * products)
    affinity_bytes = sizes.pairs * sizes.item_bytes
    temporary = (copies[0] * affinity_bytes, copies[1] * affinity_bytes)
    speed = PLATFORMS[platform]
    moved = passes * affinity_bytes if affinity_bytes > speed.cache else 0
    return Forecast(flops, temporary, speed.seconds(sum(flops), moved))


KERNEL = Kernel(
    name="dense",
    instantiations=get_args(Instantiation),
    respond=respond,
    cost=cost,
    needs_static_sizes=False,
    respond_split=respond_split,
)
