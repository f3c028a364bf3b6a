"""What an affinity map is like, in numbers: how spread its rows are, and whether they depend on the query at all.

All of them are of the shares s_ij = |f_ij| / Σ_j |f_ij|, for the Gaussians the affinity itself; so the dot product, whose
weights are signed, and the concatenation, whose are unbounded, can be compared. Rows come a few at a time, never all N×M.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nonlocal_jax.visualize.maps import AffinityMap


class QueryDependence(NamedTuple):
    """How much the rows of a map differ between queries; 0 where all queries look at the same.

    Attributes:
        cosine: (B,), the mean over pairs of queries i ≠ i' of 1 − cos(s_i, s_i').
        jensen_shannon: (B,), the entropy of the mean row less the mean entropy of the rows, in nats: what the query tells
            of the key.
    """

    cosine: Float[np.ndarray, " b"]
    jensen_shannon: Float[np.ndarray, " b"]


def shares(weights: Float[np.ndarray, "*b m"]) -> Float[np.ndarray, "*b m"]:
    """s_ij = |f_ij| / Σ_j |f_ij|, over the last axis; a row of zeros, as ReLU may leave it, stays 0.

    >>> shares(np.array([[3.0, -1.0], [0.0, 0.0]]))
    array([[0.75, 0.25],
           [0.  , 0.  ]])
    """
    size = np.abs(weights)
    total = size.sum(axis=-1, keepdims=True)
    return size / np.where(total == 0, 1, total)


def entropy(affinity: AffinityMap) -> Float[np.ndarray, "b *queries"]:
    """H_i = −Σ_j s_ij log s_ij of every query, in nats: exp(H_i) is to how many keys it looks, in effect.

    Returns:
        (B, *queries), from 0 to the logarithm of the number of keys that are summed.

    Raises:
        ValueError: affinities that are not finite.
    """
    out = np.zeros((affinity.batch, math.prod(affinity.queries)), np.float32)
    for ids, _, weights in affinity.chunks():
        out[:, ids] = _entropy(shares(weights))
    return out.reshape(affinity.batch, *affinity.queries)


def received(affinity: AffinityMap) -> Float[np.ndarray, "b *keys"]:
    """How much each key is looked at: the mean of its share over the queries that sum it, times the number of keys they sum.

    Returns:
        (B, *keys); 1 where all are looked at alike, 0 where masked.

    Raises:
        ValueError: affinities that are not finite.
    """
    total = np.zeros((affinity.batch, math.prod(affinity.keys)))
    seen = np.zeros(math.prod(affinity.keys))
    counted = affinity.counted().reshape(affinity.batch, -1, 1)
    for ids, key_ids, weights in affinity.chunks():
        total[:, key_ids] += (counted[:, ids] * shares(weights)).sum(axis=1)
        seen[key_ids] += len(ids)
    return (total / np.maximum(seen, 1)).astype(np.float32).reshape(affinity.batch, *affinity.keys)


def time_by_time(affinity: AffinityMap) -> Float[np.ndarray, "b t keys_t"]:
    """How much each frame of a map attends to each: the mean over its queries of their shares there.

    Returns:
        (B, T, frames of the keys); rows sum to 1, less what rows of zeros, as ReLU may leave them, lack.

    Raises:
        ValueError: a map without frames, or affinities that are not finite.
    """
    if len(affinity.queries) != 3:
        raise ValueError(
            f"time by time wants a map of (T, H, W); {affinity.block} has {affinity.queries}."
        )
    frames, of_keys = affinity.queries[0], affinity.keys[0]
    out = np.zeros((affinity.batch, frames, of_keys))
    for ids, key_ids, weights in affinity.chunks():
        of_query, to = (
            ids // math.prod(affinity.queries[1:]),
            key_ids // math.prod(affinity.keys[1:]),
        )
        onto = np.stack(
            [shares(weights)[..., to == t].sum(axis=-1) for t in range(of_keys)], axis=-1
        )
        for t in np.unique(of_query):
            out[:, t] += onto[:, of_query == t].sum(axis=1)
    return (out / math.prod(affinity.queries[1:])).astype(np.float32)


def query_dependence(affinity: AffinityMap) -> QueryDependence:
    """How much the maps of different queries differ: the question of GCNet, which found them nearly alike.

    Compared are queries of one sum: of the same frame over space, of the same pixel over time; and then the mean is taken over
    the sums. Rows of zeros are left out; a sum of one row has 0. Over all pairs of queries, i = i' included, the mean of
    cos(s_i, s_i') is ‖mean of s_i / ‖s_i‖‖²; so no pair is left out.

    Raises:
        ValueError: affinities that are not finite.

    Source: Cao, Xu, Lin, Wei, Hu: GCNet, ICCV Workshops 2019, section 3.2.
    """
    queries, keys = math.prod(affinity.queries), math.prod(affinity.keys)
    units, total = np.zeros((2, affinity.batch, keys))
    entropies, there = np.zeros((2, affinity.batch, queries))
    for ids, key_ids, weights in affinity.chunks():
        s = shares(weights.astype(np.float64))
        norm = np.linalg.norm(s, axis=-1, keepdims=True)
        units[:, key_ids] += (s / np.where(norm == 0, 1, norm)).sum(axis=1)
        total[:, key_ids] += s.sum(axis=1)
        entropies[:, ids] = _entropy(s)
        there[:, ids] = norm[..., 0] > 0
    of_queries, of_keys = affinity.sums
    count = there[:, of_queries].sum(axis=-1)  # (B, sums), as all that follows
    rows = np.maximum(count, 1)
    alike = np.square(units[:, of_keys]).sum(
        axis=-1
    )  # Σ over all ordered pairs, of which `count` are i = i', with cos 1
    cosine = np.where(count > 1, 1 - (alike - count) / np.maximum(count * (count - 1), 1), 0)
    divergence = (
        _entropy(total[:, of_keys] / rows[..., None]) - entropies[:, of_queries].sum(axis=-1) / rows
    )
    return QueryDependence(*(each.clip(0).mean(axis=-1) for each in (cosine, divergence)))


def _entropy(s: Float[np.ndarray, "*b m"]) -> Float[np.ndarray, "*b"]:
    return -(s * np.log(np.where(s > 0, s, 1))).sum(axis=-1)
