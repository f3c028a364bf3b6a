"""Folders of Orbax, read onto the host."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import samples

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read
from nonlocal_jax.weights.entries import detect


@pytest.fixture(scope="module")
def orbax_folders(tmp_path_factory):
    """Checkpoints of arrays on four devices, written by the checkpointer and by the manager."""
    import orbax.checkpoint as ocp

    root = tmp_path_factory.mktemp("orbax")
    mesh = jax.sharding.Mesh(jax.devices()[:4], "d")
    spread = jax.device_put(
        jnp.arange(8.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    )
    tree = {
        "params": {
            "conv": {"kernel": spread, "bias": jnp.ones(3, jnp.bfloat16)},
            "list": [jnp.zeros((2, 5))],
        },
        "step": 3,
    }
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(root / "plain", tree)
    with ocp.CheckpointManager(root / "managed") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(root / "items", item_names=("state", "record")) as manager:
        record = ocp.args.JsonSave({"accuracy": 0.5})
        manager.save(9, args=ocp.args.Composite(state=ocp.args.StandardSave(tree), record=record))
    return root


@pytest.mark.parametrize(
    "folder", ["plain", "managed/7", "managed/7/default", "items/9", "items/9/state"]
)
def test_folders_are_read(folder, orbax_folders):
    checkpoint = read(orbax_folders / folder)
    assert checkpoint.format == "orbax"
    expected = {
        "params/conv/bias": np.ones(3, ml_dtypes.bfloat16),
        "params/conv/kernel": np.arange(8, dtype="f4"),
        "params/list/0": np.zeros((2, 5), "f4"),
    }
    samples.assert_arrays(checkpoint.arrays, expected)
    assert checkpoint.ignored == {"step": "not weights: int"}


def test_errors_name_the_folder(orbax_folders, tmp_path):
    with pytest.raises(
        FileFormatError, match="managed: it is a folder without the _METADATA of Orbax; it holds 7"
    ):
        read(orbax_folders / "managed")
    with pytest.raises(
        UnsafeFileError, match="plain: its arrays would take 86 bytes, over max_bytes=85"
    ):
        read(orbax_folders / "plain", max_bytes=85)
    (tmp_path / "_METADATA").write_text("{}")
    with pytest.raises(FileFormatError, match="its _METADATA must be a JSON object with tree_meta"):
        read(tmp_path)


def test_one_of_several_items_must_be_chosen(orbax_folders, tmp_path):
    for name in ("ema", "state"):
        (tmp_path / name).symlink_to(orbax_folders / "plain")
    with pytest.raises(
        FileFormatError, match="it holds several folders of arrays; pass one of ema, state"
    ):
        read(tmp_path)


VARIABLES = {
    "params": {"conv1": {"kernel": np.ones((2, 3), "f4")}},
    "batch_stats": {"conv1_norm": {"mean": np.zeros(3, "f4")}},
}
OTHERS = {
    "step": np.int32(7),
    "opt_state": [{"mu": {"params": {"conv1": {"kernel": np.zeros((2, 3), "f4")}}}}],
}
STATES = {
    "a state": {**VARIABLES, **OTHERS},
    "variables as params": {"params": VARIABLES, **OTHERS},
    "one level down": {"model": {**VARIABLES, **OTHERS}, "config": {"rate": 0.5}},
    "both": {"model": {"params": VARIABLES, **OTHERS}},
}


@pytest.mark.parametrize("name", STATES)
def test_variables_of_a_training_state(name, tmp_path):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", STATES[name])
    for folder in (tmp_path, tmp_path / "state"):
        checkpoint = read(folder)
        assert set(checkpoint.arrays) == {
            "params/conv1/kernel",
            "batch_stats/conv1_norm/mean",
        }
        reasons = {key: reason for key, reason in checkpoint.ignored.items() if "opt_state" in key}
        assert list(reasons.values()) == ["training state"]
    network = {"params": {"conv1": {"kernel": np.ones((2, 3), "f4")}}}
    assert detect(checkpoint) is None
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "two", {"model": network, "average": network})
    # Which of two networks is meant is not guessed.
    assert set(read(tmp_path / "two").arrays) == {
        "model/params/conv1/kernel",
        "average/params/conv1/kernel",
    }


def test_relative_paths_and_links_to_the_folder(orbax_folders, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(orbax_folders / "plain")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("../link", tmp_path / "link", f"{tmp_path}//work/../link/."):
        assert len(read(folder).arrays) == 3
