"""Arrows that move, as a GIF or an MP4."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from nonlocal_jax.visualize.maps import AffinityMap
from nonlocal_jax.visualize.pictures import arrows

Picture = UInt8[np.ndarray, "h w 3"]


def animate(
    affinity: AffinityMap,
    clip: Any,
    queries: Any,
    file: Path | str,
    *,
    top: int = 20,
    sample: int = 0,
    seconds: float = 0.5,
) -> Path:
    """Write `arrows` of one position after another: of a track through the clip, or of a walk over the map.

    Args:
        affinity: of `affinities`.
        clip: what the network saw.
        queries: (Q, axes), positions of the map in the order in which they are shown.
        file: ends in .gif (Pillow) or .mp4 (PyAV, H.264).
        top: how many arrows.
        sample: which clip of the batch.
        seconds: for which each is shown.

    Returns:
        The file.

    Raises:
        ValueError: another kind of file, a folder that is not there, no queries, a time that is not positive, or as `arrows`;
            before anything is written.
        IndexError: a query outside the map.
    """
    file, queries = Path(file), np.atleast_2d(np.asarray(queries))
    if file.suffix not in (".gif", ".mp4"):
        raise ValueError(f"file must end in .gif or .mp4; got {file.name!r}.")
    if not file.parent.is_dir():
        raise ValueError(f"file must lie in a folder that is there; there is no {file.parent}.")
    if not 0.01 <= seconds <= 60:
        raise ValueError(f"seconds must be from 0.01 to 60; got {seconds}.")
    if not queries.size:
        raise ValueError("queries must hold at least one position; got none.")
    affinity.flat(queries)  # raises what is wrong with them
    pictures = _pictures(affinity, clip, queries, top, sample)
    write = _write_gif if file.suffix == ".gif" else _write_mp4
    write(pictures, file, seconds)
    return file


def _pictures(
    affinity: AffinityMap, clip: Any, queries: Any, top: int, sample: int
) -> Iterator[Picture]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for query in queries.tolist():
        canvas = FigureCanvasAgg(arrows(affinity, clip, tuple(query), top=top, sample=sample))
        canvas.draw()
        yield np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _write_gif(pictures: Iterator[Picture], file: Path, seconds: float) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(picture).quantize(128) for picture in pictures)
    first.save(file, save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)


def _write_mp4(pictures: Iterator[Picture], file: Path, seconds: float) -> None:
    import av

    with av.open(str(file), "w") as container:
        stream: Any = None
        for picture in pictures:
            height, width = (
                n // 2 * 2 for n in picture.shape[:2]
            )  # H.264 with 4:2:0 wants them even
            if stream is None:
                stream = container.add_stream(
                    "libx264", rate=Fraction(1 / seconds).limit_denominator(1000)
                )
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(picture[:height, :width]), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
