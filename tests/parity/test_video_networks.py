"""The networks of PySlowFast, pytorchvideo and mmaction2, and a plain one for other layouts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from parity import peers
from parity.compare import (
    HEIGHT,
    WIDTH,
    ask,
    assert_close,
    compare_export,
    compare_forward,
    compare_gradients,
    load,
    numbers,
    randomise,
    renamed,
    video_resnet,
)
from parity.peers import R50, R101
from torch import nn

# Files in the form in which each source saves a state dict.


def pyth(state):
    training = {"epoch": 3, "optimizer_state": {"state": {}}, "cfg": "TRAIN:\n  ENABLE: true\n"}
    return {**training, "model_state": state}


def published(state):
    meta = {"epoch": 3, "config": "model = dict()", "CLASSES": ["a", "b"]}
    return {"meta": meta, "state_dict": state}


def zoo(state):
    return {"model_state": state}


def parallel(state):
    return {f"module.{name}": tensor for name, tensor in state.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to compare.

    Attributes:
        name: Name of the test.
        peer: Builds the network of the peer.
        source: Source of its names.
        options: Options of `video_resnet` for the same network.
        file: Makes the object that is saved from a state dict.
        frames: Frames of the clip.
        gradients: Whether gradients are compared, which they are where no other case has the same.
    """

    name: str
    peer: Callable[[], peers.Peer]
    source: str
    options: dict[str, Any]
    file: Callable[[dict[str, Any]], dict[str, Any]]
    frames: int
    gradients: bool


def slowfast(name, peer_options, options, frames=8, gradients=True):
    return Case(
        f"slowfast-{name}",
        lambda: peers.slowfast(**peer_options),
        "slowfast",
        {"preset": "slowfast"} | options,
        pyth,
        frames,
        gradients,
    )


def pytorchvideo(name, kind, gradients=True, **depth):
    return Case(
        "-".join([name, *(["whole"] if depth else [])]),
        lambda: peers.pytorchvideo(name, **depth),
        "pytorchvideo",
        {"preset": "slowfast", "kind": kind, "nonlocal_blocks": 0} | depth,
        zoo,
        8,
        gradients,
    )


def mmaction2(mode, style="3x1x1", frames=16, gradients=True, **depth):
    options = {"preset": "mmcv", "clip": "32x2", "kind": f"i3d_{style}"} | depth
    options |= {"instantiation": mode} if mode else {"nonlocal_blocks": 0}
    return Case(
        "-".join(["mmaction2", mode or style, *(["whole"] if depth else [])]),
        lambda: peers.mmaction2(mode, style, **depth),
        "mmaction2",
        options,
        published,
        frames,
        gradients,
    )


def plain(name, peer_options, options, frames=8, gradients=True):
    return Case(
        f"plain-{name}",
        lambda: peers.plain(places={}, **peer_options),
        "slowfast",
        {"nonlocal_blocks": 0} | options,
        parallel,
        frames,
        gradients,
    )


WHOLE = {"blocks": R50}
C2D, DOT, LONG = {"kind": "c2d"}, {"instantiation": "dot_product"}, {"clip": "32x2"}
RESNEXT = {"width": 128, "groups": 32}, {"preset": "slowfast", "groups": 32, "width_per_group": 4}
TABLE_1 = nn.MaxPool3d(3, 2, 1), nn.MaxPool3d((3, 1, 1), (2, 1, 1), (1, 0, 0))
CASES = [
    slowfast("i3d-nln-whole", WHOLE, WHOLE, gradients=False),
    slowfast("i3d-nln", {}, {}),
    slowfast("i3d-nln-dot", DOT, DOT),
    slowfast("c2d-nln", C2D, C2D, gradients=False),
    # Four groups of two frames, then two of four.
    slowfast(
        "grouped",
        {"frames": 16, "groups": {"res3": 4, "res4": 2}},
        {"group_size": {"res3": 2, "res4": 4}},
        16,
    ),
    slowfast(
        "stride-at-1x1",
        C2D | {"places": {}, "stride_1x1": True},
        C2D | {"nonlocal_blocks": 0, "stride_at": "conv_a"},
        gradients=False,
    ),
    pytorchvideo("c2d_r50", "c2d", gradients=False),
    pytorchvideo("i3d_r50", "i3d_3x1x1", gradients=False, **WHOLE),
    pytorchvideo("i3d_r50", "i3d_3x1x1"),
    mmaction2("embedded_gaussian", gradients=False, **WHOLE),
    mmaction2("embedded_gaussian"),
    mmaction2("gaussian"),
    mmaction2("dot_product"),
    mmaction2("concatenation"),
    mmaction2(None, frames=32, gradients=False),
    mmaction2(None, "3x3x3", gradients=False),
    plain("resnext", C2D | RESNEXT[0], C2D | RESNEXT[1]),
    plain("slowfast-32x2", LONG, LONG | {"preset": "slowfast"}, frames=32, gradients=False),
    plain("paper-32x2", LONG | {"pools": TABLE_1}, LONG, frames=32, gradients=False),
]


