"""What is in a video, and where the network looked.

    python -m experiments.predict VIDEO --weights I3D_NLN_8x8_R50.pkl --preset slowfast     # the file tells its network
    python -m experiments.predict VIDEO --weights FILE --clip 32x4 --classes kinetics_400.txt
    python -m experiments.predict VIDEO --weights runs/kinetics/weights.safetensors --recipe toy_mp4 --page looked.html
    python -m experiments.predict VIDEO --weights runs/charades/weights.safetensors --recipe toy_mp4 --data charades

Prints the classes with the highest scores, of 10 clips × 3 crops the mean, or the largest for Charades. Draws the middle clip:
how much each position is looked at by all positions, in the last non-local block, and the 20 highest-weighted arrows of the one
that is looked at most.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import nonlocal_jax as nl
from experiments import charades, kinetics, video
from experiments.recipes import build, in_time
from nonlocal_jax import evaluation
from nonlocal_jax.data import DataError, annotations
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import TestingClips, normalise
from nonlocal_jax.data.sampling import Crops, InTime
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.weights import read
from nonlocal_jax.weights.build import Choices, call, options
from nonlocal_jax.weights.build import build as build_as
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.loading import load_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Choices):
    """The classes of a video, and where the network looked."""

    file: Annotated[Path, tyro.conf.Positional]  # the video
    weights: Path  # of the network, of any source that nonlocal_jax.weights reads
    data: Literal["kinetics", "charades"] = "kinetics"  # one class a video, or any number
    recipe: str | None = (
        None  # of experiments.kinetics or .charades; None takes the network that the file tells
    )
    classes: Path | None = None  # names of the classes, one a line; else they are numbers
    top: int = 5  # classes to print
    clips: int = 10  # evenly in time
    crops: Crops = "three"  # of each clip
    size: int | None = None  # rows and columns of a crop; None is 256, or the recipe's
    views_at_once: int = 3  # clips of a batch
    picture: Path | None = (
        None  # file of the picture; None is the video's name with .png, in this folder
    )
    page: Path | None = (
        None  # file of a page, .html, in which one points at a position and sees where it looks; None is none
    )

    def __post_init__(self) -> None:
        for name in ("top", "clips", "views_at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")


def network(config: Config) -> tuple[Any, dict[str, Any], InTime, int, Preset]:
    """The model, its variables, its clips, its crops, and whose colours it takes."""
    if config.recipe is not None:
        experiment: Any = {"kinetics": kinetics, "charades": charades}[config.data]
        recipes = experiment.recipes()
        if config.recipe not in recipes:
            raise DataError(f"--recipe must be one of {', '.join(recipes)}; got {config.recipe!r}.")
        recipe = recipes[config.recipe]
        settings = experiment.Config(
            preset=config.preset or "paper", init=config.weights, test_only=True
        )
        model = build(settings, recipe, recipe.num_classes)
        variables = video.initial(settings, model, recipe)
        assert variables is not None
        return (
            model,
            dict(variables),
            in_time(settings, recipe),
            config.size or recipe.test_size,
            "caffe2",
        )
    checkpoint = read(config.weights)
    found = architecture(checkpoint)
    chosen = options(found, config)
    if "clip" not in chosen or found.num_classes is None:
        raise DataError(
            f"{config.weights} must be of a video network with a classifier; it is of {call(found, config)}."
        )
    model = build_as(found, config)
    variables, _ = load_checkpoint(checkpoint, model, inflate_flat=config.kind is not None)
    frames, stride = map(int, chosen["clip"].split("x"))
    return (
        model,
        variables,
        InTime(frames, stride),
        config.size or 256,
        chosen["preset"],
    )


def draw(clip: np.ndarray, block: nl.visualize.AffinityMap, file: Path, title: str) -> None:
    """Above, how much each position is looked at; below, where the one that is looked at most looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heat = nl.visualize.measures.received(block)[0]
    most = nl.visualize.to_pixels(
        block, np.unravel_index(heat.argmax(), heat.shape), of="keys"
    ).centre
    query = nl.visualize.from_pixels(block, most)
    frames = block.queries[0]
    figure = plt.figure(figsize=(1.9 * frames + 1, 5.2), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    nl.visualize.received(block, clip, axes=above.subplots(1, frames, squeeze=False)[0])
    nl.visualize.arrows(block, clip, query, axes=below.subplots(1, frames, squeeze=False)[0])
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(config: Config) -> list[tuple[str, float]]:
    """Print the classes and draw the picture; the classes with their scores."""
    console = Console()
    picture = config.picture or Path(f"{config.file.stem}.png")
    try:
        for flag, written in (("--picture", picture), ("--page", config.page)):
            if written is not None and not written.parent.is_dir():
                raise DataError(
                    f"{flag} must lie in a folder that is there; there is no {written.parent}."
                )
        names = annotations.read_classes(config.classes) if config.classes else ()
        model, variables, clip, size, colours = network(config)
        if names and len(names) != model.num_classes:
            raise DataError(
                f"{config.classes} must name the {model.num_classes} classes of the network; it names {len(names)}."
            )
        one = Annotations((Record(config.file, (0,)),), 1)
        views = TestingClips(one, clip, config.clips, config.crops, size).read(0)
    except OSError as error:
        raise SystemExit(f"error: {error.filename}: {error.strerror}.") from error
    except (DataError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    many = config.data == "charades"
    activation = jax.nn.sigmoid if many else jax.nn.softmax
    apply = jax.jit(
        lambda v, clips: activation(model.apply(v, normalise(clips, colours), train=False))
    )
    each = evaluation.score_views(
        lambda clips: apply(variables, clips), views, config.views_at_once
    )
    scores = evaluation.combine(each[:-1], "max" if many else "mean")
    best = [
        (names[i] if names else str(i), float(scores[i]))
        for i in np.argsort(-scores)[: config.top].tolist()
    ]
    table = Table("class", "score", title=f"{config.file.name}: {len(each) - 1} views")
    for name, score in best:
        table.add_row(name, f"{score:.3f}")
    console.print(table)
    middle, written = list(views)[-1], picture
    try:
        maps = nl.visualize.affinities(
            model, variables, normalise(jnp.asarray(middle)[None], colours), train=False
        )
        draw(middle, list(maps.values())[-1], picture, f"{best[0][0]}, {best[0][1]:.2f}")
        console.print(f"where it looked: {picture}", highlight=False)
        if config.page is not None:
            written = config.page
            nl.visualize.explore(
                maps, middle, config.page, title=f"{config.file.name}: {best[0][0]}"
            )
            console.print(f"where each position looked: {config.page}", highlight=False)
    except nl.visualize.NoBlocksError as error:
        console.print(f"no picture: {error}", highlight=False)
    except (
        OSError,
        ValueError,
    ) as error:  # a folder that may not be written to, a format that there is not, NaN
        raise SystemExit(f"error: no picture of where it looked, {written}: {error}") from error
    return best


if __name__ == "__main__":
    main(tyro.cli(Config))
