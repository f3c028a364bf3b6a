"""Inspects, converts and verifies files of trained weights.

    python -m nonlocal_jax.weights inspect FILE       # entries, their native names, the network
    python -m nonlocal_jax.weights convert FILE OUT   # to .safetensors, with any source's names
    python -m nonlocal_jax.weights verify FILE        # weights against the file, layers by
    definition

FILE is a pickle of Caffe2, a file of torch.save, a .safetensors file or a folder of Orbax. Nothing
in it is executed, and torch is not needed. The exit code is 0 on success, 1 if `verify` finds a
problem, and 2 if a file or an option is unusable.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from nonlocal_jax.path_options import AnyPathOption
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.terminal import printable, printable_lines
from nonlocal_jax.weights.build import build, build_any, call, notes
from nonlocal_jax.weights.entries import read_names, table_name
from nonlocal_jax.weights.infer import Architecture, architecture
from nonlocal_jax.weights.load_reports import dims, table
from nonlocal_jax.weights.loading import load_arrays
from nonlocal_jax.weights.matching import Part
from nonlocal_jax.weights.names import flatten, unflatten
from nonlocal_jax.weights.published import hint
from nonlocal_jax.weights.questions import Choices, open_questions
from nonlocal_jax.weights.readers import Checkpoint, checkpoint_files
from nonlocal_jax.weights.saving import save
from nonlocal_jax.weights.verification import TOLERANCE, verify

Names = Literal[
    "nonlocal_jax",
    "caffe2",
    "slowfast",
    "mmaction2",
    "pytorchvideo",
    "torchvision",
    "non_local_pytorch",
    "non_local_pytorch (first version)",
]
InputFile = Annotated[AnyPathOption, tyro.conf.arg(metavar="FILE")]
OutputFile = Annotated[AnyPathOption, tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Choices):
    """Show the entries of a file, what it leaves open, and the call that builds the network."""

    file: InputFile  # the file, or the folder of Orbax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Choices):
    """Write the weights of a file as .safetensors. What the file lacks is left out."""

    file: InputFile  # the file, or the folder of Orbax
    out: OutputFile  # the .safetensors file to write
    names: Names = "nonlocal_jax"  # the source whose names and shapes the weights get
    overwrite: bool = False  # replace OUT if it exists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Choices):
    """Compare loaded weights with the file, and the network with its layers' definitions."""

    file: InputFile  # the file, or the folder of Orbax
    tolerance: float = TOLERANCE  # largest accepted difference, relative to the largest value
    seed: int = 0  # seed of the random clip


class VerificationError(ValueError):
    """The weights of the file and the leaves of the network do not match."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The words after the program's name; None takes those of this process.

    Returns:
        The exit code.
    """
    commands: Any = Inspect | Convert | Verify
    command = tyro.cli(
        commands,
        args=arguments,
        prog="python -m nonlocal_jax.weights",
        description=__doc__,
        config=(tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff),
    )
    try:
        match command:
            case Inspect():
                return _inspect(command)
            case Convert():
                return _convert(command)
            case _:
                return _verify(command)
    except OSError as error:
        name = printable(error.filename or "")
        _print_error(f"{name}: {error.strerror}" if name else str(error))
        return 2
    except ValueError as error:
        _print_error(str(error))
        return 1 if isinstance(error, VerificationError) else 2


def _print_error(message: str) -> None:
    print(f"error: {printable_lines(message)}", file=sys.stderr)


def _inspect(command: Inspect) -> int:
    checkpoint = checkpoint_files.read(command.file)
    numbers = sum(math.prod(array.shape) for array in checkpoint.arrays.values())
    count = len(checkpoint.arrays)
    file = printable(command.file)
    print(f"{file}: {checkpoint.format}, {count} arrays, {numbers:,} numbers")
    targets: dict[str, str] = {}
    summary: list[str] = []
    problem = None
    try:
        naming_table, entries, _ = read_names(checkpoint)
        targets = {entry.key: entry.target or "unknown" for entry in entries}
        print(f"names: {table_name(naming_table)}")
        found = architecture(checkpoint)
        summary = _summary(found, command)
    except ValueError as error:  # raised again below, after the entries are shown
        problem = error
    _print_entries(checkpoint, targets)
    if problem is not None:
        raise problem
    print("\n".join(summary))
    return 0


def _summary(found: Architecture, command: Inspect) -> list[str]:
    """Returns what is open about the network, and as the last line the call that builds it."""
    questions = open_questions(found, command)
    lines = list(notes(found, command))
    if questions:
        lines.append("The file does not show, so choose:")
        lines += [f"  {question}" for question in questions]
    if questions and (advice := hint(command.file.name)):
        lines.append(advice)
    return [*lines, f"network: {call(found, command)}"]


def _print_entries(checkpoint: Checkpoint, targets: dict[str, str]) -> None:
    fallback = "not a weight" if targets else "unknown"
    rows = [
        (key, dims(array.shape), array.dtype.name, targets.get(key, fallback))
        for key, array in checkpoint.arrays.items()
    ]
    print(table("Entries", ("name", "shape", "dtype", "native name"), rows))
    if checkpoint.ignored:
        print(table("Ignored", ("name", "reason"), list(checkpoint.ignored.items())))


def _convert(command: Convert) -> int:
    if command.out.exists() and not (command.overwrite and command.out.is_file()):
        raise FileExistsError(
            f"{printable(command.out)} exists already; --overwrite replaces a file."
        )
    folder = command.out.parent
    if not isinstance(folder, RemotePath) and not folder.is_dir():  # stores make folders
        raise FileNotFoundError(
            f"{printable(folder)} is not a folder; {printable(command.out.name)} cannot be written "
            "there."
        )
    checkpoint = checkpoint_files.read(command.file)
    try:
        found = architecture(checkpoint)
        network = call(found, command)
    except ValueError as error:  # raised again if it is about the arrays or the choices
        found = architecture(dataclasses.replace(checkpoint, configuration=""))
        network = f"none here, but its arrays were converted. {printable(error)}"
    model, load_options = build_any(found, command), _load_options(found, command)
    variables, report = load_arrays(checkpoint, model, **load_options)
    loaded = {weight.target for weight in report.weights if weight.source and weight.target}
    leaves = {path: leaf for path, leaf in flatten(variables).items() if path in loaded}
    save(command.out, unflatten(leaves), command.names)
    print(f"network: {network}")
    summary = report.summary.partition(";")[0]
    print(f"{summary}; written to {printable(command.out)} by the names of {command.names}")
    return 0


def _verify(command: Verify) -> int:
    checkpoint = checkpoint_files.read(command.file)
    found = architecture(checkpoint)
    model, load_options = build(found, command), _load_options(found, command)
    print(f"network: {call(found, command)}")
    try:
        verification = verify(
            checkpoint, model, seed=command.seed, tolerance=command.tolerance, **load_options
        )
    except ValueError as error:
        raise VerificationError(str(error)) from error
    print(verification)
    return 0 if verification.ok else 1


def _load_options(found: Architecture, choices: Choices) -> dict[str, Any]:
    """Lets a classifier that the file lacks keep its initial value, and a chosen kind inflate."""
    parts: tuple[Part, ...] = () if found.num_classes is not None else ("classifier",)
    return {"initialise": parts, "inflate_flat": choices.kind is not None}


if __name__ == "__main__":
    sys.exit(main())
