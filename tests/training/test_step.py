"""Training on many devices, by pmap, in parts and on one device is the same training."""

import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.jax_utils import replicate, unreplicate
from training.networks import CLASSES, Small, SmallVideo, make_batches, make_trainer, run_steps

from nonlocal_jax import training
from nonlocal_jax.data import augment

STEPS = 10
ONE, FOUR = (training.make_mesh(devices=jax.devices()[:n]) for n in (1, 4))
needs_four = pytest.mark.skipif(len(jax.devices()) < 4, reason="four devices are absent")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def noisy(batch, key):
    """An augmentation with random numbers of each example."""
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
    """One device, the whole batch at once."""
    return trained(make_trainer(prepare=noisy, average=0.9), ONE)


@pytest.fixture(scope="module")
def by_device():
    """Four devices, each with BatchNorm of its own."""
    return trained(make_trainer(prepare=noisy, average=0.9, batch_norm="device"), FOUR)


def test_it_learns(alone):
    _, rows = alone
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[0]["residual_ratio/nonlocal"] == 0 < rows[-1]["residual_ratio/nonlocal"]
    np.testing.assert_allclose(
        [row["learning_rate"] for row in rows[:3]], [0, 0.02, 0.04], rtol=1e-6
    )


@needs_four
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_four_devices_equal_one(alone, placement, monkeypatch):
    monkeypatch.setattr(training.mesh, "SMALLEST_SHARDED", 16)
    state, rows = trained(make_trainer(prepare=noisy, average=0.9), FOUR, placement=placement)
    chex.assert_trees_all_close((state, rows), alone, **CLOSE)


@needs_four
def test_sharded_state_is_split(monkeypatch):
    monkeypatch.setattr(training.mesh, "SMALLEST_SHARDED", 16)
    state, _ = run_steps(make_trainer(), FOUR, make_batches(1), placement="sharded")
    kernel = state.params["conv"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 3, 2, 2)}
    momentum = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert momentum
    assert all(leaf.sharding == kernel.sharding for leaf in momentum)
    assert state.params["head"]["bias"].sharding.is_fully_replicated


@needs_four
def test_pmap_equals_the_sharded_step(by_device):
    trainer = make_trainer(prepare=noisy, average=0.9)
    state = replicate(
        trainer.init(jax.random.key(0), jax.tree.map(lambda x: x[:1], next(make_batches(1))))
    )
    step = training.pmap_step(trainer)
    for batch in make_batches(STEPS):
        state, metrics = step(state, jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch))
    chex.assert_trees_all_close(
        jax.device_get(unreplicate((state, metrics))), (by_device[0], by_device[1][-1]), **CLOSE
    )


def test_parts_equal_devices(by_device):
    """Statistics of BatchNorm by part, as on so many devices."""
    state, rows = trained(make_trainer(prepare=noisy, average=0.9, accumulate=4), ONE)
    chex.assert_trees_all_close((state, rows), by_device, **CLOSE)


@needs_four
def test_statistics_by_device_are_others(alone, by_device):
    mean, of_devices = (state.batch_stats["norm"]["var"] for state in (alone[0], by_device[0]))
    assert np.abs(mean - of_devices).max() > 1e-4


@needs_four
@pytest.mark.parametrize(
    ("options", "devices"),
    [
        ({"accumulate": 2}, 4),
        ({"batch_norm": "device", "accumulate": 2}, 4),
    ],
    ids=str,
)
def test_without_norms_all_are_equal(options, devices):
    model = Small(norm=False)
    whole = trained(make_trainer(model=model, prepare=noisy), ONE)
    parts = trained(make_trainer(model=model, prepare=noisy, **options), {1: ONE, 4: FOUR}[devices])
    for row in (*whole[1], *parts[1]):
        row.pop(
            "residual_ratio/nonlocal"
        )  # the mean of ratios of parts is not the ratio of the whole
    chex.assert_trees_all_close(parts, whole, **CLOSE)


@needs_four
def test_parts_take_rows_of_every_device():
    """So nothing moves between devices; the last example changes a part's statistics, and only that part's."""
    x = jnp.arange(16)
    parts = training.step._split(x, parts=2, shards=4)
    np.testing.assert_array_equal(parts, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])


def dimmed(batch, key):
    """An augmentation with a random number of each example, the same for all its positions."""
    if key is None:
        return batch
    share = jax.vmap(jax.random.uniform)(augment.example_keys(key, batch["position"]))
    return {**batch, "inputs": batch["inputs"] * (0.5 + 0.5 * share[:, None, None, None])}


@needs_four
@pytest.mark.parametrize(
    ("options", "positions"),
    [({}, 2), ({"batch_norm": "device", "accumulate": 2}, 2), ({"batch_norm": "device"}, 1)],
    ids=str,
)
def test_split_positions_equal_whole_ones(options, positions, monkeypatch):
    """Training, precise BN and evaluation; two devices of `data` in both."""
    monkeypatch.setattr(training.mesh, "SMALLEST_SHARDED", 16)

    def run(model, positions, **placement):
        mesh = training.make_mesh(positions, jax.devices()[: 2 * positions])
        trainer = make_trainer(model=model, prepare=dimmed, **options)
        state, rows = run_steps(trainer, mesh, make_batches(STEPS), **placement)
        batch = next(make_batches(1, seed=1))
        moments = training.mesh.sum_of_moments(trainer, mesh)(state, [(batch, 3)])
        masked = {**batch, "mask": np.arange(16) < 11}
        return jax.device_get(
            (
                state,
                rows,
                moments,
                training.sum_of_evaluations(trainer, mesh)(state.variables, [(masked,)]),
            )
        )

    split = run(SmallVideo(dropout=0.2, axis_name="positions"), positions, placement="sharded")
    whole = run(SmallVideo(dropout=0.2), 1)
    chex.assert_trees_all_close(split, whole, **CLOSE)
    assert int(whole[3]["count"]) == 11


