"""Look into lists of videos, write them, and make small copies of what is in them.

    python -m nonlocal_jax.data check LIST            # every line, and frames of every video; a summary
    python -m nonlocal_jax.data index FOLDER          # a list of class-name folders
    python -m nonlocal_jax.data transcode LIST OUT    # copies with a shorter side of 256; goes on where it was stopped
    python -m nonlocal_jax.data stand-in FOLDER       # real H.264 files of moving digits, and their lists

LIST is a list of Kinetics (`path label`, or the official CSV), of Charades (the official CSV, or PySlowFast's frame list), or
a folder of class-name folders. Exit code 0, 1 where a video cannot be read, 2 for a list or an option that cannot be used.
"""

import collections
import dataclasses
import functools
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nonlocal_jax.data import DataError, VideoError, annotations, stand_in
from nonlocal_jax.data.annotations import Annotations, Record, plain_path
from nonlocal_jax.data.clips import cores
from nonlocal_jax.data.frames import open_frames
from nonlocal_jax.data.transcode import transcode_all

SHOWN = 20  # videos that cannot be read


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfList:
    """How a list is read."""

    list: Annotated[Path, tyro.conf.Positional]  # the list, or the folder
    root: Path | None = (
        None  # folder that its paths are relative to, and must lie in; else they are relative to the list's
    )
    num_classes: int | None = (
        None  # of the labels; else 157 for Charades, and what the list has for others
    )
    classes: Path | None = None  # file of the names of the classes, one a line
    leave_out: bool = (
        False  # leave out lines of files that are missing or named before, in place of stopping
    )
    threads: int = dataclasses.field(default_factory=cores)  # videos at a time

    def read(self) -> Annotations:
        """The list."""
        return annotations.read(
            self.list,
            num_classes=self.num_classes,
            root=self.root,
            classes=self.classes,
            leave_out=self.leave_out,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(OfList):
    """Every line of a list, and the first, middle and last frame of every video."""

    sample: int | None = None  # so many videos, chosen at random; None is all

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be at least 1; got {self.sample}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Write a list, `path label` a line, of a folder that has a folder of videos for each class."""

    folder: Annotated[Path, tyro.conf.Positional]  # with the folders
    out: Path | None = (
        None  # the list; None is FOLDER/list.txt, and classes.txt beside it has the names
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcode(OfList):
    """Copies of the videos of a list as H.264, and the list of them."""

    out: Annotated[Path, tyro.conf.Positional]  # folder of the copies, at the same relative paths
    shorter: int = 256  # length of the shorter side, pixels
    keyframes: int = (
        32  # a frame in so many is a keyframe: fewer make clips quicker to read, and files larger
    )
    crf: int = 18  # x264's quality; less is better

    def __post_init__(self) -> None:
        if self.shorter < 2 or self.keyframes < 1 or not 0 <= self.crf <= 51:
            raise ValueError(
                f"shorter must be at least 2, keyframes 1, crf from 0 to 51; got {self.shorter}, {self.keyframes}, {self.crf}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandIn:
    """Write real H.264 files of moving digits, 6 classes, with a damaged one among them, and their lists."""

    folder: Annotated[Path, tyro.conf.Positional]  # to write to
    kind: stand_in.Kind = "kinetics"  # of the lists


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the program's name; None is those of this process.

    Returns:
        The exit code.
    """
    commands: Any = Check | Index | Transcode | StandIn
    config = (tyro.conf.FlagCreatePairsOff,)
    try:
        command = tyro.cli(
            commands,
            args=arguments,
            prog="python -m nonlocal_jax.data",
            description=__doc__,
            config=config,
        )
        match command:
            case Check():
                return _check(command)
            case Index():
                return _index(command)
            case Transcode():
                return _transcode(command)
            case _:
                lists = stand_in.make(command.folder, command.kind, threads=cores())
                print(*lists.values(), sep="\n")
                return 0
    except OSError as error:
        print(
            f"error: {error.filename}: {error.strerror}" if error.strerror else f"error: {error}",
            file=sys.stderr,
        )
    except (DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


@dataclasses.dataclass(frozen=True)
class _Look:
    """What was seen of one video."""

    frames: int = 0
    rate: float = 0.0
    size: tuple[int, int] = (0, 0)
    failure: str = ""


def _look(record: Record) -> _Look:
    try:
        with open_frames(record) as video:
            count = len(video)
            pixels = video.read(np.unique([0, count // 2, count - 1]))
            return _Look(count, video.rate, pixels.shape[1:3])
    except VideoError as error:
        return _Look(failure=str(error))


def _check(command: Check) -> int:
    read = command.read()
    records = list(read.records)
    if command.sample is not None:
        chosen = np.random.default_rng(0).permutation(len(records))[: command.sample]
        records = [records[i] for i in sorted(chosen.tolist())]
    with ThreadPoolExecutor(command.threads) as pool:
        looks = list(_with_bar("decoding", pool.map(_look, records), len(records)))
    good = [look for look in looks if not look.failure]
    of_classes = collections.Counter(itertools.chain(*(record.labels for record in read.records)))
    seconds = [look.frames / look.rate for look in good]
    table = Table(title=str(command.list))
    table.add_column("what")
    table.add_column("found")
    rows: list[tuple[str, str]] = [
        ("videos", f"{len(read):,}, {len(records):,} of them decoded"),
        ("classes", f"{read.num_classes}, {len(of_classes)} of them with videos"),
        ("videos of a class", _spread(of_classes.values(), "{:,.0f}")),
        ("frames", _spread((look.frames for look in good), "{:,.0f}")),
        ("frames a second", _spread((look.rate for look in good), "{:.4g}")),
        ("seconds", _spread(seconds, "{:,.1f}")),
        ("shorter side", _spread((min(look.size) for look in good), "{:,.0f}")),
        ("left out", f"{len(read.left_out):,} lines"),
        ("cannot be read", f"{len(looks) - len(good):,} videos"),
    ]
    if read.multi_label:
        rows.insert(
            3,
            (
                "classes of a video",
                _spread((len(record.labels) for record in read.records), "{:,.0f}"),
            ),
        )
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    problems = [*read.left_out, *(look.failure for look in looks if look.failure)]
    _say_first(problems)
    return 1 if len(good) < len(looks) else 0


def _index(command: Index) -> int:
    read = annotations.index(command.folder)
    out = command.out or command.folder / "list.txt"
    if out.exists():
        raise ValueError(f"{out} is there already; name another with --out.")
    names = out.with_name("classes.txt")
    folder = command.folder.absolute()
    out.write_text(
        "".join(
            f"{record.path.absolute().relative_to(folder)} {record.labels[0]}\n"
            for record in read.records
        )
    )
    names.write_text("".join(f"{name}\n" for name in read.names))
    print(
        f"{len(read):,} videos of {read.num_classes} classes: {out}, {names}; paths are relative to {command.folder}"
    )
    return 0


def _transcode(command: Transcode) -> int:
    read = command.read()
    if any(record.frames for record in read.records):
        raise ValueError(f"{command.list} is a list of images; there is no video to copy.")
    root = plain_path(
        command.root or (command.list if command.list.is_dir() else command.list.parent)
    )
    targets = {
        record.path: command.out / _relative(plain_path(record.path), root)
        for record in read.records
    }
    _check_targets(command, targets)
    work = transcode_all(
        list(targets.items()),
        command.threads,
        shorter=command.shorter,
        keyframes=command.keyframes,
        crf=command.crf,
    )
    failed = {}
    for source, error in _with_bar("copying", work, len(targets)):
        if error is not None:
            failed[source] = str(error)
    _write_list(command, read, targets, failed)
    print(
        f"{len(targets) - len(failed):,} videos in {command.out}, {len(failed):,} could not be copied"
    )
    _say_first(list(failed.values()))
    return 1 if failed else 0


def _check_targets(command: Transcode, targets: dict[Path, Path]) -> None:
    """Copies replace neither the list, nor a video, nor each other."""
    sources: dict[Path, Path] = {}
    for source, target in targets.items():
        if target in sources:
            raise ValueError(f"{sources[target]} and {source} would have one copy, {target}.")
        sources[target] = source
    originals = {os.path.realpath(path) for path in (*targets, command.list)}
    for target in (*sources, command.out / command.list.name):
        if os.path.realpath(target) in originals:
            raise ValueError(
                f"{target} would be replaced by a copy; name another folder than {command.out}."
            )


def _relative(path: Path, root: Path) -> Path:
    inside = path.relative_to(root) if path.is_relative_to(root) else path.relative_to(path.anchor)
    return inside.with_suffix(".mp4")


def _write_list(
    command: Transcode, read: Annotations, targets: dict[Path, Path], failed: dict[Path, str]
) -> None:
    """A folder's copy is its own list, and a CSV names no files; the lines of another list are those that were copied."""
    if read.kind == "folder":
        return
    out = command.out / command.list.name
    if read.kind in ("kinetics", "charades"):
        shutil.copyfile(command.list, out)
        return
    lines = [
        f"{targets[record.path].relative_to(command.out)} {record.labels[0]}\n"
        for record in read.records
        if record.path not in failed
    ]
    out.write_text("".join(lines))


def _with_bar(what: str, work: Iterable[Any], total: int) -> Iterable[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, speed_estimate_period=600) as progress:
        yield from progress.track(work, total, description=what)


def _say_first(problems: Sequence[str]) -> None:
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN:,} more")


def _spread(values: Iterable[float | int], form: str) -> str:
    found = sorted(values)
    if not found:
        return "none"
    show: Callable[[float], str] = functools.partial(form.format)
    return f"{show(found[0])} to {show(found[-1])}, median {show(statistics.median(found))}"


if __name__ == "__main__":
    sys.exit(main())
