"""Precise BN: the statistics of BatchNorm, computed over many batches with the current parameters.

Running averages mix the statistics of parameters that are many steps old. Here E[x] and E[x²] are
averaged over k batches, each normalised by its own statistics as in training, and
Var = E[x²] − E[x]².

Source: section 4.1 of the paper asks for it; Wu and Johnson, Rethinking "Batch" in BatchNorm
(2021), section 3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.training.losses import Batch
from nonlocal_jax.training.step import Trainer, TrainState
from nonlocal_jax.types import Array

Tree = Any


def moments(
    trainer: Trainer,
    state: TrainState,
    batch: Batch,
    step: int | Array,
    *,
    axis_name: str | None = None,
) -> Tree:
    """Computes the moments of every norm's input over one batch.

    Args:
        trainer: The trainer, whose loss is run in training mode.
        state: State whose parameters and key are used.
        batch: Batch, which is prepared as that of training step `step`.
        step: Step whose random numbers are used.
        axis_name: Mapped axis over which the moments are averaged.

    Returns:
        A tree like `state.batch_stats`: "mean" holds the mean, "var" the mean of squares.

    Raises:
        ValueError: If a BatchNorm has momentum 1.
    """
    key = state.key_at(step)
    batch = trainer.prepare(batch, key)
    with nn.intercept_methods(_store_batch_statistics):
        _, _, updates = trainer.loss(state.variables, batch, key, True)
    batch_moments = _map_norms(
        lambda mean, var: (mean, var + jnp.square(mean)), updates["batch_stats"]
    )
    return batch_moments if axis_name is None else jax.lax.pmean(batch_moments, axis_name)


def _store_batch_statistics(
    call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """Makes a BatchNorm that updates its statistics store those of this batch alone.

    It stores momentum · old + (1 − momentum) · new. So old is set to 0 and the result divided by
    1 − momentum. A norm that uses its running statistics keeps them.
    """
    norm = context.module
    if not isinstance(norm, nn.BatchNorm) or context.method_name != "__call__":
        return call(*args, **kwargs)
    argument = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    if nn.merge_param("use_running_average", norm.use_running_average, argument):
        return call(*args, **kwargs)
    if norm.momentum == 1:
        raise ValueError(
            f"momentum of BatchNorm {'/'.join(norm.path)} must be below 1 for precise statistics; "
            "got 1, with which no statistics are stored. Lower it, or set precise_bn to 0."
        )
    for name in ("mean", "var"):
        norm.put_variable("batch_stats", name, jnp.zeros_like(_statistic(norm, name)))
    result = call(*args, **kwargs)
    for name in ("mean", "var"):
        stored = _statistic(norm, name) / (1 - norm.momentum)
        norm.put_variable("batch_stats", name, stored)
    return result


def _statistic(norm: nn.BatchNorm, name: str) -> Array:
    return norm.get_variable("batch_stats", name)


def statistics(total: Tree, batches: int) -> Tree:
    """Computes the statistics of BatchNorm from summed moments.

    Args:
        total: Sum of the `moments` of some batches.
        batches: Number of those batches.

    >>> total = {"norm": {"mean": jnp.array(1.0 + 3.0), "var": jnp.array((1.0 + 1) + (9.0 + 1))}}
    >>> norm = statistics(total, 2)["norm"]
    >>> norm["mean"].item(), norm["var"].item()  # 1 within the batches and 1 between them
    (2.0, 2.0)
    """
    average = jax.tree.map(lambda x: x / batches, total)
    return _map_norms(
        lambda mean, second: (mean, jnp.maximum(second - jnp.square(mean), 0)), average
    )


def _map_norms(function: Callable[[Array, Array], tuple[Array, Array]], tree: Tree) -> Tree:
    """Applies `function` to the pair (mean, var) of every norm."""
    if "mean" in tree and not isinstance(tree["mean"], Mapping):
        mean, var = function(tree["mean"], tree["var"])
        return {**tree, "mean": mean, "var": var}
    return {name: _map_norms(function, inner) for name, inner in tree.items()}
