"""Summaries of affinity maps: how spread out their rows are, and how much they depend on the query.

All of them use the shares s_ij = |f_ij| / Σ_j |f_ij|, which for the Gaussians are the affinity
itself. Shares make the signed weights of the dot product and the unbounded weights of the
concatenation comparable. Rows are processed in chunks; the N×M matrix is never stored.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from nonlocal_jax.visualize.affinity_map import AffinityMap


class QueryDependence(NamedTuple):
    """How much the rows of a map differ between queries; 0 if all queries attend to the same keys.

    Attributes:
        cosine: (B,), mean cosine distance 1 − cos(s_i, s_i') over pairs of queries i ≠ i'.
        jensen_shannon: (B,), Jensen-Shannon divergence of the rows in nats: entropy of the mean row
            minus mean entropy of the rows. It is the mutual information of query and key.
    """

    cosine: Float[np.ndarray, " b"]
    jensen_shannon: Float[np.ndarray, " b"]


def shares(weights: Float[np.ndarray, "*b m"]) -> Float[np.ndarray, "*b m"]:
    """Returns s_ij = |f_ij| / Σ_j |f_ij| over the last axis; a row of zeros stays 0.

    >>> shares(np.array([[3.0, -1.0], [0.0, 0.0]]))
    array([[0.75, 0.25],
           [0.  , 0.  ]])
    """
    size = np.abs(weights)
    total = size.sum(axis=-1, keepdims=True)
    return size / np.where(total == 0, 1, total)


def entropy(affinity: AffinityMap) -> Float[np.ndarray, "b *queries"]:
    """Returns the entropy H_i = −Σ_j s_ij log s_ij of every query, in nats.

    exp(H_i) is the effective number of keys that query i attends to.

    Returns:
        (B, *queries), from 0 to the logarithm of the number of keys that are summed.

    Raises:
        ValueError: Affinities that are not finite.
    """
    entropies = np.zeros((affinity.batch, math.prod(affinity.queries)), np.float32)
    for ids, _, weights in affinity.chunks():
        entropies[:, ids] = _entropy(shares(weights))
    return entropies.reshape(affinity.batch, *affinity.queries)


def received(affinity: AffinityMap) -> Float[np.ndarray, "b *keys"]:
    """Returns the attention that each key receives.

    This is its mean share over the queries, times the number of keys that they sum over.

    Returns:
        (B, *keys); 1 for uniform attention, 0 for masked keys.

    Raises:
        ValueError: Affinities that are not finite.
    """
    totals = np.zeros((affinity.batch, math.prod(affinity.keys)))
    query_counts = np.zeros(math.prod(affinity.keys))
    key_counts = affinity.counted().reshape(affinity.batch, -1, 1)
    for ids, key_ids, weights in affinity.chunks():
        totals[:, key_ids] += (key_counts[:, ids] * shares(weights)).sum(axis=1)
        query_counts[key_ids] += len(ids)
    means = totals / np.maximum(query_counts, 1)
    return means.astype(np.float32).reshape(affinity.batch, *affinity.keys)


def time_by_time(affinity: AffinityMap) -> Float[np.ndarray, "b t keys_t"]:
    """Returns how much each frame attends to each.

    This is the mean share that the positions of a frame give to the keys of the other.

    Returns:
        (B, T, frames of the keys). Rows sum to 1, or less if some positions have rows of zeros.

    Raises:
        ValueError: A map without frames, or affinities that are not finite.
    """
    if len(affinity.queries) != 3:
        raise ValueError(
            f"time_by_time needs a map of size (T, H, W); {affinity.block} has {affinity.queries}."
        )
    frames, key_frames = affinity.queries[0], affinity.keys[0]
    positions, key_positions = math.prod(affinity.queries[1:]), math.prod(affinity.keys[1:])
    table = np.zeros((affinity.batch, frames, key_frames))
    for ids, key_ids, weights in affinity.chunks():
        weight_shares = shares(weights)
        sources, targets = ids // positions, key_ids // key_positions
        target_shares = [weight_shares[..., targets == t].sum(axis=-1) for t in range(key_frames)]
        frame_shares = np.stack(target_shares, axis=-1)  # (B, n, frames of the keys)
        for t in np.unique(sources):
            table[:, t] += frame_shares[:, sources == t].sum(axis=1)
    return (table / positions).astype(np.float32)


def query_dependence(affinity: AffinityMap) -> QueryDependence:
    """Returns how much the rows of different queries differ, the question that GCNet asked.

    Compares queries of the same sum (those of one frame over space, those of one pixel over time)
    and averages over the sums. Rows of zeros are left out; a sum with a single row counts as 0.

    The mean of cos(s_i, s_i') over all pairs, including i = i', equals ‖mean of s_i / ‖s_i‖‖².
    Every pair is therefore counted at the cost of one pass over the rows.

    Raises:
        ValueError: Affinities that are not finite.

    Source: Cao, Xu, Lin, Wei, Hu: GCNet, ICCV Workshops 2019, Section 3.2.
    """
    queries, keys = math.prod(affinity.queries), math.prod(affinity.keys)
    unit_sums, share_sums = np.zeros((2, affinity.batch, keys))
    entropies, nonzero = np.zeros((2, affinity.batch, queries))
    for ids, key_ids, weights in affinity.chunks():
        rows = shares(weights.astype(np.float64))
        norms = np.linalg.norm(rows, axis=-1, keepdims=True)
        unit_sums[:, key_ids] += (rows / np.where(norms == 0, 1, norms)).sum(axis=1)
        share_sums[:, key_ids] += rows.sum(axis=1)
        entropies[:, ids] = _entropy(rows)
        nonzero[:, ids] = norms[..., 0] > 0
    query_ids, key_ids = affinity.sums
    count = nonzero[:, query_ids].sum(axis=-1)  # (B, sums), as all arrays below
    divisor = np.maximum(count, 1)
    # The sum over ordered pairs contains `count` pairs i = i', whose cosine is 1.
    cosine_sum = np.square(unit_sums[:, key_ids]).sum(axis=-1) - count
    pairs = np.maximum(count * (count - 1), 1)
    cosine = np.where(count > 1, 1 - cosine_sum / pairs, 0)
    mean_rows = share_sums[:, key_ids] / divisor[..., None]
    mean_entropy = entropies[:, query_ids].sum(axis=-1) / divisor
    divergence = _entropy(mean_rows) - mean_entropy
    # Rounding can leave either slightly below 0.
    return QueryDependence(cosine.clip(0).mean(axis=-1), divergence.clip(0).mean(axis=-1))


def _entropy(rows: Float[np.ndarray, "*b m"]) -> Float[np.ndarray, "*b"]:
    return -(rows * np.log(np.where(rows > 0, rows, 1))).sum(axis=-1)
