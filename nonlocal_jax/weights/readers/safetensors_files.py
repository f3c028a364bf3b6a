"""Files in the safetensors format, read by its own library."""

from pathlib import Path

import numpy as np

from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.readers.errors import FileFormatError
from nonlocal_jax.weights.readers.values import Contents, check_size, ignored_reason

MAX_MAPPED_BYTES = 32 << 20  # of tensors that are read from one mapping of the file
MAX_HEADER_BYTES = 100 << 20  # as in the safetensors library
FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8")
SUPPORTED_DTYPES = (*FLOATS, *INTEGERS, "BOOL")


def is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with these bytes can be one: 8 bytes of length, then JSON."""
    return head[8:9] == b"{" and _header_bytes(head) <= MAX_HEADER_BYTES


def _header_bytes(head: bytes) -> int:
    return int.from_bytes(head[:8], "little")


def read_safetensors(path: Path, head: bytes, size: int, max_bytes: int) -> Contents:
    """Reads all tensors.

    Args:
        path: The file.
        head: Its first bytes.
        size: Its size in bytes.
        max_bytes: Limit of what the tensors may take in memory.
    """
    from safetensors import SafetensorError, safe_open

    header_bytes = _header_bytes(head)
    if header_bytes > size - 8:
        raise FileFormatError(
            f"truncated: its header has {header_bytes} bytes, of which {size - 8} follow. "
            "Download it again."
        )
    check_size(size, max_bytes, "its tensors")
    # The library does not declare what it raises for headers that NumPy cannot follow.
    try:
        with safe_open(path, framework="np") as file:
            names = file.offset_keys()
            for name in names:
                dtype = file.get_slice(name).get_dtype()
                if dtype not in SUPPORTED_DTYPES:
                    raise FileFormatError(
                        f"{name!a:.80} is of {dtype}, which is not supported. "
                        "Convert it before saving."
                    )
            metadata = file.metadata()
        arrays: dict[str, np.ndarray] = {}
        remaining = list(reversed(names))
        while remaining:
            # The library maps the file into memory, and opening it again unmaps what was read.
            with safe_open(path, framework="np") as file:
                mapped_bytes = 0
                while remaining and mapped_bytes <= MAX_MAPPED_BYTES:
                    name = remaining.pop()
                    arrays[name] = file.get_tensor(name)
                    mapped_bytes += arrays[name].nbytes
    except FileFormatError:
        raise
    except (SafetensorError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"it is a damaged safetensors file ({printable(error):.200}). Download it again."
        ) from error
    return arrays, {"__metadata__": ignored_reason(metadata)} if metadata else {}
