"""What the command lines of all experiments have in common: options, commands, what is printed."""

import contextlib
import dataclasses
import difflib
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console

from nonlocal_jax import training
from nonlocal_jax.terminal import printable_lines

C = TypeVar("C")

TRAINING_ERRORS = (
    training.RunError,
    training.CheckpointError,
    training.MismatchError,
    training.NonFiniteError,
    training.DistributedError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Options of runs on many processes."""

    # Run as one of several processes. TPU pods, SLURM and Open MPI are detected; elsewhere, the
    # three options after this one must be set.
    distributed: bool = False
    coordinator: str | None = None  # Address of process 0, as host:port.
    processes: int | None = None  # Number of processes.
    process_id: int | None = None  # Number of this process, from 0.
    timeout: int = 120  # Seconds to wait for other processes, at the start and during the run.


class PlainConsole(Console):
    """A console that prints text as it is.

    File names and names of classes have brackets and colons that are no markup, and may have
    control characters, which are escaped. Cells and titles of tables must be passed through
    `printable` by the caller.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(
            *(printable_lines(o) if isinstance(o, str) else o for o in objects), **options
        )


def parse(
    config: type[C],
    groups: Mapping[str, type],
    experiment: str,
    arguments: Sequence[str] | None = None,
) -> C:
    """Parses the command line of an experiment, and shows --help in groups.

    Args:
        config: The config, whose fields are those of all groups. Its defaults are used.
        groups: Dataclasses with the options of a group, by the title of the group. "" has the most
            important options. A group whose title is a field of the config is that field, and its
            title is a prefix of its options, as in --scene.size.
        experiment: Name of the module.
        arguments: The arguments. Defaults to those of this process.

    Raises:
        SystemExit: An option is unknown or has a wrong value, or help was asked for.
    """
    defaults = {field.name: _default(field) for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    names = {title: title.replace(" ", "_") or "main" for title in groups}
    parts: list[Any] = []
    for title, group in groups.items():
        if title in defaults:
            shown = tyro.conf.arg(name=title, help=group.__doc__)
            kind: Any = Annotated[group, shown]
            default = defaults[title]
        else:
            options = {field.name: defaults[field.name] for field in dataclasses.fields(group)}
            is_complete = dataclasses.MISSING not in options.values()
            default = group(**options) if is_complete else dataclasses.MISSING
            kind = Annotated[group, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=title, help="")]
        parts.append((names[title], kind, dataclasses.field(default=default)))
    words = sys.argv[1:] if arguments is None else arguments
    with exit_on(ValueError):  # raised by the checks of the config and its parts
        parsed: Any = tyro.cli(
            dataclasses.make_dataclass("CommandLine", parts, kw_only=True),
            prog=f"python -m experiments.{experiment}",
            description=config.__doc__,
            args=_without_defaults(words, defaults),
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        values: dict[str, Any] = {}
        for title, name in names.items():
            part = getattr(parsed, name)
            values |= {title: part} if title in defaults else vars(part)
        return config(**values)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _without_defaults(words: Sequence[str], defaults: Mapping[str, Any]) -> list[str]:
    """Drops flags that ask for a default, such as --no-remat, and the opposite before them.

    They are accepted but not shown in --help, which lists one flag for each option.
    """
    opposites = {}
    for name, default in defaults.items():
        pair = f"--{name}".replace("_", "-"), f"--no-{name}".replace("_", "-")
        if isinstance(default, bool):
            opposites[pair[not default]] = pair[default]
    kept: list[str] = []
    for word in words:
        flag = word.replace("_", "-")
        if flag in opposites:
            kept = [other for other in kept if other.replace("_", "-") != opposites[flag]]
        else:
            kept.append(word)
    return kept


def choose(flag: str, name: str, options: Collection[str]) -> str:
    """Checks that a name is one of the options.

    Raises:
        ValueError: It is not. The message suggests the most similar one.

    >>> choose("--recipe", "i3d_r50_32x", ["toy_mp4", "i3d_r50_32x2"])
    Traceback (most recent call last):
    ValueError: --recipe must be one of toy_mp4, i3d_r50_32x2; got 'i3d_r50_32x'. Did you mean
    i3d_r50_32x2?
    """
    if name in options:
        return name
    nearest = difflib.get_close_matches(name, options, n=1)
    hint = f" Did you mean {nearest[0]}?" if nearest else ""
    raise ValueError(f"{flag} must be one of {', '.join(options)}; got {name!r}.{hint}")


def command(experiment: str) -> str:
    """Returns the command that started this process, for the record of a run."""
    return shlex.join(["python", "-m", f"experiments.{experiment}", *sys.argv[1:]])


def settings(config: Any, excluded: Collection[str]) -> dict[str, Any]:
    """Returns the fields of a config by name, except the excluded ones."""
    fields = dataclasses.asdict(config)
    return {name: value for name, value in fields.items() if name not in excluded}


def connect(config: ProcessOptions) -> None:
    """Connects this process to the others with --distributed.

    Raises:
        ValueError: The options are incomplete, out of range, or need --distributed.
        DistributedError: The processes cannot be connected.
    """
    addresses = config.coordinator, config.processes, config.process_id
    if config.distributed:
        training.initialize(*addresses, timeout=config.timeout)
    elif addresses != (None, None, None):
        raise ValueError(
            "--coordinator, --processes and --process-id require --distributed, without which each "
            "process would train alone. Add it, or leave them out."
        )


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
        raise SystemExit(printable_lines(f"error: {error}{hint}")) from error
