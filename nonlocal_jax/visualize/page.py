"""An interactive page in a single file: point at a position to see what it attends to."""

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int8, Shaped

from nonlocal_jax import files
from nonlocal_jax.lazy import extra
from nonlocal_jax.visualize import measures, overlay
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.geometry import pixels_of
from nonlocal_jax.visualize.panels import TITLES, WEIGHTS
from nonlocal_jax.visualize.scene import Scene, select_clip

MAX_BYTES = 12 << 20  # of the affinities in a page, before base64
LOSSLESS_SIZE = 64  # pixels; larger pictures are stored as JPEG
LEVELS = 127  # of the square root of a share, in 8 bits with a sign


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that `explore` wrote; a notebook displays it.

    Attributes:
        file: Path of the page.
        height: Height of the page in a notebook, in pixels.
    """

    file: files.AnyPath
    height: int = 720

    def _repr_html_(self) -> str:
        page = html.escape(self.file.read_text(encoding="utf-8"))
        style = f"width: 100%; height: {self.height}px; border: 0"
        return f'<iframe srcdoc="{page}" style="{style}"></iframe>'


def explore(
    maps: Mapping[str, AffinityMap] | AffinityMap,
    clip: Any,
    file: files.PathLike = "explore.html",
    *,
    sample: int = 0,
    query: tuple[int, ...] | None = None,
    title: str = "Where it looks",
    max_bytes: int = MAX_BYTES,
) -> Page:
    """Writes a page that shows what any position of any block attends to.

    Positions are selected by mouse, touch or keyboard. The page opens with one of them selected,
    and its arrows grow, unless the browser is set to reduce motion. The colours of a position are
    those of a `heatmap` of this position alone, since each has its own scale. The file contains
    everything it shows and loads nothing from elsewhere. For each position the largest weights are
    stored, as many as fit into `max_bytes`, in steps of 1/127 of the square root of the largest;
    the page states how many of the keys these are.

    Args:
        maps: The maps that `affinities` returned, or one of them. The page uses the names of the
            mapping, so maps of two networks can be compared.
        clip: The input of the network, (B, T, H, W, C), or one clip (T, H, W, C); images without T.
        file: Path of the page, local or remote. It is replaced atomically.
        sample: Index of the clip in the batch.
        query: Position of the first block that is selected at first. None selects one with a large
            weight that goes far.
        title: Title of the page.
        max_bytes: Size of the stored weights.

    Returns:
        The page, which a notebook displays.

    Raises:
        ValueError: No maps, a path that cannot be written, weights that are not finite, another
            clip than the network saw, or a map whose axes are not in the order of the input's;
            raised before anything is written.
        IndexError: A query outside the map.
        GeometryError: The receptive fields of a block cannot be followed.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> block = nl.layers.nonlocal_block("embedded_gaussian")
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), block])
    >>> image = jax.random.uniform(jax.random.key(0), (1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(1), image), image)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = explore(maps, image, Path(folder) / "explore.html")
    ...     page.file.stat().st_size > 10_000
    True
    """
    maps = {maps.block: maps} if isinstance(maps, AffinityMap) else dict(maps)
    if not maps:
        raise ValueError("maps must have at least one block; got none.")
    file = _checked_path(file)
    selected = {name: select_clip(affinity, clip, sample) for name, affinity in maps.items()}
    first_map, first_scene = next(iter(selected.values()))
    start = None if query is None else first_map.single(query)
    pictures = _pictures([scene for _, scene in selected.values()])
    numbers = sorted(pictures)
    weights = {
        name: _largest_weights(affinity, max_bytes // len(selected))
        for name, (affinity, _) in selected.items()
    }
    if start is None:
        start = _first_query(first_map, first_scene, next(iter(weights.values())))
    blocks = [
        {"name": name, **_block(affinity, scene, numbers, weights[name])}
        for name, (affinity, scene) in selected.items()
    ]
    record = {
        "title": title,
        "size": first_scene.pictures.shape[1:3],
        "numbers": numbers,
        "pictures": [_data_url(pictures[number]) for number in numbers],
        "query": [*[0] * (3 - len(start)), *start],
        "bands": {
            "count": overlay.BANDS,
            "positive": overlay.POSITIVE_BANDS,
            "negative": overlay.NEGATIVE_BANDS,
            "grey": overlay.GREY,
            "opacity": overlay.GREY_OPACITY,
        },
        "blocks": blocks,
    }
    template = (resources.files("nonlocal_jax.visualize") / "page.html").read_text(encoding="utf-8")
    # Escaped, so that a block named "</script>" cannot end the script element.
    text = json.dumps(record, allow_nan=False).replace("<", "\\u003c")
    files.write_text(file, template.replace("/*data*/", text))
    return Page(file)


def _checked_path(file: files.PathLike) -> files.AnyPath:
    file = files.as_path(file)
    folder = file.absolute().parent
    if isinstance(folder, Path) and not folder.is_dir():
        raise ValueError(f"file must be in an existing directory; {folder} does not exist.")
    if file.is_dir():
        raise ValueError(f"file must not be a directory; got {file}.")
    return file


def _pictures(scenes: list[Scene]) -> dict[int, Float[np.ndarray, "h w 3"]]:
    """Returns the input frames that any of the blocks is drawn on, by number."""
    return {
        int(number): picture
        for scene in scenes
        for number, picture in zip(scene.numbers, scene.pictures, strict=True)
    }


class _Weights(NamedTuple):
    """The largest weights of each query, in descending order.

    Attributes:
        indices: (queries, kept), flat positions of the keys.
        levels: (queries, kept), signed levels.
        largest: (queries,), shares of the largest.
    """

    indices: Shaped[np.ndarray, "n kept"]
    levels: Int8[np.ndarray, "n kept"]
    largest: Float[np.ndarray, " n"]


def _block(
    affinity: AffinityMap, scene: Scene, numbers: list[int], weights: _Weights
) -> dict[str, Any]:
    """Returns the entry of one block in the data of the page."""
    counted = affinity.counted().reshape(-1)
    kept = weights.indices.shape[1]
    cut = f"; the {kept:,} largest of each position are stored" if kept < affinity.summed else ""
    title, unit = TITLES[affinity.instantiation], WEIGHTS[affinity.instantiation]
    return {
        "caption": f"{title[0].upper()}{title[1:]}: {unit}; {counted.max():,} keys{cut}.",
        "queries": scene.queries.grid,
        "keys": scene.keys.grid,
        "panels": [numbers.index(int(number)) for number in scene.numbers],
        "key_panels": _key_panels(scene),
        "panel_keys": [scene.key_frame(panel) for panel in range(len(scene.pictures))],
        "queries_axes": _axes(scene, "queries"),
        "keys_axes": _axes(scene, "keys"),
        "counted": _base64(counted.astype(np.uint32)),
        "kept": kept,
        "wide": weights.indices.dtype == np.uint32,
        "indices": _base64(weights.indices),
        "weights": _base64(weights.levels),
        "largest": _base64(weights.largest),
    }


def _key_panels(scene: Scene) -> list[int]:
    """Returns the panel of each frame of the keys."""
    return [scene.place((frame, 0, 0), "keys")[0] for frame in range(scene.keys.grid[0])]


def _first_query(affinity: AffinityMap, scene: Scene, weights: _Weights) -> tuple[int, ...]:
    """Returns a position that shows what the page does: a large weight, which goes far.

    The share of the largest weight is multiplied by the length of its arrow, at most a quarter of
    the diagonal of a frame; an arrow to another frame counts as long.
    """
    reach = 0.25 * math.hypot(*scene.pictures.shape[1:3])
    flat = np.arange(len(weights.largest))
    queries = np.stack(np.unravel_index(flat, scene.queries.grid), axis=-1)
    keys = np.stack(np.unravel_index(weights.indices[:, 0], scene.keys.grid), axis=-1)
    starts = pixels_of(scene.queries, queries).centre
    ends = pixels_of(scene.keys, keys).centre
    lengths = np.linalg.norm((ends - starts)[:, 1:], axis=-1)
    same_frame = np.array(_key_panels(scene))[keys[:, 0]] == queries[:, 0]
    lengths = np.where(same_frame, lengths, reach)
    best = int(np.argmax(weights.largest * np.minimum(lengths, reach)))
    return tuple(map(int, np.unravel_index(best, affinity.queries)))


def _largest_weights(affinity: AffinityMap, max_bytes: int) -> _Weights:
    """Returns the largest weights of each query as flat keys and signed levels.

    A level is the square root of the share, relative to the largest, in `LEVELS` steps.
    """
    queries, keys = math.prod(affinity.queries), math.prod(affinity.keys)
    wide = keys > 1 << 16
    entry_bytes = 5 if wide else 3
    kept = max(min(affinity.summed, max_bytes // (queries * entry_bytes)), 1)
    indices = np.zeros((queries, kept), np.uint32 if wide else np.uint16)
    levels = np.zeros((queries, kept), np.int8)
    largest = np.zeros(queries, np.float32)
    for ids, key_ids, rows in affinity.chunks():
        share = measures.shares(rows[0])
        order = np.argsort(-share, axis=-1, kind="stable")[:, :kept]
        top = np.take_along_axis(share, order, axis=-1)
        sign = np.sign(np.take_along_axis(rows[0], order, axis=-1))
        relative = top / np.maximum(top[:, :1], np.finfo(np.float32).tiny)
        levels[ids] = np.round(LEVELS * sign * np.sqrt(relative))
        indices[ids] = key_ids[order]
        largest[ids] = top[:, 0]
    return _Weights(indices, levels, largest)


def _axes(scene: Scene, side: str) -> list[tuple[int, float] | None]:
    """Returns stride and centre, in pixels, along rows and columns."""
    return [
        None if field is None else (int(field.stride), float(field.centre))
        for field in scene.geometry(side).fields[1:]
    ]


def _data_url(picture: Float[np.ndarray, "h w 3"]) -> str:
    with extra("visualize"):
        from PIL import Image

    lossless = max(picture.shape[:2]) <= LOSSLESS_SIZE
    kind, options = ("png", {}) if lossless else ("jpeg", {"quality": 90})
    file = io.BytesIO()
    image = Image.fromarray((255 * picture + 0.5).astype(np.uint8))
    image.save(file, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _base64(array: np.ndarray) -> str:
    little_endian = array.astype(array.dtype.newbyteorder("<"))
    return base64.b64encode(little_endian.tobytes()).decode()
