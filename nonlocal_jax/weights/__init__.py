"""Parameters of trained networks: reading, inflating, checking, writing."""

from nonlocal_jax.weights.files import Checkpoint, read
from nonlocal_jax.weights.inflation import inflate
from nonlocal_jax.weights.loading import load, load_report
from nonlocal_jax.weights.report import LoadedWeight, LoadReport
from nonlocal_jax.weights.saving import export, save
from nonlocal_jax.weights.unpickle import FileFormatError, UnsafeFileError
from nonlocal_jax.weights.verification import Verification, verify

__all__ = [
    "Checkpoint",
    "FileFormatError",
    "LoadReport",
    "LoadedWeight",
    "UnsafeFileError",
    "Verification",
    "export",
    "inflate",
    "load",
    "load_report",
    "read",
    "save",
    "verify",
]
