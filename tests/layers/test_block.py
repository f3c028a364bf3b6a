"""The block: an identity at first, residual, normalised in each way; and the presets, different where the sources are."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx

from nonlocal_jax.layers import (
    Affine,
    BatchNorm,
    EmbeddedGaussian,
    NonLocalBlock,
    freeze_batch_norm,
    nonlocal_block,
)

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
PRESETS = ("paper", "caffe2", "slowfast", "non_local_pytorch", "mmcv")
NORMS = {
    "batch": BatchNorm,
    "affine": Affine,
    "group": functools.partial(nn.GroupNorm, num_groups=2),
    "layer": nn.LayerNorm,
    "none": None,
}
each_instantiation = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())

X = jax.random.normal(jax.random.key(0), (2, 3, 5, 7, 6))
MASK = jax.random.bernoulli(jax.random.key(1), 0.7, X.shape[:-1])


def awake(variables, seed=3):
    """The same variables away from their initial values, so that the block is no identity and no bias is 0."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [
            jnp.abs(leaf + jax.random.uniform(k, leaf.shape) / 2)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
    )


def paths(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


class OnEveryDevice(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.product(instantiation=INSTANTIATIONS)
    def test_new_block_is_the_identity(self, instantiation):
        block = nonlocal_block(instantiation)
        variables = block.init(jax.random.key(1), X)
        chex.assert_trees_all_equal(self.variant(block.apply)(variables, X), X)

    @chex.variants(with_jit=True, with_pmap=True)
    @parameterized.product(instantiation=INSTANTIATIONS)
    def test_trained_block_answers_as_without_jit(self, instantiation):
        block = nonlocal_block(instantiation)
        variables = awake(block.init(jax.random.key(1), X))
        z = block.apply(variables, X)
        assert not np.allclose(z, X, atol=1e-3)
        chex.assert_trees_all_close(
            self.variant(block.apply)(variables, X), z, rtol=1e-4, atol=1e-4
        )


@each_norm
@pytest.mark.parametrize("train", [False, True])
def test_identity_at_start_with_each_norm_and_not_stuck_there(norm, train):
    block = nonlocal_block("embedded_gaussian", norm=norm)
    variables = block.init(jax.random.key(1), X)

    def loss(params):
        z, _ = block.apply({**variables, "params": params}, X, train=train, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(z)), z

    gradient, z = jax.grad(loss, has_aux=True)(variables["params"])
    chex.assert_trees_all_equal(z, X)
    first = gradient["out"]["kernel"] if norm is None else gradient["out_norm"]["scale"]
    assert np.abs(first).max() > 1e-4


@each_norm
def test_zero_init_can_be_turned_off(norm):
    block = nonlocal_block("dot_product", norm=norm, zero_init=False)
    z, _ = block.init_with_output(jax.random.key(1), X)
    assert not np.allclose(z, X, atol=1e-3)


def test_batch_statistics_move_by_a_tenth_in_training_and_not_otherwise():
    block = nonlocal_block("dot_product")
    variables = block.init(jax.random.key(1), X)
    trained = block.apply(variables, X, train=True, mutable=["batch_stats"])[1]["batch_stats"][
        "out_norm"
    ]
    y = block.operation.apply({"params": variables["params"]["operation"]}, X)
    response = (y @ variables["params"]["out"]["kernel"]).reshape(-1, 6)
    chex.assert_trees_all_close(trained["mean"], 0.1 * response.mean(0), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(trained["var"], 0.9 + 0.1 * response.var(0), rtol=1e-4)
    kept = block.apply(variables, X, mutable=["batch_stats"])[1]["batch_stats"]
    chex.assert_trees_all_equal(kept, variables["batch_stats"])


@each_instantiation
def test_frozen_batch_norm_answers_as_the_trained_one(instantiation):
    block = nonlocal_block(instantiation)
    variables = awake(block.init(jax.random.key(1), X))
    frozen = freeze_batch_norm(variables)
    assert set(frozen) == {"params"}
    assert set(frozen["params"]["out_norm"]) == {"scale", "bias"}
    chex.assert_trees_all_close(
        nonlocal_block(instantiation, norm=Affine).apply(frozen, X),
        block.apply(variables, X),
        rtol=1e-4,
        atol=1e-4,
    )


def test_freezing_reaches_every_depth_and_needs_statistics():
    class Tail(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nonlocal_block("dot_product", name="last")(nn.Dense(6)(x))

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nonlocal_block("dot_product", name="first")(x)
            return Tail(name="tail")(x)

    variables = awake(Network().init(jax.random.key(0), X))
    frozen = freeze_batch_norm(variables)
    assert paths(frozen["params"]).keys() == paths(variables["params"]).keys()
    changed = {
        name
        for name, leaf in paths(frozen["params"]).items()
        if not np.array_equal(leaf, paths(variables["params"])[name])
    }
    assert changed == {
        f"{place}/out_norm/{leaf}" for place in ("first", "tail/last") for leaf in ("scale", "bias")
    }
    with pytest.raises(ValueError, match=r"must hold batch_stats.*\['params'\]"):
        freeze_batch_norm(frozen)


@each_norm
def test_padding_keeps_its_value_and_influences_nothing(norm):
    block = nonlocal_block("embedded_gaussian", norm=norm)
    variables = awake(block.init(jax.random.key(1), X))

    def apply(x):
        return block.apply(variables, x, mask=MASK, train=True, mutable=["batch_stats"])

    (z, state), (spoilt, spoilt_state) = apply(X), apply(jnp.where(MASK[..., None], X, 1e3))
    chex.assert_trees_all_close(spoilt[MASK], z[MASK], rtol=1e-5)
    chex.assert_trees_all_close(spoilt_state, state, rtol=1e-5)
    chex.assert_trees_all_equal(z[~MASK], X[~MASK])
    assert (spoilt[~MASK] == 1e3).all()


@each_norm
def test_masked_statistics_are_those_of_the_real_positions(norm):
    block = nonlocal_block("dot_product", subsample=False, norm=norm)
    variables = awake(block.init(jax.random.key(1), X))
    real = jnp.zeros(X.shape[:-1], bool).at[:, :, :, :4].set(True)

    def apply(x, mask):
        return block.apply(variables, x, mask=mask, train=True, mutable=["batch_stats"])

    (z, state), (alone, state_alone) = apply(X, real), apply(X[:, :, :, :4], None)
    chex.assert_trees_all_close(z[:, :, :, :4], alone, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(state, state_alone, rtol=1e-4, atol=1e-6)


@each_norm
def test_a_sample_of_padding_alone_spoils_nothing(norm):
    """Batches are filled up with empty samples: finite values, statistics and gradients, for a whole batch of them too."""
    block = nonlocal_block("dot_product", norm=norm)
    variables = awake(block.init(jax.random.key(1), X))
    for mask in (MASK.at[1].set(False), jnp.zeros_like(MASK)):

        def loss(params, mask=mask):
            z, state = block.apply(
                {**variables, "params": params}, X, mask=mask, train=True, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(z)), (z, state)

        gradient, (z, state) = jax.grad(loss, has_aux=True)(variables["params"])
        chex.assert_tree_all_finite((gradient, state))
        chex.assert_trees_all_equal(z[1], X[1])
        assert bool(gradient["out"]["kernel"].any()) is bool(mask.any())


def test_instance_norm_does_not_see_padding():
    block = nonlocal_block("dot_product", norm=nn.InstanceNorm)
    variables = awake(block.init(jax.random.key(1), X))
    real = jnp.zeros(X.shape[:-1], bool).at[:, :, :, :4].set(True)
    z, alone = block.apply(variables, X, mask=real), block.apply(variables, X[:, :, :, :4])
    chex.assert_trees_all_close(z[:, :, :, :4], alone, rtol=1e-4, atol=1e-4)


def test_the_residual_ratio_is_that_of_the_real_positions():
    block = nonlocal_block("dot_product")
    variables = awake(block.init(jax.random.key(1), X))
    z, state = block.apply(
        variables, jnp.where(MASK[..., None], X, 1e3), mask=MASK, mutable=["intermediates"]
    )
    expected = np.linalg.norm(z[MASK] - X[MASK]) / np.linalg.norm(X[MASK])
    np.testing.assert_allclose(state["intermediates"]["residual_ratio"][0], expected, rtol=1e-4)


def test_dtypes():
    block = nonlocal_block("embedded_gaussian", dtype=jnp.bfloat16)
    variables = awake(block.init(jax.random.key(1), X))
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    z = block.apply(variables, X.astype(jnp.bfloat16))
    chex.assert_type(z, jnp.bfloat16)
    exact = nonlocal_block("embedded_gaussian").apply(variables, X)
    chex.assert_trees_all_close(z.astype(jnp.float32), exact, rtol=0.1, atol=0.1)


def test_an_operation_made_inside_a_network_keeps_its_parameters_in_the_block():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = NonLocalBlock(EmbeddedGaussian(), name="a")(x)
            return nonlocal_block("dot_product", name="b")(x)

    params = Network().init(jax.random.key(0), X)["params"]
    assert set(params) == {"a", "b"}
    assert set(params["a"]) == set(params["b"]) == {"operation", "out", "out_norm"}


def test_an_nnx_model_can_hold_a_block():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.before = nnx.Linear(6, 6, rngs=rngs)
            self.block = nnx.bridge.ToNNX(nonlocal_block("embedded_gaussian"), rngs=rngs)
            nnx.bridge.lazy_init(self.block, X)

        def __call__(self, x):
            return self.block(self.before(x))

    model = Model(nnx.Rngs(0))
    chex.assert_trees_all_close(model(X), model.before(X))

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))))(model)

    scale = gradient(model, X)["block"]["out_norm"]["scale"]
    assert np.abs(scale[...]).max() > 1e-4


# What paper.md's table says of each source, read off a block of 512 channels.
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
EPSILON = {"caffe2": 1.0000001e-5}
DEVIATION = {  # of θ's kernel (512, 256) and of its bias
    "paper": ((2 / 512) ** 0.5, None),
    "caffe2": (0.01, 0.0),
    "slowfast": ((2 / 256) ** 0.5, 0.0),
    "non_local_pytorch": ((1 / 3 / 512) ** 0.5, (1 / 3 / 512) ** 0.5),
    "mmcv": (0.01, 0.0),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_differ_exactly_where_the_sources_do(preset):
    block = nonlocal_block("embedded_gaussian", preset)
    x = jnp.ones((1, 4, 512))
    variables = block.init(jax.random.key(0), x)
    params = {**variables["params"]["operation"], "out": variables["params"]["out"]}
    assert {name for name, p in params.items() if "bias" in p} == BIASES[preset]
    kernel, bias = DEVIATION[preset]
    np.testing.assert_allclose(params["theta"]["kernel"].std(), kernel, rtol=0.01)
    if bias is not None:
        np.testing.assert_allclose(params["theta"]["bias"].std(), bias, rtol=0.2)
    chex.assert_trees_all_equal(
        variables["params"]["out_norm"], {"scale": jnp.zeros(512), "bias": jnp.zeros(512)}
    )

    assert block.operation.use_scale is SCALED[preset]
    assert (block.operation.pool_order if block.operation.subsample else None) == POOLED[preset]
    norm = block.norm()
    assert (norm.momentum, norm.epsilon) == (0.9, EPSILON.get(preset, 1e-5))


@pytest.mark.parametrize("preset", ["paper", "non_local_pytorch", "mmcv"])
def test_w_z_and_w_f_are_initialised_as_in_the_source(preset):
    """mmcv initialises θ, φ and g only; its ConvModules keep their own He normal, whose fan is the outputs."""
    params = nonlocal_block("concatenation", preset).init(jax.random.key(0), jnp.ones((1, 4, 512)))[
        "params"
    ]
    w_z = {
        "paper": (2 / 256) ** 0.5,
        "non_local_pytorch": (1 / 3 / 256) ** 0.5,
        "mmcv": (2 / 512) ** 0.5,
    }[preset]
    w_f = {"paper": (2 / 512) ** 0.5, "non_local_pytorch": (1 / 3 / 512) ** 0.5, "mmcv": 2**0.5}[
        preset
    ]
    np.testing.assert_allclose(params["out"]["kernel"].std(), w_z, rtol=0.01)
    np.testing.assert_allclose(params["operation"]["w_f"].std(), w_f, rtol=0.1)


def test_mmcv_has_an_output_bias_when_no_norm_follows():
    params = nonlocal_block("dot_product", "mmcv", norm=None).init(jax.random.key(0), X)["params"]
    assert set(params["out"]) == {"kernel", "bias"}
    assert not params["out"]["kernel"].any()


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"instantiation": "cosine"},
            ValueError,
            r"instantiation must be one of 'gaussian', .*got 'cosine'",
        ),
        (
            {"instantiation": "gaussian", "preset": "torch"},
            ValueError,
            r"preset must be one of 'paper', .*got 'torch'",
        ),
        (
            {"instantiation": "gaussian", "preset": "caffe2"},
            ValueError,
            r"'caffe2' has no 'gaussian': video-nonlocal-net has",
        ),
        (
            {"instantiation": "dot_product", "subsmaple": False},
            TypeError,
            r"no attribute subsmaple; it has axes, ",
        ),
        (
            {"instantiation": "dot_product", "use_scale": True},
            TypeError,
            r"dot_product block has no attribute use_scale",
        ),
    ],
)
def test_bad_presets_name_what_there_is(arguments, error, message):
    with pytest.raises(error, match=message):
        nonlocal_block(**arguments)
