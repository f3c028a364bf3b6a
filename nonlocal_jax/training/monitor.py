"""Watches the steps of a run: waits for their metrics, logs them, and stops at the first NaN."""

import math
from typing import NamedTuple

import jax

from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.progress import Bar, Clock
from nonlocal_jax.training.run import Run


class NonFiniteError(FloatingPointError):
    """The loss or the gradient is no longer finite; every checkpoint is from an earlier step."""


class _Pending(NamedTuple):
    """A step that the devices may still be computing."""

    step: int  # number of updates after it
    batch: Batch
    metrics: dict[str, jax.Array]


class Monitor:
    """Reports each step one step late, so that the host never waits for the step just started."""

    def __init__(
        self,
        run: Run,
        bar: Bar,
        clock: Clock,
        batch_size: int,
        warn_if_zero: str | None,
        warn_zero_after: int,
    ) -> None:
        """Initialises the monitor, which does not watch anything yet.

        Args:
            run: Run whose log takes a row for each step.
            bar: Progress bar.
            clock: Clock of the time spent in training.
            batch_size: Number of examples of a batch on all devices.
            warn_if_zero: Prefix of the metrics that should not stay 0; None warns of none.
            warn_zero_after: Step after which the warning is printed.
        """
        self._run, self._bar, self._clock = run, bar, clock
        self._batch_size = batch_size
        self._warn_if_zero, self._warn_zero_after = warn_if_zero, warn_zero_after
        self._pending: _Pending | None = None

    def watch(self, step: int, batch: Batch, metrics: dict[str, jax.Array]) -> None:
        """Reports the step before, and keeps this one for later.

        Args:
            step: Number of updates made.
            batch: This process's rows of the batch, to be saved if the loss is not finite.
            metrics: Metrics that the devices are computing.

        Raises:
            NonFiniteError: As `flush` raises it.
        """
        self.flush()
        self._pending = _Pending(step, batch, metrics)

    def flush(self) -> None:
        """Waits for the last step and reports it.

        Raises:
            NonFiniteError: If its loss or the norm of its gradient is not finite.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        seconds_before = self._clock.seconds
        metrics = jax.device_get(pending.metrics)
        values = {name: float(value) for name, value in metrics.items()}
        seconds = self._clock.read()
        self._check_finite(pending, values)
        self._run.log(pending.step, "train", {**values, "seconds": round(seconds, 4)})
        rate = self._batch_size / max(seconds - seconds_before, 1e-9)
        self._bar.step(pending.step, values, rate)
        if pending.step == self._warn_zero_after and self._warn_if_zero is not None:
            self._warn_of_zeros(values, self._warn_if_zero)

    def _check_finite(self, pending: _Pending, values: dict[str, float]) -> None:
        loss, norm = values["loss"], values["gradient_norm"]
        if math.isfinite(loss) and math.isfinite(norm):
            return
        file = self._run.keep_batch(pending.step, pending.batch, values)
        raise NonFiniteError(
            f"the loss and the norm of the gradient must be finite; got {loss} and {norm} at step "
            f"{pending.step}. The batch is saved in {file}, and every checkpoint is from an "
            "earlier step. Look at the batch, or lower the learning rate."
        )

    def _warn_of_zeros(self, values: dict[str, float], prefix: str) -> None:
        for name, value in values.items():
            if name.startswith(prefix) and value == 0:
                self._bar.say(
                    f"warning: {name} is still exactly 0 after {self._warn_zero_after} steps. Is "
                    "that part of the network frozen, or missing from the optimiser?"
                )
