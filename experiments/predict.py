r"""Predicts the classes of a video, and shows where the network looked.

    python -m experiments.predict VIDEO --weights I3D_NLN_8x8_R50.pkl --preset slowfast \
        --clip 8x8 --instantiation embedded_gaussian --pool2 True --key-pool 1 2 2
    python -m experiments.predict VIDEO --weights FILE --clip 32x4 --classes classes.txt
    python -m experiments.predict VIDEO --weights runs/kinetics/weights.safetensors \
        --recipe toy_mp4 --page looked.html
    python -m experiments.predict VIDEO --weights runs/charades/weights.safetensors \
        --recipe toy_mp4 --data charades

The network is inferred from published weights, and what they do not show is asked for; weights of
this project need the recipe that they were trained with. Prints the classes with the highest
scores, which are the mean over 10 clips × 3 crops, or the maximum for Charades, and whose names of
classes these are. Networks of 400 classes have the names of Kinetics-400 unless --classes names
others. Draws, on the middle clip, how much attention each position receives in the last non-local
block, and the 20 largest weights of the position that receives most.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

import nonlocal_jax as nl
from experiments import charades, kinetics
from experiments.shared import results
from experiments.shared.building import build, score_clips
from experiments.shared.command_line import PlainConsole, choose, exit_on, parse
from experiments.shared.recipes import clip_sampling
from experiments.shared.video_training import initial
from nonlocal_jax import checks, evaluation
from nonlocal_jax.data import DataError, annotations, kinetics_400
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import TestingClips, Views, normalise
from nonlocal_jax.data.sampling import Crops, InTime
from nonlocal_jax.files import AnyPath
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.path_options import AnyPathOption
from nonlocal_jax.terminal import printable
from nonlocal_jax.visualize.panels import AS_WRITTEN
from nonlocal_jax.weights import read
from nonlocal_jax.weights.build import Choices, call, options
from nonlocal_jax.weights.build import build as build_architecture
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.loading import load_checkpoint


@dataclasses.dataclass(frozen=True, kw_only=True)
class MainOptions:
    """The video, the network, and what to print and draw."""

    # The video.
    file: Annotated[AnyPathOption, tyro.conf.Positional, tyro.conf.arg(metavar="VIDEO")]
    weights: AnyPathOption  # Weights of the network, in any format nonlocal_jax.weights reads.
    # Recipe of experiments.kinetics or experiments.charades that the weights were trained with.
    # None infers the network from the weights.
    recipe: str | None = None
    data: Literal["kinetics", "charades"] = "kinetics"  # Single-label or multi-label classes.
    # File with the class names, one per line. By default networks of 400 classes have those of
    # Kinetics-400, and class numbers are printed for others.
    classes: AnyPathOption | None = None
    top: int = 5  # Number of classes to print.
    # File of the picture. Defaults to the name of the video with .png, in the current folder.
    picture: AnyPathOption | None = None
    # File of an .html page that shows where any position of your choice looks. None writes no page.
    page: AnyPathOption | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TestingOptions:
    """Which views of the video are scored."""

    __test__ = False  # pytest takes classes of this name for tests

    clips: int = 10  # Number of clips, evenly spaced in time.
    crops: Crops = "three"  # Crops per clip.
    size: int | None = None  # Rows and columns of a crop. Defaults to 256, or the recipe's.
    views_at_once: int = 3  # Number of views per batch.


# Groups of options by title, as --help shows them.
GROUPS: dict[str, type] = {"": MainOptions, "network": Choices, "testing": TestingOptions}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(MainOptions, Choices, TestingOptions):
    """Predicts the classes of a video, and shows where the network looked."""

    def __post_init__(self) -> None:
        for name in ("top", "clips", "views_at_once"):
            checks.at_least(name, getattr(self, name), 1)


class Network(NamedTuple):
    """A network with the preparation of its inputs.

    Attributes:
        model: The module.
        variables: Its weights.
        sampling: The rule by which the frames of a clip are chosen.
        size: Rows and columns of a crop.
        colours: Source whose mean and standard deviation normalise the colours.
    """

    model: Any
    variables: dict[str, Any]
    sampling: InTime
    size: int
    colours: Preset


def network(config: Config) -> Network:
    """Builds the network and loads its weights."""
    return (
        inferred_network(config) if config.recipe is None else recipe_network(config, config.recipe)
    )


def recipe_network(config: Config, name: str) -> Network:
    """Builds the network of a recipe of `experiments.kinetics` or `experiments.charades`."""
    experiment: Any = {"kinetics": kinetics, "charades": charades}[config.data]
    recipes = experiment.recipes()
    recipe = recipes[choose("--recipe", name, recipes)]
    preset = config.preset or "paper"
    experiment_config = experiment.Config(preset=preset, init=config.weights, test_only=True)
    model = build(experiment_config, recipe, recipe.num_classes)
    variables = initial(experiment_config, model, recipe)
    assert variables is not None
    sampling = clip_sampling(experiment_config, recipe)
    size = config.size or recipe.test_size
    return Network(model, dict(variables), sampling, size, experiment_config.normalisation)


def inferred_network(config: Config) -> Network:
    """Infers the network from the names and shapes of its weights."""
    checkpoint = read(config.weights)
    found = architecture(checkpoint)
    chosen = options(found, config)
    if "clip" not in chosen or found.num_classes is None:
        raise DataError(
            f"{config.weights} must hold a video network with a classifier; "
            f"got {call(found, config)}."
        )
    model = build_architecture(found, config)
    variables, _ = load_checkpoint(checkpoint, model, inflate_flat=config.kind is not None)
    frames, stride = map(int, chosen["clip"].split("x"))
    return Network(model, variables, InTime(frames, stride), config.size or 256, chosen["preset"])


def check_format(picture: AnyPath) -> None:
    """Checks that matplotlib can write a picture with this suffix."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = [f".{name}" for name in FigureCanvasBase.get_supported_filetypes()]
    if picture.suffix not in formats:
        raise DataError(f"--picture must end in one of {', '.join(formats)}; got {picture.name}.")


