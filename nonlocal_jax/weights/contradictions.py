"""Where a network is another than its file of weights shows."""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from nonlocal_jax.layers.block import OPERATIONS, NonLocalBlock
from nonlocal_jax.models import VideoResNet
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.build import USUAL_KEY_POOL, group_sizes
from nonlocal_jax.weights.infer import Architecture, architecture
from nonlocal_jax.weights.published import PublishedFile, published_file
from nonlocal_jax.weights.readers import Checkpoint

STACK_LEVEL = 5  # of the call of `load`
Facts = Mapping[str, Any]  # by name; None is not stated


def warn_of_contradictions(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Warns if a network computes something else than its file shows.

    The names of the arrays show it, the configuration in the file, or, least reliably, the name of
    a published file.

    The network is what a user asked for, and fine-tuning can change it on purpose. Clips and their
    strides are not compared, since they often change.

    Args:
        checkpoint: The contents of the file.
        model: The network that its weights are loaded into.
    """
    if not isinstance(model, VideoResNet):
        return
    try:
        named = architecture(dataclasses.replace(checkpoint, configuration=""))
    except ValueError:
        return  # whether the arrays fit is checked by `load`, and that is enough to load them
    path = printable(checkpoint.path)
    origins = {f"the names in {path} show": _named_facts(named)}
    if checkpoint.configuration:
        try:
            stated_facts = _stated_facts(architecture(checkpoint), model)
            origins[f"the configuration in {path} states"] = stated_facts
        except ValueError as error:
            message = f"{error} The network that was loaded computes something else."
            warnings.warn(message, stacklevel=STACK_LEVEL)
    if published := published_file(checkpoint.path.name):
        origin = f"{published.family}'s published file has, by whose name {path} is called"
        origins[origin] = _published_facts(published)
    actual = _facts(model)
    compared: set[str] = set()
    for origin, expected in origins.items():
        stated = {name: value for name, value in expected.items() if value is not None}
        differences = [
            f"{name}={actual[name]!r} instead of {value!r}"
            for name, value in stated.items()
            if name not in compared and actual.get(name, value) != value
        ]
        compared |= stated.keys()
        if differences:
            warnings.warn(
                f"the network has {', '.join(differences)}, which {origin}. Without a reason for "
                "this, build it as `python -m nonlocal_jax.weights inspect` shows.",
                stacklevel=STACK_LEVEL,
            )


def _named_facts(found: Architecture) -> Facts:
    return {"pool2": found.pool2, "subsample": found.subsample}


def _stated_facts(found: Architecture, model: VideoResNet) -> Facts:
    stated = found.configuration
    facts: dict[str, Any] = {"pool2": stated.pool2, "stride_at": stated.stride_at}
    if not found.nonlocal_blocks:
        return facts
    if stated.groups and stated.clip is not None:
        sizes = group_sizes(found, stated.clip, model.layout.pool2 is not None)
        facts["group_size"] = {stage: sizes.get(stage) for stage in model.nonlocal_blocks}
    return facts | {
        "instantiation": stated.instantiation,
        "key_pool": stated.key_pool,
        "use_scale": stated.use_scale,
    }


def _published_facts(file: PublishedFile) -> Facts:
    choices = file.choices
    return {
        "pool2": choices.pool2 is not False,
        "instantiation": choices.instantiation,
        "key_pool": choices.key_pool,
        "use_scale": choices.use_scale,
    }


def _facts(model: VideoResNet) -> Facts:
    """Returns what a file can show about networks, for this one."""
    facts: dict[str, Any] = {
        "pool2": model.layout.pool2 is not None,
        "stride_at": model.stride_at,
    }
    group_size: dict[str, int | None] = {}
    for stage in model.nonlocal_blocks:
        block = model.make_block(stage)
        if not isinstance(block, NonLocalBlock):
            continue
        operation = block.operation
        names = {operation_class: name for name, operation_class in OPERATIONS.items()}
        usual = USUAL_KEY_POOL if operation.subsample is True else (1, 1, 1)
        is_window = isinstance(operation.subsample, tuple)
        facts["instantiation"] = names.get(type(operation))
        facts["key_pool"] = operation.subsample if is_window else usual
        facts["subsample"] = facts["key_pool"] != (1, 1, 1)
        if facts["instantiation"] == "embedded_gaussian":
            facts["use_scale"] = operation.use_scale
        group_size[stage] = operation.group_size
    return facts | {"group_size": group_size}
