"""The loop: it steps, evaluates, logs and saves, and knows neither model nor data set."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from nonlocal_jax.training import precise_bn
from nonlocal_jax.training.checkpoints import Checkpoints
from nonlocal_jax.training.mesh import (
    Placement,
    put,
    sharded_step,
    state_sharding,
    sum_of_evaluations,
    sum_of_moments,
)
from nonlocal_jax.training.progress import Bar, Clock, Profiler
from nonlocal_jax.training.run import Run
from nonlocal_jax.training.step import RATIO, Batch, Trainer, TrainState
from nonlocal_jax.training.stop import Stopped, StopSignals

Tree = Any


class NonFiniteError(FloatingPointError):
    """The loss or the gradient stopped being finite; the checkpoints are from before."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How long, and what happens how often.

    Attributes:
        steps: updates in all.
        evaluate_every: steps between evaluations; the last step is always evaluated.
        save_every: steps between checkpoints; the last step is always saved.
        keep: how many of the latest checkpoints are kept.
        best: the metric of the evaluation whose best checkpoint is kept too; None keeps none.
        best_mode: "max" or "min".
        precise_bn: batches over which BatchNorm's statistics are computed anew before an evaluation; 0 is none.
        warn_zero_after: steps after which a non-local block that still adds exactly nothing is warned about.
        profile: steps that are profiled, after the first ten of this start.
        placement: of the state on the devices, "replicated" or "sharded".
    """

    steps: int
    evaluate_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    best: str | None = "accuracy"
    best_mode: str = "max"
    precise_bn: int = 0
    warn_zero_after: int = 100
    profile: int = 0
    placement: Placement = "replicated"

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "save_every", "keep", "warn_zero_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("precise_bn", "profile"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")


class Result(NamedTuple):
    """What training ends with.

    Attributes:
        state: after the last step.
        metrics: of the last evaluation; empty without one.
        seconds: of training, over all starts, without compilation and evaluation.
    """

    state: TrainState
    metrics: dict[str, float]
    seconds: float


def fit(
    trainer: Trainer,
    options: Options,
    run: Run,
    mesh: Mesh,
    data: Callable[[int], Iterator[Batch]],
    evaluation: Callable[[], Iterable[Batch]] | None = None,
    *,
    key: jax.Array,
    variables: Mapping[str, Any] | None = None,
    console: Console | None = None,
) -> Result:
    """Train, from the run's latest checkpoint where it has one.

    The same seed and data give the same result bit for bit on the same devices, whether the run was interrupted or not.

    Args:
        trainer: what a step does.
        options: how long, and what happens how often.
        run: its folder, entered already.
        mesh: the devices.
        data: from a step to this process's rows of the batches from that step on, as NumPy arrays.
        evaluation: gives this process's rows of the batches of one evaluation, of equal size; "mask" says which are real.
        key: of the initial values and of all random numbers.
        variables: initial values to take instead.
        console: None is standard output.

    Returns:
        The last state and its evaluation.

    Raises:
        Stopped: SIGTERM or SIGINT came; all is saved, and the process exits with 75 unless this is caught.
        NonFiniteError: the loss or the gradient is not finite; the batch is in the run's folder, and the checkpoints are older.
        CheckpointError, MismatchError: as `Checkpoints` raises them.
    """
    loop = _Loop(trainer, options, run, mesh, data, evaluation)
    example = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in next(data(0)).items()}
    numbers = np.asarray(
        jax.random.key_data(key)
    )  # NumPy's arrays are the same on every process, JAX's are of one

    def init(numbers: Any, example: Batch) -> TrainState:
        return trainer.init(jax.random.wrap_key_data(numbers), example, variables)

    shapes = jax.eval_shape(init, numbers, example)
    shardings = state_sharding(mesh, shapes, options.placement)
    best = options.best if evaluation else None
    checkpoints = Checkpoints(run.folder / "checkpoints", options.keep, best, options.best_mode)
    with contextlib.closing(checkpoints), StopSignals() as stop:
        restored = checkpoints.restore(shapes, shardings)
        if restored is None:
            state, step = jax.jit(init, out_shardings=shardings)(numbers, example), 0
        else:
            state, step = restored.state, restored.step
            loop.clock.seconds = restored.record["seconds"]
            loop.evaluated, loop.metrics = restored.record["evaluated"], restored.record["metrics"]
        run.open_log(step)
        with Bar(console or Console(), options.steps, step) as loop.bar:
            if restored is not None:
                loop.bar.say(f"resumed at step {step}: {run.folder}")
            state = loop.run_from(state, step, shardings, checkpoints, stop)
    return Result(state, loop.metrics, loop.clock.seconds)


class _Pending(NamedTuple):
    """A step that the devices may still be computing."""

    step: int  # after it
    batch: Batch
    metrics: dict[str, jax.Array]


class _Loop:
    """One call of `fit`."""

    bar: Bar

    def __init__(
        self,
        trainer: Trainer,
        options: Options,
        run: Run,
        mesh: Mesh,
        data: Callable[[int], Iterator[Batch]],
        evaluation: Callable[[], Iterable[Batch]] | None,
    ) -> None:
        self.trainer, self.options, self.run, self.mesh = trainer, options, run, mesh
        self.data, self.evaluation = data, evaluation
        self.clock = Clock()
        self.evaluated = 0  # the step of the last evaluation
        self.metrics: dict[str, float] = {}
        self._sum_of_evaluations = sum_of_evaluations(trainer, mesh)
        self._sum_of_moments = sum_of_moments(trainer, mesh)

    def run_from(
        self,
        state: TrainState,
        step: int,
        shardings: Tree,
        checkpoints: Checkpoints,
        stop: StopSignals,
    ) -> TrainState:
        options = self.options
        saved = step if checkpoints.steps else -1
        state = self._evaluation_if_due(state, step, stop)  # if it was interrupted
        if step == options.steps:
            if stop.requested:
                self._say_stopped(step)
            return state
        profiler = Profiler(self.run.folder / "profile", step, options.profile)
        batches = self.data(step)
        batch = next(batches)
        take_step = self._compile(state, batch, shardings)
        pending: _Pending | None = None
        with contextlib.ExitStack() as at_end:
            at_end.callback(profiler.stop)
            self.clock.go()
            while True:
                profiler.before(step)
                state, metrics = take_step(state, put(batch, self.mesh))
                step += 1
                this = _Pending(step, batch, metrics)
                if step < options.steps:
                    batch = next(batches)  # while the devices compute
                if pending:
                    self._look(pending)
                pending = this
                finished = step == options.steps
                saves = finished or step % options.save_every == 0
                if not (stop.after(step) or saves or step % options.evaluate_every == 0):
                    continue
                self._look(pending)  # what is not finite is not saved
                pending = None
                self.clock.pause()
                state = self._evaluation_if_due(state, step, stop)
                asked = stop.requested
                if (saves or asked) and saved < step:
                    self.bar.doing("saving")
                    self._save(checkpoints, step, state)
                    saved = step
                if finished or asked:
                    checkpoints.wait()
                if asked:
                    self._say_stopped(step)
                if finished:
                    return state
                self.clock.go()

    def _say_stopped(self, step: int) -> NoReturn:
        self.bar.say(
            f"stopped by a signal; step {step} is saved, and the same command goes on from there"
        )
        raise Stopped(step)

    def _compile(self, state: TrainState, batch: Batch, shardings: Tree) -> Any:
        self.bar.doing("compiling")
        on_devices = put(batch, self.mesh)
        self.batch_size = on_devices["inputs"].shape[0]
        return sharded_step(self.trainer, self.mesh, shardings).lower(state, on_devices).compile()

    def _look(self, done: _Pending) -> None:
        """Wait for a step; log it, or stop if it is not finite."""
        before = self.clock.seconds
        values = {name: float(value) for name, value in jax.device_get(done.metrics).items()}
        seconds = self.clock.read()
        if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
            file = self.run.keep_batch(done.step, done.batch, values)
            raise NonFiniteError(
                f"loss {values['loss']}, norm of the gradient {values['gradient_norm']} at step {done.step}. The batch is in "
                f"{file}; the last checkpoint is from before. Look at the batch, or take a smaller learning rate."
            )
        self.run.log(done.step, "train", {**values, "seconds": round(seconds, 4)})
        self.bar.step(done.step, values, self.batch_size / max(seconds - before, 1e-9))
        if done.step == self.options.warn_zero_after:
            for name, value in values.items():
                if name.startswith(RATIO) and value == 0:
                    self.bar.say(
                        f"warning: after {done.step} steps the non-local block {name.removeprefix(RATIO + '/')} still adds "
                        "exactly nothing. Is it frozen, or without weight in the optimiser?"
                    )

    def _evaluation_if_due(self, state: TrainState, step: int, stop: StopSignals) -> TrainState:
        """Evaluate, unless that was done or a signal comes meanwhile; then the next start does it."""
        due = step == self.options.steps or step % self.options.evaluate_every == 0
        if not due or self.evaluation is None or self.evaluated >= step:
            return state
        self.bar.doing("evaluating")
        precise = state
        if self.options.precise_bn and state.batch_stats:
            batches = itertools.islice(
                zip(self.data(step), itertools.count(step), strict=False), self.options.precise_bn
            )
            total = self._sum_of_moments(
                state, itertools.takewhile(lambda _: not stop.requested, batches)
            )
            if stop.requested:
                return state
            precise = dataclasses.replace(
                state, batch_stats=precise_bn.statistics(total, self.options.precise_bn)
            )
        unless_stopped = itertools.takewhile(lambda _: not stop.requested, self.evaluation())
        sums = self._sum_of_evaluations(precise.variables, ((batch,) for batch in unless_stopped))
        if stop.requested:
            return state
        values = {
            name: float(value) for name, value in jax.device_get(sums or {"count": 0}).items()
        }
        count = values.pop("count")
        if not count:
            raise ValueError("the evaluation must have at least one example; got none.")
        self.metrics = {**{name: value / count for name, value in values.items()}, "count": count}
        self.evaluated = step
        self.run.log(step, "evaluation", self.metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in self.metrics.items())
        self.bar.say(f"step {step:,}: {shown} examples, {self.clock.seconds:,.1f} s of training")
        return precise

    def _save(self, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
        record = {
            "seconds": self.clock.seconds,
            "evaluated": self.evaluated,
            "metrics": self.metrics,
        }
        checkpoints.save(
            step, state, record, self.metrics if self.evaluated == step and self.metrics else None
        )
