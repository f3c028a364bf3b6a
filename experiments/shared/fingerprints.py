"""Fingerprints of everything that the scores of a test depend on.

A test stores its scores in a folder named after them, so that it is resumed exactly when nothing
has changed.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared.recipes import Config, Recipe
from nonlocal_jax import evaluation
from nonlocal_jax.data.annotations import Annotations
from nonlocal_jax.files import AnyPath
from nonlocal_jax.remote_paths import RemotePath

RECIPE_FIELDS = (
    "depth",
    "kind",
    "nonlocal_blocks",
    "instantiation",
    "axes",
    "frames",
    "stride",
    "test_size",
    "num_classes",
    "multi_label",
)
CONFIG_FIELDS = (
    "preset",
    "normalisation",
    "fps",
    "sampling",
    "short",
    "clips",
    "crops",
    "dtype",
)


def digest(tree: Any) -> str:
    """Returns the SHA-256 of all arrays of a tree and their names."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sha.update(jax.tree_util.keystr(path).encode())
        sha.update(np.ascontiguousarray(leaf).tobytes())
    return sha.hexdigest()


def digest_of_list(videos: Annotations) -> str:
    """Returns the SHA-256 of a list of videos, which does not depend on where the list lies.

    It covers the order of the videos, their sizes, labels, and paths relative to the folder that
    all files share.
    """
    files = [file for record in videos.records for file in (record.frames or (record.path,))]
    common_folder = os.path.commonpath([_as_local(file).parent for file in files])
    sha = hashlib.sha256()
    for record in videos.records:
        paths = record.frames or (record.path,)
        names = [os.path.relpath(_as_local(file), common_folder) for file in paths]
        size = paths[0].stat().st_size if paths[0].exists() else None
        sha.update(repr((names, size, record.labels, record.actions, record.frame_labels)).encode())
    return sha.hexdigest()


def _as_local(file: AnyPath) -> Path:
    """Returns a local path for `os.path.relpath`: /protocol/bucket/file for a remote file."""
    if isinstance(file, RemotePath):
        return Path(f"/{file.protocol}/{str(file).partition('://')[2]}")
    return file


def combination(config: Config, recipe: Recipe) -> evaluation.Combination:
    """Returns how the scores of a video's views are combined."""
    return config.combine or ("max" if recipe.multi_label else "mean")


def test_settings(
    config: Config, recipe: Recipe, videos: Annotations, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns everything that the scores of a test depend on, as JSON data."""
    return {
        "weights": digest(variables),
        "videos": digest_of_list(videos),
        "combine": combination(config, recipe),
        **{name: getattr(recipe, name) for name in RECIPE_FIELDS},
        **{name: getattr(config, name) for name in CONFIG_FIELDS},
    }
