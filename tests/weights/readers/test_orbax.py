"""Folders of Orbax, read onto the host."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import samples

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read


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
    return root


@pytest.mark.parametrize("folder", ["plain", "managed/7", "managed/7/default"])
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
    with pytest.raises(FileFormatError, match="Orbax cannot read it"):
        read(tmp_path)


def test_relative_paths_and_links_to_the_folder(orbax_folders, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(orbax_folders / "plain")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("../link", tmp_path / "link", f"{tmp_path}//work/../link/."):
        assert len(read(folder).arrays) == 3
