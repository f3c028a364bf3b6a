"""What kind of machine runs, and round numbers for it."""

from typing import NamedTuple

import jax


class Machine(NamedTuple):
    """Only ratios matter: they decide between implementations."""

    flops: float  # of matrix products, a second
    bandwidth: float  # bytes a second to memory that was just taken from the system
    cache: int  # bytes of temporaries that cost nothing


MACHINES = {
    "cpu": Machine(1.5e11, 1e10, 8 << 20),  # 2 cores
    "gpu": Machine(1e14, 2e12, 32 << 20),
    "tpu": Machine(1e14, 1e12, 32 << 20),
}


def backend() -> str:
    """JAX's own backend as `MACHINES` names it, whatever a vendor calls its GPU."""
    name = jax.default_backend()
    return name if name in MACHINES else "gpu"
