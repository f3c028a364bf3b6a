"""Linen and NNX models as functions of their variables, and where their blocks are."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nonlocal_jax.types import Array

# Begins the name of a Linen module inside an NNX model; the path of its `ToNNX` follows.
NNX_MARK = "nonlocal_jax.nnx:"
# JAX's caches of traces depend on its value, and compiled programs do not contain it.
_TRACE = jax.make_user_context()
_trace_numbers = itertools.count()


def functional(model: Any, variables: Any) -> tuple[Callable[..., Any], Any]:
    """Returns `model.apply` and the variables of a Linen module, or the same for an NNX module.

    Equal hashable models have the same function, so that caches find what was traced before.

    Raises:
        TypeError: A model that is neither, a Linen module without variables, or an NNX module with
            variables.
    """
    if isinstance(model, nn.Module):
        if variables is None:
            raise TypeError("variables of a Linen module must be the result of `init`; got None.")
        return _call_if_hashable(_linen_function, model), variables
    from flax import nnx  # imports optax

    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a Linen or an NNX module; got {type(model).__name__}.")
    if variables is not None:
        raise TypeError(
            "variables of an NNX module must be None, because the module holds its own; got "
            f"{type(variables).__name__}."
        )
    definition, state = nnx.split(model)
    return _call_if_hashable(_nnx_function, definition), state


@functools.lru_cache(maxsize=16)
def _linen_function(model: nn.Module) -> Callable[..., Any]:
    return model.apply


@functools.lru_cache(maxsize=16)
def _nnx_function(definition: Any) -> Callable[..., Any]:
    from flax import nnx

    def apply(state: Any, x: Array, *, mutable: Any = False, **kwargs: Any) -> Any:
        merged = nnx.merge(definition, state)
        for path, module in nnx.iter_modules(merged):
            # A Linen module inside `ToNNX` does not know where it is: its name carries the path.
            if isinstance(module, nnx.bridge.ToNNX):
                name = NNX_MARK + "/".join(map(str, path))
                module.to_nnx__module = module.to_nnx__module.clone(name=name)
        y = merged(x, **kwargs)
        return (y, {}) if mutable else y

    return apply


def _call_if_hashable(cached: Any, argument: Any) -> Any:
    """Calls a cached function, without its cache if the argument is not hashable."""
    return (cached if is_hashable(argument) else cached.__wrapped__)(argument)


def is_hashable(value: Any) -> bool:
    """Whether a value can be the key of a cache."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def shape_of(leaf: Any) -> Any:
    """Returns the shape and dtype of an array, and any other argument as it is."""
    if isinstance(leaf, jax.Array | np.ndarray):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def split_arrays(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[int, jax.ShapeDtypeStruct], Callable[[Mapping[int, Any]], Any]]:
    """Returns the arrays of a call, numbered, and a function that puts arrays in their places.

    What is not a `jax.ShapeDtypeStruct`, such as a flag or a name, is a constant of the program.
    """
    leaves, structure = jax.tree.flatten((args, dict(kwargs)))
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}

    def fill(arrays: Mapping[int, Any]) -> Any:
        return jax.tree.unflatten(structure, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])

    return arrays, fill


@contextlib.contextmanager
def fresh_trace() -> Iterator[None]:
    """Context manager in which all methods of modules run in Python, even if traced before.

    `disable_jit` inlines `jax.jit`. Other transformations cache their traces by JAX's context, so a
    new number in it makes every cache miss.
    """
    with jax.disable_jit(), _TRACE(next(_trace_numbers)):
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