def class_names(config: Config, num_classes: int) -> tuple[str, ...]:
    """Returns the names of the classes of a network, or none if they are not known.

    Raises:
        DataError: The file of --classes cannot be read, or names another number of classes.
    """
    if config.classes is None:
        is_kinetics = config.data == "kinetics" and num_classes == len(kinetics_400.CLASSES)
        return kinetics_400.CLASSES if is_kinetics else ()
    names = annotations.read_classes(config.classes)
    if len(names) != num_classes:
        raise DataError(
            f"{config.classes} must name the {num_classes} classes of the network; "
            f"got {len(names)} names."
        )
    return names


def source_of_names(config: Config, names: Sequence[str]) -> str:
    """Tells whose names of classes are printed."""
    if config.classes is not None:
        return f"class names: {config.classes}"
    return "class names: Kinetics-400" if names else "class numbers; --classes takes their names"


def load(config: Config, picture: AnyPath) -> tuple[Network, Views, tuple[str, ...]]:
    """Loads the network, the views of the video and the class names, and checks all options.

    Raises:
        SystemExit: An option is wrong, or a file cannot be read.
    """
    try:
        with exit_on(DataError, ValueError, ImportError):
            check_format(picture)
            for flag, file in (("--picture", picture), ("--page", config.page)):
                if isinstance(file, Path) and not file.parent.is_dir():
                    raise DataError(
                        f"{flag} must be in an existing folder; there is no {file.parent}."
                    )
            loaded = network(config)
            names = class_names(config, loaded.model.num_classes)
            video = Annotations((Record(config.file, (0,)),), 1)
            source = TestingClips(video, loaded.sampling, config.clips, config.crops, loaded.size)
            return loaded, source.read(0), names
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise SystemExit(f"error: {printable(reason)}.") from error


