"""The page of published weights says what the library finds in files of these layouts.

The files themselves are not downloaded. For each row, a network of its kind is built, and `inspect`
reads arrays of zeros with the names and shapes that the network has in the source.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.weights.build import build, call, open_questions
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.published import PAGES, PUBLISHED_FILES, PublishedFile, flags, hint
from nonlocal_jax.weights.questions import Choices

PAGE = Path(__file__).parents[2] / "docs" / "published_weights.md"
HEADER = ("file", "top-1, %", "`inspect` asks for", "answers", "the call")


def network(file: PublishedFile):
    """Builds the network of a published file."""
    choices = file.choices
    options = {"clip": choices.clip, "preset": choices.preset or "slowfast"}
    if file.names == "mmaction2":
        options["preset"] = "mmcv"
    if choices.pool2 is not None:
        options["pool2"] = choices.pool2
    if choices.instantiation is not None:
        options["instantiation"] = choices.instantiation
    is_frozen_block = "block_options" in file.network
    if file.names == "caffe2" and is_frozen_block and choices.clip in ("32x4", "128x1"):
        options["group_size"] = {"res3": 4}
    return nl.models.video_resnet(**options, **file.network)


def found_in(file: PublishedFile):
    """Infers the architecture from arrays as the file has them."""
    checkpoint = samples.checkpoint(network(file), file.names)
    if file.is_flat:
        arrays = {
            name: np.broadcast_to(np.float32(0), [n for i, n in enumerate(a.shape) if i != 2])
            if a.ndim == 5
            else a
            for name, a in checkpoint.arrays.items()
        }
        checkpoint = dataclasses.replace(checkpoint, arrays=arrays)
    return architecture(checkpoint)


def row(file: PublishedFile) -> str:
    """Returns the row of the page for a file."""
    found = found_in(file)
    asked = ", ".join(question.name for question in open_questions(found))
    written = call(found, file.choices).removeprefix("nl.models.")
    cells = (
        f"[{file.name}]({file.link})",
        file.top_1,
        asked,
        f"`{flags(file.choices)}`",
        f"`{written}`",
    )
    return f"| {' | '.join(cells)} |"


def table(family: str) -> str:
    """Returns the table of one family, as the page has it."""
    rows = [row(file) for file in PUBLISHED_FILES if file.family == family]
    lines = [f"| {' | '.join(HEADER)} |", "|---|--:|---|---|---|", *rows]
    return "\n".join(lines)


@pytest.mark.parametrize("file", PUBLISHED_FILES, ids=lambda file: file.name)
def test_the_answers_build_the_network(file):
    """None of the answers is superfluous."""
    found = found_in(file)
    named = {
        field.name
        for field in dataclasses.fields(Choices)
        if getattr(file.choices, field.name) != field.default
    }
    for name in named:
        others = dataclasses.replace(file.choices, **{name: None})
        assert name in {question.name for question in open_questions(found, others)}
    assert repr(build(found, file.choices)) == repr(network(file))


@pytest.mark.parametrize("family", PAGES)
def test_the_page_has_the_table(family):
    page = PAGE.read_text()
    assert table(family) in page
    assert PAGES[family] in page


def test_the_page_has_no_other_files():
    links = re.findall(r"^\| \[([^]]*)\]", PAGE.read_text(), flags=re.MULTILINE)
    assert links == [file.name for file in PUBLISHED_FILES]
    assert len({file.link for file in PUBLISHED_FILES}) == len(PUBLISHED_FILES)


def test_a_name_only_suggests_answers():
    assert hint("weights.pkl") == ""
    advice = hint("C2D_NOPOOL_8x8_R50.pkl")
    assert advice.startswith("If it is PySlowFast's C2D_NOPOOL_8x8_R50.pkl, as its name says, ")
    assert advice.endswith("pass: --clip 8x8 --preset slowfast --pool2 False")
