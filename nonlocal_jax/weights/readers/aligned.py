"""Arrays in aligned memory, which JAX uses on CPUs without a copy."""

from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 64  # bytes
# Entries along the last axis that are copied at once. The last axis of a transposed kernel has a
# large stride in the file's layout: 237 MB take 0.34 s to copy at once, and 0.13 s in blocks.
BLOCK = 32


def aligned_copy(array: npt.NDArray[Any], dtype: Any = None) -> npt.NDArray[Any]:
    """Copies an array, in C order, to memory that `jax.device_put` does not copy on CPUs.

    Args:
        array: The array, usually a transposed view.
        dtype: The dtype of the copy. Defaults to the array's.

    >>> copy = aligned_copy(np.arange(6.0).reshape(3, 2).T)
    >>> copy.tolist(), copy.ctypes.data % ALIGNMENT
    ([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]], 0)
    """
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    nbytes = array.size * dtype.itemsize
    memory = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    copy = memory[start : start + nbytes].view(dtype).reshape(array.shape)
    if array.ndim < 2 or array.flags.c_contiguous:
        copy[...] = array
        return copy
    for first in range(0, array.shape[-1], BLOCK):
        copy[..., first : first + BLOCK] = array[..., first : first + BLOCK]
    return copy
