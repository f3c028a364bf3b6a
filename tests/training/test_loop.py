"""The loop: what it does when, and that an interrupted run ends as one that was not."""

import dataclasses
import io
import itertools
import json
import os
import signal

import chex
import jax
import numpy as np
import pytest
from compilations import compilations
from rich.console import Console
from training.networks import Small, initial_variables, make_batches, make_trainer, observe

from nonlocal_jax import training
from nonlocal_jax.training import (
    Checkpoints,
    NonFiniteError,
    Options,
    Run,
    Stopped,
    fit,
)

MESH = training.make_mesh(devices=jax.devices()[:1])
OPTIONS = Options(steps=12, evaluate_every=4, save_every=3, precise_bn=2)
TRAIN_METRICS = {"loss", "accuracy", "gradient_norm", "learning_rate", "feature_mean", "seconds"}


def data(step):
    return itertools.islice(make_batches(1000), step, None)


def evaluation():
    for batch in make_batches(2, seed=1):
        yield {**batch, "mask": np.ones(16, bool)}


def averaging_trainer():
    """The trainer of most tests, whose compiled functions the library caches."""
    return make_trainer(average=0.9)


def run_fit(
    folder, trainer=None, options=OPTIONS, data=data, evaluation=evaluation, mesh=MESH, **arguments
):
    """Returns the result and what was printed."""
    out = io.StringIO()
    trainer = trainer or averaging_trainer()
    key, console = jax.random.key(0), Console(file=out, width=200)
    with Run(folder, {}) as run:
        result = fit(
            trainer, options, run, mesh, data, evaluation, key=key, console=console, **arguments
        )
    return result, out.getvalue()


def log(folder, kind):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts: its directory, result and output."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run_fit(folder)


@pytest.mark.usefixtures("whole")
def test_a_second_run_and_a_resumed_one_compile_nothing(tmp_path):
    """Evaluation, precise BN and checkpoints included."""
    with compilations() as names:
        run_fit(tmp_path / "second")
    assert names == []
    shorter = dataclasses.replace(OPTIONS, steps=6)
    run_fit(tmp_path / "resumed", options=shorter)
    with compilations() as names:
        _, printed = run_fit(tmp_path / "resumed")
    assert "resumed at step 6" in printed
    assert names == []


def test_what_a_run_leaves(whole):
    folder, result, printed = whole
    assert int(result.state.step) == 12
    assert [row["step"] for row in log(folder, "train")] == list(range(1, 13))
    assert [row["step"] for row in log(folder, "evaluation")] == [4, 8, 12]
    assert log(folder, "evaluation")[-1]["accuracy"] == result.metrics["accuracy"]
    assert result.metrics["count"] == 32
    row = log(folder, "train")[-1]
    assert row.keys() >= TRAIN_METRICS
    assert 0 < log(folder, "train")[0]["seconds"] < row["seconds"] <= result.seconds
    assert "step 12: " in printed
    saved = Checkpoints(folder / "checkpoints")
    assert saved.steps[-2:] == [9, 12]
    chex.assert_trees_all_equal(saved.restore(result.state).state, result.state)
    saved.close()


def test_a_finished_run_is_not_trained_again(whole):
    folder, result, _ = whole
    again, printed = run_fit(
        folder, data=lambda step: data(0) if step == 0 else pytest.fail("it trained")
    )
    chex.assert_trees_all_equal(again.state, result.state)
    assert again.metrics == result.metrics
    assert "resumed at step 12" in printed


class InterruptedByTestError(Exception):
    pass


def disturbed_data(step, disturb):
    """Batches that call `disturb` when the one of `step` is read."""

    def batches(first):
        for number, batch in enumerate(data(first), first):
            if number == step:
                disturb()
            yield batch

    return batches


def interrupt():
    raise InterruptedByTestError


@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_a_run_that_broke_ends_as_one_that_did_not(step, whole, tmp_path):
    folder, result, _ = whole
    with pytest.raises(InterruptedByTestError):
        run_fit(tmp_path, data=disturbed_data(step, interrupt))
    resumed, _ = run_fit(tmp_path)
    chex.assert_trees_all_equal(resumed.state, result.state)
    assert resumed.metrics == result.metrics

    def without_time(rows):
        return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]

    for kind in ("train", "evaluation"):
        assert without_time(log(tmp_path, kind)) == without_time(log(folder, kind))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [2, 6])
def test_a_signal_saves_the_step_and_stops(number, step, whole, tmp_path):
    with pytest.raises(Stopped) as stop:
        run_fit(tmp_path, data=disturbed_data(step, lambda: os.kill(os.getpid(), number)))
    assert stop.value.code == 75
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.steps[-1] == stop.value.step
    assert stop.value.step == step  # the batch is read while that step is computed
    saved.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    resumed, printed = run_fit(tmp_path)
    assert f"resumed at step {stop.value.step}" in printed
    chex.assert_trees_all_equal(resumed.state, whole[1].state)


def interrupted():
    yield from itertools.islice(evaluation(), 1)
    os.kill(os.getpid(), signal.SIGTERM)
    yield from itertools.islice(evaluation(), 1, None)


