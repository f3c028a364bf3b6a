"""What a loss may be, and the one for classification."""

import io
import itertools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from training.networks import Small, initial_state, make_batches, make_trainer, run_steps

from nonlocal_jax import training

ONE = training.make_mesh(devices=jax.devices()[:1])


def test_label_smoothing_and_mixup_by_the_book():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0]])
    labels = np.array([0, 1])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smooth = 0.9 * np.eye(3)[labels] + 0.1 / 3
    got = training.smoothed_cross_entropy(0.1)(
        jnp.asarray(logits, jnp.float32), jnp.asarray(labels)
    )
    np.testing.assert_allclose(got, -(smooth * log_p).sum(-1), rtol=1e-6)

    batch = {"inputs": jnp.arange(6.0).reshape(3, 2), "labels": jnp.array([0, 1, 2])}
    keys = jax.random.split(jax.random.key(0), 50)
    mixed = jax.jit(jax.vmap(lambda key: training.mixup(batch, key, 0.4, 3)))(keys)
    shares = np.asarray(mixed["labels"][:, 0, 0])
    first, last = (np.asarray(batch["inputs"][i]) for i in (0, 2))
    expected = shares[:, None] * first + (1 - shares[:, None]) * last
    np.testing.assert_allclose(mixed["inputs"][:, 0], expected, rtol=1e-6)
    middle = np.broadcast_to([0, 1, 0], (50, 3))
    np.testing.assert_allclose(mixed["labels"][:, 1], middle, atol=1e-6)
    assert shares.min() < 0.1
    assert shares.max() > 0.9
    with pytest.raises(ValueError, match="smoothing must be at least 0 and below 1; got 1"):
        training.smoothed_cross_entropy(1.0)


def test_residual_ratios_of_blocks_are_logged():
    """A new block is the identity until the second step, the first of a learning rate above 0."""
    model = Small(block=True)
    _, rows = run_steps(make_trainer(model=model), ONE, make_batches(3))
    ratios = [row["residual_ratio/nonlocal"] for row in rows]
    assert ratios[:2] == [0, 0]
    assert ratios[2] > 0


def test_evaluation_counts_every_real_example_once():
    """One batch, the same in two padded ones and one of padding alone, and without a mask."""
    trainer = make_trainer(average=0.9)
    variables = initial_state(trainer).variables
    batch = next(make_batches(1, size=8, seed=1))
    evaluate = training.sum_of_evaluations(trainer, ONE)
    full = evaluate(variables, [({**batch, "mask": np.ones(8, bool)},)])
    padded = {name: np.concatenate([x[:5], np.full_like(x[:3], 2)]) for name, x in batch.items()}
    rolled = {name: np.roll(x, -5, 0) for name, x in batch.items()}
    parts = [
        ({**padded, "mask": np.arange(8) < 5},),
        ({**rolled, "mask": np.arange(8) < 3},),
        ({**padded, "mask": np.zeros(8, bool)},),
    ]
    split = evaluate(variables, parts)
    assert int(full["count"]) == int(split["count"]) == 8
    chex.assert_trees_all_close(full, split, rtol=1e-5)
    chex.assert_trees_all_close(evaluate(variables, [(batch,)]), full, rtol=1e-5)


def test_a_loss_may_update_statistics_only():
    def loss(variables, batch, rng, train):
        return variables["params"]["w"].sum(), {}, {"cache": {}}

    trainer = training.Trainer(loss, optax.sgd(0.1))
    state = trainer.init(jax.random.key(0), None, {"params": {"w": jnp.ones(1)}})
    with pytest.raises(ValueError, match="updates of a loss must be of 'batch_stats'; got cache"):
        training.train_step(trainer, state, {"x": jnp.ones(2)})


def test_a_plain_function_and_nested_batches(tmp_path):
    """A loss other than classification, on batches with nested leaves of other names."""

    def squared_error(variables, batch, rng, train):
        pair = batch["pair"]
        errors = jnp.square(pair["x"] @ variables["params"]["w"] - pair["y"])
        real = batch.get("mask", np.ones(len(errors), bool))
        mean = jnp.where(real, errors, 0).sum() / real.sum()
        return mean, {"is_training": mean * 0 + train}, {}

    weights = np.array([1.0, -2.0, 3.0], np.float32)

    def pairs(count, size, seed):
        rng = np.random.default_rng(seed)
        for _ in range(count):
            x = rng.normal(size=(size, 3)).astype(np.float32)
            yield {"pair": {"x": x, "y": x @ weights}}

    def ragged():
        for batch, real in zip(pairs(2, 16, seed=1), (16, 5), strict=True):
            yield {**batch, "mask": np.arange(16) < real}

    def endless(step):
        return itertools.islice(pairs(100, 16, seed=0), step, None)

    trainer = training.Trainer(squared_error, optax.sgd(0.2))
    options = training.Options(steps=30, evaluate_every=30, save_every=30)
    variables = {"params": {"w": np.zeros(3, np.float32)}}
    with training.Run(tmp_path, {}) as run:
        console, key = Console(file=io.StringIO()), jax.random.key(0)
        result = training.fit(
            trainer,
            options,
            run,
            ONE,
            endless,
            ragged,
            key=key,
            variables=variables,
            console=console,
        )
    np.testing.assert_allclose(result.state.params["w"], weights, atol=1e-3)
    assert result.metrics["count"] == 21
    assert result.metrics["is_training"] == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["is_training"] for row in rows] == [1] * 30 + [0]
    with pytest.raises(ValueError, match="variables must be passed if the loss has no `init`"):
        trainer.init(jax.random.key(0), next(pairs(1, 1, 0)))
