"""Runnable experiments, one per file. `shared` holds what several of them use."""

from nonlocal_jax.lazy import MissingExtraError, extra

try:
    with extra("experiments"):
        import filelock  # noqa: F401 - every run locks its folder
        import matplotlib  # noqa: F401 - and draws pictures, after it has trained
except MissingExtraError as error:
    # A command is about to run: one line says more than a traceback.
    raise SystemExit(f"error: {error}") from error
