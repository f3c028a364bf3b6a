"""What the README shows runs, and what the site's first pages do."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


TEN_LINES, NETWORKS, LOOKING = snippets(README)
(FIRST,) = snippets((ROOT / "docs" / "index.md").read_text())
(HOW_TO_LOOK,) = snippets((ROOT / "docs" / "how_to.md").read_text())


def test_the_ten_lines_run():
    names = {}
    exec(TEN_LINES, names)
    assert (names["z"] == names["x"]).all()
    (affinity,) = names["state"]["intermediates"]["operation"]["affinity"]
    assert affinity.shape == (2, 1568, 392)
    assert jax.tree.structure(names["variables"]).num_leaves == 8
    names = {}
    exec(FIRST, names)
    assert (names["z"] == names["x"]).all()


def test_published_weights_are_loaded_as_it_says(tmp_path, monkeypatch, capsys):
    """From a file of that name, with random weights, and a small clip."""
    monkeypatch.chdir(tmp_path)
    model = nl.models.video_resnet(
        50, "i3d_3x1x1", nonlocal_blocks=5, clip="8x8", preset="slowfast"
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
    nl.weights.save("I3D_NLN_8x8_R50.pkl", weights, names="caffe2")
    names = {"nl": nl, "clip": jnp.ones((1, 8, 32, 32, 3))}
    exec(NETWORKS, names)
    assert names["logits"].shape == (1, 400)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("35,401,936 parameters")


def test_one_sees_what_it_attends_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nl.models.video_resnet(
        (1, 1, 6, 1), "c2d", {"res4": (5,)}, preset="slowfast", num_classes=3, width_per_group=4
    )
    clip = jax.random.uniform(jax.random.key(0), (1, 8, 128, 128, 3))
    variables = jax.jit(model.init)(jax.random.key(1), clip)
    for snippet in (LOOKING, HOW_TO_LOOK):
        exec(snippet, {"nl": nl, "model": model, "clip": clip, "variables": variables})
        assert {file.name for file in tmp_path.iterdir()} == {"arrows.png", "explore.html"}
        for file in tmp_path.iterdir():
            file.unlink()


def test_it_is_short_and_its_picture_is_there():
    assert len(README.splitlines()) < 150
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
