"""Readers of weight files, which return NumPy arrays and execute nothing in a file.

`checkpoint_files.read` recognises a file by its content and calls the reader of its format.
"""

from nonlocal_jax.weights.readers.checkpoint_files import Checkpoint, Format, read
from nonlocal_jax.weights.readers.errors import FileFormatError, UnsafeFileError

__all__ = ["Checkpoint", "FileFormatError", "Format", "UnsafeFileError", "read"]
