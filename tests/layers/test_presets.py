"""The presets differ where the sources do, and a new source is one entry of the table."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax.data.clips import normalise
from nonlocal_jax.layers import nonlocal_block
from nonlocal_jax.layers.presets import PRESETS, presets_table
from nonlocal_jax.models import video_resnet

# The table of the sources, read off a block of 512 channels.
BIASES = {
    "paper": set(),
    "caffe2": {"theta", "phi", "g", "out"},
    "slowfast": {"theta", "phi", "g", "out"},
    "non_local_pytorch": {"theta", "phi", "g", "out"},
    "mmcv": {"theta", "phi", "g"},
}
SCALED = {
    "paper": False,
    "caffe2": True,
    "slowfast": True,
    "non_local_pytorch": False,
    "mmcv": True,
}
POOLED = {
    "paper": "after",
    "caffe2": "before",
    "slowfast": "before",
    "non_local_pytorch": "after",
    "mmcv": None,
}
EPSILON = {
    "paper": 1e-5,
    "caffe2": 1.0000001e-5,
    "slowfast": 1e-5,
    "non_local_pytorch": 1e-5,
    "mmcv": 1e-5,
}
DEVIATION = {  # of θ's kernel (512, 256) and of its bias
    "paper": ((2 / 512) ** 0.5, None),
    "caffe2": (0.01, 0.0),
    "slowfast": ((2 / 256) ** 0.5, 0.0),
    "non_local_pytorch": ((1 / 3 / 512) ** 0.5, (1 / 3 / 512) ** 0.5),
    "mmcv": (0.01, 0.0),
}


@pytest.mark.parametrize("preset", BIASES)
def test_presets_differ_exactly_where_the_sources_do(preset):
    block = nonlocal_block("embedded_gaussian", preset)
    variables = block.init(jax.random.key(0), jnp.ones((1, 4, 512)))
    params = {**variables["params"]["operation"], "out": variables["params"]["out"]}
    assert {name for name, layer in params.items() if "bias" in layer} == BIASES[preset]
    kernel, bias = DEVIATION[preset]
    np.testing.assert_allclose(params["theta"]["kernel"].std(), kernel, rtol=0.01)
    if bias is not None:
        np.testing.assert_allclose(params["theta"]["bias"].std(), bias, rtol=0.2)
    zeros = {"scale": jnp.zeros(512), "bias": jnp.zeros(512)}
    chex.assert_trees_all_equal(variables["params"]["out_norm"], zeros)

    operation, norm = block.operation, block.norm()
    assert operation.use_scale is SCALED[preset]
    assert (operation.pool_order if operation.subsample else None) == POOLED[preset]
    assert (norm.momentum, norm.epsilon) == (0.9, EPSILON[preset])


@pytest.mark.parametrize("preset", ["paper", "non_local_pytorch", "mmcv"])
def test_w_z_and_w_f_are_initialised_as_in_the_source(preset):
    """mmcv initialises θ, φ and g only; its ConvModules keep their own He normal, by fan-out."""
    block = nonlocal_block("concatenation", preset)
    params = block.init(jax.random.key(0), jnp.ones((1, 4, 512)))["params"]
    out_deviation = {
        "paper": (2 / 256) ** 0.5,
        "non_local_pytorch": (1 / 3 / 256) ** 0.5,
        "mmcv": (2 / 512) ** 0.5,
    }
    w_f_deviation = {
        "paper": (2 / 512) ** 0.5,
        "non_local_pytorch": (1 / 3 / 512) ** 0.5,
        "mmcv": 2**0.5,
    }
    np.testing.assert_allclose(params["out"]["kernel"].std(), out_deviation[preset], rtol=0.01)
    np.testing.assert_allclose(params["operation"]["w_f"].std(), w_f_deviation[preset], rtol=0.1)


def test_mmcv_has_an_output_bias_when_no_norm_follows():
    block = nonlocal_block("dot_product", "mmcv", norm=None)
    params = block.init(jax.random.key(0), jnp.ones((1, 4, 6)))["params"]
    assert set(params["out"]) == {"kernel", "bias"}
    assert not params["out"]["kernel"].any()


def test_equal_options_make_equal_blocks():
    """Blocks are static arguments under jit, so unequal ones would be compiled twice."""
    for preset in PRESETS:
        assert nonlocal_block("dot_product", preset) == nonlocal_block("dot_product", preset)


def test_the_tables_list_every_preset():
    assert presets_table() in nonlocal_block.__doc__.replace("\n    ", "\n")
    assert (
        "| `caffe2` | video-nonlocal-net | d^-0.5 | before φ and g | all | N(0, 0.01) "
        "| 1.0000001e-5 |" in presets_table()
    )
    for part in ("block", "backbone", "input"):
        lines = presets_table(part).splitlines()
        assert len(lines) == 2 + len(PRESETS)
        assert len({line.count("|") for line in lines}) == 1
    assert "| 2×3×3 / 2×2×2 |" in presets_table("backbone")
    [header, _, *rows] = presets_table("backbone").splitlines()
    cells = [cell.strip() for cell in header.split("|")]
    column = cells.index("networks without pool2")
    without = {row.split("|")[1].strip() for row in rows if row.split("|")[column].strip() == "yes"}
    assert without == {"`slowfast`", "`mmcv`"}
    column = cells.index("pool1, short clips, C2D")
    padded = {row.split("|")[1].strip() for row in rows if "padding" in row.split("|")[column]}
    assert padded == {"`paper`", "`slowfast`", "`non_local_pytorch`"}


@pytest.mark.usefixtures("as_users_see_it")
def test_a_table_that_does_not_exist():
    with pytest.raises(ValueError, match=r"part must be one of 'block', .*; got 'head'"):
        presets_table("head")


@pytest.mark.usefixtures("as_users_see_it")
def test_a_sixth_source_is_one_entry(monkeypatch):
    slowfast = PRESETS["slowfast"]
    sixth = dataclasses.replace(
        slowfast,
        title="a sixth source",
        block=dataclasses.replace(slowfast.block, epsilon=1e-3, pool_order="after"),
        backbone=dataclasses.replace(slowfast.backbone, zero_init_residual=False),
        input=dataclasses.replace(slowfast.input, mean=(100.0,) * 3, std=(50.0,) * 3),
    )
    monkeypatch.setitem(PRESETS, "sixth", sixth)

    block = nonlocal_block("dot_product", "sixth")
    assert (block.norm().epsilon, block.operation.pool_order) == (1e-3, "after")
    model = video_resnet((1, 1, 2, 1), "c2d", 1, preset="sixth")
    assert (model.norm().epsilon, model.zero_init_residual) == (1e-3, False)
    assert model.make_block("res4").norm().epsilon == 1e-3
    np.testing.assert_allclose(normalise(np.uint8([[150, 100, 50]]), "sixth"), [[1, 0, -1]])
    for part in ("block", "backbone", "input"):
        assert "| `sixth` | a sixth source |" in presets_table(part)
    with pytest.raises(ValueError, match=r"must be one of .*'sixth'; got 'seventh'"):
        nonlocal_block("dot_product", "seventh")
