"""Inflated ResNets for images: on a clip of equal frames they equal the image network."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import peers
from parity.compare import (
    HEIGHT,
    WIDTH,
    ask,
    assert_close,
    difference,
    load,
    numbers,
    randomise,
    video_resnet,
)
from parity.peers import R50, SHORT
from safetensors.torch import save_file

import nonlocal_jax as nl

OPTIONS = {"preset": "slowfast", "nonlocal_blocks": 0}


def save_legacy(state, path):
    """Saves as the older files of torchvision: not in a zip archive, without the counters of BN."""
    weights = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    torch.save(weights, path, _use_new_zipfile_serialization=False)


SAVE = {"torchvision": save_legacy, "timm": save_file}


def images_and_answer(package, height, width, blocks=R50):
    peer = peers.image_resnet(package, blocks)
    images = numbers(2, 3, height, width)
    state = randomise(peer, images.shape)
    return state, images.numpy().transpose(0, 2, 3, 1)[:, None], ask(peer, images)


def repeated(image_features, features):
    return np.broadcast_to(image_features[:, None], features.shape)


def stages_of(model, variables, clip):
    logits, state = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))(
        variables, clip
    )
    return logits, {
        stage: state["intermediates"][stage][0] for stage in peers.STAGES if stage != "pool2"
    }


@pytest.mark.networks
@pytest.mark.parametrize("package", SAVE)
def test_c2d_is_the_image_network(package, tmp_path):
    state, images, answer = images_and_answer(package, HEIGHT, WIDTH)
    model = video_resnet(kind="c2d", blocks=R50, **OPTIONS)
    variables = load(tmp_path / "weights", state, model, SAVE[package])
    logits, stages = stages_of(model, variables, jnp.repeat(images, 5, axis=1))
    assert_close(logits, answer.logits, 5e-5, "logits")
    for stage, features in stages.items():
        assert_close(features, repeated(answer.stages[stage], features), 5e-5, stage)


@pytest.mark.networks
def test_i3d_is_the_image_network_away_from_the_ends(tmp_path):
    """A convolution in time sees zeros beyond the ends: stages differ near them, and only there."""
    state, images, answer = images_and_answer("torchvision", 33, 49, SHORT)
    model = video_resnet(kind="i3d_3x1x1", **OPTIONS)
    variables = load(tmp_path / "weights", state, model, SAVE["torchvision"])
    _, stages = stages_of(model, variables, jnp.repeat(images, 24, axis=1))
    # conv1 reaches 2 frames and res2 1 more, of 24; after pool2, of 12, res3 and res4 1 each.
    exact = {"pool1": (2, 22), "res2": (3, 21), "res3": (3, 9), "res4": (4, 8), "res5": (4, 8)}
    for stage, (first, end) in exact.items():
        features = stages[stage][:, first:end]
        assert_close(features, repeated(answer.stages[stage], features), 5e-5, stage)
    assert difference(stages["res5"][:, 0], answer.stages["res5"]) > 0.01
    head = variables["params"]["head"]
    logits = stages["res5"][:, 4:8].mean((1, 2, 3)) @ head["kernel"] + head["bias"][None]
    assert_close(logits, answer.logits, 5e-5, "logits")


def test_flat_kernels_inflate_as_those_of_images(tmp_path):
    state = randomise(peers.image_resnet("torchvision", SHORT), (2, 3, HEIGHT, WIDTH))
    c2d, i3d = video_resnet(kind="c2d", **OPTIONS), video_resnet(kind="i3d_3x3x3", **OPTIONS)
    expected = load(tmp_path / "images", state, i3d)
    nl.weights.save(
        tmp_path / "flat.safetensors", load(tmp_path / "images", state, c2d), names="pytorchvideo"
    )
    inflated = nl.weights.load(tmp_path / "flat.safetensors", i3d, inflate_flat=True)
    jax.tree.map(np.testing.assert_array_equal, inflated, expected)
