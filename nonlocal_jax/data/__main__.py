"""Check lists of videos, write them, and make small copies of the videos.

    python -m nonlocal_jax.data check LIST            # check every line, and frames of every video
    python -m nonlocal_jax.data index FOLDER          # write a list of the videos in class folders
    python -m nonlocal_jax.data transcode LIST OUT    # copy with a shorter side of 256; resumable
    python -m nonlocal_jax.data stand-in FOLDER       # make H.264 files of moving digits, and lists

LIST is a list of Kinetics (`path label`, or the official CSV) or of Charades (the official CSV, or
PySlowFast's frame list), or a folder that has a folder of videos for each class. The exit code is 0
for success, 1 if a video cannot be read, and 2 if a list or an option cannot be used.
"""

import collections
import dataclasses
import functools
import itertools
import os
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
from rich.text import Text

from nonlocal_jax import checks, files
from nonlocal_jax.data import DataError, VideoError, annotations, stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import cores
from nonlocal_jax.data.image_frames import open_frames
from nonlocal_jax.data.lists import writing
from nonlocal_jax.data.lists.folders import lies_in, plain_path
from nonlocal_jax.data.lists.writing import path_line, write_folder
from nonlocal_jax.data.toy_video import Split
from nonlocal_jax.data.transcode import transcode_all
from nonlocal_jax.files import AnyPath
from nonlocal_jax.path_options import AnyPathOption, LocalPathOption
from nonlocal_jax.remote_paths import RemotePath
from nonlocal_jax.terminal import printable, printable_lines

