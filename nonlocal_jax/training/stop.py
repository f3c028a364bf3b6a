"""Signals that ask a run to stop: it saves first."""

import signal
from types import FrameType, TracebackType
from typing import Any

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
    """Within `with`, SIGTERM and SIGINT only set `requested`.

    Another SIGTERM changes nothing: schedulers and launchers often send two, and the save is on its way. Another SIGINT, from
    someone who presses Ctrl-C again, raises KeyboardInterrupt at once; the save that it interrupts leaves the checkpoints
    before it whole.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread, where no signal arrives
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
