"""What the command lines of all experiments have in common."""

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Collection, Iterator
from typing import Any

from nonlocal_jax import training

TRAINING_ERRORS = (
    training.RunError,
    training.CheckpointError,
    training.MismatchError,
    training.NonFiniteError,
)


def command(experiment: str) -> str:
    """Returns the command that started this process, for the record of a run."""
    return shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]])


def settings(config: Any, excluded: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a config by name, except the excluded ones."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in excluded}


@contextlib.contextmanager
def exit_on(*errors: type[Exception], hint: str = "") -> Iterator[None]:
    """Turns errors that the user can correct into one printed line, without a traceback.

    Args:
        *errors: The exceptions to catch.
        hint: Advice to append to the message.

    Raises:
        SystemExit: One of `errors` was raised. Its message is "error: ...".
    """
    try:
        yield
    except errors as error:
        raise SystemExit(f"error: {error}{hint}") from error
