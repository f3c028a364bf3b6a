"""Checks files, weights, a run and checkpoints at gs://, on an emulator in this process.

pytest does not run this, because gcsfs and the emulator are 29 packages with all that they require.

    pip install gcsfs gcp-storage-emulator
    PYTHONPATH=.:tests python -m training.object_store
"""

import os
import socket

with socket.socket() as unused:
    unused.bind(("127.0.0.1", 0))
    PORT = unused.getsockname()[1]
ENDPOINT = f"http://127.0.0.1:{PORT}"
os.environ |= {
    "STORAGE_EMULATOR_HOST": ENDPOINT,  # for gcsfs
    "TENSORSTORE_GCS_HTTP_URL": ENDPOINT,  # for TensorStore, which writes Orbax's arrays
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the type of the bucket
    "GCE_METADATA_ROOT": "127.0.0.1:1",  # no credentials
    "NO_GCE_CHECK": "true",
    "EPATH_USE_TF": "false",
}

import fsspec  # noqa: E402 - these read the environment
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from gcp_storage_emulator.server import create_server  # noqa: E402
from training import networks  # noqa: E402

import nonlocal_jax as nl  # noqa: E402
from nonlocal_jax import training  # noqa: E402
from nonlocal_jax.files import as_path  # noqa: E402
from nonlocal_jax.training.checkpoints import Checkpoints  # noqa: E402

for protocol in ("gs", "gcs"):
    fsspec.config.conf[protocol] = {"token": "anon", "endpoint_url": ENDPOINT}


def check_files(folder):
    file = folder / "a/b.txt"
    assert not file.exists()
    file.write_text("text")
    assert (file.read_text(), file.stat().st_size, file.read_bytes(2)) == ("text", 4, b"te")
    assert list(folder.iterdir()) == [folder / "a"]
    assert (folder / "a").is_dir()
    with pytest.raises(FileNotFoundError, match=str(folder / "missing")):
        (folder / "missing").read_bytes()


def check_weights(folder):
    variables = {"params": {"conv": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}}
    nl.weights.save(str(folder / "weights.safetensors"), variables)
    arrays = nl.weights.read(str(folder / "weights.safetensors")).arrays
    np.testing.assert_array_equal(
        arrays["params/conv/kernel"], variables["params"]["conv"]["kernel"]
    )


def check_run(folder):
    """Trains, is started again for more steps, and finds the checkpoint and the log."""
    batches = list(networks.make_batches(8))
    for steps in (4, 8):
        options = training.Options(steps, save_every=2, evaluate_every=steps, best=None)
        with training.Run(str(folder), {"seed": 1}) as run:
            training.fit(
                networks.make_trainer(),
                options,
                run,
                training.make_mesh(),
                lambda step: iter(batches[step:] or batches),
                key=jax.random.key(0),
            )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8, lines


def check_damage(folder):
    state = {"w": np.arange(24.0, dtype=np.float32), "n": np.ones(5, np.int32)}
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, jax.tree.map(lambda x, step=step: step * x, state), {})
        checkpoints.wait()
    checkpoints.close()
    arrays = nl.weights.read(folder / "2/state").arrays
    np.testing.assert_array_equal(arrays["w"], 2 * state["w"])
    (folder / "2/record/metadata").write_text("{}")
    checkpoints = Checkpoints(folder)
    restored = checkpoints.restore(state)
    checkpoints.close()
    assert restored.step == 1
    np.testing.assert_array_equal(restored.state["w"], state["w"])
    assert sorted(path.name for path in folder.iterdir()) == ["1", "corrupt-2"]


def main():
    server = create_server("127.0.0.1", PORT, in_memory=True, default_bucket="bucket")
    server.start()
    check_files(as_path("gs://bucket/files"))
    check_weights(as_path("gs://bucket/weights"))
    check_run(as_path("gs://bucket/run"))
    check_damage(as_path("gs://bucket/checkpoints"))
    print("all checks passed", flush=True)
    os._exit(0)  # the threads of the emulator do not end


if __name__ == "__main__":
    main()
