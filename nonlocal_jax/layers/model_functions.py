"""Linen and NNX models as functions of their variables, and where their blocks are."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.experimental.xla_metadata import set_xla_metadata

from nonlocal_jax.types import Array

# Begins the name of a Linen module inside an NNX model; the path of its `ToNNX` follows.
NNX_MARK = "nonlocal_jax.nnx:"
TRACES = itertools.count()


def functional(model: Any, variables: Any) -> tuple[Callable[..., Any], Any]:
    """Returns `model.apply` and the variables of a Linen module, or the same for an NNX module.

    Raises:
        TypeError: A model that is neither, a Linen module without variables, or an NNX module with
            variables.
    """
    if isinstance(model, nn.Module):
        if variables is None:
            raise TypeError("variables of a Linen module must be the result of `init`; got None.")
        return model.apply, variables
    from flax import nnx  # imports optax

    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Linen or an NNX module; got {type(model).__name__}.")
    if variables is not None:
        raise TypeError(
            "variables of an NNX module must be None, because the module holds its own; got "
            f"{type(variables).__name__}."
        )
    definition, state = nnx.split(model)

    def apply(state: Any, x: Array, *, mutable: Any = False, **kwargs: Any) -> Any:
        merged = nnx.merge(definition, state)
        for path, module in nnx.iter_modules(merged):
            # A Linen module inside `ToNNX` does not know where it is: its name carries the path.
            if isinstance(module, nnx.bridge.ToNNX):
                name = NNX_MARK + "/".join(map(str, path))
                module.to_nnx__module = module.to_nnx__module.clone(name=name)
        y = merged(x, **kwargs)
        return (y, {}) if mutable else y

    return apply, state


@contextlib.contextmanager
def fresh_trace() -> Iterator[None]:
    """Context manager in which all methods of modules run in Python, even if traced before.

    `disable_jit` inlines `jax.jit`. Other transformations cache their traces by a context that
    includes the XLA metadata, so a new number in the metadata makes every cache miss.
    """
    with jax.disable_jit(), set_xla_metadata(nonlocal_jax_trace=str(next(TRACES))):
        yield


def module_path(module: nn.Module) -> tuple[str, ...]:
    """Returns the path of a module in its network, as in `params`.

    Inside `functional` of an NNX model, the path starts with that of the attributes.
    """
    root: Any = module
    while isinstance(root.parent, nn.Module):
        root = root.parent
    name = root.name or ""
    prefix = name.removeprefix(NNX_MARK).split("/") if name.startswith(NNX_MARK) else ()
    return (*filter(None, prefix), *module.path)
