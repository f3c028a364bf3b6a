"""Linen and NNX models as functions of their variables, and where their blocks are."""

import contextlib
import dataclasses
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

    The functions of equal models are equal, so that caches find what was traced before.

    Raises:
        TypeError: A model that is neither, a Linen module without variables, or an NNX module with
            variables.
    """
    if isinstance(model, nn.Module):
        if variables is None:
            raise TypeError("variables of a Linen module must be the result of `init`; got None.")
        return _Function(structural_key(model), model.apply), variables
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

    return _Function(structural_key(definition), apply), state


@dataclasses.dataclass(frozen=True)
class _Function:
    """A function of variables, equal to those of equal models."""

    key: Any
    call: Callable[..., Any] = dataclasses.field(compare=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def structural_key(value: Any) -> Any:
    """Returns a key that is equal for equal modules, also if they hold lists or dicts.

    It is hashable unless the module holds something else that is not, such as an array.

    >>> dense = [structural_key(nn.Sequential([nn.Dense(size)])) for size in (3, 3, 4)]
    >>> dense[0] == dense[1], dense[0] == dense[2]
    (True, False)
    """
    if isinstance(value, list | tuple):
        return type(value), tuple(map(structural_key, value))
    if isinstance(value, Mapping):
        return type(value), tuple((key, structural_key(item)) for key, item in value.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.name != "parent"]
        return type(value), tuple(structural_key(getattr(value, name, None)) for name in names)
    return value


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
