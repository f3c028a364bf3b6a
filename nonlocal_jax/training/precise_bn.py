"""Precise BN: the statistics of BatchNorm computed anew over many batches, with the parameters as they are now.

Running averages mix statistics of parameters of many steps ago. Here E[x] and E[x²] are averaged over k batches, each
normalised by its own statistics as in training, and Var = E[x²] − E[x]².

Source: section 4.1 of the paper asks for it; Wu and Johnson, Rethinking "Batch" in BatchNorm (2021), section 3.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax.training.step import Batch, Trainer, TrainState
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
    """Of each norm's input the mean and, in the place of the variance, the mean of squares, over one batch.

    Args:
        trainer: whose model.
        state: whose parameters.
        batch: prepared as that of training step `step`.
        step: for the random numbers.
        axis_name: the mapped axis over which the moments are averaged.
    """
    key = state.key_at(step)
    batch = trainer.prepare(batch, key)

    def at_once(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, nn.BatchNorm):
            object.__setattr__(
                context.module, "momentum", 0.0
            )  # then what it stores is of this batch alone
        return call(*args, **kwargs)

    with nn.intercept_methods(at_once):
        _, changed = trainer.model.apply(
            state.variables,
            batch["inputs"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
    of_batch = _map_norms(lambda mean, var: (mean, var + jnp.square(mean)), changed["batch_stats"])
    return of_batch if axis_name is None else jax.lax.pmean(of_batch, axis_name)


def statistics(total: Tree, batches: int) -> Tree:
    """Batch statistics from the sum of the `moments` of some batches.

    >>> total = {"norm": {"mean": jnp.array(1.0 + 3.0), "var": jnp.array((1.0 + 1) + (9.0 + 1))}}
    >>> of_two = statistics(total, 2)["norm"]
    >>> of_two["mean"].item(), of_two["var"].item()  # 1 within the batches and 1 between them
    (2.0, 2.0)
    """
    average = jax.tree.map(lambda x: x / batches, total)
    return _map_norms(
        lambda mean, second: (mean, jnp.maximum(second - jnp.square(mean), 0)), average
    )


def _map_norms(function: Callable[[Array, Array], tuple[Array, Array]], tree: Tree) -> Tree:
    """`function` of the pair (mean, var) of every norm."""
    if "mean" in tree and not isinstance(tree["mean"], Mapping):
        mean, var = function(tree["mean"], tree["var"])
        return {**tree, "mean": mean, "var": var}
    return {name: _map_norms(function, inner) for name, inner in tree.items()}
