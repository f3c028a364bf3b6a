"""What is compiled: operations, blocks and networks, for which chips, by which competitors."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

import nonlocal_jax as nl
from benchmarks.cases import INSTANTIATIONS, POSITIONS, SIZES, Direction
from nonlocal_jax.layers.conventions import ClipFormat
from nonlocal_jax.types import Instantiation

Platform = Literal["tpu", "gpu"]
Section = Literal["operation", "block", "inference", "training"]
Size = tuple[int, int, int]  # N, M, d

BATCH = 8  # samples of operations, blocks and inference
H100 = "h100"  # the topology of a single GPU
# One chip of each kind, and slices of 16, on which a training step has 64 clips.
SINGLE = ("v5e:1x1", "v4:1x1x1", "v5p:1x1x1", "v6e:1x1")
SIXTEEN = ("v5e:4x4", "v4:2x2x4", "v5p:2x2x4", "v6e:4x4")
# Titles of the networks.
NETWORKS = {"i3d_8x8": "I3D R50 8×8", "i3d_32x2": "I3D R50 32×2", "cifar": "CIFAR's ResNet-20"}
CLIPS: dict[str, tuple[ClipFormat, int]] = {"i3d_8x8": ("8x8", 8), "i3d_32x2": ("32x2", 32)}
# Competitors besides the implementations of an operation. "attention" is JAX's
# `dot_product_attention`; "plain" is a network of `nn.Conv`, `nn.max_pool` and all pairs.
ATTENTION, OURS, PLAIN = "attention", "ours", "plain"


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
        topology: The devices that it is compiled for.
        section: What it is. A training step is that of `nonlocal_jax.training`.
        subject: The pairwise function, or the network, one of `NETWORKS`.
        size: N, M and d of an operation or a block, whose input has 2d channels.
        batch: Samples on all devices together.
        competitor: Who computes it: an implementation of an operation, "attention", or for networks
            "ours" and "plain".
        direction: Whether gradients are computed; "both" for training.
    """

    topology: str
    section: Section
    subject: str
    size: Size | None
    batch: int
    competitor: str
    direction: Direction

    @property
    def platform(self) -> Platform:
        return "gpu" if self.topology == H100 else "tpu"

    @property
    def name(self) -> str:
        size = "/".join(map(str, self.size)) + "/" if self.size else ""
        return (
            f"{self.topology}/{self.section}/{self.subject}/{size}{self.batch}/"
            f"{self.competitor}/{self.direction}"
        )

    @property
    def weight(self) -> float:
        """Roughly how long it takes to compile, for the progress bar."""
        if self.subject in CLIPS:
            return 100 if self.section == "training" else 30
        return 1


def list_cases(platform: Platform) -> list[Case]:
    """Returns every case of a platform, small ones first."""
    networks = _networks_on_tpus() if platform == "tpu" else _networks_on_a_gpu()
    return sorted([*_operations_and_blocks(platform), *networks], key=lambda case: case.weight)


def is_small(case: Case) -> bool:
    """Whether the case is one of the few that are compiled with every change."""
    if case.topology not in ("v5e:1x1", H100):
        return False
    if case.section == "operation":
        subjects, size = ("embedded_gaussian", "concatenation"), (3136, 784, 256)
        return case.subject in subjects and case.size == size
    if case.section == "block":
        return case.subject == "embedded_gaussian" and case.size == (784, 196, 512)
    return False  # a network takes minutes; tests/tpu compiles steps of training


def _operations_and_blocks(platform: Platform) -> Iterator[Case]:
    topologies = SINGLE if platform == "tpu" else (H100,)
    directions: tuple[Direction, ...] = ("forward", "both")
    for topology, size, name, direction in itertools.product(
        topologies, SIZES, INSTANTIATIONS, directions
    ):
        names = implementations(name, size, platform)
        for competitor in names + ([ATTENTION] if name == "embedded_gaussian" else []):
            yield Case(topology, "operation", name, size, BATCH, competitor, direction)
        if size[0] in POSITIONS and size[0] < 12544:
            for competitor in names:
                yield Case(topology, "block", name, size, BATCH, competitor, direction)


def _networks_on_tpus() -> Iterator[Case]:
    """Yields I3D on every chip for clips of 32×2, and on v5e for 8×8 and by plain Flax as well."""
    for network, competitor in itertools.product(CLIPS, (OURS, PLAIN)):
        chips = len(SINGLE) if (network, competitor) == ("i3d_32x2", OURS) else 1
        for topology in SINGLE[:chips]:
            yield Case(topology, "inference", network, None, BATCH, competitor, "forward")
        for topology in SIXTEEN[:chips]:
            yield Case(topology, "training", network, None, 64, competitor, "both")
    yield Case("v5e:16x16", "training", "i3d_32x2", None, 1024, OURS, "both")
    yield Case("v5e:2x2", "training", "cifar", None, 512, OURS, "both")


def _networks_on_a_gpu() -> Iterator[Case]:
    """Yields the same networks, with as many samples in a training step as a TPU has."""
    for network, competitor in itertools.product(CLIPS, (OURS, PLAIN)):
        yield Case(H100, "inference", network, None, BATCH, competitor, "forward")
        yield Case(H100, "training", network, None, 4, competitor, "both")
    yield Case(H100, "training", "cifar", None, 128, OURS, "both")


def implementations(instantiation: Instantiation, size: Size, platform: Platform) -> list[str]:
    """Returns the implementations of an operation that a platform has.

    cuDNN's attention is left out: without a GPU, JAX cannot trace it for 256 channels.
    """
    # If "auto" is not asked for, those that it never takes are available too.
    costs = explanation(instantiation, size, platform, "dense").costs
    names = [cost.implementation for cost in costs if cost.refusal is None]
    return [name for name in names if name != "cudnn"]


def explanation(
    instantiation: Instantiation, size: Size, platform: Platform, implementation: str = "auto"
) -> nl.ops.Explanation:
    """Returns what runs on a platform, and the alternatives."""
    n, m, d = size
    rows = (jax.ShapeDtypeStruct((BATCH, count, d), jnp.bfloat16) for count in (n, m, m))
    return nl.ops.explain(instantiation, *rows, implementation=implementation, platform=platform)
