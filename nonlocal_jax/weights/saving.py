"""From the variables of a network to files: our own, or with the names and shapes of another library."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nonlocal_jax.weights.entries import NATIVE
from nonlocal_jax.weights.names import Weights, flatten
from nonlocal_jax.weights.sources import SOURCES


def save(path: str | os.PathLike[str], variables: Mapping[str, Any], names: str = NATIVE) -> None:
    """Write variables as a `.safetensors` file, whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        variables: as `model.init` makes them.
        names: "nonlocal_jax" for paths such as "params/res2_0/conv_a/kernel"; or whose names and shapes the file gets:
            "slowfast", "mmaction2", "pytorchvideo", "torchvision", "non_local_pytorch" (a state dict that
            `safetensors.torch.load_file` reads), or "caffe2".

    Raises:
        ValueError: unknown names, or a leaf for which that source has no name.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> model = nl.models.non_local_pytorch_mnist("gaussian")
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 28, 28, 1)))
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.safetensors"
    >>> save(path, variables, names="non_local_pytorch")
    >>> nl.weights.read(path).arrays["conv_1.0.weight"].shape
    (32, 1, 3, 3)
    """
    from safetensors.numpy import save as to_bytes

    arrays = export(variables, names)
    path = Path(path)
    contents = to_bytes(
        {name: np.asarray(a, order="C") for name, a in arrays.items()},
        metadata={"names": names, "format": "np"},
    )
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        try:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def export(variables: Mapping[str, Any], names: str = NATIVE) -> dict[str, Weights]:
    """The arrays of variables under the names, and in the shapes, of a source.

    Args:
        variables: as `model.init` makes them.
        names: as of `save`.

    Returns:
        Arrays by name. Counters that only PyTorch's BatchNorm has are not among them.

    Raises:
        ValueError: unknown names, or a leaf for which that source has no name.
    """
    sources = {source.name: source for source in SOURCES}
    if names != NATIVE and names not in sources:
        raise ValueError(
            f"names must be one of {', '.join(map(repr, (NATIVE, *sources)))}; got {names!r}."
        )
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    if names == NATIVE:
        return leaves
    arrays = {}
    for path, leaf in leaves.items():
        found = sources[names].to_theirs(path.split("/", 1)[1])
        if found is None:
            raise ValueError(f"{names} has no name for {path}.")
        theirs, row = found
        if theirs in arrays:
            raise ValueError(f"{path} would be a second {theirs} of {names}.")
        arrays[theirs] = row.transform.to_theirs(leaf)
    return arrays
