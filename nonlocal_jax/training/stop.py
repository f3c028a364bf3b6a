"""Signals that ask a run to stop: it saves first."""

import signal
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

SAVED = 75  # EX_TEMPFAIL of sysexits.h: run it again


class Stopped(SystemExit):
    """A run was asked to stop, and has saved; the process exits with 75, which says that it may be started again.

    Attributes:
        step: that was saved.
    """

    def __init__(self, step: int) -> None:
        super().__init__(SAVED)
        self.step = step

    def __str__(self) -> str:
        return f"stopped by a signal; step {self.step} is saved"


class StopSignals:
    """Within `with`, SIGTERM and SIGINT only set `requested`; of many processes all stop after the same step.

    Another SIGTERM changes nothing: schedulers and launchers often send two, and the save is on its way. Another SIGINT, from
    someone who presses Ctrl-C again, raises KeyboardInterrupt at once; the save that it interrupts leaves the checkpoints
    before it whole.

    Of many processes any one's SIGTERM stops all: JAX's preemption service takes the signal, and agrees on a step. SIGINT is
    then left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ():
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread, where no signal arrives
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after each, once."""
        if jax.process_count() > 1:
            self.requested = self.requested or multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
