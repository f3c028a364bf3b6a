"""The paper's optimiser: stochastic gradient descent with Nesterov's momentum, and its schedules."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optax


def sgd(
    schedule: optax.ScalarOrSchedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = True,
    weight_decay: float = 1e-4,
    decay_norms: bool = False,
    decay_biases: bool = True,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """SGD as the paper trains with.

    With the gradient d and the decay λ, d ← d + λ w, v ← μ v + d, and w ← w − η (d + μ v), or w ← w − η v without Nesterov.
    The decay is part of the gradient, as in Caffe2 and PyTorch.

    Args:
        schedule: η, or from the step to η.
        momentum: μ.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: λ.
        decay_norms: whether scale and bias of norms decay; the paper's do not.
        decay_biases: whether the other biases decay.
        clip_norm: the largest norm of the gradient, before the decay is added; None is any.

    Returns:
        An optax optimiser.

    Raises:
        ValueError: a number out of its range.

    Source: section 4.1; video-nonlocal-net has λ = 0 for norms alone.

    >>> import jax.numpy as jnp
    >>> params = {"conv": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "norm": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    >>> decays(params, norms=False, biases=True)
    {'conv': {'kernel': True, 'bias': True}, 'norm': {'scale': False, 'bias': False}}
    >>> optimiser = sgd(0.1, momentum=0.0, nesterov=False, weight_decay=0.5)
    >>> updates, _ = optimiser.update(params, optimiser.init(params), params)
    >>> float(updates["conv"]["kernel"][0]), float(updates["norm"]["scale"][0])  # 0.1 · (1 + 0.5), 0.1 · 1
    (-0.15000000596046448, -0.10000000149011612)
    """
    _in_range("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
    _in_range("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0 and finite")
    if clip_norm is not None:
        _in_range("clip_norm", clip_norm, 0 < clip_norm < math.inf, "positive and finite, or None")
    if not callable(schedule):
        _in_range(
            "the learning rate", float(schedule), 0 <= schedule < math.inf, "at least 0 and finite"
        )

    def mask(params: Any) -> Any:
        return decays(params, norms=decay_norms, biases=decay_biases)

    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, momentum or None, nesterov),
    )


def decays(params: Mapping[str, Any], *, norms: bool, biases: bool) -> dict[str, Any]:
    """Which leaves decay: True or False for each. A norm is what has a `scale`."""
    is_norm = "scale" in params
    return {
        name: decays(leaf, norms=norms, biases=biases)
        if isinstance(leaf, Mapping)
        else (norms if is_norm else biases or name != "bias")
        for name, leaf in params.items()
    }


def step_schedule(
    peak: float,
    boundaries: Sequence[int],
    *,
    factor: float = 0.1,
    warmup: int = 0,
    warmup_from: float = 0.0,
) -> optax.Schedule:
    """The peak, times `factor` from each boundary on; a linear warm-up before.

    Args:
        peak: the learning rate after the warm-up.
        boundaries: ascending steps.
        factor: what each boundary multiplies with.
        warmup: steps of the warm-up.
        warmup_from: the learning rate of the first step, as a share of the peak.

    Returns:
        From the step to the learning rate.

    Raises:
        ValueError: boundaries that do not ascend or lie in the warm-up, or a number out of its range.

    Source: section 4.1, where 0.01 is divided by 10 at 150,000 and 300,000 of 400,000 steps.

    >>> schedule = step_schedule(0.01, (150_000, 300_000))
    >>> [round(float(schedule(step)), 6) for step in (0, 149_999, 150_000, 399_999)]
    [0.01, 0.01, 0.001, 0.0001]
    """
    _check_peak(peak, warmup, warmup_from)
    ascending = [warmup, *boundaries]
    if any(later <= earlier for earlier, later in itertools.pairwise(ascending)):
        raise ValueError(
            f"boundaries must ascend and lie after the {warmup} steps of warm-up; got {tuple(boundaries)}."
        )
    pieces = [optax.constant_schedule(peak * factor**i) for i in range(len(boundaries) + 1)]
    if not warmup:
        return optax.join_schedules(pieces, list(boundaries))
    return optax.join_schedules(
        [optax.linear_schedule(warmup_from * peak, peak, warmup), *pieces], ascending
    )


def cosine_schedule(
    peak: float, steps: int, *, warmup: int = 0, warmup_from: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Half a period of a cosine from the peak to `end`, a share of the peak, at step `steps`; a linear warm-up before.

    Raises:
        ValueError: a warm-up as long as the whole, or a number out of its range.

    >>> schedule = cosine_schedule(0.1, 30, warmup=10)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 20, 30)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    _check_peak(peak, warmup, warmup_from)
    _in_range("warmup", warmup, warmup < steps, f"below steps, {steps}")
    _in_range("end", end, 0 <= end <= 1, "a share from 0 to 1")
    return optax.warmup_cosine_decay_schedule(
        warmup_from * peak if warmup else peak, peak, warmup, steps, end * peak
    )


def _check_peak(peak: float, warmup: int, warmup_from: float) -> None:
    _in_range("peak", peak, 0 < peak < math.inf, "positive and finite")
    _in_range("warmup", warmup, warmup >= 0, "at least 0")
    _in_range("warmup_from", warmup_from, 0 <= warmup_from <= 1, "a share from 0 to 1")


def _in_range(name: str, value: float | int, holds: bool, range_: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {range_}; got {value}.")