def predict(config: Config, loaded: Network, views: Views) -> np.ndarray:
    """Computes the score of each class, combined over the views."""
    multi_label = config.data == "charades"

    def apply(clips: np.ndarray) -> Any:
        return score_clips(
            loaded.model,
            loaded.variables,
            clips,
            normalisation=loaded.colours,
            multi_label=multi_label,
        )

    scores = evaluation.score_views(apply, views, config.views_at_once)
    return evaluation.combine(scores[:-1], "max" if multi_label else "mean")


def draw(clip: np.ndarray, block: nl.visualize.AffinityMap, file: AnyPath, title: str) -> None:
    """Draws how much attention each position receives, and where the most attended one looks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    received = nl.visualize.measures.received(block)[0]
    key = np.unravel_index(received.argmax(), received.shape)
    centre = nl.visualize.to_pixels(block, key, of="keys").centre
    query = nl.visualize.from_pixels(block, centre)
    frames = block.queries[0]
    figure = plt.figure(figsize=(1.9 * frames + 1, 5.2), layout="constrained")
    parts: Any = figure.subfigures(2, 1)
    top, bottom = (part.subplots(1, frames, squeeze=False)[0] for part in parts)
    nl.visualize.received(block, clip, axes=top)
    nl.visualize.arrows(block, clip, query, axes=bottom)
    figure.suptitle(printable(title), **AS_WRITTEN)
    align(figure, top, bottom)
    results.save_figure(figure, file)
    plt.close(figure)


def align(figure: Any, top: Sequence[Any], bottom: Sequence[Any]) -> None:
    """Moves the axes of the bottom row below those of the top row, which has a colour bar."""
    figure.draw_without_rendering()  # lays out the rows
    figure.set_layout_engine("none")
    for above, below in zip(top, bottom, strict=True):
        columns, rows = (ax.get_position(original=True) for ax in (above, below))
        below.set_position((columns.x0, rows.y0, columns.width, rows.height))


def show_attention(
    config: Config,
    loaded: Network,
    clip: np.ndarray,
    picture: AnyPath,
    best: tuple[str, float],
    console: Console,
) -> None:
    """Writes the picture and the page, if the network has non-local blocks."""
    inputs = normalise(jnp.asarray(clip)[None], loaded.colours)
    name, score = best
    file = picture
    try:
        maps = nl.visualize.affinities(loaded.model, loaded.variables, inputs, train=False)
        draw(clip, list(maps.values())[-1], picture, f"{name}, {score:.2f}")
        console.print(f"where the network looked: {picture}")
        if config.page is not None:
            file = config.page
            nl.visualize.explore(maps, clip, file, title=f"{config.file.name}: {name}")
            console.print(f"where each position looked: {file}")
    except nl.visualize.NoBlocksError as error:
        console.print(f"no picture: {error}")
    except (OSError, ValueError, ImportError) as error:
        # The folder is read-only, the disk is full, or the maps have NaN.
        raise SystemExit(f"error: cannot write {printable(file)}: {printable(error)}") from error


def main(config: Config) -> list[tuple[str, float]]:
    """Predicts the classes of a video.

    Returns:
        The names of the best classes with their scores, best first.
    """
    console = PlainConsole()
    picture = config.picture or Path(f"{config.file.stem}.png")
    loaded, views, names = load(config, picture)
    scores = predict(config, loaded, views)
    order = np.argsort(-scores)[: config.top].tolist()
    best = [(names[i] if names else str(i), float(scores[i])) for i in order]
    title = f"{printable(config.file.name)}: {len(views) - 1} views"
    table = Table("class", "score", title=title)
    for name, score in best:
        table.add_row(printable(name), f"{score:.3f}")
    console.print(table)
    console.print(source_of_names(config, names))
    *_, middle = views
    show_attention(config, loaded, middle, picture, best[0], console)
    return best


if __name__ == "__main__":
    main(parse(Config, GROUPS, "predict"))
