"""A checkpoint is restored bit for bit, or found to be damaged and the previous one is used."""

import gc
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training.networks import MIN_SHARDED_SIZE, initial_state, make_trainer

from nonlocal_jax import training
from nonlocal_jax.training import checkpoints as checkpoints_module
from nonlocal_jax.training import digests as digests_module
from nonlocal_jax.training.checkpoints import CheckpointError, Checkpoints, MismatchError
from nonlocal_jax.training.digests import digests

DEVICES = jax.devices()
# What Orbax leaves behind when it finds a damaged file itself.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(scale=1.0):
    rng = np.random.default_rng(7)
    return {
        "kernel": np.asarray(scale * rng.normal(size=(30, 50, 7)), np.float32),
        "half": np.asarray(rng.normal(size=11), jnp.bfloat16),
        "mask": np.asarray(rng.integers(0, 2, 13), bool),
        "step": np.asarray(4, np.int32),
        "nested": {"key": np.asarray(rng.integers(0, 2**32, 2), np.uint32)},
    }


@pytest.fixture
def opened(tmp_path):
    """Returns a function that opens the directory of this test; all are closed at the end."""
    managers = []

    def open_checkpoints(**options):
        managers.append(Checkpoints(tmp_path / "checkpoints", **options))
        return managers[-1]

    yield open_checkpoints
    for checkpoints in managers:
        checkpoints.close()
    gc.collect()  # so that what Orbax leaves behind is reported while this test ignores it


def save(checkpoints, *steps, state=None, metrics=None):
    for step in steps:
        values = jax.device_put(tree(step)) if state is None else state
        checkpoints.save(step, values, {"seconds": step / 2}, metrics and metrics(step))
    checkpoints.wait()


def test_a_saved_state_is_restored(opened):
    checkpoints = opened()
    assert checkpoints.restore(tree()) is None
    save(checkpoints, 5)
    step, state, record = opened().restore(tree())
    assert (step, record) == (5, {"seconds": 2.5})
    chex.assert_trees_all_equal(state, tree(5))
    chex.assert_trees_all_equal_dtypes(state, tree(5))


def test_arrays_donated_after_the_save(opened):
    """The step that follows donates its state, and the save goes on in the background."""
    checkpoints = opened()
    state = {"kernel": jnp.arange(1 << 20, dtype=jnp.float32)}
    consume = jax.jit(lambda t: jax.tree.map(lambda x: -x, t), donate_argnums=0)
    for step in range(1, 4):
        expected = np.asarray(state["kernel"]).copy()
        checkpoints.save(step, state, {})
        state = consume(consume(state))
        state = jax.tree.map(lambda x: x + 1, state)
        checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore(state).state["kernel"], expected)


def test_the_last_and_the_best_are_kept(opened):
    checkpoints = opened(keep=2, best="accuracy")
    scores = {1: 0.1, 2: 0.9, 3: 0.3, 4: 0.2, 5: 0.4}
    save(checkpoints, *scores, metrics=lambda step: {"accuracy": scores[step]})
    assert checkpoints.steps == [2, 4, 5]
    save(opened(keep=2, best="accuracy"), 6, 7)  # without an evaluation
    assert opened().steps == [2, 6, 7]


def test_the_smallest_value_may_be_the_best(opened):
    checkpoints = opened(keep=1, best="loss", mode="min")
    save(checkpoints, 1, 2, 3, metrics=lambda step: {"loss": [0.0, 3.0, 1.0, 2.0][step]})
    assert checkpoints.steps == [2, 3]


@pytest.mark.skipif(len(DEVICES) < 4, reason="four devices are absent")
def test_another_number_of_devices(opened):
    """Saved from one, split over four, saved again, split over two: equal numbers and digests."""
    original = initial_state(make_trainer(average=0.9))
    state = jax.device_put(original, DEVICES[0])
    checkpoints = opened()
    for step, devices in ((1, 4), (2, 2)):
        save(checkpoints, step, state=state)
        mesh = training.make_mesh(devices=DEVICES[:devices])
        shardings = training.state_sharding(mesh, state, "sharded", min_size=MIN_SHARDED_SIZE)
        state = checkpoints.restore(state, shardings).state
        kernel = state.params["hidden"]["kernel"]
        assert kernel.sharding.mesh.size == devices
        assert kernel.addressable_shards[0].data.size == kernel.size // devices
        chex.assert_trees_all_equal(jax.device_get(state), original)


def flip_bit(leaf, bit):
    raw = bytearray(leaf.tobytes())
    raw[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), leaf.dtype).reshape(leaf.shape)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float16, np.int32, np.float32])
@pytest.mark.parametrize("shape", [(), (3, 5), (70_001,), (0, 2)])
def test_digests_on_the_host_are_those_on_devices(shape, dtype):
    array = (100 * np.random.default_rng(0).normal(size=shape)).astype(dtype)
    on_devices = digests_module._digest_on_devices(jnp.asarray(array))
    assert digests([array]) == [digests_module._as_text(on_devices)]


