"""What the README shows runs."""

import re
from pathlib import Path

import jax

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(code, names)
    assert (names["z"] == names["x"]).all()
    (affinity,) = names["state"]["intermediates"]["operation"]["affinity"]
    assert affinity.shape == (2, 1568, 392)
    assert jax.tree.structure(names["variables"]).num_leaves == 8


def test_it_is_short_and_its_picture_is_there():
    assert len(README.splitlines()) < 150
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (Path(__file__).parent.parent / picture).is_file(), picture
