"""What is measured: operations, blocks, sizes, competitors, and the input arrays."""

import dataclasses
import math
import zlib
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from nonlocal_jax.layers.conventions import ClipFormat
from nonlocal_jax.types import Instantiation

Section = Literal["operation", "block", "growth", "network"]
Direction = Literal["forward", "both"]  # "both": the response and every gradient
Competitor = Literal[
    "auto",
    "dense",
    "cudnn",
    "copy",
    "plain",
    "torch pairs",
    "torch sdpa",
    "torch cudnn",
    "torch contiguous",
    "torch channels_last",
    "torch compiled",
    "mmcv contiguous",
    "mmcv channels_last",
]
Floats = npt.NDArray[np.floating[Any]]

INSTANTIATIONS: tuple[Instantiation, ...] = get_args(Instantiation)
LIBRARY: dict[Competitor, Literal["jax", "torch"]] = {
    "auto": "jax",
    "dense": "jax",
    "cudnn": "jax",
    "copy": "jax",
    "plain": "jax",
    "torch pairs": "torch",
    "torch sdpa": "torch",
    "torch cudnn": "torch",
    "torch contiguous": "torch",
    "torch channels_last": "torch",
    "torch compiled": "torch",
    "mmcv contiguous": "torch",
    "mmcv channels_last": "torch",
}
GROWTH_WIDTH = 64  # d of the growth cases
MMCV_CONCATENATION = (
    "mmcv's concatenation divides the saved output of a ReLU in place, which breaks its gradient, "
    "so only its forward pass is measured."
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation or block at one size, or a whole network.

    Attributes:
        section: "operation" and "growth" are functions of `nonlocal_jax.ops`, "block" is a whole
            block, and "network" is I3D R50 with five blocks, the largest of which has this n, m and
            d.
        instantiation: The pairwise function.
        n: Number of queries.
        m: Number of keys.
        d: Channels of θ, φ and g. A block has 2d, as do the queries and keys of its Gaussian.
        where: Where in a network this size occurs.
        positions: (T, H, W) of a block, or of the clips of a network.
        batch: Number of samples.
    """

    section: Section
    instantiation: Instantiation
    n: int
    m: int
    d: int
    where: str
    positions: tuple[int, ...] = ()
    batch: int = 1

    @property
    def clip(self) -> ClipFormat:
        """Format of the clips of a network."""
        return "32x2" if self.positions[0] == 32 else "8x8"

    @property
    def name(self) -> str:
        return f"{self.section}/{self.instantiation}/{self.n}/{self.m}/{self.d}"

    @property
    def size(self) -> tuple[int, int, int]:
        return self.n, self.m, self.d

    @property
    def weight(self) -> float:
        """Roughly how long the case takes, for the progress bar."""
        return 40 if self.section == "network" else 1 + self.n * self.m * self.d / 2e9


@dataclasses.dataclass(frozen=True)
class Job:
    """One case, computed by one competitor."""

    case: Case
    competitor: Competitor
    direction: Direction
    dtype: Literal["float32", "bfloat16"] = "float32"


SIZES = {
    (784, 196, 512): "res4 of an 8×8 or 32×2 clip, pooled keys",
    (3136, 784, 256): "res3 of an 8×8 or 32×2 clip, pooled keys",
    (4200, 4200, 512): "a 50×84 detection map, all keys",
    (12544, 3136, 256): "res3 of 128 frames, pooled keys",
    (12544, 12544, 256): "res3 of 128 frames, all keys",
}
POSITIONS = {784: (4, 14, 14), 3136: (4, 28, 28), 12544: (16, 28, 28)}  # of a block, by N
GROWTH: dict[Instantiation, tuple[int, ...]] = {
    "concatenation": (3136, 12544, 50176, 200704),
    "dot_product": (3136, 12544, 50176, 200704),
    "embedded_gaussian": (3136, 12544),
}


NETWORK = Case(
    "network",
    "embedded_gaussian",
    3136,
    784,
    256,
    "I3D R50, 5 blocks, 2 clips of 8×224×224",
    (8, 224, 224),
    batch=2,
)


def list_cases() -> list[Case]:
    """Returns every case, small ones first."""
    operations = [
        Case("operation", name, *size, where)
        for size, where in SIZES.items()
        for name in INSTANTIATIONS
    ]
    blocks = [
        block(name, *size) for size in SIZES if size[0] in (784, 3136) for name in INSTANTIATIONS
    ]
    blocks.append(block("dot_product", 12544, 12544, 256))
    growth = [
        Case("growth", name, n, n // 4, GROWTH_WIDTH, "pooled keys")
        for name, lengths in GROWTH.items()
        for n in lengths
    ]
    return operations + blocks + growth + [NETWORK]


def block(instantiation: Instantiation, n: int, m: int, d: int) -> Case:
    """Returns the case of a block with 2d channels at one of `SIZES`."""
    return Case("block", instantiation, n, m, d, SIZES[n, m, d], POSITIONS[n])


def has_smallest_size(case: Case) -> bool:
    """Whether the case has the smallest size."""
    return case.n * case.m * case.d <= 784 * 196 * 512


def competitors(case: Case, free_bytes: float) -> list[tuple[Competitor, Direction]]:
    """Lists who computes a case, in which directions, leaving out what would not fit in memory."""
    if case.section == "network":
        return _every_direction("auto", "plain", "torch contiguous", "torch channels_last")
    pairs = 4 * case.n * case.m  # bytes
    if case.section == "growth":
        # The most that "dense" holds at once, in bytes.
        dense_bytes: dict[Direction, int] = {"forward": 2 * pairs, "both": 4 * pairs}
        dense: list[tuple[Competitor, Direction]] = [
            ("dense", direction)
            for direction, needed in dense_bytes.items()
            if needed < free_bytes / 2
        ]
        return _every_direction("auto", "copy") + dense
    torch: tuple[Competitor, ...] = (
        ("torch pairs", "torch sdpa") if "gaussian" in case.instantiation else ("torch pairs",)
    )
    if case.section == "operation":
        return _every_direction("auto", "dense", *torch)
    jax_and_torch = _every_direction("auto", *torch)
    mmcv = _every_direction("mmcv contiguous", "mmcv channels_last")
    if case.instantiation == "concatenation":
        # mmcv repeats and joins θ and φ for every pair: 15 GB were measured at 3136/784/256.
        fits = 6 * case.d * pairs < free_bytes
        mmcv = [pair for pair in mmcv if pair[1] == "forward" and fits]
    return jax_and_torch + mmcv


def _every_direction(*names: Competitor) -> list[tuple[Competitor, Direction]]:
    return [(name, direction) for name in names for direction in get_args(Direction)]


def inputs(case: Case) -> list[Floats]:
    """Returns θ (B, N, d), φ (B, M, d), g (B, M, d) and, for the concatenation, w_f (2d,).

    All samples are equal. Logits are roughly N(0, 1), so that a softmax over them is neither
    uniform nor one-hot.
    """
    random = np.random.default_rng(0)
    theta, phi = (
        random.standard_normal((1, rows, case.d), np.float32) * case.d**-0.25
        for rows in (case.n, case.m)
    )
    arrays = [theta, phi, random.standard_normal((1, case.m, case.d), np.float32)]
    arrays = [np.repeat(array, case.batch, axis=0) for array in arrays]
    if case.instantiation == "concatenation":
        arrays.append(random.standard_normal(2 * case.d, np.float32) * case.d**-0.5)
    return [array.astype(np.float32) for array in arrays]


def cotangent(case: Case) -> Floats:
    """Returns a cotangent of the response (B, N, d), or of a block's output (B, T, H, W, 2d)."""
    shape = (1, *case.positions, 2 * case.d) if case.section == "block" else (1, case.n, case.d)
    sample = np.random.default_rng(1).standard_normal(shape, np.float32)
    return np.repeat(sample, case.batch, axis=0)


def features(case: Case) -> Floats:
    """Returns the input of a block, (B, T, H, W, 2d)."""
    x = np.random.default_rng(2).standard_normal((1, *case.positions, 2 * case.d), np.float32)
    return np.repeat(x * np.float32((2 * case.d) ** -0.25), case.batch, axis=0)


def weights(case: Case) -> dict[str, Floats]:
    """Returns a block's weights: kernels (inputs, outputs), biases, w_f and BatchNorm's."""
    random = np.random.default_rng(3)
    channels, d = 2 * case.d, case.d

    def normal(*shape: int) -> Floats:
        return (random.standard_normal(shape) / math.sqrt(shape[0])).astype(np.float32)

    names = ("g",) if case.instantiation == "gaussian" else ("theta", "phi", "g")
    kernels = {f"{name}.kernel": normal(channels, d) for name in names}
    biases = {f"{name}.bias": normal(d) for name in names}
    projection = {"w_f": normal(2 * d)} if case.instantiation == "concatenation" else {}
    norm = {
        "scale": normal(channels) + 1,
        "bias": normal(channels),
        "mean": normal(channels),
        "var": normal(channels) ** 2 + 1,
    }
    return kernels | biases | projection | {"out.kernel": normal(d, channels)} | norm


def clips(case: Case) -> Floats:
    """Returns the input of a network, (B, T, H, W, 3)."""
    shape = case.batch, *case.positions, 3
    return np.random.default_rng(4).standard_normal(shape, np.float32)


def network_weight(name: str, shape: tuple[int, ...]) -> Floats:
    """Returns one array of a network, by its name in PySlowFast.

    Norms and statistics stay away from 0 and 1, residuals are small, and logits are about 1.
    """
    random = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        gain = 0.5 if "conv_theta" in name or "conv_phi" in name else 2.0
        return (
            random.standard_normal(shape, np.float32) * math.sqrt(gain / math.prod(shape[1:]))
        ).astype(np.float32)
    if name.endswith("running_var"):
        low, high = 0.8, 1.2
    elif name.endswith("bn.weight"):
        low, high = (0.1, 0.3) if "c_bn" in name or "nonlocal" in name else (0.5, 1.0)
    else:
        low, high = -0.1, 0.1
    return random.uniform(low, high, shape).astype(np.float32)
