"""Writing variables to files, with native names or with those of another source."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from nonlocal_jax import checks, files
from nonlocal_jax.terminal import printable
from nonlocal_jax.weights.entries import NATIVE, naming_tables
from nonlocal_jax.weights.names import Weights, flatten


def save(path: files.PathLike, variables: Mapping[str, Any], names: str = NATIVE) -> None:
    """Writes variables to a `.safetensors` file, atomically.

    Args:
        path: The file to create or replace, local or remote, such as gs://bucket/file.safetensors.
        variables: Variables as `model.init` returns them.
        names: "nonlocal_jax" for paths such as "params/res2_0/conv_a/kernel"; or the source whose
            names and shapes the file gets: "slowfast", "mmaction2", "pytorchvideo", "torchvision"
            or "non_local_pytorch" (a state dict, which `safetensors.torch.load_file` reads), or
            "caffe2".

    Raises:
        ValueError: The names are unknown, or the source has no name for a leaf.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp, nonlocal_jax as nl
    >>> variables = {"params": {"conv1": {"kernel": jnp.ones((3, 3, 1, 32))}}}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "digits.safetensors"
    >>> save(path, variables, names="non_local_pytorch")
    >>> nl.weights.read(path).arrays["conv_1.0.weight"].shape
    (32, 1, 3, 3)
    """
    from safetensors.numpy import save as serialise

    arrays = export(variables, names)
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    contents = serialise(contiguous, metadata={"names": names, "format": "np"})
    with files.atomic_write(path) as partial:
        partial.write_bytes(contents)


def export(variables: Mapping[str, Any], names: str = NATIVE) -> dict[str, Weights]:
    """Returns the arrays of variables under the names, and in the shapes, of a source.

    Args:
        variables: Variables as `model.init` returns them.
        names: The source, as for `save`.

    Returns:
        Arrays by name. The counters of PyTorch's BatchNorm, which have no counterpart here, are
        left out.

    Raises:
        ValueError: The names are unknown, or the source has no name for a leaf.
    """
    tables = naming_tables()
    checks.one_of("names", names, (NATIVE, *tables))
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
    if names == NATIVE:
        return leaves
    arrays: dict[str, Weights] = {}
    for path, leaf in leaves.items():
        found = tables[names].source_name(path.split("/", 1)[1])
        if found is None:
            raise ValueError(f"{names} has no name for {printable(path)}.")
        name, row = found
        if name in arrays:
            raise ValueError(
                f"{names} has the name {name} for {printable(path)} and for another leaf."
            )
        arrays[name] = row.transform.export_array(leaf)
    return arrays
