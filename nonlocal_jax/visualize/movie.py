"""Animated arrows, as a GIF or an MP4."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nonlocal_jax import files
from nonlocal_jax.lazy import extra
from nonlocal_jax.visualize.affinity_map import AffinityMap
from nonlocal_jax.visualize.pictures import arrows

Picture = UInt8[np.ndarray, "h w 3"]
GIF_COLOURS = 128


def animate(
    affinity: AffinityMap,
    clip: Any,
    queries: Any,
    file: files.PathLike,
    *,
    top: int = 20,
    sample: int = 0,
    seconds: float = 0.5,
) -> files.AnyPath:
    """Writes a movie of `arrows` from one position after another, such as a track through the clip.

    Args:
        affinity: A map that `affinities` returned.
        clip: The input of the network.
        queries: (Q, axes), positions of the map in the order in which they are shown.
        file: Path, local or remote, that ends in .gif (written by Pillow) or .mp4 (PyAV, H.264).
            It is replaced atomically.
        top: Number of arrows.
        sample: Index of the clip in the batch.
        seconds: Time for which each position is shown.

    Returns:
        The path of the file.

    Raises:
        ValueError: Another type of file, a directory that does not exist, no queries, a time that
            is not between 0.01 and 60 seconds, or for the reasons that `arrows` lists; raised
            before anything is written.
        IndexError: A query outside the map.
    """
    file, queries = files.as_path(file), np.atleast_2d(np.asarray(queries))
    if file.suffix not in (".gif", ".mp4"):
        raise ValueError(f"file must end in .gif or .mp4; got {file.name!r}.")
    if isinstance(file, Path) and not file.parent.is_dir():
        raise ValueError(f"file must be in an existing directory; {file.parent} does not exist.")
    if not 0.01 <= seconds <= 60:
        raise ValueError(f"seconds must be between 0.01 and 60; got {seconds}.")
    if not queries.size:
        raise ValueError("queries must have at least one position; got none.")
    affinity.flat(queries)  # raises for positions outside the map
    pictures = _pictures(affinity, clip, queries, top, sample)
    write = _write_gif if file.suffix == ".gif" else _write_mp4
    with files.atomic_write(file) as partial:
        write(pictures, partial, seconds)
    return file


def _pictures(
    affinity: AffinityMap, clip: Any, queries: Any, top: int, sample: int
) -> Iterator[Picture]:
    with extra("visualize"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

    for query in queries.tolist():
        canvas = FigureCanvasAgg(arrows(affinity, clip, tuple(query), top=top, sample=sample))
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _write_gif(pictures: Iterator[Picture], file: Path, seconds: float) -> None:
    with extra("visualize"):
        from PIL import Image

    first, *later = (Image.fromarray(picture).quantize(GIF_COLOURS) for picture in pictures)
    timing: dict[str, Any] = {"duration": round(1000 * seconds), "loop": 0}
    first.save(file, format="GIF", save_all=True, append_images=later, **timing)


def _write_mp4(pictures: Iterator[Picture], file: Path, seconds: float) -> None:
    with extra("visualize"):
        import av

    with av.open(str(file), "w", format="mp4") as container:
        stream: Any = None
        for picture in pictures:
            # H.264 with 4:2:0 chroma subsampling requires even sizes.
            height, width = (size // 2 * 2 for size in picture.shape[:2])
            if stream is None:
                rate = Fraction(1 / seconds).limit_denominator(1000)
                stream = container.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            cropped = np.ascontiguousarray(picture[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(cropped, format="rgb24")))
        container.mux(stream.encode(None))
