"""What is seen while a run goes on: a bar, a clock, a profile."""

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

SHOWN = ("loss", "accuracy", "learning_rate")


class Bar:
    """Steps done, rate, metrics and the time left; on process 0 alone."""

    def __init__(self, console: Console, steps: int, step: int) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"),
            TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=True),
        )  # fmt: skip
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
        """After a step: `rate` in examples a second."""
        shown = ", ".join(
            f"{name.replace('_', ' ')} {metrics[name]:.3g}" for name in SHOWN if name in metrics
        )
        text = f"{shown}, {rate:,.0f} examples/s"
        self._progress.update(self._task, completed=step, description="training", metrics=text)

    def doing(self, what: str) -> None:
        """Something else than a step goes on."""
        self._progress.update(self._task, description=what)
        self._progress.refresh()

    def say(self, line: str) -> None:
        """A line that stays."""
        if jax.process_index() == 0:
            self.console.print(line, highlight=False)


class Clock:
    """Seconds of training, over all starts of a run: what is between `go` and `pause`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def go(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        self.read()
        self._since = None

    def read(self) -> float:
        """Seconds so far."""
        now = time.perf_counter()
        if self._since is not None:
            self.seconds += now - self._since
            self._since = now
        return self.seconds


class Profiler:
    """Records some steps of this start, after the first ten."""

    AFTER = 10

    def __init__(self, folder: Path, start: int, steps: int) -> None:
        self.folder = folder
        self._first, self._last = start + self.AFTER, start + self.AFTER + steps
        self._running = False

    def before(self, step: int) -> None:
        """Before the update from `step`."""
        if step == self._first < self._last:
            jax.profiler.start_trace(str(self.folder))
            self._running = True
        elif step == self._last:
            self.stop()

    def stop(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