def test_the_digest_changes_with_every_bit():
    """Bits all over each leaf, two words that change places, and a transposed leaf."""
    for leaf in jax.tree.leaves(tree()):
        if leaf.dtype == bool:
            continue
        bits = range(0, 8 * leaf.nbytes, 41 if leaf.nbytes < 1000 else 4001)
        changed = [flip_bit(leaf, bit) for bit in bits]
        original, *found = digests([leaf, *changed])
        assert original not in found
    kernel = tree()["kernel"]
    swapped = kernel.copy()
    swapped.flat[[0, 1]] = swapped.flat[[1, 0]]
    assert len(set(digests([kernel, swapped, kernel.T]))) == 3


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(file, seed=0):
    content = bytearray(file.read_bytes())
    content[np.random.default_rng(seed).integers(len(content))] ^= 0x40
    file.write_bytes(bytes(content))


def test_a_flipped_byte_anywhere_is_found_or_does_no_harm(opened, tmp_path):
    """Orbax restores an array with a flipped byte without an error."""
    save(opened(), 1, 2)
    intact = tmp_path / "intact"
    shutil.copytree(tmp_path / "checkpoints", intact)
    found = 0
    for number in range(len(files(intact / "2"))):
        for seed in range(2):
            shutil.rmtree(tmp_path / "checkpoints")
            shutil.copytree(intact, tmp_path / "checkpoints")
            flip(files(tmp_path / "checkpoints" / "2")[number], seed)
            step, state, record = opened().restore(tree())
            assert step in (1, 2)
            chex.assert_trees_all_equal(state, tree(step))
            assert record == {"seconds": step / 2}
            found += step == 1
    assert found >= 3


def test_orbax_alone_does_not_notice_it(opened, tmp_path, monkeypatch):
    """If this fails, the digests are no longer needed."""
    rng = np.random.default_rng(0)
    big = {"kernel": jax.device_put(rng.integers(0, 2**31, (64, 1024)).astype(np.int32))}
    save(opened(), 1, state=big)
    largest = max(files(tmp_path / "checkpoints"), key=lambda file: file.stat().st_size)
    saved_digests = digests(big)
    flip(largest)
    message = "1 of its arrays changed on the disk, the first kernel"
    with pytest.raises(CheckpointError, match=message):
        opened().restore(big)
    monkeypatch.setattr(checkpoints_module, "digests", lambda tree: saved_digests)
    assert not np.array_equal(opened().restore(big).state["kernel"], big["kernel"])


@pytest.mark.parametrize("damage", ["truncated", "deleted", "emptied"])
def test_a_damaged_file(damage, opened, tmp_path, caplog):
    save(opened(), 1, 2)
    largest = max(files(tmp_path / "checkpoints" / "2"), key=lambda file: file.stat().st_size)
    match damage:
        case "truncated":
            os.truncate(largest, largest.stat().st_size // 2)
        case "deleted":
            largest.unlink()
        case "emptied":
            os.truncate(largest, 0)
    checkpoints = opened()
    assert checkpoints.restore(tree()).step == 1
    assert "the checkpoint of step 2 is damaged" in caplog.text
    assert (tmp_path / "checkpoints" / "corrupt-2").is_dir()
    save(checkpoints, 2)  # its place is free again
    assert opened().restore(tree()).step == 2


def test_all_damaged_is_an_error_and_nothing_is_moved(opened, tmp_path):
    save(opened(), 1, 2)
    for step in (1, 2):
        for file in files(tmp_path / "checkpoints" / str(step) / "state"):
            os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint in .* can be trusted \(step 2: .*; step 1: "
    ):
        opened().restore(tree())
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_left_over_temporary_folders_are_removed(opened, tmp_path):
    save(opened(), 1)
    left = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", left)
    (left / "commit_success.txt").unlink(missing_ok=True)
    checkpoints = opened()
    assert checkpoints.steps == [1]
    save(checkpoints, 3)  # Orbax cleans up in the background, and waits for that before it saves
    assert not left.exists()
    assert checkpoints.restore(tree()).step == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"kernel": np.zeros((30, 50, 8), np.float32)},
            r"kernel is float32 \(30, 50, 7\) in it, and float32 \(30, 50, 8\) here",
        ),
        (
            lambda t: t | {"half": np.zeros(11, np.float32)},
            r"half is bfloat16 \(11,\) in it, and float32 \(11,\) here",
        ),
        (
            lambda t: t | {"nested": {"other": np.zeros(2)}},
            r"it has nested/key, which this one does not have \(1 in all\)",
        ),
        (lambda t: t | {"new": np.zeros(2)}, r"it lacks new \(1 in all\)"),
    ],
)
def test_another_model_is_an_error_that_names_the_leaf(change, message, opened):
    save(opened(), 3)
    start = "the checkpoint of step 3 belongs to another model or optimiser: "
    with pytest.raises(MismatchError, match=start + message):
        opened().restore(change(tree()))
    assert opened().steps == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "keep must be at least 1; got 0"), ({"mode": "avg"}, "mode must be")],
)
def test_bad_options(options, message, opened):
    with pytest.raises(ValueError, match=message):
        opened(**options)
