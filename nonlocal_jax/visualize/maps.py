"""The affinity f(x_i, x_j) / C(x) of every non-local block of a network, row by row, as it is asked for."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax import ops
from nonlocal_jax.layers.instantiations import to_rows
from nonlocal_jax.layers.tap import PairwiseCall, SumLayout, tap
from nonlocal_jax.types import Array, Instantiation
from nonlocal_jax.visualize.geometry import Geometry, GeometryError
from nonlocal_jax.visualize.tracing import applied, geometries, numbered, place, untraced

MOST_QUERIES = 4096  # of one call of `rows`
MOST_BYTES = 1 << 30  # of what one call of `rows` returns
CHUNK = 1 << 22  # affinities that are computed at once


class NoBlocksError(ValueError):
    """A model without non-local blocks."""


@dataclasses.dataclass(frozen=True, eq=False)
class AffinityMap:
    """The affinity of one block on some clips: what `rows`, `top` and the pictures read.

    It holds θ, φ and w_f, and computes rows of f / C from them: never the N×M numbers of all pairs at once.

    Attributes:
        block: its name, the path of the module.
        instantiation: the pairwise function f. Rows of the two Gaussians sum to 1; those of the dot product are signed, those
            of the concatenation unbounded.
        queries: the size of the map, (T, H, W), (H, W) or (N,).
        keys: the size of the map of the keys, smaller where they are subsampled.
        window: the subsampling, along each axis.
        batch: B, how many clips.
    """

    block: str
    instantiation: Instantiation
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: tuple[int, ...]
    batch: int
    _geometry: Geometry | GeometryError = dataclasses.field(repr=False)
    # (B, outer, N, d), (B, outer, M, d), (2d,), (B, outer, M): the positions of one sum are of one index of `outer`.
    _theta: Any = dataclasses.field(repr=False)
    _phi: Any = dataclasses.field(repr=False)
    _w_f: Any = dataclasses.field(repr=False)
    _key_mask: Any = dataclasses.field(repr=False)
    _scale: Any = dataclasses.field(repr=False)
    # (outer, N) and (outer, M): which flat position each is.
    _query_ids: Any = dataclasses.field(repr=False)
    _key_ids: Any = dataclasses.field(repr=False)

    def geometry(self, of: str = "queries") -> Geometry:
        """The receptive fields of the "queries" or of the "keys". Raises GeometryError where the path cannot be followed."""
        if of not in ("queries", "keys"):
            raise ValueError(f"of must be 'queries' or 'keys'; got {of!r}.")
        if isinstance(self._geometry, GeometryError):
            raise GeometryError(f"{self.block}: {self._geometry}")
        return self._geometry if of == "queries" else self._geometry.pooled(self.window)

    @property
    def summed(self) -> int:
        """How many keys each position sums, masked ones included."""
        return int(self._key_ids.shape[1])

    @property
    def sums(self) -> tuple[Int[np.ndarray, "s n"], Int[np.ndarray, "s m"]]:
        """The flat positions of the queries and of the keys of each sum: one sum over spacetime, one a frame over space, ..."""
        return self._query_ids, self._key_ids

    def counted(self) -> Int[np.ndarray, "b *queries"]:
        """How many keys each position sums, without masked ones."""
        counts = np.full((self.batch, math.prod(self.queries)), self.summed)
        if self._key_mask is not None:
            counts[:, self._query_ids] = np.asarray(self._key_mask).sum(axis=-1)[..., None]
        return counts.reshape(self.batch, *self.queries)

    def rows(self, queries: Any) -> Float[np.ndarray, "b q *keys"]:
        """Where some positions look: their rows of the affinity.

        Args:
            queries: (Q, axes) or (axes,), positions of the map, such as (frame, row, column); at most 4,096.

        Returns:
            (B, Q, *keys), float32; 0 where a key is not summed, as those of other frames in a space-only block.

        Raises:
            ValueError: too many queries, more than 1 GiB of rows, or affinities that are not finite.
            IndexError: a query outside the map.
        """
        ids = self.flat(queries)
        if len(ids) > MOST_QUERIES:
            raise ValueError(
                f"queries must be at most {MOST_QUERIES:,} at once; got {len(ids):,}. Ask for them in parts, or for `top`, "
                f"`entropy` or another summary, which take all without keeping them."
            )
        if (size := 4 * self.batch * len(ids) * math.prod(self.keys)) > MOST_BYTES:
            raise ValueError(
                f"rows must hold at most {MOST_BYTES >> 20:,} MiB; those of {len(ids):,} queries of {self.batch} clips hold "
                f"{size >> 20:,}. Ask for them in parts, for one clip (`maps[block][clip]`), or for `top`."
            )
        out = np.zeros((self.batch, len(ids), math.prod(self.keys)), np.float32)
        for wanted, key_ids, weights in self._chunks(ids):
            out[:, wanted[:, None], key_ids] = weights
        return out.reshape(self.batch, len(ids), *self.keys)

    def top(
        self, k: int, queries: Any = None
    ) -> tuple[Float[np.ndarray, "b q k"], Int[np.ndarray, "b q k axes"]]:
        """The k keys with the largest |f / C| of some positions, or of all; rows are not kept.

        Args:
            k: how many; at most as many as are summed.
            queries: (Q, axes) positions of the map, any number; None is all, in row-major order.

        Returns:
            Their affinities (B, Q, k), the largest first, and their positions among the keys (B, Q, k, axes).

        Raises:
            ValueError: k that is not from 1 to the keys that are summed, or affinities that are not finite.
            IndexError: a query outside the map.
            TypeError: k that is not an integer.
        """
        k = operator.index(k)
        if not 1 <= k <= self.summed:
            raise ValueError(
                f"k must be from 1 to {self.summed}, the keys that each position of {self.block} sums; got {k}."
            )
        ids = np.arange(math.prod(self.queries)) if queries is None else self.flat(queries)
        weights = np.zeros((self.batch, len(ids), k), np.float32)
        places = np.zeros((self.batch, len(ids), k), np.int64)
        for wanted, key_ids, chunk in self._chunks(ids):
            order = np.asarray(jax.lax.top_k(jnp.abs(chunk), k)[1])
            weights[:, wanted], places[:, wanted] = (
                np.take_along_axis(chunk, order, axis=-1),
                key_ids[order],
            )
        return weights, np.stack(np.unravel_index(places, self.keys), axis=-1)

    def __getitem__(self, clip: int) -> "AffinityMap":
        """That of one clip of the batch."""
        if not -self.batch <= clip < self.batch:
            raise IndexError(f"clip must be one of the {self.batch} of the batch; got {clip}.")
        clip %= self.batch
        mask = None if self._key_mask is None else self._key_mask[clip : clip + 1]
        one = slice(clip, clip + 1)
        return dataclasses.replace(
            self, batch=1, _theta=self._theta[one], _phi=self._phi[one], _key_mask=mask
        )

    def chunks(
        self,
    ) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], Float[np.ndarray, "b n m"]]]:
        """All rows, a few at a time: flat positions of the queries and of the keys that they sum, and their affinities."""
        yield from self._chunks(np.arange(math.prod(self.queries)))

    def flat(self, queries: Any) -> Int[np.ndarray, " q"]:
        """Positions (Q, axes) or (axes,) as indices of the map in row-major order. Raises IndexError where one lies outside."""
        queries = np.asarray(queries)
        axes = len(self.queries)
        if (
            queries.ndim not in (1, 2)
            or queries.shape[-1] != axes
            or not np.issubdtype(queries.dtype, np.integer)
        ):
            raise ValueError(
                f"queries must be integers, (Q, {axes}) positions of the map {self.queries}; got {queries.dtype} of shape "
                f"{queries.shape}."
            )
        queries = queries.reshape(-1, axes)
        outside = ((queries < 0) | (queries >= np.array(self.queries))).any(axis=-1)
        if outside.any():
            query = tuple(map(int, queries[outside][0]))
            raise IndexError(
                f"a query must lie inside the map {self.queries} of {self.block}; got {query}."
            )
        return np.ravel_multi_index(tuple(queries.T), self.queries)

    def single(self, query: Any) -> tuple[int, ...]:
        """One position, as integers. Raises ValueError for several, IndexError outside of the map."""
        if len(self.flat(query)) != 1:
            raise ValueError(
                f"query must be one position of the map {self.queries} of {self.block}; got {np.shape(query)}."
            )
        return tuple(np.asarray(query).reshape(-1).tolist())

    def _chunks(self, ids: Any) -> Iterator[tuple[Any, Any, Any]]:
        """Of flat queries: their indices in `ids`, the flat keys that they sum, and f / C (B, n, M)."""
        n = self._query_ids.shape[1]
        order = np.argsort(self._query_ids, axis=None)[ids]  # where each is in (outer, N)
        size = max(CHUNK // (self.batch * self._key_ids.shape[1]), 1)
        for o in np.unique(order // n):
            (wanted,) = np.nonzero(order // n == o)
            for at in range(0, len(wanted), size):
                chunk = wanted[at : at + size]
                mask = None if self._key_mask is None else self._key_mask[:, o]
                theta, phi = self._theta[:, o, order[chunk] % n], self._phi[:, o]
                weights = np.asarray(
                    _affinity(self.instantiation, theta, phi, self._w_f, self._scale, mask)
                )
                if not np.isfinite(weights).all():
                    query = np.unravel_index(
                        ids[chunk[np.nonzero(~np.isfinite(weights))[1][0]]], self.queries
                    )
                    raise ValueError(
                        f"affinities must be finite; those of {self.block} at {tuple(map(int, query))} are NaN or infinity. "
                        "Look at the weights and at the clip."
                    )
                yield chunk, self._key_ids[o], weights.astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _affinity(
    instantiation: Instantiation, theta: Array, phi: Array, w_f: Any, scale: Any, key_mask: Any
) -> Array:
    options = {"scale": scale} if instantiation == "embedded_gaussian" else {}
    return ops.affinity(instantiation, theta, phi, w_f, key_mask=key_mask, **options)


def affinities(
    model: Any, variables: Any, clip: Any, blocks: Sequence[str] | str | None = None, **kwargs: Any
) -> dict[str, AffinityMap]:
    """The affinity of the non-local blocks of any network on a clip.

    The network runs once; rows of f / C are computed when they are asked for, so that 10,000 × 10,000 pairs are never kept.
    Each call compiles the network anew: many clips at once are faster than one after another.

    Args:
        model: any Linen module, or an NNX module with blocks by `nnx.bridge.ToNNX`.
        variables: its variables; None for an NNX module, which holds its own.
        clip: (B, T, H, W, C), (B, H, W, C) or (B, N, C), what the model takes.
        blocks: names of the blocks, their paths; None is all.
        **kwargs: more arguments of the model.

    Returns:
        By name, in the order in which they run, an `AffinityMap` each. A block that runs again is `block#2`.

    Raises:
        NoBlocksError: a model without non-local blocks.
        ValueError: a name that there is not (the error lists those that are), a clip that the model does not take, or blocks
            inside `nn.scan`, `nn.vmap`, `nnx.remat` and the like, or split over devices; before the network runs.
        TypeError: a model that is neither Linen nor NNX, no variables of a Linen module, or some of an NNX module.

    Source: section 3.1, Eq. 1, and Figures 1 and 3.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import nonlocal_jax as nl
    >>> model = nn.Sequential([nn.Conv(8, (3, 3), strides=2), nl.layers.nonlocal_block("embedded_gaussian")])
    >>> image = jax.random.normal(jax.random.key(0), (1, 24, 24, 3))
    >>> maps = affinities(model, model.init(jax.random.key(1), image), image)
    >>> maps["layers_1"].queries, maps["layers_1"].keys
    ((12, 12), (6, 6))
    >>> row = maps["layers_1"].rows((5, 7))[0, 0]  # where row 5, column 7 looks
    >>> row.shape, round(float(row.sum()), 4)
    ((6, 6), 1.0)
    """
    if jnp.ndim(clip) < 3:
        raise ValueError(
            f"clip must have shape (B, *positions, C), as the model takes it; got {jnp.shape(clip)}."
        )
    clip = jnp.asarray(clip)
    apply, variables = applied(model, variables)
    calls: list[_Call] = []

    def run(variables: Any, clip: Array) -> list[Any]:
        calls.clear()
        with untraced(), tap(functools.partial(_record, calls)):
            sown = apply(variables, clip, mutable=["intermediates"], **kwargs)[1].get(
                "intermediates", {}
            )
        return [call.pairs(sown if isinstance(model, nn.Module) else None) for call in calls]

    def of_wanted(variables: Any, clip: Array) -> dict[str, Any]:
        return {
            call.block: pairs
            for call, pairs in zip(calls, run(variables, clip), strict=True)
            if call.block in wanted
        }

    jax.eval_shape(run, variables, clip)
    if not calls:
        raise NoBlocksError(
            f"the model must have non-local blocks; {type(model).__name__} has none."
        )
    names = [call.block for call in calls]
    wanted = names if blocks is None else [blocks] if isinstance(blocks, str) else list(blocks)
    if unknown := [name for name in wanted if name not in names]:
        raise ValueError(
            f"blocks must be among {', '.join(names)}; got {', '.join(map(repr, unknown))}."
        )
    try:  # under jit, what is sown beside the pairs (the N×M maps) is never computed
        kept = jax.jit(of_wanted)(variables, clip)
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            f"blocks must not be inside nnx.remat, nnx.scan or nnx.vmap; of {', '.join(names)} one or more are."
        ) from error
    missing = GeometryError("it was not met where the network was traced.")
    paths: dict[str, Geometry | GeometryError] = {}
    try:
        paths = geometries(apply, variables, clip, **kwargs)
    except Exception as error:  # whatever a model raises
        missing = GeometryError(f"the network cannot be traced with one clip: {error}")
    return {
        call.block: _map(call, kept[call.block], paths.get(call.block, missing))
        for call in calls
        if call.block in wanted
    }


@dataclasses.dataclass
class _Call:
    """One run of an operation while the network is traced."""

    name: str  # of the block
    index: int  # of the run, where the block runs again
    path: tuple[str, ...]  # of the operation
    instantiation: Instantiation
    layout: SumLayout
    arrays: Any  # θ, φ, the mask of the keys, w_f, and the scale

    @property
    def block(self) -> str:
        """The name of the map."""
        return numbered(self.name, self.index)

    def pairs(self, sown: Any) -> Any:
        """The arrays: in Linen those that the module has sown, as they came out of what it is inside of, such as `nn.remat`."""
        if sown is None:
            return self.arrays
        try:
            found = functools.reduce(operator.getitem, self.path, sown)["pairs"][self.index]
        except (LookupError, TypeError):
            found = None
        if found is None or found[0].shape != self.arrays[0].shape:
            raise ValueError(
                f"blocks must not be inside nn.scan, nn.vmap or nnx.bridge.ToLinen; {self.block} is."
            )
        return found


def _record(calls: list[_Call], call: PairwiseCall) -> Array:
    """Writes down each run of a non-local operation."""
    name = place(call.block or call.module)
    axis_name = getattr(call.module, "axis_name", None)
    if axis_name is not None:
        raise ValueError(f"{name} must not be split over devices; got axis_name={axis_name!r}.")
    layout = call.layout or SumLayout((call.theta.shape[-2],), (1,))
    arrays = (call.theta, call.phi, call.key_mask, call.w_f, call.scale)
    index = sum(one.name == name for one in calls)
    calls.append(_Call(name, index, call.module.path, call.instantiation, layout, arrays))
    call.module.sow("intermediates", "pairs", arrays)
    with jax.disable_jit(False):  # loops are not unrolled
        return call.respond()


def _map(call: _Call, pairs: Any, geometry: Geometry | GeometryError) -> AffinityMap:
    theta, phi, key_mask, w_f, scale = pairs
    layout = call.layout
    keys = tuple(n // size for n, size in zip(layout.positions, layout.window, strict=True))

    def ids(size: tuple[int, ...]) -> Any:
        flat = np.asarray(
            to_rows(jnp.arange(math.prod(size)).reshape(1, *size, 1), layout.axes, layout.groups)
        )
        return flat.reshape(-1, flat.shape[-2])

    def rows(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, *x.shape[-2:])

    return AffinityMap(
        block=call.block,
        instantiation=call.instantiation,
        queries=layout.positions,
        keys=keys,
        window=layout.window,
        batch=theta.shape[0],
        _geometry=geometry,
        _theta=rows(theta),
        _phi=rows(phi),
        _w_f=w_f,
        _key_mask=None if key_mask is None else rows(key_mask[..., None])[..., 0],
        _scale=scale,
        _query_ids=ids(layout.positions),
        _key_ids=ids(keys),
    )
