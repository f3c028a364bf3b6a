"""A page of one file in which one points at a position and sees where it looks."""

import base64
import dataclasses
import html
import io
import json
import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from nonlocal_jax.visualize import measures
from nonlocal_jax.visualize.frames import Scene, of_sample
from nonlocal_jax.visualize.maps import AffinityMap
from nonlocal_jax.visualize.pictures import WEIGHTS

BUDGET = 12 << 20  # bytes of affinities in a page
SMALL = 64  # pixels: pictures up to this size are stored without loss


@dataclasses.dataclass(frozen=True)
class Page:
    """A page that was written; as the value of a notebook's cell it shows itself.

    Attributes:
        file: of the page.
        height: of the frame in a notebook, in pixels.
    """

    file: Path
    height: int = 720

    def _repr_html_(self) -> str:
        page = html.escape(self.file.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{page}" style="width: 100%; height: {self.height}px; border: 0"></iframe>'


def explore(
    maps: Mapping[str, AffinityMap] | AffinityMap,
    clip: Any,
    file: Path | str = "explore.html",
    *,
    sample: int = 0,
    query: tuple[int, ...] | None = None,
    title: str = "Where it looks",
) -> Page:
    """Write a page in which one points at, taps, or goes by keys to a position, and sees where it looks, in every block.

    The file holds all that it shows and loads nothing. Of each position the largest weights are kept, as many as fit into
    12 MiB, in steps of 1/127 of the square root of the largest; the page says how many of the keys these are.

    Args:
        maps: of `affinities`, or one of them; the page calls each by its name here, so maps of two networks may be compared.
        clip: what the network saw, (B, T, H, W, C) or one clip (T, H, W, C); images likewise without T.
        file: of the page.
        sample: which clip of the batch.
        query: the position that is shown first, of the first block; None is the middle.
        title: of the page.

    Returns:
        The page, which a notebook shows.

    Raises:
        ValueError: no maps, a file that cannot be there, weights that are not finite, another clip than the network saw, or
            a map whose axes are not in the order of the input's; before anything is written.
        IndexError: a query outside the map.
        GeometryError: a network whose receptive fields cannot be followed.

    >>> import jax, jax.numpy as jnp, tempfile
    >>> import flax.linen as nn, nonlocal_jax as nl
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nl.layers.nonlocal_block("embedded_gaussian")])
    >>> image = jax.random.uniform(jax.random.key(0), (1, 24, 24, 3))
    >>> maps = nl.visualize.affinities(model, model.init(jax.random.key(1), image), image)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = explore(maps, image, Path(folder) / "explore.html")
    ...     page.file.stat().st_size > 10_000
    True
    """
    maps = {maps.block: maps} if isinstance(maps, AffinityMap) else dict(maps)
    file = Path(file)
    if not maps:
        raise ValueError("maps must have at least one block; got none.")
    if not file.absolute().parent.is_dir():
        raise ValueError(
            f"file must lie in a folder that is there; there is no {file.absolute().parent}."
        )
    if file.is_dir():
        raise ValueError(f"file must not be a folder; got {file}.")
    drawn = {name: of_sample(one, clip, sample) for name, one in maps.items()}
    first, scenes = next(iter(drawn.values()))[0], [at for _, at in drawn.values()]
    start = first.single(tuple(n // 2 for n in first.queries) if query is None else query)
    numbers = sorted({int(number) for at in scenes for number in at.numbers})
    pictures = {
        int(n): picture for at in scenes for n, picture in zip(at.numbers, at.pictures, strict=True)
    }
    record = {
        "title": title,
        "size": next(iter(pictures.values())).shape[:2],
        "numbers": numbers,
        "pictures": [_as_url(pictures[number]) for number in numbers],
        "query": [*[0] * (3 - len(start)), *start],
        "blocks": [
            {"name": name, **_block(one, at, numbers, BUDGET // len(drawn))}
            for name, (one, at) in drawn.items()
        ],
    }
    template = (resources.files("nonlocal_jax.visualize") / "page.html").read_text(encoding="utf-8")
    text = json.dumps(record, allow_nan=False).replace(
        "<", "\\u003c"
    )  # nothing in a name can end the script
    file.write_text(template.replace("/*data*/", text), encoding="utf-8")
    return Page(file)


def _block(one: AffinityMap, at: Scene, numbers: list[int], budget: int) -> dict[str, Any]:
    """What the page needs of one block."""
    queries, keys = math.prod(one.queries), math.prod(one.keys)
    wide = keys > 1 << 16
    kept = max(min(one.summed, budget // (queries * (5 if wide else 3))), 1)
    indices = np.zeros((queries, kept), np.uint32 if wide else np.uint16)
    weights = np.zeros((queries, kept), np.int8)
    largest = np.zeros(queries, np.float32)
    for ids, key_ids, rows in one.chunks():
        share = measures.shares(rows[0])
        order = np.argsort(-share, axis=-1, kind="stable")[:, :kept]
        top = np.take_along_axis(share, order, axis=-1)
        largest[ids], indices[ids] = top[:, 0], key_ids[order]
        sign = np.sign(np.take_along_axis(rows[0], order, axis=-1))
        weights[ids] = np.round(
            127 * sign * np.sqrt(top / np.maximum(top[:, :1], np.finfo(np.float32).tiny))
        )
    counted = one.counted().reshape(-1)
    part = f"; of each position the {kept:,} largest are kept" if kept < one.summed else ""
    return {
        "caption": f"{one.instantiation.replace('_', ' ')}; {WEIGHTS[one.instantiation]}; {counted.max():,} keys{part}.",
        "queries": at.queries.grid,
        "keys": at.keys.grid,
        "panels": [numbers.index(int(number)) for number in at.numbers],
        "key_panels": [at.place((frame, 0, 0), "keys")[0] for frame in range(at.keys.grid[0])],
        "queries_axes": _axes(at, "queries"),
        "keys_axes": _axes(at, "keys"),
        "counted": _base64(counted.astype(np.uint32)),
        "kept": kept,
        "wide": wide,
        "indices": _base64(indices),
        "weights": _base64(weights),
        "largest": _base64(largest),
    }


def _axes(at: Scene, of: str) -> list[tuple[int, float] | None]:
    """Stride and centre, in pixels, along rows and columns."""
    geometry = at.queries if of == "queries" else at.keys
    return [
        None if field is None else (int(field.stride), float(field.centre))
        for field in geometry.fields[1:]
    ]


def _as_url(picture: Float[np.ndarray, "h w 3"]) -> str:
    from PIL import Image

    file, small = io.BytesIO(), max(picture.shape[:2]) <= SMALL
    image = Image.fromarray((255 * picture + 0.5).astype(np.uint8))
    image.save(file, format="PNG" if small else "JPEG", **({} if small else {"quality": 90}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode()
