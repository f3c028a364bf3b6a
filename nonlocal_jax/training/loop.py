"""The training loop: it steps, evaluates, logs and saves, and knows neither model nor data set."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from nonlocal_jax import checks
from nonlocal_jax.training.checkpoints import Checkpoints, MismatchError, Restored
from nonlocal_jax.training.compilation import compiled, sharded_step
from nonlocal_jax.training.evaluator import Evaluator
from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.mesh import Placement, put, state_sharding
from nonlocal_jax.training.monitor import Monitor
from nonlocal_jax.training.progress import Bar, Clock, Profiler
from nonlocal_jax.training.run import Run
from nonlocal_jax.training.step import Trainer, TrainState, batch_size
from nonlocal_jax.training.stop import Stopped, StopSignals

Tree = Any
RECORDED = ("seconds", "evaluated", "metrics")  # in each checkpoint


@dataclasses.dataclass(frozen=True)
class Options:
    """Length of a run, and how often it evaluates, saves and reports.

    Attributes:
        steps: Number of updates in all.
        evaluate_every: Steps between evaluations. The last step is always evaluated.
        save_every: Steps between checkpoints. The last step is always saved.
        keep: Number of latest checkpoints that are kept.
        best: Metric of the evaluation whose best checkpoint is kept as well; None keeps none.
        best_mode: Whether the "max" or the "min" of that metric is best.
        precise_bn: Number of batches over which BatchNorm's statistics are computed before each
            evaluation; 0 evaluates with the running statistics.
        warn_if_zero: Prefix of training metrics that should not stay 0, such as "residual_ratio" of
            non-local blocks; None warns of none.
        warn_zero_after: Number of steps after which a metric that is exactly 0 is warned about.
        profile: Number of steps that are profiled, after the first ten of this start.
        placement: Placement of the state on the devices, "replicated" or "sharded".
    """

    steps: int
    evaluate_every: int = 1000
    save_every: int = 1000
    keep: int = 2
    best: str | None = "accuracy"
    best_mode: str = "max"
    precise_bn: int = 0
    warn_if_zero: str | None = None
    warn_zero_after: int = 100
    profile: int = 0
    placement: Placement = "replicated"

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "save_every", "keep", "warn_zero_after"):
            checks.at_least(name, getattr(self, name), 1)
        for name in ("precise_bn", "profile"):
            checks.at_least(name, getattr(self, name), 0)

    def evaluates(self, step: int) -> bool:
        """Whether the state after `step` updates is evaluated."""
        return step == self.steps or step % self.evaluate_every == 0

    def saves(self, step: int) -> bool:
        """Whether the state after `step` updates is saved."""
        return step == self.steps or step % self.save_every == 0


class Result(NamedTuple):
    """The result of training.

    Attributes:
        state: State after the last step.
        metrics: Metrics of the last evaluation; empty without one.
        seconds: Time spent in training, over all starts, without compilation and evaluation.
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
    """Trains, from the run's latest checkpoint if it has one.

    The same seed and data give the same result bit for bit on the same devices, whether the run was
    interrupted or not.

    Args:
        trainer: What a step does.
        options: Length of the run, and how often it evaluates, saves and reports.
        run: The run's directory, already entered.
        mesh: Devices.
        data: Function of a step that returns this process's rows of the batches from that step on,
            trees of NumPy arrays.
        evaluation: Function that returns this process's rows of the batches of one evaluation. All
            have the same size; "mask" (B,) says which examples are real.
        key: Key of the initial values and of all random numbers.
        variables: Initial variables to use instead.
        console: Where progress is printed; None prints to standard output.

    Returns:
        The last state and its evaluation.

    Raises:
        Stopped: If SIGTERM or SIGINT arrived. The state is saved, and the process exits with 75
            unless this is caught.
        NonFiniteError: If the loss or the gradient is not finite. The batch is saved in the run's
            directory, and every checkpoint is from an earlier step.
        CheckpointError, MismatchError: As `Checkpoints` raises them.
    """
    example = jax.tree.map(lambda x: np.zeros((1, *x.shape[1:]), x.dtype), next(data(0)))
    # NumPy arrays are the same on every process; a JAX array belongs to the process that made it.
    arguments = jax.device_get((jax.random.key_data(key), example, variables))
    shapes = jax.jit(_init, static_argnums=0).eval_shape(trainer, *arguments)
    shardings = state_sharding(mesh, shapes, options.placement)
    evaluator = Evaluator(trainer, mesh, data, evaluation, options.precise_bn)
    best = options.best if evaluation else None
    checkpoints = Checkpoints(run.folder / "checkpoints", options.keep, best, options.best_mode)
    with contextlib.closing(checkpoints), StopSignals() as stop:
        clock, restored = Clock(), checkpoints.restore(shapes, shardings)
        if restored is None:
            init = jax.jit(_init, static_argnums=0, out_shardings=shardings)
            state, step = init(trainer, *arguments), 0
        else:
            state, step = restored.state, restored.step
            clock.seconds = _seconds(restored)
            evaluator.restore(restored.record)
        run.open_log(step)
        with Bar(console or Console(), options.steps, step) as bar:
            if restored is not None:
                bar.say(f"resumed at step {step}: {run.folder}")
            loop = _Loop(trainer, options, run, mesh, evaluator, checkpoints, bar, clock, stop)
            state = loop.train(state, step, shardings, data)
    run.upload()
    return Result(state, evaluator.metrics, clock.seconds)


