"""Feedback during a run: a progress bar, a clock and a profile."""

import time
from pathlib import Path
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nonlocal_jax.terminal import printable

SHOWN_METRICS = ("loss", "accuracy", "learning_rate")


class Bar:
    """Progress bar with the step, the rate, metrics and the time left; shown on process 0 only."""

    def __init__(self, console: Console, steps: int, step: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.console = console
        self._progress = Progress(
            *columns, console=console, disable=jax.process_index() != 0, speed_estimate_period=60
        )
        self._task: TaskID = self._progress.add_task(
            "training", total=steps, completed=step, metrics=""
        )

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def step(self, step: int, metrics: dict[str, float], rate: float) -> None:
        """Shows that a step is done; `rate` is in examples per second."""
        shown = ", ".join(
            f"{name.replace('_', ' ')} {metrics[name]:.3g}"
            for name in SHOWN_METRICS
            if name in metrics
        )
        text = f"{shown}, {rate:,.0f} examples/s"
        self._progress.update(self._task, completed=step, description="training", metrics=text)

    def doing(self, activity: str) -> None:
        """Shows that something other than a step is going on."""
        self._progress.update(self._task, description=activity)
        self._progress.refresh()

    def say(self, line: str) -> None:
        """Prints a line above the bar, as it is except for control characters."""
        if jax.process_index() == 0:
            self.console.print(Text(printable(line)))


class Clock:
    """Measures the seconds between `start` and `pause`, summed over all starts of a run."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        self.read()
        self._since = None

    def read(self) -> float:
        """Returns the seconds so far."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        return self.seconds


class Profiler:
    """Profiles some steps of this start. The first ten are skipped, while caches fill."""

    SKIPPED = 10

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self.folder = folder
        self._first = start + self.SKIPPED
        self._end = self._first + steps
        self._running = False

    def on_step(self, step: int) -> None:
        """Starts or ends the profile, as is due before the update from `step`."""
        if step == self._first < self._end:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step == self._end:
            self.close()

    def close(self) -> None:
        """Ends the profile if one is being recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
