"""Moments of norms over one batch; test_loop.py has the statistics over several."""

import dataclasses

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from training.networks import make_batches

from nonlocal_jax import training
from nonlocal_jax.training import precise_bn

ONE = training.make_mesh(devices=jax.devices()[:1])


class Norms(nn.Module):
    """Two norms, one of which always uses its running statistics."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        x = nn.BatchNorm(momentum=self.momentum, name="trained")(x, use_running_average=not train)
        return nn.Dense(3)(x.mean(1))


def test_precise_statistics_keep_those_of_a_frozen_norm():
    trainer = training.Trainer(training.classification(Norms()), optax.sgd(0.1))
    batch = next(make_batches(1))
    state = trainer.init(jax.random.key(0), batch)
    frozen = {"mean": np.array([0.5, -1.0]), "var": np.array([4.0, 9.0])}
    statistics = {**state.batch_stats, "frozen": jax.tree.map(np.float32, frozen)}
    state = dataclasses.replace(state, batch_stats=statistics)
    total = training.sum_of_moments(trainer, ONE)(state, [(batch, 0)])
    precise = jax.device_get(precise_bn.statistics(total, 1))
    chex.assert_trees_all_close(precise["frozen"], frozen, rtol=1e-6)
    x = (batch["inputs"] - frozen["mean"]) / np.sqrt(frozen["var"] + 1e-5)
    np.testing.assert_allclose(precise["trained"]["mean"], x.mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(precise["trained"]["var"], x.var((0, 1)), rtol=1e-4)


def test_precise_statistics_need_a_norm_that_stores_some():
    trainer = training.Trainer(training.classification(Norms(momentum=1.0)), optax.sgd(0.1))
    batch = next(make_batches(1))
    state = trainer.init(jax.random.key(0), batch)
    with pytest.raises(ValueError, match="momentum of BatchNorm trained must be below 1"):
        training.sum_of_moments(trainer, ONE)(state, [(batch, 0)])
