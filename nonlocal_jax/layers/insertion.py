"""Trained variables in a network that has new blocks."""

from typing import Any

import jax
import numpy as np

Path = tuple[str, ...]
MAX_NAMED = 5  # paths that an error lists


def insert(trained: Any, fresh: Any) -> Any:
    """Puts the variables of a trained network into those of a network with new blocks.

    Each variable of `trained` takes the place of the one with the same path in `fresh`, in every
    collection, running statistics included. Modules that only `fresh` has keep their variables. A
    new block is the identity, so the output stays the same where nothing but blocks is new.

    Args:
        trained: All variables of the trained network: the Linen variables of all collections, or
            the `nnx.state` of an NNX module.
        fresh: All variables of the network with blocks, from `init` or `nnx.state`.

    Returns:
        Variables of the structure of `fresh`.

    Raises:
        ValueError: If a trained variable has no place in `fresh`, its shape differs there, or
            `trained` has a part of the variables of a module, such as the scale of a BatchNorm
            without its running statistics.

    Source: section 3.3, where blocks are added to pre-trained networks.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> class Network(nn.Module):
    ...     has_block: bool
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         x = nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))
    ...         x = nonlocal_block("dot_product", name="nonlocal")(x) if self.has_block else x
    ...         return nn.Dense(10)(x)
    >>> x = jnp.ones((2, 6, 6, 3))
    >>> trained = Network(has_block=False).init(jax.random.key(0), x)  # stands for trained ones
    >>> variables = insert(trained, Network(has_block=True).init(jax.random.key(1), x))
    >>> sorted(variables["params"])
    ['BatchNorm_0', 'Dense_0', 'Dense_1', 'nonlocal']
    >>> before = Network(has_block=False).apply(trained, x)
    >>> bool((Network(has_block=True).apply(variables, x) == before).all())
    True
    """
    old, new = _leaves_by_path(trained), _leaves_by_path(fresh)
    if homeless := [path for path in old if path not in new]:
        raise ValueError(
            "Each variable of trained must have a place in fresh, the variables of the network "
            f"with blocks; got {_listed(homeless)} without one. Give the layers the same names in "
            "both networks."
        )
    for path, leaf in old.items():
        if np.shape(leaf) != np.shape(new[path]):
            raise ValueError(
                f"{'/'.join(path)} must have the same shape in trained and in fresh; got "
                f"{np.shape(leaf)} and {np.shape(new[path])}."
            )
    # Fresh running statistics would not fit the trained scale of a BatchNorm.
    depth = 1 if "params" in fresh else 0  # Linen has collections above the modules
    modules = {path[depth:-1] for path in old}
    if missing := [path for path in new if path not in old and path[depth:-1] in modules]:
        raise ValueError(
            "trained must have all variables of its modules, in all collections; got none for "
            f"{_listed(missing)}. Pass everything that the trained network has, such as "
            'both "params" and "batch_stats".'
        )
    return jax.tree.unflatten(
        jax.tree.structure(fresh), [old.get(path, leaf) for path, leaf in new.items()]
    )


def _leaves_by_path(variables: Any) -> dict[Path, Any]:
    leaves = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
        # The value of an NNX variable, or of a Linen one with metadata, is an attribute of it.
        names = keys[:-1] if isinstance(keys[-1], jax.tree_util.GetAttrKey) else keys
        # As text, since restored checkpoints number the layers of a list by text.
        leaves[tuple(str(getattr(key, "key", key)) for key in names)] = leaf
    return leaves


def _listed(paths: list[Path]) -> str:
    names = ", ".join("/".join(path) for path in paths[:MAX_NAMED])
    hidden = len(paths) - MAX_NAMED
    return f"{names} and {hidden} more" if hidden > 0 else names
