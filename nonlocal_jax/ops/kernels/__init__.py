"""The implementations of Eq. 1, one file each.

To add one, write a file and add its `KERNEL` to `KERNELS`.
"""

from nonlocal_jax.ops.kernels import cudnn, dense, flash, reassociated, sorted_keys, streaming
from nonlocal_jax.ops.kernels.kernel import Kernel

# The definition comes first; the others are compared with it.
KERNELS: tuple[Kernel, ...] = (
    dense.KERNEL,
    streaming.KERNEL,
    cudnn.KERNEL,
    flash.KERNEL,
    reassociated.KERNEL,
    sorted_keys.KERNEL,
)
