"""A dry run compiles the training step for a slice of TPUs that is not at hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from experiments import cifar
from nonlocal_jax import training
from nonlocal_jax.compiler import topologies
from nonlocal_jax.training import preview


class Wide(nn.Module):
    """Its only layer has 8.6 GB of parameters."""

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(1 << 15)(x)


def test_of_an_experiment(capsys, monkeypatch):
    # The step of a much larger batch takes minutes to compile.
    monkeypatch.setattr(preview, "largest_batch", lambda *arguments, **bytes_of_step: 4096)
    config = cifar.Config(depth=8, nonlocal_blocks=("res2_0",), dry_run=True, topology="v5e:2x2")
    assert cifar.main(config) is None
    printed = capsys.readouterr().out
    for words in (
        "devices: 4 (tpu, TPU v5 lite) as data 4 × positions 1",
        "of 16,911 MB",
        "all-reduce",
        "ms (",
        "of the peak of the matrix units",
        "largest batch that fits: 4,096, 1,024 on each of 4",
    ):
        assert words in printed
    assert "queries × " not in printed  # blocks are planned for this machine alone


def test_of_a_step_that_does_not_fit():
    trainer = training.Trainer(training.classification(Wide()), optax.sgd(0.1))
    batch = {
        "inputs": jax.ShapeDtypeStruct((8, 1 << 16), jnp.float32),
        "labels": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    mesh = training.make_mesh(devices=topologies.devices("v5e:2x2"))
    lines = training.dry_run(trainer, training.Options(10), mesh, batch)
    message = (
        r"got a batch of 8, which needs \d+\.\d GB, \d+\.\d GB more than there are\. About 4 would"
    )
    with pytest.raises(ValueError, match=message):
        list(lines)


def test_of_a_batch_that_does_not_split():
    config = cifar.Config(batch_size=100, dry_run=True, topology="v5e:4x8")
    with pytest.raises(SystemExit, match="the batch must split over 32 devices; got 100 examples"):
        cifar.main(config)
