"""Signals that ask a run to stop, which it does after saving."""

import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: the command may be run again


class Stopped(SystemExit):
    """Raised when a run was asked to stop and has saved.

    If it is not caught the process exits with 75, which means that it may be started again.

    Attributes:
        step: Step that was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(EXIT_CODE)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by a signal; step {self.step} is saved"


class StopSignals:
    """Context manager in which SIGTERM and SIGINT only set `requested`.

    A second SIGTERM changes nothing: schedulers and launchers often send two while a run is saving.
    A second SIGINT, from pressing Ctrl-C again, raises KeyboardInterrupt at once; the checkpoints
    before the save that it interrupts stay intact.

    With several processes a SIGTERM to any one stops all after the same step: JAX's preemption
    service receives the signal and agrees on the step. SIGINT keeps its default behaviour then.

    Attributes:
        requested: Whether the run was asked to stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if jax.process_count() > 1:
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._handle)
            except ValueError:  # outside of the main thread, where no signal arrives
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self, step: int) -> bool:
        """Whether to stop after this step. Call it exactly once after each step."""
        if jax.process_count() > 1:
            self.requested = self.requested or multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
