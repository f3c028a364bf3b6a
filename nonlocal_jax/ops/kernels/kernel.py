"""What a kernel offers: one row of the table in `kernels/__init__.py`.

A kernel computes Eq. 1: it maps `Operands` to the same responses and gradients as `definition`
does, but faster or in less memory.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nonlocal_jax.ops import sharded
from nonlocal_jax.ops.definition import wide_dtype
from nonlocal_jax.ops.platforms import PLATFORMS
from nonlocal_jax.types import (
    Array,
    ConcatenationWeights,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)


class Operands(NamedTuple):
    """The checked arguments of a public function, the same for every kernel.

    Attributes:
        instantiation: The pairwise function f.
        theta: The queries (..., N, d); for the Gaussian, x.
        phi: The keys (..., M, d), 0 where a key is masked.
        g: The values (..., M, e), 0 where a key is masked.
        key_mask: The mask (..., M) of bool, True for a real key, or None.
        scale: Factor of the logits of the embedded Gaussian; 1 otherwise.
        w_f: The weights (2d,) of the concatenation; None otherwise.
    """

    instantiation: Instantiation
    theta: Queries
    phi: Keys
    g: Values
    key_mask: KeyMask | None
    scale: float | Array = 1.0
    w_f: ConcatenationWeights | None = None

    def gather_keys(self, axis_name: str) -> "Operands":
        """Returns the operands with the keys, values and mask of all devices of a mapped axis."""
        key_mask, phi, g = sharded.gather(axis_name, self.key_mask, self.phi, self.g)
        return self._replace(key_mask=key_mask, phi=phi, g=g)


class Sizes(NamedTuple):
    """Static facts about the operands, from which a kernel is chosen.

    Attributes:
        instantiation: The pairwise function f.
        batch: Number of samples, the product of all leading axes.
        n: Number of queries of a sample.
        m: Number of keys of a sample, over all devices.
        d: Channels of queries and keys.
        e: Channels of the values.
        dtype: The dtype of the values.
        masked: Whether there is a key mask.
        static: Whether N, M, d and e are known. A size that is symbolic, in `jax.export`, is
            replaced by a typical one.
    """

    instantiation: Instantiation
    batch: int
    n: int
    m: int
    d: int
    e: int
    dtype: Any
    masked: bool
    static: bool = True

    @property
    def pairs(self) -> int:
        """Number of pairs of a query and a key, over the whole batch."""
        return self.batch * self.n * self.m

    @property
    def is_empty(self) -> bool:
        """Whether there are no samples or no channels, so that there is nothing to compute."""
        return 0 in (self.batch, self.d, self.e)

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in the temporaries, which are float32 or wider."""
        return int(wide_dtype(self.dtype).itemsize)


class Forecast(NamedTuple):
    """What a kernel is forecast to cost. Pairs of numbers are without and with gradients.

    Attributes:
        flops: FLOPs, a multiply-add counted as 2.
        temporary: Peak bytes of temporaries, without inputs and results.
        seconds: Time of the response and of the response with its gradients, together. A roofline:
            FLOPs over the rate of matrix products, plus the traffic of temporaries that leave the
            cache over the rate of memory. Only ratios between kernels matter.
    """

    flops: tuple[int, int]
    temporary: tuple[int, int]
    seconds: float


def available_everywhere(sizes: Sizes, platform: str) -> None:
    """The `refusal` of a kernel that runs everywhere."""


def traceable_everywhere(sizes: Sizes) -> None:
    """The `untraceable` of a kernel that every host can trace."""


# The `settings` of a kernel that is the same on every platform.
NO_SETTINGS: Mapping[str, None] = dict.fromkeys(PLATFORMS)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One implementation of Eq. 1.

    Attributes:
        name: The name that `implementation=` takes.
        instantiations: The pairwise functions that it implements.
        respond: Computes the responses (..., N, e) from the operands and the settings of the
            platform that it is lowered for.
        cost: Forecasts its cost for given sizes on a platform in `PLATFORMS`.
        settings: What differs between platforms, such as the sizes of tiles, for each platform.
            Hashable; platforms with equal settings share their code.
        refusal: Returns why it is not available for given sizes on a platform, or None if it is.
        untraceable: Returns why this host cannot trace it for any platform, or None if it can.
        respond_split: Computes this device's responses where positions are split over the devices
            of a mapped axis, whose name is the third argument. None means that `respond` runs on
            the keys and values gathered from all devices.
        preferred_when_split: Whether "auto" takes this kernel whenever positions are split.
        needs_static_sizes: Whether it can be traced only where N, M, d and e are known.
        only_on_request: Why "auto" never takes this kernel; None if it may.
    """

    name: str
    instantiations: tuple[Instantiation, ...]
    respond: Callable[[Operands, Any], Responses]
    cost: Callable[[Sizes, str], Forecast]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_SETTINGS)
    refusal: Callable[[Sizes, str], str | None] = available_everywhere
    untraceable: Callable[[Sizes], str | None] = traceable_everywhere
    respond_split: Callable[[Operands, Any, str], Responses] | None = None
    preferred_when_split: bool = False
    needs_static_sizes: bool = True
    only_on_request: str | None = None
