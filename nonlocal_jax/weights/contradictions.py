"""Where a network is another than the configuration in a file of its weights states."""

import dataclasses
import warnings
from typing import Any

import flax.linen as nn

from nonlocal_jax.layers.block import OPERATIONS, NonLocalBlock
from nonlocal_jax.models import VideoResNet
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.readers import Checkpoint

STACK_LEVEL = 5  # of the call of `load`


def warn_of_contradictions(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Warns if a network computes something else than its file's configuration states.

    The network is what a user asked for, and fine-tuning can change it on purpose. Clips and their
    strides are not compared, since they often change.

    Args:
        checkpoint: The contents of the file.
        model: The network that its weights are loaded into.
    """
    if not checkpoint.configuration or not isinstance(model, VideoResNet):
        return
    try:
        architecture(dataclasses.replace(checkpoint, configuration=""))
    except ValueError:
        return  # whether the arrays fit is checked by `load`, and that is enough to load them
    try:
        found = architecture(checkpoint)
    except ValueError as error:
        message = f"{error} The network that was loaded computes something else."
        warnings.warn(message, stacklevel=STACK_LEVEL)
        return
    stated = {
        "instantiation": found.instantiation,
        "key_pool": found.configuration.key_pool,
        "pool2": found.pool2,
        "stride_at": found.configuration.stride_at,
    }
    actual = _facts(model)
    differences = [
        f"{name}={value!r} instead of {stated[name]!r}"
        for name, value in actual.items()
        if stated[name] is not None and stated[name] != value
    ]
    if differences:
        warnings.warn(
            f"the network has {', '.join(differences)}, which the configuration in "
            f"{printable(checkpoint.path)} states. Without a reason for this, build it as "
            "`python -m nonlocal_jax.weights inspect` shows.",
            stacklevel=STACK_LEVEL,
        )


def _facts(model: VideoResNet) -> dict[str, Any]:
    """Returns what a configuration states about networks, for this one."""
    facts: dict[str, Any] = {
        "pool2": model.layout.pool2 is not None,
        "stride_at": model.stride_at,
    }
    for stage in model.nonlocal_blocks:
        block = model.make_block(stage)
        if not isinstance(block, NonLocalBlock):
            continue
        operation = block.operation
        names = {operation_class: name for name, operation_class in OPERATIONS.items()}
        usual = (1, 2, 2) if operation.subsample is True else (1, 1, 1)
        is_window = isinstance(operation.subsample, tuple)
        facts["instantiation"] = names.get(type(operation))
        facts["key_pool"] = operation.subsample if is_window else usual
    return facts