def test_a_signal_in_the_last_evaluation_is_a_stop_at_every_start(whole, tmp_path):
    last = dataclasses.replace(OPTIONS, evaluate_every=12)
    for _ in range(2):
        with pytest.raises(Stopped) as stop:
            run_fit(tmp_path, options=last, evaluation=interrupted)
        assert stop.value.step == 12
    result, _ = run_fit(tmp_path, options=last)
    assert result.metrics == whole[1].metrics
    assert [row["step"] for row in log(tmp_path, "evaluation")] == [12]


def test_a_signal_in_an_evaluation_leaves_it_to_the_next_start(whole, tmp_path):
    with pytest.raises(Stopped) as stop:
        run_fit(tmp_path, evaluation=interrupted)
    assert stop.value.step == 4
    assert not log(tmp_path, "evaluation")
    resumed, _ = run_fit(tmp_path)
    chex.assert_trees_all_equal(resumed.state, whole[1].state)
    assert [row["step"] for row in log(tmp_path, "evaluation")] == [4, 8, 12]


def test_a_second_interrupt_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_fit(tmp_path, data=disturbed_data(8, twice))
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.steps == [3, 6]
    saved.close()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(bad, tmp_path):
    def spoilt(step):
        for number, batch in enumerate(data(step), step):
            if number == 5:  # the update of step 6, which is saved
                batch["inputs"][3, 1, 0] = bad
            yield batch

    with pytest.raises(
        NonFiniteError, match=r"got nan and .* at step 6. The batch is saved in .*step-6-process-0"
    ):
        run_fit(tmp_path, data=spoilt)
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.steps == [3]
    saved.close()
    with np.load(tmp_path / "nonfinite" / "step-6-process-0.npz", allow_pickle=False) as batch:
        assert not np.isfinite(batch["inputs"][3, 1, 0])
        np.testing.assert_array_equal(batch["position"], np.arange(80, 96))
    assert (
        json.loads((tmp_path / "nonfinite" / "step-6-process-0.json").read_text())["loss"] == "nan"
    )
    resumed, _ = run_fit(tmp_path)  # with intact data
    assert int(resumed.state.step) == 12


def test_a_metric_that_stays_zero_is_warned_about(tmp_path):
    options = dataclasses.replace(OPTIONS, warn_if_zero="feature", warn_zero_after=3)
    _, printed = run_fit(tmp_path / "alive", options=options)
    assert "warning" not in printed

    def observe_zero(intermediates):
        return {name: 0 * value for name, value in observe(intermediates).items()}

    trainer = make_trainer(observe=observe_zero)
    short = dataclasses.replace(options, steps=4)
    _, printed = run_fit(tmp_path / "dead", trainer, short)
    assert "warning: feature_mean is still exactly 0 after 3 steps" in printed


def test_another_model_is_an_error_that_names_the_leaf(whole):
    with pytest.raises(
        training.MismatchError,
        match=r"params/head/kernel is float32 \(8, 3\) in it, and float32 \(9, 3\) here",
    ):
        run_fit(whole[0], make_trainer(model=Small(features=9), average=0.9))


def test_precise_statistics_are_those_of_all_examples(tmp_path):
    """The norm sees the inputs of k batches through one dense layer: compare with plain NumPy."""
    options = Options(steps=4, evaluate_every=4, save_every=4, precise_bn=3)
    result, _ = run_fit(tmp_path, options=options)
    hidden = jax.device_get(result.state.average["hidden"])
    batches = itertools.islice(data(4), 3)
    inputs = np.concatenate([batch["inputs"] for batch in batches]).astype(np.float64)
    features = inputs @ hidden["kernel"] + hidden["bias"]
    statistics = result.state.batch_stats["norm"]
    np.testing.assert_allclose(statistics["mean"], features.mean((0, 1)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics["var"], features.var((0, 1)), rtol=1e-4)


@pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
@pytest.mark.parametrize("batch_norm", ["global", "device"])
def test_the_loop_on_four_devices(batch_norm, whole, tmp_path):
    """Evaluated with the same statistics and counts; with global statistics the same training."""
    trainer = make_trainer(average=0.9, batch_norm=batch_norm)
    result, _ = run_fit(tmp_path, trainer, mesh=training.make_mesh())
    assert result.metrics["count"] == 32
    if batch_norm == "global":
        states = jax.device_get((result.state, whole[1].state))
        chex.assert_trees_all_close(*states, rtol=1e-5, atol=1e-6)


def test_a_profile_of_some_steps(tmp_path):
    options = Options(steps=14, evaluate_every=14, save_every=14, profile=2)
    run_fit(tmp_path, options=options)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_initial_values_may_be_passed(tmp_path):
    start = initial_variables(Small())
    options = Options(steps=1, evaluate_every=1, save_every=1)
    result, _ = run_fit(tmp_path, options=options, variables=start)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), result.state.params, start["params"])
    assert max(jax.tree.leaves(moved)) < 0.05  # one small step away


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"precise_bn": -1}, "precise_bn must be at least 0; got -1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**{"steps": 5, **options})


def test_dry_run_says_what_a_step_needs():
    batch = next(make_batches(1))
    lines = training.dry_run(averaging_trainer(), OPTIONS, training.make_mesh(), batch)
    text = "\n".join(lines)
    params = jax.tree.leaves(initial_variables(Small())["params"])
    assert f"parameters: {sum(leaf.size for leaf in params)}" in text
    assert "inputs float32 (16, 8, 2)" in text
    assert "hidden/kernel" in text
    assert "MB in addition to state and batch" in text