def _seconds(restored: Restored) -> float:
    missing = [name for name in RECORDED if name not in restored.record]
    if missing:
        raise MismatchError(
            f"the record of the checkpoint of step {restored.step} must have "
            f"{', '.join(RECORDED)}, as `fit` saves it; it lacks {', '.join(missing)}. Use another "
            "directory."
        )
    return float(restored.record["seconds"])


def _init(
    trainer: Trainer, key_data: Any, example: Batch, variables: Mapping[str, Any] | None
) -> TrainState:
    return trainer.init(jax.random.wrap_key_data(key_data), example, variables)


@dataclasses.dataclass
class _Loop:
    """One call of `fit`, and the parts that it is made of."""

    trainer: Trainer
    options: Options
    run: Run
    mesh: Mesh
    evaluator: Evaluator
    checkpoints: Checkpoints
    bar: Bar
    clock: Clock
    stop: StopSignals
    saved_step: int = -1

    def train(
        self,
        state: TrainState,
        step: int,
        shardings: Tree,
        data: Callable[[int], Iterator[Batch]],
    ) -> TrainState:
        """Trains from `step` to the last step, and returns the last state."""
        if self.checkpoints.steps:
            self.saved_step = step
        state = self._evaluate(state, step)  # in case a signal interrupted it at the last start
        if step == self.options.steps:
            if self.stop.requested:
                self._stop(step)
            return state
        batches = data(step)
        batch = next(batches)
        device_batch = self._put(batch)
        self.bar.doing("compiling")
        take_step = compiled(sharded_step(self.trainer, self.mesh, shardings), state, device_batch)
        monitor = Monitor(
            self.run,
            self.bar,
            self.clock,
            batch_size(device_batch),
            self.options.warn_if_zero,
            self.options.warn_zero_after,
        )
        profiler = Profiler(self.run.growing / "profile", step, self.options.profile)
        with contextlib.closing(profiler):
            self.clock.start()
            while step < self.options.steps:
                profiler.on_step(step)
                state, metrics = take_step(state, self._put(batch))
                step += 1
                trained_batch = batch
                if step < self.options.steps:
                    batch = next(batches)  # the host reads data while the devices compute
                monitor.watch(step, trained_batch, metrics)
                if self._pauses(step):
                    monitor.flush()  # before saving: a state that is not finite must not be saved
                    self.clock.pause()
                    state = self._pause(state, step)
                    if step < self.options.steps:
                        self.clock.start()
        return state

    def _put(self, batch: Batch) -> Tree:
        return put(batch, self.mesh, self.trainer.split_over_positions(batch))

    def _pauses(self, step: int) -> bool:
        # `stop.check` must be asked after every step: processes agree there on when to stop.
        stops = self.stop.check(step)
        return stops or self.options.saves(step) or self.options.evaluates(step)

    def _pause(self, state: TrainState, step: int) -> TrainState:
        """Evaluates, saves and stops, as far as each is due after `step`."""
        state = self._evaluate(state, step)
        stops = self.stop.requested
        if (stops or self.options.saves(step)) and self.saved_step < step:
            self._save(state, step)
        if stops or step == self.options.steps:
            self.checkpoints.wait()
        if stops:
            self._stop(step)
        return state

    def _evaluate(self, state: TrainState, step: int) -> TrainState:
        """Evaluates if it is due; if a signal arrives meanwhile, the next start does it."""
        if not self.options.evaluates(step) or not self.evaluator.is_due(step):
            return state
        self.bar.doing("evaluating")
        evaluated = self.evaluator.evaluate(state, step, self.stop)
        if evaluated is None:
            return state
        metrics = self.evaluator.metrics
        self.run.log(step, "evaluation", metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        seconds = f"{self.clock.seconds:,.1f} s of training"
        self.bar.say(f"step {step:,}: {shown} examples, {seconds}")
        return evaluated

    def _save(self, state: TrainState, step: int) -> None:
        self.bar.doing("saving")
        self.run.upload()  # first, so that the log has every step of the checkpoint
        record = {"seconds": self.clock.seconds, **self.evaluator.record}
        metrics = self.evaluator.metrics if self.evaluator.step == step else {}
        self.checkpoints.save(step, state, record, metrics or None)
        self.saved_step = step

    def _stop(self, step: int) -> NoReturn:
        self.bar.say(f"stopped by a signal; step {step} is saved; run the same command to resume")
        raise Stopped(step)
