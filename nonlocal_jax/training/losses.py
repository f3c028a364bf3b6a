"""Losses that a `Trainer` can minimise: what a loss must be, and the one for classification."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nonlocal_jax.types import Array, PRNGKeyArray

Tree = Any
Batch = Any  # a tree of arrays whose leading axis is the batch
Metrics = dict[str, Array]


@runtime_checkable
class Loss(Protocol):
    """The function that a `Trainer` minimises.

    A plain function is enough if the initial variables are passed to `Trainer.init`. A loss may
    also define

    - `init(key, batch)`, which returns the initial variables;
    - `axis_name`, the mapped axis over which it splits the positions of each example, or None;
    - `split_over_positions(batch)`, a tree of bool that marks the leaves of a batch so split;
    - `without_axis()`, the same loss for devices that hold whole examples.
    """

    def __call__(
        self, variables: Mapping[str, Any], batch: Batch, rng: PRNGKeyArray | None, train: bool
    ) -> tuple[Array, Metrics, Tree]:
        """Computes the loss of one batch.

        Args:
            variables: Collections of the model: "params" and, if it has any, "batch_stats".
            batch: Tree of arrays whose leading axis is the batch. In evaluation it may be a mapping
                with "mask" (B,) of bool, False for examples that only fill the batch.
            rng: Key of the random numbers of this step; None in evaluation.
            train: Whether this is a training step.

        Returns:
            The mean loss over the real examples; scalar metrics, which are means over the same
            examples; and the collections that changed: {"batch_stats": ...} in training, {} in
            evaluation.
        """
        ...


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Computes the cross-entropy of each example, -log softmax(logits)[label].

    Args:
        logits: (B, classes).
        labels: Integer classes (B,) or probabilities (B, classes).

    Returns:
        (B,).
    """
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels)


