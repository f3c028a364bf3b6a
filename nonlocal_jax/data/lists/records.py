"""What a list of videos contains, whatever its format."""

import dataclasses
from typing import Literal, NamedTuple

from nonlocal_jax.files import AnyPath

ListFormat = Literal["paths", "kinetics", "charades", "frames", "folder"]


class Action(NamedTuple):
    """What happens in a video, and when.

    Attributes:
        label: Number of the class.
        start: Start in seconds.
        end: End in seconds.
    """

    label: int
    start: float
    end: float


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One video of a list.

    Attributes:
        path: The file. For a video that is a list of frames, its name.
        labels: Classes of the whole video, ascending.
        line: Line of the list, from 1; 0 in a folder.
        actions: When each class occurs, if the list says so.
        frames: Image files of the frames, if the video is not a file.
        frame_labels: Classes of each of these frames.
    """

    path: AnyPath
    labels: tuple[int, ...]
    line: int = 0
    actions: tuple[Action, ...] = ()
    frames: tuple[AnyPath, ...] = ()
    frame_labels: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Annotations:
    """The contents of a list.

    Attributes:
        records: The videos.
        num_classes: Number of classes.
        multi_label: Whether a video may have any number of classes, as in Charades, or has exactly
            one.
        names: Names of the classes; empty if the list has only numbers.
        left_out: Why each line that was left out cannot be used; in a folder, each link and each
            folder without videos.
        format: Format of the list, one of those in the table of `nonlocal_jax.data.annotations`.
    """

    records: tuple[Record, ...]
    num_classes: int
    multi_label: bool = False
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    format: ListFormat = "paths"

    def __len__(self) -> int:
        return len(self.records)