MAX_PROBLEMS = 20  # unreadable videos to print


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOptions:
    """How a list is read."""

    list: Annotated[AnyPathOption, tyro.conf.Positional]  # the list, or the folder
    # folder that paths are relative to and must lie in; by default the folder of the list
    root: AnyPathOption | None = None
    # number of classes; by default 157 for Charades, and what the list has otherwise
    num_classes: int | None = None
    classes: AnyPathOption | None = None  # file with the names of the classes, one per line
    # leave out lines whose file is missing or was named before, instead of stopping
    leave_out: bool = False
    threads: int = dataclasses.field(default_factory=cores)  # videos to read at a time

    def read(self) -> Annotations:
        """Reads the list."""
        return annotations.read(
            self.list,
            num_classes=self.num_classes,
            root=self.root,
            classes=self.classes,
            leave_out=self.leave_out,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check(ListOptions):
    """Check every line of a list, and the first, middle and last frame of every video."""

    sample: int | None = None  # number of videos to decode, chosen at random; by default all

    def __post_init__(self) -> None:
        if self.sample is not None:
            checks.at_least("sample", self.sample, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """Write a list, `path label` per line, of a folder that has a folder of videos for each class.

    The names of the classes are written to classes.txt beside the list. Hidden files and folders,
    such as .thumbnails, and folders without videos do not count. A list that exists is not
    replaced, nor is a classes.txt with other names.
    """

    folder: Annotated[AnyPathOption, tyro.conf.Positional]  # folder with the class folders
    out: AnyPathOption | None = None  # the list; by default FOLDER/list.txt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transcode(ListOptions):
    """Copy the videos of a list as H.264, and write the list of the copies."""

    # folder for the copies, which keep their relative paths
    out: Annotated[LocalPathOption, tyro.conf.Positional]
    shorter: int = 256  # length of the shorter side in pixels
    # largest distance of keyframes in frames; with fewer, clips read faster and files are larger
    keyframes: int = 32
    crf: int = 18  # quality of x264; less is better

    def __post_init__(self) -> None:
        checks.at_least("shorter", self.shorter, 2)
        checks.at_least("keyframes", self.keyframes, 1)
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf must be from 0 to 51; got {self.crf}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandIn:
    """Make H.264 files of moving digits in 6 classes, one of them damaged, and their lists."""

    folder: Annotated[LocalPathOption, tyro.conf.Positional]  # folder to write to
    kind: stand_in.DataSet = "kinetics"  # format of the lists
    train: int = stand_in.NUMBERS["train"]  # number of videos for training
    test: int = stand_in.NUMBERS["test"]  # number of videos for testing


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Words after the name of the program; None takes those of this process.

    Returns:
        The exit code.
    """
    commands: Any = Check | Index | Transcode | StandIn
    try:
        command = tyro.cli(
            commands,
            args=arguments,
            prog="python -m nonlocal_jax.data",
            description=__doc__,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        match command:
            case Check():
                return _check(command)
            case Index():
                return _index(command)
            case Transcode():
                return _transcode(command)
            case _:
                return _make_stand_in(command)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(printable_lines(f"error: {reason}"), file=sys.stderr)
    except (DataError, ValueError, ImportError) as error:
        print(printable_lines(f"error: {error}"), file=sys.stderr)
    return 2


@dataclasses.dataclass(frozen=True)
class _VideoCheck:
    """What decoding a few frames of a video showed.

    Attributes:
        frames: Number of frames.
        rate: Frames a second.
        size: (height, width).
        failure: Why it cannot be read, or "".
    """

    frames: int = 0
    rate: float = 0.0
    size: tuple[int, int] = (0, 0)
    failure: str = ""


def _check_video(record: Record) -> _VideoCheck:
    try:
        with open_frames(record) as video:
            count = len(video)
            pixels = video.read(np.unique([0, count // 2, count - 1]))
            return _VideoCheck(count, video.rate, pixels.shape[1:3])
    except VideoError as error:
        return _VideoCheck(failure=str(error))


def _check(command: Check) -> int:
    videos = command.read()
    records = list(videos.records)
    if command.sample is not None:
        chosen = np.random.default_rng(0).permutation(len(records))[: command.sample]
        records = [records[i] for i in sorted(chosen.tolist())]
    with ThreadPoolExecutor(command.threads) as pool:
        results = list(_show_progress("decoding", pool.map(_check_video, records), len(records)))
    readable = [result for result in results if not result.failure]
    failures = [result.failure for result in results if result.failure]
    table = Table(title=Text(printable(command.list)))
    table.add_column("quantity")
    table.add_column("value")
    for row in _summary(videos, len(records), readable, len(failures)):
        table.add_row(*map(Text, row))
    Console().print(table)
    _print_first([*videos.left_out, *failures])
    return 1 if failures else 0


def _summary(
    videos: Annotations, decoded: int, readable: Sequence[_VideoCheck], unreadable: int
) -> Iterable[tuple[str, str]]:
    videos_of_class = collections.Counter(
        itertools.chain.from_iterable(record.labels for record in videos.records)
    )
    yield "videos", f"{len(videos):,}, {decoded:,} of them decoded"
    yield "classes", f"{videos.num_classes}, {len(videos_of_class)} of them with videos"
    yield "videos per class", _spread(videos_of_class.values(), "{:,.0f}")
    if videos.multi_label:
        counts = [len(record.labels) for record in videos.records]
        yield "classes per video", _spread(counts, "{:,.0f}")
    yield "frames", _spread((video.frames for video in readable), "{:,.0f}")
    yield "frames per second", _spread((video.rate for video in readable), "{:.4g}")
    yield "seconds", _spread((video.frames / video.rate for video in readable), "{:,.1f}")
    yield "shorter side", _spread((min(video.size) for video in readable), "{:,.0f}")
    kind = "files and folders" if videos.format == "folder" else "lines"
    yield "left out", f"{len(videos.left_out):,} {kind}"
    yield "unreadable", f"{unreadable:,} videos"


def _index(command: Index) -> int:
    list_file = command.out or command.folder / "list.txt"
    names_file = list_file.with_name("classes.txt")
    if list_file.exists():
        raise ValueError(f"{list_file} exists already; choose another with --out.")
    videos = annotations.index(command.folder)
    if names_file.exists() and not _has_names(names_file, videos.names):
        raise ValueError(
            f"{names_file} exists already and does not have the {videos.num_classes} classes of "
            f"{command.folder}; write the list to another folder with --out."
        )
    write_folder(videos, command.folder, list_file, names_file)
    folder, list_name, names_name = map(printable, (command.folder, list_file, names_file))
    hint = "" if list_file.parent == command.folder else f"; read the list with --root {folder}"
    print(
        f"{len(videos):,} videos of {videos.num_classes} classes: {list_name}, {names_name}; "
        f"paths are relative to {folder}{hint}"
    )
    _print_first(videos.left_out)
    return 0


def _has_names(names_file: AnyPath, names: tuple[str, ...]) -> bool:
    try:
        return annotations.read_classes(names_file) == names
    except DataError:
        return False


def _make_stand_in(command: StandIn) -> int:
    numbers: dict[Split, int] = {"train": command.train, "test": command.test}
    lists = stand_in.make(command.folder, command.kind, numbers=numbers, threads=cores())
    print(*map(printable, lists.values()), sep="\n")
    return 0


def _transcode(command: Transcode) -> int:
    videos = command.read()
    if any(record.frames for record in videos.records):
        raise ValueError(f"{command.list} is a list of images; there is no video to copy.")
    list_folder = command.list if command.list.is_dir() else command.list.parent
    root = plain_path(command.root or list_folder)
    targets = {
        record.path: command.out / _relative_target(plain_path(record.path), root)
        for record in videos.records
    }
    _check_targets(command, videos, targets)
    results = transcode_all(
        list(targets.items()),
        command.threads,
        shorter=command.shorter,
        keyframes=command.keyframes,
        crf=command.crf,
    )
    failed = {}
    for source, error in _show_progress("copying", results, len(targets)):
        if error is not None:
            failed[source] = str(error)
    if videos.format != "folder":
        copies = {source: target for source, target in targets.items() if source not in failed}
        file = command.out / command.list.name
        if file.is_symlink():  # which `atomic_write` would write through
            file.unlink()
        with files.atomic_write(file) as partial:
            partial.write_bytes(_list_content(command, videos, copies))
    copied = len(targets) - len(failed)
    folder = printable(command.out)
    print(f"{copied:,} videos in {folder}, {len(failed):,} could not be copied")
    _print_first(list(failed.values()))
    return 1 if failed else 0


def _check_targets(command: Transcode, videos: Annotations, targets: dict[AnyPath, Path]) -> None:
    """Raises an error if a copy would be outside the folder, or replace what is not a copy."""
    if command.out.exists() and not command.out.is_dir():
        raise ValueError(f"{command.out} is a file; choose a folder for the copies.")
    outputs = dict(targets)
    if videos.format != "folder":
        outputs[command.list] = command.out / command.list.name
    # The real paths, since a folder of copies may be a link to that of the originals.
    real_folder = functools.cache(os.path.realpath)
    originals = {_real_path(path, real_folder) for path in targets if isinstance(path, Path)}
    if isinstance(command.list, Path):
        originals.add(os.path.realpath(command.list))
    folder = os.path.realpath(command.out)
    sources: dict[Path, AnyPath] = {}
    for source, target in outputs.items():
        real = Path(real_folder(target.parent), target.name)
        if real in sources:
            raise ValueError(f"{sources[real]} and {source} would have the same copy, {target}.")
        sources[real] = source
        if not {str(real), _real_path(target, real_folder)}.isdisjoint(originals):
            raise ValueError(
                f"{target} would be replaced by a copy; choose another folder than {command.out}."
            )
        if not real.is_relative_to(folder):
            raise ValueError(
                f"{target} would be written outside {command.out}, to {real}, because of a "
                "symbolic link; remove the link, or choose another folder."
            )
    if videos.format != "folder":
        _check_list(
            outputs[command.list],
            _list_content(command, videos, targets),
            _list_content(command, videos, targets, _unquoted_line),
        )


def _real_path(path: Path, real_folder: Callable[[Path], str]) -> str:
    """Returns the real path of a file, whose folder is resolved once for all files in it."""
    real = Path(real_folder(path.parent), path.name)
    return os.path.realpath(path) if real.is_symlink() else str(real)


def _unquoted_line(path: str, label: int) -> str:
    """Returns the line of a list of copies as earlier versions wrote it."""
    return f"{path} {label}\n"


def _check_list(file: Path, *contents: bytes) -> None:
    """Raises an error if a list exists that an earlier run cannot have written.

    Args:
        file: The list of the copies.
        *contents: What it has if every video was copied, by this version and by earlier ones.
    """
    if not os.path.lexists(file):
        return
    lines = {line for content in contents for line in content.split(b"\n")}
    if not file.is_file() or not set(file.read_bytes().split(b"\n")) <= lines:
        raise ValueError(
            f"{file} exists and is not a list of these copies; move it, or choose another folder."
        )


def _relative_target(path: Any, root: AnyPath) -> Path:
    """Returns the path of a copy below the root, or below / or the protocol if it lies outside."""
    base = root
    if not lies_in(path, root):
        is_remote = isinstance(path, RemotePath)
        base = RemotePath(f"{path.protocol}://") if is_remote else Path(path.anchor)
    return Path(path.relative_to(base)).with_suffix(".mp4")


def _list_content(
    command: Transcode,
    videos: Annotations,
    targets: dict[AnyPath, Path],
    write_line: Callable[[str, int], str] = path_line,
) -> bytes:
    """Returns the list of the copies: a line for each target, or a CSV, which has no file names."""
    if videos.format in ("kinetics", "charades"):
        return command.list.read_bytes()
    lines = []
    for record in videos.records:
        if target := targets.get(record.path):
            with writing.naming(target):
                lines.append(write_line(str(target.relative_to(command.out)), record.labels[0]))
    return "".join(lines).encode()


def _show_progress(description: str, work: Iterable[Any], total: int) -> Iterable[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    # The estimate averages over 10 minutes, because videos differ much in length.
    with Progress(*columns, speed_estimate_period=600) as progress:
        yield from progress.track(work, total, description=description)


def _print_first(problems: Sequence[str]) -> None:
    for problem in problems[:MAX_PROBLEMS]:
        print(f"  {printable(problem)}")
    if len(problems) > MAX_PROBLEMS:
        print(f"  and {len(problems) - MAX_PROBLEMS:,} more")


def _spread(values: Iterable[float | int], template: str) -> str:
    ordered = sorted(values)
    if not ordered:
        return "none"
    show: Callable[[float], str] = functools.partial(template.format)
    return f"{show(ordered[0])} to {show(ordered[-1])}, median {show(statistics.median(ordered))}"


if __name__ == "__main__":
    sys.exit(main())