@needs_four
@pytest.mark.usefixtures("as_users_see_it")
def test_positions_that_cannot_be_split():
    mesh = training.make_mesh(2, jax.devices()[:4])
    for model in (Small(), SmallVideo(axis_name="frames")):
        with pytest.raises(
            ValueError,
            match=r"must split positions .* 'positions', of 2 device.*; got (None|'frames')",
        ):
            training.sharded_step(make_trainer(model=model), mesh, None)
    with pytest.raises(
        ValueError, match="the positions of an example must split over 4 devices; got 6 of them"
    ):
        training.put(next(make_batches(1)), training.make_mesh(4, jax.devices()[:4]))


def test_dropout_of_a_step_is_always_the_same():
    model = Small(dropout=0.5)
    first, again = (trained(make_trainer(model=model), ONE)[0] for _ in range(2))
    chex.assert_trees_all_equal(first, again)
    other = trained(make_trainer(model=model), ONE, key=1)[0]
    assert not np.array_equal(first.params["head"]["kernel"], other.params["head"]["kernel"])


def test_the_average_lags_behind(alone):
    kernels = []

    def look(state):
        kernels.append(
            [
                np.asarray(tree["conv"]["kernel"], np.float64)
                for tree in (state.params, state.average)
            ]
        )

    trainer = make_trainer(prepare=noisy, average=0.9)
    state, _ = run_steps(trainer, ONE, make_batches(4), look=look)
    for (_, average), (kernel, next_average) in itertools.pairwise(kernels):
        np.testing.assert_allclose(next_average, 0.9 * average + 0.1 * kernel, rtol=1e-5, atol=1e-7)
    assert state.variables["params"] is state.average


def test_bfloat16_computes_and_float32_keeps():
    class Half(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            y = nn.Conv(4, (3, 3), dtype=jnp.bfloat16)(x)
            self.sow("intermediates", "dtype", y)
            return nn.Dense(CLASSES, dtype=jnp.float32)(y.mean((1, 2)))

    state, rows = run_steps(make_trainer(model=Half()), ONE, make_batches(2))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((state.params, state.opt_state))} <= {
        "float32",
        "int32",
    }
    assert np.isfinite(rows[-1]["loss"])


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
    shares = []
    for seed in range(50):
        mixed = training.mixup(batch, jax.random.key(seed), 0.4, 3)
        share = float(mixed["labels"][0, 0])
        shares.append(share)
        np.testing.assert_allclose(
            mixed["inputs"][0],
            share * batch["inputs"][0] + (1 - share) * batch["inputs"][2],
            rtol=1e-6,
        )
        np.testing.assert_allclose(mixed["labels"][1], [0, 1, 0], atol=1e-6)
    assert min(shares) < 0.1
    assert max(shares) > 0.9


def test_one_step_by_hand():
    """Decay, clipping and Nesterov's momentum with the gradient of the loss, in NumPy."""
    model = Small(norm=False, block=False)
    schedule = optax.constant_schedule(0.3)
    optimiser = training.sgd(schedule, momentum=0.5, weight_decay=0.1, clip_norm=0.2)
    trainer = training.Trainer(model, optimiser, loss=training.cross_entropy)
    batches = list(make_batches(3))
    state, _ = run_steps(trainer, ONE, batches)
    params = trainer.init(jax.random.key(0), jax.tree.map(lambda x: x[:1], batches[0])).params
    velocity = jax.tree.map(np.zeros_like, params)
    for batch in batches:

        def loss(p, batch=batch):
            logits = model.apply({"params": p}, batch["inputs"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        gradient = jax.tree.map(np.asarray, jax.grad(loss)(params))
        shrink = min(1, 0.2 / np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient))))
        gradient = jax.tree.map(
            lambda d, w, s=shrink: s * d + 0.1 * np.asarray(w), gradient, params
        )
        velocity = jax.tree.map(lambda v, d: 0.5 * v + d, velocity, gradient)
        params = jax.tree.map(
            lambda w, v, d: np.asarray(w) - 0.3 * (d + 0.5 * v), params, velocity, gradient
        )
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"batch_norm": "both"}, "batch_norm must be 'global' or 'device'; got 'both'"),
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
    with pytest.raises(ValueError, match="smoothing must be at least 0 and below 1; got 1"):
        training.smoothed_cross_entropy(1.0)


def test_evaluation_ignores_what_is_masked():
    trainer = make_trainer()
    state, _ = run_steps(trainer, ONE, make_batches(1))
    batch = next(make_batches(1, size=8, seed=1))
    full = training.sum_of_evaluations(trainer, ONE)(
        state.variables, [({**batch, "mask": np.ones(8, bool)},)]
    )
    padded = {name: np.concatenate([x[:5], np.full_like(x[:3], 2)]) for name, x in batch.items()}
    mask = np.arange(8) < 5
    parts = [
        ({**padded, "mask": mask},),
        ({name: np.roll(x, -5, 0) for name, x in batch.items()} | {"mask": np.arange(8) < 3},),
    ]
    split = training.sum_of_evaluations(trainer, ONE)(state.variables, parts)
    assert int(full["count"]) == int(split["count"]) == 8
    chex.assert_trees_all_close(full, split, rtol=1e-5)
