"""Runnable experiments, one per file. `shared` holds what several of them use."""

import sys

from nonlocal_jax.lazy import MissingExtraError, extra

try:
    with extra("experiments"):
        import filelock  # noqa: F401 - every run locks its folder
        import matplotlib  # noqa: F401 - and draws pictures, after it has trained
except MissingExtraError as error:
    # Python calls a program so until `python -m` has found its module, which is in this package.
    # For a command, one line says more than a traceback.
    if sys.argv[0] == "-m":
        raise SystemExit(f"error: {error}") from error
    raise
