"""Look into files of trained weights, convert and verify them.

    python -m nonlocal_jax.weights inspect FILE          # what it holds, whose names it has, which network it is of
    python -m nonlocal_jax.weights convert FILE OUT      # to a .safetensors file, by the names of this library or another
    python -m nonlocal_jax.weights verify FILE           # the weights against the file, the network against its definitions

FILE is a pickle of Caffe2, a file of torch.save, a .safetensors file or a folder of Orbax; nothing in it is run, and torch
is not wanted. Exit code 0, 1 where `verify` finds something wrong, 2 for a file or an option that cannot be used.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import flax.linen as nn
import tyro

from nonlocal_jax.weights import files
from nonlocal_jax.weights.build import Choices, build, call, open_questions
from nonlocal_jax.weights.entries import name_of, read_names
from nonlocal_jax.weights.infer import Architecture, architecture
from nonlocal_jax.weights.loading import Part, load_checkpoint
from nonlocal_jax.weights.names import flatten, unflatten
from nonlocal_jax.weights.report import dims, table
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect(Choices):
    """What a file holds: whose names it has, the call that makes its network, every entry and what it is called here."""

    file: Annotated[Path, tyro.conf.arg(metavar="FILE")]  # the file, or the folder of Orbax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Choices):
    """Write the weights of a file as .safetensors, whole or not at all; what the file does not have is not made up."""

    file: Annotated[Path, tyro.conf.arg(metavar="FILE")]  # the file, or the folder of Orbax
    out: Annotated[Path, tyro.conf.arg(metavar="OUT")]  # the .safetensors file to write
    names: Names = "nonlocal_jax"  # whose names, and shapes, the weights get
    overwrite: bool = False  # replace OUT where it is there already


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Choices):
    """Load a file; compare the weights with the file's, and each layer, each stage and the logits with their definitions."""

    file: Annotated[Path, tyro.conf.arg(metavar="FILE")]  # the file, or the folder of Orbax
    tolerance: float = (
        TOLERANCE  # the largest difference that is accepted, relative to the largest value
    )
    seed: int = 0  # of the random clip


class VerificationError(ValueError):
    """A weight without a place, or a place without a weight."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; None is those of this process.

    Returns:
        The exit code.
    """
    config = (tyro.conf.PositionalRequiredArgs, tyro.conf.FlagCreatePairsOff)
    commands: Any = Inspect | Convert | Verify
    command = tyro.cli(
        commands,
        args=arguments,
        prog="python -m nonlocal_jax.weights",
        description=__doc__,
        config=config,
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
        print(
            f"error: {error.filename}: {error.strerror}" if error.strerror else f"error: {error}",
            file=sys.stderr,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, VerificationError) else 2
    return 2


def _inspect(command: Inspect) -> int:
    checkpoint = files.read(command.file)
    numbers = sum(math.prod(array.shape) for array in checkpoint.arrays.values())
    print(
        f"{command.file}: {checkpoint.format}, {len(checkpoint.arrays)} arrays, {numbers:,} numbers"
    )
    targets: dict[str, str] = {}
    wrong = None
    try:
        source, entries, _ = read_names(checkpoint)
        targets = {entry.key: entry.target or "unknown" for entry in entries}
        print(f"names: {name_of(source)}")
        found = architecture(checkpoint)
        print(f"network: {call(found, command)}")
        for question in open_questions(found, command):
            print(f"  the file does not tell the {question}")
    except ValueError as error:  # the entries are shown all the same
        wrong = error
    rows = [
        (
            key,
            dims(array.shape),
            array.dtype.name,
            targets.get(key, "not a weight" if targets else "unknown"),
        )
        for key, array in checkpoint.arrays.items()
    ]
    print(table("Entries", ("name", "shape", "dtype", "here"), rows))
    if checkpoint.ignored:
        print(table("Ignored", ("name", "reason"), list(checkpoint.ignored.items())))
    if wrong is not None:
        raise wrong
    return 0


def _convert(command: Convert) -> int:
    if command.out.exists() and not (command.overwrite and command.out.is_file()):
        raise FileExistsError(f"{command.out} is there already; --overwrite replaces a file.")
    if not command.out.parent.is_dir():
        raise FileNotFoundError(
            f"{command.out.parent} is no folder; {command.out.name} cannot be written there."
        )
    checkpoint = files.read(command.file)
    found = architecture(checkpoint)
    variables, report = load_checkpoint(
        checkpoint, build(found, command), **_load_options(found, command)
    )
    from_file = {weight.target for weight in report.weights if weight.source and weight.target}
    leaves = {target: leaf for target, leaf in flatten(variables).items() if target in from_file}
    save(command.out, unflatten(leaves), command.names)
    print(f"network: {call(found, command)}")
    print(
        f"{report.summary.partition(';')[0]}; written to {command.out} by the names of {command.names}"
    )
    return 0


def _verify(command: Verify) -> int:
    checkpoint = files.read(command.file)
    found = architecture(checkpoint)
    model: nn.Module = build(found, command)
    print(f"network: {call(found, command)}")
    try:
        options = _load_options(found, command)
        verification = verify(
            checkpoint, model, seed=command.seed, tolerance=command.tolerance, **options
        )
    except ValueError as error:
        raise VerificationError(str(error)) from error
    print(verification)
    return 0 if verification.ok else 1


def _load_options(found: Architecture, choices: Choices) -> dict[str, Any]:
    """Only what the file cannot have stays as it is initialised; another kind that is asked for is an inflation."""
    parts: tuple[Part, ...] = () if found.num_classes is not None else ("classifier",)
    return {"initialise": parts, "inflate_flat": choices.kind is not None}


if __name__ == "__main__":
    sys.exit(main())
