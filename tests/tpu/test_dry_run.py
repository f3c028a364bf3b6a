"""A dry run compiles the training step for a slice of TPUs that is not at hand."""

import pytest
from tpu import thin

from experiments import cifar
from nonlocal_jax import training
from nonlocal_jax.compiler import topologies


def dry_run(examples):
    mesh = training.make_mesh(devices=topologies.devices("v5e:2x2"))
    return training.dry_run(thin.trainer(), training.Options(10), mesh, thin.batch(examples))


def test_of_an_experiment(capsys):
    config = cifar.Config(depth=8, dry_run=True, topology="v5e:2x2")
    assert cifar.main(config) is None
    printed = capsys.readouterr().out
    for words in (
        "devices: 4 (tpu, TPU v5 lite) as data 4 × positions 1",
        "of 16,911 MB",
        "all-reduce",
        "ms (",
        "of the peak of the matrix units",
        "largest batch that fits: ",
    ):
        assert words in printed
    assert "queries × " not in printed  # blocks are planned for this machine alone


def test_largest_batch_fits_and_a_larger_one_does_not():
    lines = list(dry_run(1 << 13))
    largest = int(
        lines[-1].removeprefix("largest batch that fits: ").split(", ")[0].replace(",", "")
    )
    assert largest > 1 << 13
    with pytest.raises(ValueError, match=r"into the memory of each device; got a batch of "):
        list(dry_run(4 * largest))