@pytest.mark.networks
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_networks(case, tmp_path):
    peer, model = case.peer(), video_resnet(**case.options)
    clip = numbers(2, 3, case.frames, HEIGHT, WIDTH)
    cotangent = numbers(2, peers.CLASSES, seed=2) if case.gradients else None
    state = randomise(peer, clip.shape)
    variables = load(tmp_path / "weights", case.file(state), model)
    compare_export(variables, state, case.source)
    answer = ask(peer, clip, cotangent)
    compare_forward(model, variables, clip, answer)
    if case.gradients:
        compare_gradients(model, variables, clip, cotangent, answer, case.source)


def test_names_of_r101(tmp_path):
    """Every weight is loaded into its place. The layers are those of the R50."""
    state = peers.slowfast(blocks=R101).network.state_dict()
    model = video_resnet(blocks=R101, preset="slowfast")
    variables = load(tmp_path / "weights", pyth(state), model)
    compare_export(variables, state, "slowfast")


@pytest.mark.networks
def test_training(tmp_path):
    peer, model = peers.slowfast(), video_resnet(preset="slowfast", dropout=0.0)
    clip, cotangent = numbers(2, 3, 8, HEIGHT, WIDTH), numbers(2, peers.CLASSES, seed=2)
    state = randomise(peer, clip.shape)
    variables = load(tmp_path / "weights", pyth(state), model)
    answer = ask(peer, clip, cotangent, train=True)
    statistics = compare_gradients(
        model, variables, clip, cotangent, answer, "slowfast", train=True
    )
    biased = {
        name: tensor.numpy()
        for name, tensor in peer.network.state_dict().items()
        if "running" in name
    }
    for norm, count in answer.counts.items():
        name = f"{norm}.running_var"
        kept = 0.9 * state[name].double().numpy()
        biased[name] = kept + (biased[name] - kept) * (count - 1) / count
    expected = renamed(biased, "slowfast")
    assert statistics.keys() == expected.keys()
    for name, statistic in expected.items():
        assert_close(statistics[name], statistic, 1e-5, name)


@pytest.mark.networks
def test_windows_of_slowfast(tmp_path):
    """Its head returns probabilities in testing, averaged over the windows."""
    peer = peers.slowfast(places={}, head="softmax")
    model = video_resnet(preset="slowfast", nonlocal_blocks=0, head_window=(2, 2))
    clip = numbers(2, 3, 8, 96, 128)
    variables = load(tmp_path / "weights", pyth(randomise(peer, clip.shape)), model)
    answer = ask(peer, clip)
    np.testing.assert_allclose(answer.logits.sum(1), 1)
    assert answer.stages["res5"].shape[2:4] == (3, 4)
    compare_forward(model, variables, clip, answer, stages=("res5",), finish=jax.nn.softmax)


@pytest.mark.networks
def test_windows_of_pytorchvideo(tmp_path):
    peer = peers.pytorchvideo("c2d_r50", window=(4, 1, 3))
    options = {"head_window": (1, 3), "window_average": "logits"}
    model = video_resnet(preset="slowfast", kind="c2d", nonlocal_blocks=0, **options)
    clip = numbers(2, 3, 8, 96, 128)
    variables = load(tmp_path / "weights", zoo(randomise(peer, clip.shape)), model)
    compare_forward(model, variables, clip, ask(peer, clip), stages=("res5",))
