"""Runs the whole network, I3D with five non-local blocks, in this library and in plain Flax."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nonlocal_jax as nl
from benchmarks import cases
from benchmarks.cases import Case, Job
from benchmarks.plain_flax import PlainI3D
from nonlocal_jax.weights.names import flatten, unflatten
from nonlocal_jax.weights.sources import SLOWFAST

OPTIMISER = optax.sgd(0.01, momentum=0.9, nesterov=True)


def prepare(job: Job) -> Callable[[], Sequence[Any]]:
    """Prepares a run: the logits of a batch of clips, or those of one more training step."""
    state: list[Any] = [weights()]
    if job.direction == "both":
        state.append(OPTIMISER.init(state[0]["params"]))
    clips = jnp.asarray(cases.clips(job.case))
    compiled = function(job).lower(*state, clips).compile()

    def run() -> Sequence[Any]:
        if job.direction == "forward":
            return [compiled(*state, clips)]
        *state[:], logits = compiled(*state, clips)
        return [logits]

    return run


def lowered(job: Job) -> Any:
    """Returns what `prepare` compiles, lowered."""
    state: list[Any] = [jax.eval_shape(weights)]
    if job.direction == "both":
        state.append(jax.eval_shape(OPTIMISER.init, state[0]["params"]))
    return function(job).lower(*state, jnp.asarray(cases.clips(job.case)))


def function(job: Job) -> Any:
    """Returns the jitted function of (variables, clips), or in training of (variables, state,
    clips).

    In training, the variables and the optimizer state are donated.
    """
    model = _model(job.case, job.dtype)
    if job.competitor == "plain":
        model = PlainI3D(job.case.clip, dtype=jnp.dtype(job.dtype))
    if job.direction == "forward":
        return jax.jit(model.apply)

    def step(variables: Any, state: Any, clips: jax.Array) -> Any:
        labels = jnp.arange(len(clips))

        def loss(params: Any) -> Any:
            logits, updated = model.apply(
                {**variables, "params": params}, clips, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (
                logits,
                updated,
            )

        gradients, (logits, updated) = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = OPTIMISER.update(gradients, state)
        return (
            {"params": optax.apply_updates(variables["params"], updates), **updated},
            state,
            logits,
        )

    return jax.jit(step, donate_argnums=(0, 1))


def weights() -> dict[str, Any]:
    """Returns the weights that all competitors share, under this library's names.

    They do not depend on the format of the clips.
    """
    model = _model(cases.NETWORK, "float32")
    leaves = {}
    for path, leaf in flatten(jax.eval_shape(model.init, jax.random.key(0), model.example)).items():
        found = SLOWFAST.source_name(path.split("/", 1)[1])
        assert found, path
        name, row = found
        shape = row.transform.export_array(np.broadcast_to(np.float32(0), leaf.shape)).shape
        leaves[path] = jnp.asarray(row.transform.import_array(cases.network_weight(name, shape)))
    return unflatten(leaves)


def _model(case: Case, dtype: str) -> nn.Module:
    return nl.models.video_resnet(
        50, "i3d_3x1x1", 5, case.clip, "slowfast", dropout=0.0, dtype=jnp.dtype(dtype)
    )
