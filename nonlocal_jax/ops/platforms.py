"""The platforms that kernels are chosen for, and round figures of their speed."""

from typing import NamedTuple

import jax


class Platform(NamedTuple):
    """Speed of a platform. Only ratios matter: they decide between implementations.

    Attributes:
        flops: FLOPs of matrix products per second.
        bandwidth: Bytes per second to memory that was just allocated.
        cache: Bytes of temporaries that stay in the cache and cost nothing.
    """

    flops: float
    bandwidth: float
    cache: int

    def seconds(self, flops: int | float, moved: int | float) -> float:
        """Forecasts the time of `flops` FLOPs and of `moved` bytes of traffic to memory."""
        return flops / self.flops + moved / self.bandwidth


PLATFORMS = {
    "cpu": Platform(1.5e11, 1e10, 8 << 20),  # 2 cores
    "gpu": Platform(1e14, 2e12, 32 << 20),
    "tpu": Platform(1e14, 1e12, 32 << 20),
}


def host_platform() -> str:
    """Returns the name in `PLATFORMS` of JAX's default backend; GPUs of every vendor are "gpu"."""
    name = jax.default_backend()
    return name if name in PLATFORMS else "gpu"