def smoothed_cross_entropy(smoothing: float) -> Callable[[Array, Array], Array]:
    """Returns the cross-entropy with label smoothing.

    Args:
        smoothing: Share of each label that is spread evenly over all classes, in [0, 1).

    Source: Szegedy et al., Rethinking the Inception Architecture (CVPR 2016), section 7.

    >>> float(smoothed_cross_entropy(0.5)(jnp.array([[0.0, 0.0]]), jnp.array([1]))[0])
    0.6931471824645996
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be at least 0 and below 1; got {smoothing}.")

    def loss(logits: Array, labels: Array) -> Array:
        probabilities = one_hot(labels, logits.shape[-1])
        return cross_entropy(logits, optax.smooth_labels(probabilities, smoothing))

    return loss


def accuracy(logits: Array, labels: Array) -> Metrics:
    """Scores each example 1 if its largest logit is that of the label, or of the likeliest one."""
    classes = labels if labels.ndim == 1 else labels.argmax(-1)
    return {"accuracy": (logits.argmax(-1) == classes).astype(jnp.float32)}


def mixup(
    batch: Mapping[str, Any], key: PRNGKeyArray, alpha: float, num_classes: int
) -> Mapping[str, Any]:
    """Mixes each example and its label with another example, λ x + (1 − λ) x', λ ~ Beta(α, α).

    One λ is drawn for the whole batch.

    Args:
        batch: Mapping with "inputs" and "labels".
        key: Key of the random number.
        alpha: α.
        num_classes: Number of classes.

    Returns:
        The batch with mixed inputs and with probabilities (B, classes) as labels.

    Source: Zhang et al., mixup (ICLR 2018), with the partner taken from the reversed batch.

    >>> batch = {"inputs": jnp.array([[0.0], [1.0]]), "labels": jnp.array([0, 1])}
    >>> mixed = mixup(batch, jax.random.key(0), 1.0, 2)
    >>> bool((mixed["inputs"][:, 0] == mixed["labels"][:, 1]).all())
    True
    """
    share = jax.random.beta(key, alpha, alpha)

    def mix(x: Array) -> Array:
        return share * x + (1 - share) * jnp.flip(x, 0)

    labels = one_hot(batch["labels"], num_classes)
    return {**batch, "inputs": mix(batch["inputs"]), "labels": mix(labels)}


def one_hot(labels: Array, num_classes: int) -> Array:
    """Converts integer labels (B,) to probabilities (B, classes); leaves those unchanged."""
    return jax.nn.one_hot(labels, num_classes) if labels.ndim == 1 else labels


@dataclasses.dataclass(frozen=True)
class Classification:
    """The loss of a classifier on batches with "inputs" and "labels"; see `classification`."""

    model: nn.Module
    loss: Callable[[Array, Array], Array] = cross_entropy
    metrics: Callable[[Array, Array], Metrics] = accuracy
    observe: Callable[[Mapping[str, Any]], Metrics] | None = None

    @property
    def axis_name(self) -> str | None:
        """The mapped axis over which the model splits the positions of each example, or None."""
        return getattr(self.model, "axis_name", None)

    def init(self, key: PRNGKeyArray, batch: Batch) -> Mapping[str, Any]:
        """Returns the model's initial variables."""
        return self.model.init({"params": key, "dropout": key}, batch["inputs"])

    def split_over_positions(self, batch: Batch) -> Tree:
        """Marks the inputs as split over the mesh axis "positions" if the model has an axis."""
        is_split = self.axis_name is not None
        return {
            name: jax.tree.map(lambda _, split=is_split and name == "inputs": split, leaf)
            for name, leaf in batch.items()
        }

    def without_axis(self) -> "Classification":
        """Returns the same loss with a model that holds all positions on one device."""
        model: Any = self.model
        return dataclasses.replace(self, model=model.clone(axis_name=None))

    def __call__(
        self, variables: Mapping[str, Any], batch: Batch, rng: PRNGKeyArray | None, train: bool
    ) -> tuple[Array, Metrics, Tree]:
        """Computes the mean loss and metrics of a batch, as `Loss` describes."""
        logits: Any
        changed: Mapping[str, Any] = {}
        if train:
            rngs = {} if rng is None else {"dropout": rng}
            mutable = ["batch_stats"] if self.observe is None else ["batch_stats", "intermediates"]
            logits, changed = self.model.apply(
                variables, batch["inputs"], train=True, mutable=mutable, rngs=rngs
            )
        else:
            logits = self.model.apply(variables, batch["inputs"], train=False)
        labels, mask = batch["labels"], None if train else batch.get("mask")
        loss = _mean(self.loss(logits, labels), mask)
        values = self.metrics(logits, labels)
        metrics = {name: _mean(value, mask) for name, value in values.items()}
        if not train:
            return loss, metrics, {}
        if self.observe is not None:
            metrics |= self.observe(changed.get("intermediates", {}))
        return loss, metrics, {"batch_stats": changed.get("batch_stats", {})}


def classification(
    model: nn.Module,
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    metrics: Callable[[Array, Array], Metrics] = accuracy,
    observe: Callable[[Mapping[str, Any]], Metrics] | None = None,
) -> Classification:
    """Returns the loss that trains a classifier.

    Batches are mappings with "inputs" (B, ...) and "labels", and "mask" (B,) in evaluation.

    Args:
        model: Module for which `model.apply(variables, inputs, train=...)` returns logits. A model
            that can split the positions of each example over devices has an attribute `axis_name`;
            it is "positions" to do so on a mesh, as in `video_resnet(axis_name="positions")`.
        loss: Loss of each example, from logits and labels.
        metrics: Further numbers of each example, from logits and labels, by name.
        observe: Maps the "intermediates" collection of a training step to scalar metrics, as
            `nonlocal_jax.layers.residual_ratios` does; None keeps no intermediates.

    >>> loss = classification(nn.Dense(3))
    >>> batch = {"inputs": jnp.ones((2, 4)), "labels": jnp.array([0, 1])}
    >>> sorted(loss.init(jax.random.key(0), batch)["params"])
    ['bias', 'kernel']
    """
    return Classification(model, loss, metrics, observe)


def _mean(values: Array, mask: Array | None) -> Array:
    """Averages values (B,) over unmasked examples, or over all if `mask` is None."""
    if mask is None:
        return values.mean()
    # A host whose share of the data has run out contributes batches of padding alone.
    count = jnp.maximum(jnp.sum(mask), 1)
    return jnp.sum(jnp.where(mask, values, 0)) / count
