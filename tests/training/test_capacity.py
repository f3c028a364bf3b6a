"""The search for the largest batch that fits; tests/tpu compiles the steps."""

import jax
import jax.numpy as jnp
import optax
import pytest

from nonlocal_jax.training import Trainer, capacity, make_mesh

pytestmark = pytest.mark.skipif(len(jax.devices()) < 4, reason="needs four devices")


@pytest.fixture
def compile_for(monkeypatch):
    """Returns a function that sets the largest batch that compiles, and lists what is tried."""

    def set_limit(limit):
        tried = []

        def compile_step(trainer, mesh, placement, batch):
            tried.append(capacity.batch_size(batch))
            if tried[-1] > limit:
                raise capacity.TooLargeError(None)

        monkeypatch.setattr(capacity, "compile_step", compile_step)
        return tried

    return set_limit


@pytest.mark.parametrize(
    ("limit", "accumulate", "found", "tried"),
    [
        (1000, 1, 28 * 4, [28 * 4]),  # (300 − 20) / 10 bytes for each example of a device
        (100, 1, 24 * 4, [28 * 4, 24 * 4]),
        (5, 1, 4, [4 * n for n in (28, 24, 20, 16, 14, 12, 10, 8, 7, 6, 5, 4, 3, 2)]),
        (1000, 3, 8 * 12, [8 * 12]),
    ],
)
def test_largest_batch(compile_for, limit, accumulate, found, tried):
    calls = compile_for(limit)
    trainer = Trainer(lambda *arguments: None, optax.sgd(0.1), accumulate=accumulate)
    mesh = make_mesh(devices=jax.devices()[:4])
    batch = {"inputs": jnp.zeros((4, 3))}
    sizes = {"fixed": 20, "used": 30, "memory": 300.0}
    assert capacity.largest_batch(trainer, mesh, "replicated", batch, **sizes) == found
    assert calls == tried
