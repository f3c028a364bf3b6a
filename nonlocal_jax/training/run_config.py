"""The configuration in a run's directory, with which alone the run resumes."""

import json
from collections.abc import Mapping
from typing import Any

from nonlocal_jax import files
from nonlocal_jax.terminal import printable

SHOWN_CHARACTERS = 200  # of a value in an error


class RunError(Exception):
    """A directory cannot be used for this run; the message says why."""


def check_config(
    folder: files.AnyPath, config: Mapping[str, Any], may_differ: tuple[str, ...]
) -> None:
    """Checks that a run may continue with a configuration, and writes it to `config.json`.

    Args:
        folder: Directory of the run.
        config: Configuration, as JSON holds it.
        may_differ: Names that may change from one start to the next.

    Raises:
        RunError: If the run was started with another configuration, or the file is damaged.
        OSError: If the file cannot be written.
    """
    file = folder / "config.json"
    if file.exists():
        stored = _read(file)
        for name in _differences(stored, config):
            if name.split(".")[0] not in may_differ:
                raise RunError(
                    f"{_shown(name)} must be {_shown(_value(stored, name))}, as when the run in "
                    f"{folder} started; got {_shown(_value(config, name))}. Change it back, or use "
                    f"another directory. {file.name} has the first configuration."
                )
    files.write_text(file, json.dumps(config, indent=2) + "\n")


def _read(file: files.AnyPath) -> dict[str, Any]:
    advice = "Repair it, or use another directory."
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{file} must be JSON; got {error}. {advice}") from error
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{file} must be a file that can be read: {reason}. {advice}") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} must be a JSON object; got {_shown(config)}. {advice}")
    return config


def _differences(stored: Any, current: Any, prefix: str = "") -> list[str]:
    """Lists the names of values that differ; nested names are joined by dots."""
    if not isinstance(stored, dict) or not isinstance(current, dict):
        return [] if stored == current else [prefix]
    names = [*stored, *(name for name in current if name not in stored)]
    found: list[str] = []
    for name in names:
        path = f"{prefix}.{name}" if prefix else name
        found += _differences(stored.get(name), current.get(name), path)
    return found


def _value(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _shown(value: Any) -> str:
    """Returns a value of a file as it is printed in an error."""
    try:
        text = printable(value)
    except RecursionError:
        return "a value that is nested too deeply"
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"
