"""Evaluation during training: precise BatchNorm statistics, and metrics over every example once."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from nonlocal_jax.training import precise_bn
from nonlocal_jax.training.compilation import sum_of_evaluations, sum_of_moments
from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.step import Trainer, TrainState
from nonlocal_jax.training.stop import StopSignals

Record = dict[str, Any]  # JSON


class Evaluator:
    """Evaluates a state, and remembers the latest result.

    Attributes:
        step: Step of the latest evaluation; 0 before the first.
        metrics: Its metrics, means over the examples, and their "count".
    """

    def __init__(
        self,
        trainer: Trainer,
        mesh: Mesh,
        data: Callable[[int], Iterator[Batch]],
        evaluation: Callable[[], Iterable[Batch]] | None,
        precise_batches: int,
    ) -> None:
        """Prepares evaluations; nothing is compiled yet.

        Args:
            trainer: The trainer, whose loss is evaluated.
            mesh: Devices.
            data: Training batches from a step on, for the statistics of BatchNorm.
            evaluation: Batches of one evaluation; None evaluates nothing.
            precise_batches: Training batches over which BatchNorm's statistics are computed before
                each evaluation; 0 keeps the running ones.
        """
        self.step = 0
        self.metrics: dict[str, float] = {}
        self._data, self._evaluation = data, evaluation
        self._precise_batches = precise_batches
        self._sum_of_evaluations = sum_of_evaluations(trainer, mesh)
        self._sum_of_moments = sum_of_moments(trainer, mesh)

    def is_due(self, step: int) -> bool:
        """Whether the state of `step` can be evaluated and has not been yet."""
        return self._evaluation is not None and self.step < step

    def evaluate(self, state: TrainState, step: int, stop: StopSignals) -> TrainState | None:
        """Evaluates a state.

        Args:
            state: State after `step` updates.
            step: Its step.
            stop: Signals; one that arrives ends the evaluation early.

        Returns:
            The state with the statistics it was evaluated with, or None if a signal arrived: then
            `step` and `metrics` are as before.

        Raises:
            ValueError: If there is no example.
        """
        precise = self._with_precise_statistics(state, step, stop)
        if precise is None or self._evaluation is None:
            return None
        batches = _until_signal(self._evaluation(), stop)
        sums = self._sum_of_evaluations(precise.variables, ((batch,) for batch in batches))
        if stop.requested:
            return None
        totals = {name: float(total) for name, total in jax.device_get(sums or {}).items()}
        count = totals.pop("count", 0.0)
        if not count:
            raise ValueError("the evaluation must have at least one example; got none.")
        self.step = step
        self.metrics = {name: total / count for name, total in totals.items()} | {"count": count}
        return precise

    def _with_precise_statistics(
        self, state: TrainState, step: int, stop: StopSignals
    ) -> TrainState | None:
        if not self._precise_batches or not state.batch_stats:
            return state
        numbered = zip(self._data(step), itertools.count(step), strict=False)
        batches = itertools.islice(numbered, self._precise_batches)
        total = self._sum_of_moments(state, _until_signal(batches, stop))
        if stop.requested:
            return None
        statistics = precise_bn.statistics(total, self._precise_batches)
        return dataclasses.replace(state, batch_stats=statistics)

    @property
    def record(self) -> Record:
        """The latest evaluation, as stored in checkpoints."""
        return {"evaluated": self.step, "metrics": self.metrics}

    def restore(self, record: Record) -> None:
        """Restores the evaluation in `record`."""
        self.step, self.metrics = record["evaluated"], record["metrics"]


def _until_signal(batches: Iterable[Any], stop: StopSignals) -> Iterator[Any]:
    return itertools.takewhile(lambda _: not stop.requested, batches)
