"""Training on many devices, by pmap, in parts and on one device gives the same result."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.jax_utils import replicate, unreplicate
from training.networks import (
    CLASSES,
    Small,
    SmallVideo,
    initial_state,
    initial_variables,
    make_batches,
    make_trainer,
    run_steps,
)

from nonlocal_jax import training
from nonlocal_jax.data import augment

STEPS = 10
ONE = training.make_mesh(devices=jax.devices()[:1])
FOUR = training.make_mesh(devices=jax.devices()[:4])
needs_four = pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def noisy(batch, key):
    """Adds noise with random numbers for each example."""
    if key is None:
        return batch
    keys = augment.example_keys(key, batch["position"])
    noise = jax.vmap(lambda k: jax.random.normal(k, batch["inputs"].shape[1:]))(keys)
    return {**batch, "inputs": batch["inputs"] + 0.1 * noise}


def trained(trainer, mesh, **options):
    state, rows = run_steps(trainer, mesh, make_batches(STEPS), **options)
    return jax.device_get(state), rows


@pytest.fixture(scope="module")
def alone():
    """The result of one device with the whole batch at once."""
    return trained(make_trainer(prepare=noisy, average=0.9), ONE)


@pytest.fixture(scope="module")
def by_device():
    """The result of four devices, each with separate statistics of BatchNorm."""
    return trained(make_trainer(prepare=noisy, average=0.9, batch_norm="device"), FOUR)


def test_it_learns(alone):
    _, rows = alone
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    learning_rates = [row["learning_rate"] for row in rows[:3]]
    np.testing.assert_allclose(learning_rates, [0, 0.02, 0.04], rtol=1e-6)


@needs_four
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_four_devices_equal_one(alone, placement):
    result = trained(make_trainer(prepare=noisy, average=0.9), FOUR, placement=placement)
    chex.assert_trees_all_close(result, alone, **CLOSE)


@needs_four
def test_sharded_state_is_split():
    trainer = make_trainer(prepare=noisy, average=0.9)
    state, _ = run_steps(trainer, FOUR, make_batches(1), placement="sharded")
    kernel = state.params["hidden"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 2)}
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert momentum
    assert all(leaf.sharding == kernel.sharding for leaf in momentum)
    assert state.params["head"]["bias"].sharding.is_fully_replicated


@needs_four
def test_pmap_equals_the_sharded_step(by_device):
    trainer = make_trainer(prepare=noisy, average=0.9)
    state = replicate(initial_state(trainer))
    step = training.pmap_step(trainer)
    for batch in make_batches(STEPS):
        state, metrics = step(state, jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch))
    result = jax.device_get(unreplicate((state, metrics)))
    chex.assert_trees_all_close(result, (by_device[0], by_device[1][-1]), **CLOSE)


def test_parts_equal_devices(by_device):
    """Each part has separate statistics of BatchNorm, as on that many devices."""
    state, rows = trained(make_trainer(prepare=noisy, average=0.9, accumulate=4), ONE)
    chex.assert_trees_all_close((state, rows), by_device, **CLOSE)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_parts_are_a_loop_except_on_cpus(platform):
    trainer, (batch,) = make_trainer(accumulate=2), make_batches(1)
    state = initial_state(trainer)
    step = functools.partial(training.step.train_step, trainer)
    text = jax.jit(step).trace(state, batch).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == (platform != "cpu")


@needs_four
def test_statistics_by_device_differ(alone, by_device):
    whole, separate = (state.batch_stats["norm"]["var"] for state in (alone[0], by_device[0]))
    assert np.abs(whole - separate).max() > 1e-4


@needs_four
@pytest.mark.parametrize("batch_norm", ["global", "device"])
def test_parts_on_four_devices_equal_one_without_norms(batch_norm):
    model = Small(norm=False)
    whole = trained(make_trainer(model=model, prepare=noisy), ONE)
    trainer = make_trainer(model=model, prepare=noisy, batch_norm=batch_norm, accumulate=2)
    chex.assert_trees_all_close(trained(trainer, FOUR), whole, **CLOSE)


@needs_four
def test_parts_take_rows_of_every_device():
    """No example moves between devices."""
    x = jnp.arange(16)
    parts = training.step._split(x, parts=2, shards=4)
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])


def dimmed(batch, key):
    """Dims each example by a random number, the same for all its positions."""
    if key is None:
        return batch
    share = jax.vmap(jax.random.uniform)(augment.example_keys(key, batch["position"]))
    return {**batch, "inputs": batch["inputs"] * (0.5 + 0.5 * share[:, None, None])}


@needs_four
@pytest.mark.parametrize(
    ("options", "positions", "functions"),
    [
        ({}, 2, ("moments", "evaluation")),
        ({"batch_norm": "device", "accumulate": 2}, 2, ()),
        ({"batch_norm": "device"}, 1, ("moments",)),
    ],
    ids=str,
)
def test_split_positions_equal_whole_ones(options, positions, functions):
    """Training, precise BN and evaluation; two devices of `data` in both."""

    def run(model, positions, **placement):
        mesh = training.make_mesh(positions, jax.devices()[: 2 * positions])
        trainer = make_trainer(model=model, prepare=dimmed, **options)
        state, rows = run_steps(trainer, mesh, make_batches(5), **placement)
        batch, sums = next(make_batches(1, seed=1)), {}
        if "moments" in functions:
            sums["moments"] = training.sum_of_moments(trainer, mesh)(state, [(batch, 3)])
        if "evaluation" in functions:
            batch["mask"] = np.arange(16) < 11
            evaluate = training.sum_of_evaluations(trainer, mesh)
            sums["evaluation"] = evaluate(state.variables, [(batch,)])
            assert int(sums["evaluation"]["count"]) == 11
        return jax.device_get((state, rows, sums))

    split_model = SmallVideo(dropout=0.2, axis_name="positions")
    split = run(split_model, positions, placement="sharded")
    whole = run(SmallVideo(dropout=0.2), 1)
    chex.assert_trees_all_close(split, whole, **CLOSE)


@needs_four
@pytest.mark.usefixtures("as_users_see_it")
def test_positions_that_cannot_be_split():
    mesh = training.make_mesh(2, jax.devices()[:4])
    message = r"must split positions .* 'positions', of 2 device.*; got (None|'frames')"
    for model in (Small(), SmallVideo(axis_name="frames")):
        with pytest.raises(ValueError, match=message):
            training.sharded_step(make_trainer(model=model), mesh, None)
    batch = next(make_batches(1, positions=6))
    split = make_trainer(model=SmallVideo(axis_name="positions")).split_over_positions(batch)
    assert split == {"inputs": True, "labels": False, "position": False}
    with pytest.raises(ValueError, match=r"positions of an example must split over 4 .*; got 6"):
        training.put(batch, training.make_mesh(4, jax.devices()[:4]), split)


def test_dropout_of_a_step_is_always_the_same():
    trainer = make_trainer(model=Small(dropout=0.5))
    first, second = (run_steps(trainer, ONE, make_batches(3))[0] for _ in range(2))
    chex.assert_trees_all_equal(first, second)
    different = run_steps(trainer, ONE, make_batches(3), key=1)[0]
    assert not np.array_equal(first.params["head"]["kernel"], different.params["head"]["kernel"])


def test_the_average_lags_behind():
    kernels = []

    def look(state):
        trees = (state.params, state.average)
        kernels.append([np.asarray(tree["hidden"]["kernel"], np.float64) for tree in trees])

    trainer = make_trainer(prepare=noisy, average=0.9)
    state, _ = run_steps(trainer, ONE, make_batches(4), look=look)
    for (_, average), (kernel, next_average) in itertools.pairwise(kernels):
        np.testing.assert_allclose(next_average, 0.9 * average + 0.1 * kernel, rtol=1e-5, atol=1e-7)
    assert state.variables["params"] is state.average


def test_bfloat16_computes_and_float32_keeps():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            y = nn.Dense(4, dtype=jnp.bfloat16)(x)
            assert y.dtype == jnp.bfloat16
            return nn.Dense(CLASSES, dtype=jnp.float32)(y.mean(1))

    state, rows = run_steps(make_trainer(model=Half()), ONE, make_batches(2))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))}
    assert dtypes <= {"float32", "int32"}
    assert np.isfinite(rows[-1]["loss"])


def test_one_step_by_hand():
    """Decay, clipping and Nesterov momentum with the gradient of the loss, in NumPy."""
    model = Small(norm=False)
    schedule = optax.constant_schedule(0.3)
    optimiser = training.sgd(schedule, momentum=0.5, weight_decay=0.1, clip_norm=0.2)
    trainer = training.Trainer(training.classification(model), optimiser)
    batches = list(make_batches(3))
    state, _ = run_steps(trainer, ONE, batches)

    @jax.jit
    @jax.grad
    def gradient_of(params, batch):
        logits = model.apply({"params": params}, batch["inputs"])
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, batch["labels"][:, None], 1).mean()

    params = initial_variables(model)["params"]
    velocity = jax.tree.map(np.zeros_like, params)
    for batch in batches:
        gradient = jax.device_get(gradient_of(params, batch))
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
        shrink = min(1, 0.2 / norm)
        gradient = jax.tree.map(lambda d, w, s=shrink: s * d + 0.1 * w, gradient, params)
        velocity = jax.tree.map(lambda v, d: 0.5 * v + d, velocity, gradient)
        params = jax.tree.map(lambda w, v, d: w - 0.3 * (d + 0.5 * v), params, velocity, gradient)
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"batch_norm": "both"}, "batch_norm must be one of 'global', 'device'; got 'both'"),
        ({"average": 1.0}, "average must be between 0 and 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


@needs_four
def test_a_batch_that_does_not_split():
    with pytest.raises(
        ValueError, match="the batch must split into 3 parts on 4 devices; got 16 examples"
    ):
        run_steps(make_trainer(accumulate=3), FOUR, make_batches(1))
    with pytest.raises(ValueError, match="the batch must split over 4 devices; got 6 examples"):
        training.local_rows(6, FOUR)
    with pytest.raises(ValueError, match="positions must divide the number of devices, 4; got 3"):
        training.make_mesh(3)
