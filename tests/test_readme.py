"""Runs the snippets of the README, the site's first page and the how-to guides."""

import ast
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nonlocal_jax as nl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def snippets(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


QUICK_START, PUBLISHED_WEIGHTS, AFFINITIES = snippets(README)
(FIRST_PAGE,) = snippets((ROOT / "docs" / "index.md").read_text())
(HOW_TO,) = snippets((ROOT / "docs" / "how_to.md").read_text())


def test_quick_start():
    names = {}
    exec(QUICK_START, names)
    assert (names["z"] == names["x"]).all()
    assert names["affinity"].shape == (2, 1568, 392)
    assert names["y"].shape == names["tokens"].shape
    assert jax.tree.structure(names["variables"]).num_leaves == 8


def test_first_page():
    names = {}
    exec(FIRST_PAGE, names)
    assert (names["z"] == names["x"]).all()


@pytest.mark.networks
def test_published_weights(tmp_path, monkeypatch, capsys):
    """With random weights in a file of that name. The forward pass is traced, not compiled."""
    monkeypatch.chdir(tmp_path)
    model = nl.models.video_resnet(
        50, "i3d_3x1x1", nonlocal_blocks=5, clip="8x8", preset="slowfast"
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.01, np.float32), shapes)
    nl.weights.save("I3D_NLN_8x8_R50.pkl", weights, names="caffe2")
    clip = jax.ShapeDtypeStruct((1, 8, 224, 224, 3), jnp.float32)
    names = {"nl": nl, "clip": clip}
    for statement in ast.parse(PUBLISHED_WEIGHTS).body:
        source = ast.unparse(statement)
        if source.startswith("logits = "):
            forward = compile(source.removeprefix("logits = "), "README.md", "eval")
            logits = jax.eval_shape(
                lambda clip, code=forward: eval(code, {**names, "clip": clip}), clip
            )
        else:
            exec(source, names)
    assert logits.shape == (1, 400)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("35,401,936 parameters")


class SmallNetwork(nn.Module):
    """A network whose only block has the name and the map size of one in the snippets."""

    @nn.compact
    def __call__(self, clip):
        x = nn.Conv(8, (1, 16, 16), strides=(1, 16, 16))(clip)
        x = nl.layers.nonlocal_block("embedded_gaussian", name="nonlocal_res4_5")(x)
        return x.mean((1, 2, 3))


def test_affinities(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = nl.models.video_resnet(50, "i3d_3x1x1", 5, "8x8")
    shapes = jax.eval_shape(network.init, jax.random.key(0), network.example)
    assert "nonlocal_res4_5" in shapes["params"]
    model = SmallNetwork()
    clip = jax.random.uniform(jax.random.key(0), (1, 4, 128, 128, 3))
    variables = jax.jit(model.init)(jax.random.key(1), clip)
    # The same code is run once, whatever its comments.
    for snippet in {ast.unparse(ast.parse(text)) for text in (AFFINITIES, HOW_TO)}:
        exec(snippet, {"nl": nl, "model": model, "clip": clip, "variables": variables})
        assert {file.name for file in tmp_path.iterdir()} == {"arrows.png", "explore.html"}
        for file in tmp_path.iterdir():
            file.unlink()


def test_readme_is_short_and_its_pictures_exist():
    lines = README.splitlines()
    assert len(lines) < 120
    assert [line for line in lines if len(line) > 100] == []
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture


def test_links_of_the_readme_exist():
    for link in re.findall(r"\]\(([^)]*)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link
