"""A trained block looks from one digit at the other: measured by where its arrows land."""

import io

import numpy as np
from rich.console import Console

from experiments import toy_video
from nonlocal_jax import visualize
from nonlocal_jax.data.toy_video import SIDE, Scene, load_scans

SCENE = Scene(size=24, distance=10)  # maps of 8×6×6 positions, of which 8 lie on a digit
TOP, CLIPS = 20, 128


def test_arrows_from_one_digit_land_on_the_other(tmp_path):
    """Trained for about a minute, from scratch, on clips; looked at on clips of scans held out from training."""
    config = toy_video.Config(
        networks=("dot_product",),
        scene=SCENE,
        pretrain_steps=300,
        steps=200,
        evaluate_every=200,
        test_clips=256,
        output=tmp_path,
    ).of_task("same_digit")
    scans, quiet = (
        {split: load_scans(split) for split in ("train", "test")},
        Console(file=io.StringIO()),
    )
    trunk = toy_video.train("trunk", None, "single_digit", 0, None, config, scans, quiet)
    trained = toy_video.train(
        "dot_product", "dot_product", "same_digit", 0, trunk.variables, config, scans, quiet
    )
    assert trained.accuracy > 0.75

    clips = toy_video.held_out_clips("same_digit", 0, scans, SCENE)
    model = toy_video.build("dot_product", config)
    block = visualize.affinities(model, trained.variables, clips.video[:CLIPS])["block"]
    every = np.moveaxis(np.indices(block.keys), 0, -1).reshape(-1, 3)
    centres = visualize.to_pixels(block, every, of="keys").centre

    ratios = {0: [], 1: []}
    for clip in range(CLIPS):
        one, places = block[clip], np.asarray(clips.places[clip])
        for here, there in (places, places[::-1]):
            query = visualize.from_pixels(
                block, here
            )  # the position that is in the middle of the digit
            on = (np.abs(centres[:, 1:] + 0.5 - there[1:]) <= SIDE / 2).all(-1)
            on &= (there[0] <= centres[:, 0]) & (centres[:, 0] < there[0] + SCENE.visible)
            landed = np.ravel_multi_index(
                tuple(np.moveaxis(one.top(TOP, query)[1][0, 0], -1, 0)), block.keys
            )
            ratios[int(clips.labels[clip])].append(on[landed].mean() / on.mean())
    assert np.mean(ratios[0] + ratios[1]) >= 5  # × the rate of arrows that land anywhere
    assert np.mean(ratios[0]) >= 5
    assert np.mean(ratios[1]) >= 5
