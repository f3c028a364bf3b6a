"""The affinity f(x_i, x_j) / C(x) of one non-local block, whose rows are computed on request."""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from nonlocal_jax import ops
from nonlocal_jax.types import Array, Instantiation
from nonlocal_jax.visualize.geometry import Geometry, GeometryError, check_side

MAX_QUERIES = 4096  # in one call of `rows`
MAX_BYTES = 1 << 30  # in the result of one call of `rows`
CHUNK_ENTRIES = 1 << 22  # 16 MiB of float32

# Flat positions of some queries and of the keys they sum over, and the affinities (B, n, m).
Chunk = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"], Float[np.ndarray, "b n m"]]


@dataclasses.dataclass(frozen=True, eq=False)
class AffinityMap:
    """The affinity of one block on some clips, read by `rows`, `top`, `measures` and the pictures.

    Holds θ, φ and w_f and computes rows of f / C from them. The N×M matrix of all pairs is never
    stored.

    Attributes:
        block: Name of the block: the path of the module.
        instantiation: The pairwise function f. Rows of the two Gaussians sum to 1, rows of the dot
            product are signed, and those of the concatenation are non-negative and unbounded.
        queries: Size of the map of the queries: (T, H, W), (H, W) or (N,).
        keys: Size of the map of the keys, smaller than `queries` if they are subsampled.
        window: Subsampling of the keys along each axis.
        batch: Number of clips B.
        chunk_entries: Number of affinities that are computed at once.
    """

    block: str
    instantiation: Instantiation
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    window: tuple[int, ...]
    batch: int
    _geometry: Geometry | GeometryError = dataclasses.field(repr=False)
    # (B, S, N, d), (B, S, M, d), (2d,), (B, S, M): S sums over N queries and M keys each.
    _theta: Any = dataclasses.field(repr=False)
    _phi: Any = dataclasses.field(repr=False)
    _w_f: Any = dataclasses.field(repr=False)
    _key_mask: Any = dataclasses.field(repr=False)
    _scale: Any = dataclasses.field(repr=False)
    # (S, N) and (S, M): flat position of each query and key.
    _query_ids: Any = dataclasses.field(repr=False)
    _key_ids: Any = dataclasses.field(repr=False)
    chunk_entries: int = dataclasses.field(default=CHUNK_ENTRIES, repr=False)

    def geometry(self, of: str = "queries") -> Geometry:
        """Returns the receptive fields of the "queries" or of the "keys".

        Raises:
            GeometryError: The network between the input and the block cannot be followed; the
                message says why.
        """
        check_side(of)
        if isinstance(self._geometry, GeometryError):
            raise GeometryError(f"{self.block}: {self._geometry}")
        return self._geometry if of == "queries" else self._geometry.pooled(self.window)

    @property
    def summed(self) -> int:
        """Number of keys that each position sums over, masked keys included."""
        return int(self._key_ids.shape[1])

    @property
    def sums(self) -> tuple[Int[np.ndarray, "s n"], Int[np.ndarray, "s m"]]:
        """Flat positions of the queries and of the keys of each sum.

        There is one sum over spacetime, one for each frame if `axes="space"`, one for each pixel if
        `axes="time"`.
        """
        return self._query_ids, self._key_ids

    def counted(self) -> Int[np.ndarray, "b *queries"]:
        """Returns the number of keys that each position sums over, without masked keys."""
        counts = np.full((self.batch, math.prod(self.queries)), self.summed)
        if self._key_mask is not None:
            real_keys = np.asarray(self._key_mask).sum(axis=-1)
            counts[:, self._query_ids] = real_keys[..., None]
        return counts.reshape(self.batch, *self.queries)

    def rows(self, queries: Any) -> Float[np.ndarray, "b q *keys"]:
        """Returns rows of the affinity: what some positions attend to.

        Args:
            queries: (Q, axes) or (axes,), positions of the map, such as (frame, row, column); at
                most 4,096.

        Returns:
            (B, Q, *keys), float32. Keys outside the sum of a query are 0, such as those of other
            frames in a space-only block.

        Raises:
            ValueError: Too many queries, more than 1 GiB of rows, or affinities that are not
                finite.
            IndexError: A query outside the map.
        """
        ids = self.flat(queries)
        keys = math.prod(self.keys)
        if len(ids) > MAX_QUERIES:
            raise ValueError(
                f"queries must be at most {MAX_QUERIES:,} in one call; got {len(ids):,}. Pass "
                "them in parts, or use `top` or a summary such as `measures.entropy`, which "
                "process all queries without storing the rows."
            )
        if (size := 4 * self.batch * len(ids) * keys) > MAX_BYTES:
            raise ValueError(
                f"rows must take at most {MAX_BYTES >> 20:,} MiB; {len(ids):,} queries of "
                f"{self.batch} clips take {size >> 20:,} MiB. Pass them in parts, select one clip "
                "(`maps[block][clip]`), or use `top`."
            )
        rows = np.zeros((self.batch, len(ids), keys), np.float32)
        for selection, key_ids, weights in self._chunks(ids):
            rows[:, selection[:, None], key_ids] = weights
        return rows.reshape(self.batch, len(ids), *self.keys)

    def top(
        self, k: int, queries: Any = None
    ) -> tuple[Float[np.ndarray, "b q k"], Int[np.ndarray, "b q k axes"]]:
        """Returns the k keys with the largest |f / C| for some or all positions; stores no rows.

        Args:
            k: Number of keys; at most the number that are summed.
            queries: (Q, axes) positions of the map, any number of them; None for all in row-major
                order.

        Returns:
            The affinities (B, Q, k), in descending order of |f / C|, and the positions of the keys
            (B, Q, k, axes).

        Raises:
            ValueError: k below 1 or above the number of keys that are summed, or affinities that
                are not finite.
            IndexError: A query outside the map.
            TypeError: k that is not an integer.
        """
        k = operator.index(k)
        if not 1 <= k <= self.summed:
            raise ValueError(
                f"k must be between 1 and {self.summed}, the number of keys that each position of "
                f"{self.block} sums over; got {k}."
            )
        ids = np.arange(math.prod(self.queries)) if queries is None else self.flat(queries)
        affinities = np.zeros((self.batch, len(ids), k), np.float32)
        flat_keys = np.zeros((self.batch, len(ids), k), np.int64)
        for selection, key_ids, weights in self._chunks(ids):
            order = np.asarray(jax.lax.top_k(jnp.abs(weights), k)[1])
            affinities[:, selection] = np.take_along_axis(weights, order, axis=-1)
            flat_keys[:, selection] = key_ids[order]
        return affinities, np.stack(np.unravel_index(flat_keys, self.keys), axis=-1)

    def __getitem__(self, clip: int) -> "AffinityMap":
        """Returns the map of one clip of the batch."""
        if not -self.batch <= clip < self.batch:
            raise IndexError(
                f"clip must be an index of the batch of {self.batch} clips; got {clip}."
            )
        clip %= self.batch
        selection = slice(clip, clip + 1)
        return dataclasses.replace(
            self,
            batch=1,
            _theta=self._theta[selection],
            _phi=self._phi[selection],
            _key_mask=None if self._key_mask is None else self._key_mask[selection],
        )

    def chunks(self) -> Iterator[Chunk]:
        """Yields all rows in chunks: flat queries, the flat keys they sum over, and f / C."""
        yield from self._chunks(np.arange(math.prod(self.queries)))

    def flat(self, queries: Any) -> Int[np.ndarray, " q"]:
        """Returns positions (Q, axes) or (axes,) as indices of the map in row-major order.

        Raises:
            ValueError: Positions that are not integers, or have another number of axes than the
                map.
            IndexError: A position outside the map.
        """
        queries = np.asarray(queries)
        axes = len(self.queries)
        integers = np.issubdtype(queries.dtype, np.integer)
        if queries.ndim not in (1, 2) or queries.shape[-1] != axes or not integers:
            raise ValueError(
                f"queries must be integers of shape (Q, {axes}), positions of the map "
                f"{self.queries}; got {queries.dtype} of shape {queries.shape}."
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
        """Returns one position as a tuple of integers.

        Raises:
            ValueError: More than one position.
            IndexError: A position outside the map.
        """
        if len(self.flat(query)) != 1:
            raise ValueError(
                f"query must be a single position of the map {self.queries} of {self.block}; got "
                f"shape {np.shape(query)}."
            )
        return tuple(np.asarray(query).reshape(-1).tolist())

    def _chunks(self, ids: Any) -> Iterator[Chunk]:
        """Yields rows of some flat queries: indices in `ids`, flat keys, and f / C (B, n, M)."""
        queries_per_sum = self._query_ids.shape[1]
        slots = np.argsort(self._query_ids, axis=None)[ids]  # where each query is in (S, N)
        sums, columns = np.divmod(slots, queries_per_sum)
        size = max(self.chunk_entries // (self.batch * self.summed), 1)
        for index in np.unique(sums):
            (members,) = np.nonzero(sums == index)
            for start in range(0, len(members), size):
                selection = members[start : start + size]
                weights = self._affinity(index, columns[selection])
                self._check_finite(weights, ids[selection])
                yield selection, self._key_ids[index], weights

    def _affinity(self, index: Any, columns: Any) -> Float[np.ndarray, "b n m"]:
        """Computes f / C of some queries of one sum."""
        theta, phi = self._theta[:, index, columns], self._phi[:, index]
        mask = None if self._key_mask is None else self._key_mask[:, index]
        weights = _dense_affinity(self.instantiation, theta, phi, self._w_f, self._scale, mask)
        return np.asarray(weights).astype(np.float32)

    def _check_finite(self, weights: Any, query_ids: Any) -> None:
        finite = np.isfinite(weights).all(axis=(0, 2))
        if not finite.all():
            query = np.unravel_index(query_ids[~finite][0], self.queries)
            raise ValueError(
                f"affinities must be finite; {self.block} has NaN or infinity at "
                f"{tuple(map(int, query))}. Check the weights and the clip."
            )


@functools.partial(jax.jit, static_argnums=0)
def _dense_affinity(
    instantiation: Instantiation, theta: Array, phi: Array, w_f: Any, scale: Any, key_mask: Any
) -> Array:
    options = {"scale": scale} if instantiation == "embedded_gaussian" else {}
    return ops.affinity(instantiation, theta, phi, w_f, key_mask=key_mask, **options)
