"""The paper's optimiser, stochastic gradient descent with Nesterov momentum, and its schedules."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
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
    """Returns SGD as the paper trains with.

    With the gradient d and the decay λ, d ← d + λ w, v ← μ v + d, and w ← w − η (d + μ v), or
    w ← w − η v without Nesterov. The decay is part of the gradient, as in Caffe2 and PyTorch.

    Args:
        schedule: η, or a function from the step to η.
        momentum: μ.
        nesterov: Whether the momentum is Nesterov's.
        weight_decay: λ.
        decay_norms: Whether scale and bias of norms decay. The paper's do not.
        decay_biases: Whether the other biases decay.
        clip_norm: Largest norm of the gradient, before the decay is added; None does not clip.

    Returns:
        An optax optimiser.

    Raises:
        ValueError: If a number is out of range.

    Source: section 4.1; video-nonlocal-net sets λ = 0 for norms only.

    >>> import jax.numpy as jnp
    >>> one = jnp.ones(1)
    >>> params = {"conv": {"kernel": one, "bias": one}, "norm": {"scale": one, "bias": one}}
    >>> optimiser = sgd(0.1, momentum=0.0, nesterov=False, weight_decay=0.5)
    >>> updates, _ = optimiser.update(params, optimiser.init(params), params)
    >>> float(updates["conv"]["kernel"][0])  # 0.1 · (1 + 0.5)
    -0.15000000596046448
    >>> float(updates["norm"]["scale"][0])  # 0.1 · 1
    -0.10000000149011612
    """
    _check_range("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1")
    _check_range(
        "weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0 and finite"
    )
    if clip_norm is not None:
        is_valid = 0 < clip_norm < math.inf
        _check_range("clip_norm", clip_norm, is_valid, "positive and finite, or None")
    if not callable(schedule):
        is_valid = 0 <= schedule < math.inf
        _check_range("the learning rate", float(schedule), is_valid, "at least 0 and finite")

    def mask(params: Any) -> Any:
        return decays(params, norms=decay_norms, biases=decay_biases)

    return optax.chain(
        optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, momentum or None, nesterov),
    )


def is_norm_parameter(params: Mapping[str, Any]) -> dict[str, Any]:
    """Marks the parameters of norms: the scale and bias of each module that has a scale.

    Args:
        params: Nested parameters, by name.

    Returns:
        A tree of bool like `params`, which `optax.masked` accepts.

    >>> params = {"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0, "bias": 1.0}}
    >>> is_norm_parameter(params)
    {'conv': {'kernel': False, 'bias': False}, 'norm': {'scale': True, 'bias': True}}
    """
    marks: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            marks[name] = is_norm_parameter(value)
        else:
            marks[name] = "scale" in params and name in ("scale", "bias")
    return marks


def decays(params: Mapping[str, Any], *, norms: bool, biases: bool) -> dict[str, Any]:
    """Marks the parameters that decay.

    Args:
        params: Nested parameters, by name.
        norms: Whether those of norms decay.
        biases: Whether the other biases decay.

    >>> params = {"conv": {"kernel": 1.0, "bias": 1.0}, "norm": {"scale": 1.0, "bias": 1.0}}
    >>> decays(params, norms=False, biases=True)
    {'conv': {'bias': True, 'kernel': True}, 'norm': {'bias': False, 'scale': False}}
    """

    def decay(path: tuple[Any, ...], is_norm: bool) -> bool:
        return norms if is_norm else biases or path[-1].key != "bias"

    return jax.tree_util.tree_map_with_path(decay, is_norm_parameter(params))


def step_schedule(
    peak: float,
    boundaries: Sequence[int],
    *,
    factor: float = 0.1,
    warmup: int = 0,
    warmup_from: float = 0.0,
) -> optax.Schedule:
    """Returns a schedule that multiplies the peak by `factor` at each boundary.

    Args:
        peak: Learning rate after the warm-up.
        boundaries: Ascending steps.
        factor: Factor of each boundary.
        warmup: Steps of the linear warm-up.
        warmup_from: Learning rate of the first step, as a share of the peak.

    Returns:
        A function from the step to the learning rate.

    Raises:
        ValueError: If boundaries do not ascend or lie in the warm-up, or a number is out of range.

    Source: section 4.1, where 0.01 is divided by 10 at 150,000 and 300,000 of 400,000 steps.

    >>> schedule = step_schedule(0.01, (150_000, 300_000))
    >>> [round(float(schedule(step)), 6) for step in (0, 149_999, 150_000, 399_999)]
    [0.01, 0.01, 0.001, 0.0001]
    """
    _check_peak(peak, warmup, warmup_from)
    ascending = [warmup, *boundaries]
    if any(later <= earlier for earlier, later in itertools.pairwise(ascending)):
        raise ValueError(
            f"boundaries must ascend and lie after the {warmup} steps of warm-up; got "
            f"{tuple(boundaries)}."
        )
    pieces = [optax.constant_schedule(peak * factor**i) for i in range(len(boundaries) + 1)]
    if not warmup:
        return optax.join_schedules(pieces, list(boundaries))
    rise = optax.linear_schedule(warmup_from * peak, peak, warmup)
    return optax.join_schedules([rise, *pieces], ascending)


def cosine_schedule(
    peak: float, steps: int, *, warmup: int = 0, warmup_from: float = 0.0, end: float = 0.0
) -> optax.Schedule:
    """Returns a schedule that falls along half a period of a cosine.

    Args:
        peak: Learning rate after the warm-up.
        steps: Step at which `end` is reached.
        warmup: Steps of the linear warm-up.
        warmup_from: Learning rate of the first step, as a share of the peak.
        end: Learning rate of the last step, as a share of the peak.

    Returns:
        A function from the step to the learning rate.

    Raises:
        ValueError: If the warm-up is as long as the whole, or a number is out of range.

    >>> schedule = cosine_schedule(0.1, 30, warmup=10)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 20, 30)]
    [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    _check_peak(peak, warmup, warmup_from)
    _check_range("warmup", warmup, warmup < steps, f"below steps, {steps}")
    _check_range("end", end, 0 <= end <= 1, "a share from 0 to 1")
    return optax.warmup_cosine_decay_schedule(
        warmup_from * peak if warmup else peak, peak, warmup, steps, end * peak
    )


def _check_peak(peak: float, warmup: int, warmup_from: float) -> None:
    _check_range("peak", peak, 0 < peak < math.inf, "positive and finite")
    _check_range("warmup", warmup, warmup >= 0, "at least 0")
    _check_range("warmup_from", warmup_from, 0 <= warmup_from <= 1, "a share from 0 to 1")


def _check_range(name: str, value: float | int, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} must be {expected}; got {value}.")
