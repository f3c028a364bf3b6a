"""Weights of trained networks: reading, loading, inflating, verifying and writing them."""

from nonlocal_jax.weights.inflation import inflate
from nonlocal_jax.weights.load_reports import LoadedWeight, LoadReport
from nonlocal_jax.weights.loading import load, load_report
from nonlocal_jax.weights.readers import Checkpoint, FileFormatError, UnsafeFileError, read
from nonlocal_jax.weights.saving import export, save
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
