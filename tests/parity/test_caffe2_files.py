"""Pickles as video-nonlocal-net writes them, trained, and with affine norms."""

import functools
import pickle
import re

import jax
import numpy as np
import pytest
from parity import peers
from parity.compare import (
    HEIGHT,
    WIDTH,
    ask,
    compare_forward,
    compare_gradients,
    load,
    numbers,
    randomise,
    video_resnet,
)
from parity.peers import R50, R101
from torch import nn

EPSILON = 1.0000001e-5
STATISTICS = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}
RULES = [
    (r"s1\.pathway0_stem\.conv\.weight", "conv1_w"),
    (r"s1\.pathway0_stem\.bn\.", "res_conv1_bn_"),
    (r"s(\d)\.pathway0_res(\d+)\.branch2\.([abc])", r"res\1_\2_branch2\3"),
    (r"s(\d)\.pathway0_res(\d+)\.branch1", r"res\1_\2_branch1"),
    (r"s(\d)\.pathway0_nonlocal(\d+)\.(?:conv_)?(\w+)", r"nonlocal_conv\1_\2_\3"),
    (r"head\.projection", "pred"),
    (r"bn\.(weight|bias|running_mean|running_var)$", lambda m: f"bn_{STATISTICS[m[1]]}"),
    (r"bn_(weight|bias|running_mean|running_var)$", lambda m: f"bn_{STATISTICS[m[1]]}"),
    (r"\.weight$", "_w"),
    (r"\.bias$", "_b"),
]


def blob_name(name):
    """Translates a name of PySlowFast, whose own rules go in the other direction."""
    for pattern, replacement in RULES:
        name = re.sub(pattern, replacement, name)
    return name


def blobs_of(state):
    """Makes blobs with the training state that a solver leaves among the weights."""
    blobs = {
        blob_name(name): tensor.numpy()
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }
    solver = {"model_iter": 400000, "lr": np.full(1, 1e-4, np.float32)}
    momentum = {f"{name}_momentum": blobs[name] for name in ("conv1_w", "res_conv1_bn_s", "pred_b")}
    return blobs | momentum | solver


def affine(blobs):
    """Folds statistics into scale and bias, as its script for training on 128 frames does.

    The training state is dropped.
    """
    kept = {
        name: array
        for name, array in blobs.items()
        if not name.endswith(("_momentum", "lr", "model_iter"))
    }
    for name in [name for name in kept if name.endswith("_riv")]:
        norm = name.removesuffix("_riv")
        scale = kept[f"{norm}_s"] / np.sqrt(kept.pop(name) + 1e-5)
        kept[f"{norm}_b"] = kept[f"{norm}_b"] - kept.pop(f"{norm}_rm") * scale
        kept[f"{norm}_s"] = scale
    return kept | {"lr": np.float64(0.00125)}


def save(tree, path):
    """Writes a pickle with the protocol and the NumPy module names of Python 2."""
    contents = pickle.dumps(tree, protocol=2)
    path.write_bytes(contents.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


@pytest.mark.parametrize(("kind", "blocks"), [("i3d", R50), ("c2d", R50), ("i3d", R101)])
def test_names_are_those_that_slowfast_converts(kind, blocks):
    slowfast_name = peers.load("slowfast.utils.c2_model_loading").get_name_convert_func()
    names = [
        name
        for name in peers.slowfast(kind, blocks).network.state_dict()
        if not name.endswith("num_batches_tracked")
    ]
    assert [slowfast_name(blob_name(name)) for name in names] == names
    assert {
        "conv1_w",
        "res_conv1_bn_riv",
        "res3_0_branch1_bn_s",
        "nonlocal_conv4_5_theta_b",
        "pred_w",
    } < set(map(blob_name, names))


WHOLE = {"blocks": R50}
C2D_DOT = {"kind": "c2d", "instantiation": "dot_product"}
INFLATED = {"clip": "32x2", "kind": "i3d_3x3x3"}


@pytest.mark.networks
@pytest.mark.parametrize(
    ("options", "frames"),
    [(WHOLE, 8), (C2D_DOT, 8), (INFLATED, 16)],
    ids=["8x8-whole", "c2d-dot", "32x2-3x3x3"],
)
def test_trained(options, frames, tmp_path):
    peer = peers.plain(eps=EPSILON, pool_padding=0, **options)
    model = video_resnet(preset="caffe2", **options)
    clip, cotangent = numbers(2, 3, frames, HEIGHT, WIDTH), numbers(2, peers.CLASSES, seed=2)
    blobs = blobs_of(randomise(peer, clip.shape))
    variables = load(
        tmp_path / "weights.pkl", {"blobs": blobs} if frames == 8 else blobs, model, save
    )
    gradients = options is INFLATED  # those of 8×8 differ from PySlowFast's only in pool1
    answer = ask(peer, clip, cotangent if gradients else None)
    compare_forward(model, variables, clip, answer)
    if gradients:
        compare_gradients(model, variables, clip, cotangent, answer, "slowfast")


@pytest.mark.networks
def test_affine(tmp_path):
    """A file with affine norms equals one with statistics, which are folded when it is loaded."""
    peer = peers.plain(pool_padding=0)
    model = video_resnet(preset="caffe2", frozen_bn=True)
    clip = numbers(2, 3, 8, HEIGHT, WIDTH)
    blobs = blobs_of(randomise(peer, clip.shape))
    variables = load(tmp_path / "affine.pkl", affine(blobs), model, save)
    assert variables.keys() == {"params"}
    compare_forward(model, variables, clip, ask(peer, clip))
    folded = load(tmp_path / "trained.pkl", {"blobs": blobs}, model, save)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(assert_close, folded, variables)


@pytest.mark.networks
def test_released_32x4(tmp_path):
    """Affine norms, none in the non-local blocks, and groups of four frames in res3."""
    peer = peers.slowfast(frames=16, groups={"res3": 2})
    peer.network.s1.pathway0_stem.pool_layer.padding = 0
    modules = [name for name, _ in peer.network.named_modules()]
    for name in modules:
        if not re.search(r"nonlocal\d$", name):
            continue
        peer.network.get_submodule(name).bn = nn.Identity()
    clip = numbers(2, 3, 16, HEIGHT, WIDTH)
    blobs = affine(blobs_of(randomise(peer, clip.shape)))
    assert not any(name.startswith("nonlocal") and "bn" in name for name in blobs)
    options = {"frozen_bn": True, "group_size": {"res3": 4}, "block_options": {"norm": None}}
    model = video_resnet(preset="caffe2", clip="32x4", **options)
    variables = load(tmp_path / "weights.pkl", blobs, model, save)
    compare_forward(model, variables, clip, ask(peer, clip))
