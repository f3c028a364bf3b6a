"""The arrows start at the query, end at the largest weights, and are drawn over the right frames."""

import matplotlib
import numpy as np
import pytest
from matplotlib.patches import ConnectionPatch

from nonlocal_jax.visualize import arrows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLIP = np.zeros((3, 8, 16, 1), np.float32)
WEIGHTS = np.random.default_rng(0).random((3, 2, 4)).astype(np.float32)  # a position is 4×4 pixels


@pytest.fixture
def axes():
    figure, axes = plt.subplots(1, 3)
    yield axes
    plt.close(figure)


def test_arrows_go_to_the_largest_weights(axes):
    arrows(axes, CLIP, WEIGHTS, query=(1, 0, 2), top=5)
    drawn = [artist for artist in axes[0].figure.artists if isinstance(artist, ConnectionPatch)]
    assert len(drawn) == 5
    assert all(arrow.axesA is axes[1] and arrow.xy1 == (9.5, 1.5) for arrow in drawn)
    largest = sorted(np.ndindex(WEIGHTS.shape), key=lambda position: -WEIGHTS[position])[:5]
    expected = {(axes[t], (4 * column + 1.5, 4 * row + 1.5)) for t, row, column in largest}
    assert {(arrow.axesB, arrow.xy2) for arrow in drawn} == expected
    assert drawn[0].get_linewidth() > drawn[-1].get_linewidth()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": np.full((3, 2, 4), np.nan)}, "weights must be finite"),
        ({"query": (0, 2, 0)}, r"query must lie inside the map \(3, 2, 4\); got \(0, 2, 0\)"),
        ({"clip": CLIP[:2]}, "of as many frames; got 3, 2, 3"),
    ],
)
@pytest.mark.usefixtures("as_users_see_it")
def test_bad_input(axes, options, message):
    with pytest.raises(ValueError, match=message):
        arrows(**{"axes": axes, "clip": CLIP, "weights": WEIGHTS, "query": (0, 0, 0)} | options)
