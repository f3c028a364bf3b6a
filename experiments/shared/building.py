"""The network and the trainer of a video recipe."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import nonlocal_jax as nl
from experiments.shared.recipes import Config, Recipe
from nonlocal_jax import training
from nonlocal_jax.data import augment
from nonlocal_jax.data.clips import normalise
from nonlocal_jax.layers.presets import Preset
from nonlocal_jax.models.toy_video import ToyVideoNet

Batch = Mapping[str, Any]


def build(config: Config, recipe: Recipe, num_classes: int) -> Any:
    """Builds the network of a recipe."""
    dtype = jnp.dtype(config.dtype)
    if not recipe.depth:
        block = nl.layers.nonlocal_block(
            recipe.instantiation, config.preset, subsample=True, dtype=dtype
        )
        return ToyVideoNet(num_classes, block, "i3d")
    options: dict[str, Any] = {}
    if config.preset == "caffe2" and recipe.frames == 128:
        # For clips of 128 frames video-nonlocal-net sums over groups of 4 frames in res3.
        options["group_size"] = {"res3": 4}
    clip: Any = f"{recipe.frames}x{recipe.stride}"
    return nl.models.video_resnet(
        recipe.depth,
        recipe.kind,
        recipe.nonlocal_blocks,
        clip,
        config.preset,
        num_classes,
        instantiation=recipe.instantiation,
        block_options={"axes": recipe.axes},
        frozen_bn=recipe.frozen_bn,
        window_average="logits" if recipe.multi_label else "softmax",
        remat=config.remat,
        dtype=dtype,
        **options,
    )


def make_trainer(config: Config, recipe: Recipe, num_classes: int) -> training.Trainer:
    """Builds the network with its optimiser, loss and input preparation."""
    schedule = training.step_schedule(recipe.learning_rate, recipe.boundaries)
    optimiser = training.sgd(schedule, weight_decay=1e-4)
    if recipe.frozen_bn:
        freeze = optax.masked(optax.set_to_zero(), training.is_norm_parameter)
        optimiser = optax.chain(optimiser, freeze)
    loss = training.classification(
        build(config, recipe, num_classes),
        loss=sigmoid_cross_entropy if recipe.multi_label else training.cross_entropy,
        metrics=hit if recipe.multi_label else training.accuracy,
        observe=nl.layers.residual_ratios,
    )
    return training.Trainer(
        loss,
        optimiser,
        schedule,
        prepare=functools.partial(prepare, config.normalisation),
        accumulate=config.accumulate,
        batch_norm=config.batch_norm,
    )


def prepare(normalisation: Preset, batch: Batch, key: jax.Array | None) -> Batch:
    """Flips clips at random in training, and normalises their colours. Runs on the device."""
    inputs = batch["inputs"]
    if key is not None:
        inputs = augment.random_flip(inputs, augment.example_keys(key, batch["position"]))
    return {**batch, "inputs": normalise(inputs, normalisation)}


@functools.partial(jax.jit, static_argnames=("model", "normalisation", "multi_label"))
def score_clips(
    model: Any, variables: Any, clips: jax.Array, *, normalisation: Preset, multi_label: bool
) -> jax.Array:
    """Computes the scores (B, classes) of clips (B, T, H, W, 3) of uint8.

    It is compiled once for equal networks and shapes.
    """
    logits = model.apply(variables, normalise(clips, normalisation), train=False)
    return jax.nn.sigmoid(logits) if multi_label else jax.nn.softmax(logits)


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the binary cross-entropy of each example, averaged over classes."""
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean(-1)


def hit(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Returns 1 for each example that has the class with the largest logit, else 0."""
    best = logits.argmax(-1)[:, None]
    return {"hit_at_1": jnp.take_along_axis(labels, best, -1)[:, 0]}
