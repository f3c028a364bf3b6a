"""The page of published weights says what the library finds in files of these layouts.

The files themselves are not downloaded. For each row, a network of its kind is built, and `inspect`
reads arrays of zeros with the names and shapes that the network has in the source.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weights import samples

import nonlocal_jax as nl
from nonlocal_jax.layers.norm import Affine
from nonlocal_jax.weights.build import build, call, open_questions
from nonlocal_jax.weights.infer import architecture
from nonlocal_jax.weights.published import (
    CAFFE2,
    MMACTION2,
    PAGES,
    PUBLISHED_FILES,
    PYTORCHVIDEO,
    SLOWFAST,
    PublishedFile,
    flags,
    hint,
)
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


@pytest.fixture(scope="module")
def found():
    """The architectures by the name of the file. Files with the same arrays share theirs."""
    by_arrays = {}
    architectures = {}
    for file in PUBLISHED_FILES:
        arrays = (file.names, file.is_flat, repr(sorted(file.network.items())))
        if arrays not in by_arrays:
            by_arrays[arrays] = found_in(file)
        architectures[file.name] = by_arrays[arrays]
    return architectures


def row(file: PublishedFile, found) -> str:
    """Returns the row of the page for a file."""
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


def table(family: str, found) -> str:
    """Returns the table of one family, as the page has it."""
    rows = [row(file, found[file.name]) for file in PUBLISHED_FILES if file.family == family]
    lines = [f"| {' | '.join(HEADER)} |", "|---|--:|---|---|---|", *rows]
    return "\n".join(lines)


def named_facts(file: PublishedFile) -> dict[str, Any]:
    """Returns what the name of a file says about its network."""
    name = file.name.lower()
    has_blocks = re.search("_nonlocal_|_nln_|-nl-", name) is not None
    functions = ("dot-product", "embedded-gaussian", "gaussian")
    function = next((word for word in functions if word in name), "embedded-gaussian")
    return {
        "clip": re.search(r"[_-](\d+x\d)", name)[1],
        "blocks": (3, 4, 23, 3) if "r101" in name else (3, 4, 6, 3),
        "conv1_frames": {"c2d": 1, "i3d": 5}[name[:3]],
        "nonlocal_blocks": {"res3": (1, 3), "res4": (1, 3, 5)} if has_blocks else {},
        "has_pool2": "nopool" not in name,
        "operation": function.title().replace("-", "") if has_blocks else None,
        "is_frozen": "I3D_pretrain" in file.name,  # fine-tuned for long clips
    }


def facts(model) -> dict[str, Any]:
    """Returns the same facts of a network, other than its clip."""
    blocks = [model.make_block(stage) for stage in model.nonlocal_blocks]
    [operation] = {type(block.operation).__name__ for block in blocks} or {None}
    return {
        "blocks": model.blocks,
        "conv1_frames": model.conv1_frames,
        "nonlocal_blocks": dict(model.nonlocal_blocks),
        "has_pool2": model.layout.pool2 is not None,
        "operation": operation,
        "is_frozen": model.norm is Affine,
    }


# The window, strides and padding of pool1, and the stride of conv1 in time, in the sources' code.
SHORT, LONG = "short", "long"
STEMS = {
    (CAFFE2, SHORT): (1, ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    (CAFFE2, LONG): (2, ((2, 3, 3), (2, 2, 2), (0, 0, 0))),
    (SLOWFAST, SHORT): (1, ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    (PYTORCHVIDEO, SHORT): (1, ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    (MMACTION2, LONG): (2, ((1, 3, 3), (2, 2, 2), (0, 1, 1))),
    # Its C2D; what it calls C2D without pooling is another network, which pads.
    (MMACTION2, SHORT): (1, ((1, 3, 3), (1, 2, 2), (0, 0, 0))),
    (MMACTION2, "nopool"): (1, ((1, 3, 3), (1, 2, 2), (0, 1, 1))),
}


@pytest.mark.parametrize("file", PUBLISHED_FILES, ids=lambda file: file.name)
def test_the_answers_build_the_network(file, found):
    """The network is the one that the name of the file says, and no answer is superfluous."""
    named = named_facts(file)
    clip = named.pop("clip")
    model = build(found[file.name], file.choices)
    assert file.choices.clip == clip
    assert facts(model) == named
    length = LONG if clip in ("32x2", "128x1") else SHORT
    if file.family == MMACTION2 and not named["has_pool2"]:
        length = "nopool"
    assert (model.layout.conv1_stride, model.layout.pool1) == STEMS[file.family, length]
    for stage in model.nonlocal_blocks:
        operation = model.make_block(stage).operation
        assert operation.subsampling((4, 14, 14)) == (1, 2, 2)
        groups = 4 if stage == "res3" and clip in ("32x4", "128x1") else None
        assert operation.group_size == groups
        if file.family != MMACTION2:
            assert operation.use_scale
        elif named["operation"] == "EmbeddedGaussian":
            assert not operation.use_scale
    given = {
        field.name
        for field in dataclasses.fields(Choices)
        if getattr(file.choices, field.name) != field.default
    }
    for name in given:
        others = dataclasses.replace(file.choices, **{name: None})
        asked = open_questions(found[file.name], others)
        assert name in {question.name for question in asked}


@pytest.mark.parametrize("family", PAGES)
def test_the_page_has_the_table(family, found):
    page = PAGE.read_text()
    assert table(family, found) in page
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
