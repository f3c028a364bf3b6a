"""The non-local block: an identity at first, residual, normalised in each way, blind to padding."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from flax import nnx
from variables import normal, random_variables

from nonlocal_jax.layers import (
    Affine,
    BatchNorm,
    EmbeddedGaussian,
    NonLocalBlock,
    freeze_batch_norm,
    nonlocal_block,
)

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
NORMS = {
    "batch": BatchNorm,
    "affine": Affine,
    "group": functools.partial(nn.GroupNorm, num_groups=2),
    "layer": nn.LayerNorm,
    "none": None,
}
each_instantiation = pytest.mark.parametrize("instantiation", INSTANTIATIONS)
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())

X = normal((2, 3, 5, 7, 6))
MASK = np.random.default_rng(1).random(X.shape[:-1]) < 0.7
REAL = np.broadcast_to(np.arange(7) < 4, X.shape[:-1])  # the first four columns


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@functools.cache
def new_and_trained(instantiation):
    """A block, its initial variables, others, and its output with these without jit."""
    block = nonlocal_block(instantiation)
    x = jnp.asarray(X)
    trained = random_variables(block, x)
    return block, jax.jit(block.init)(jax.random.key(1), x), trained, block.apply(trained, x)


class OnEveryDevice(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    @parameterized.product(instantiation=INSTANTIATIONS)
    def test_new_block_is_the_identity_and_a_trained_one_answers_as_without_jit(
        self, instantiation
    ):
        block, new, trained, expected = new_and_trained(instantiation)
        apply, x = self.variant(block.apply), jnp.asarray(X)
        chex.assert_trees_all_equal(apply(new, x), x)
        z = apply(trained, x)
        assert not np.allclose(z, x, atol=1e-3)
        chex.assert_trees_all_close(z, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("norm", "train"),
    [(name, False) for name in NORMS] + [("batch", True)],
)
def test_identity_at_start_with_each_norm_and_not_stuck_there(norm, train):
    block = nonlocal_block("embedded_gaussian", norm=NORMS[norm])

    @jax.jit
    def start(x):
        variables = block.init(jax.random.key(1), x)

        def loss(params):
            inputs = {**variables, "params": params}
            z, _ = block.apply(inputs, x, train=train, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(z)), z

        return jax.grad(loss, has_aux=True)(variables["params"])

    gradient, z = start(X)
    chex.assert_trees_all_equal(z, X)
    first = gradient["out"]["kernel"] if norm == "none" else gradient["out_norm"]["scale"]
    assert np.abs(first).max() > 1e-4


def test_zero_init_can_be_turned_off_with_each_norm():
    blocks = [nonlocal_block("dot_product", norm=norm, zero_init=False) for norm in NORMS.values()]

    @jax.jit
    def outputs(x):
        return [block.init_with_output(jax.random.key(1), x)[0] for block in blocks]

    for z in outputs(X):
        assert not np.allclose(z, X, atol=1e-3)


def test_batch_statistics_move_by_a_tenth_in_training_and_not_otherwise():
    block = nonlocal_block("dot_product")
    variables = random_variables(block, X)
    variables["batch_stats"]["out_norm"] = {"mean": jnp.zeros(6), "var": jnp.ones(6)}
    params = variables["params"]

    @jax.jit
    def run(x):
        _, trained = block.apply(variables, x, train=True, mutable=["batch_stats"])
        _, kept = block.apply(variables, x, mutable=["batch_stats"])
        y = block.operation.apply({"params": params["operation"]}, x)
        return trained["batch_stats"]["out_norm"], kept["batch_stats"], y

    trained, kept, y = run(X)
    response = (y @ params["out"]["kernel"]).reshape(-1, 6)
    chex.assert_trees_all_close(trained["mean"], 0.1 * response.mean(0), rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(trained["var"], 0.9 + 0.1 * response.var(0), rtol=1e-4)
    chex.assert_trees_all_equal(kept, variables["batch_stats"])


@each_instantiation
def test_frozen_batch_norm_answers_as_the_trained_one(instantiation):
    _, _, variables, expected = new_and_trained(instantiation)
    frozen = freeze_batch_norm(variables)
    assert set(frozen) == {"params"}
    assert set(frozen["params"]["out_norm"]) == {"scale", "bias"}
    z = jax.jit(nonlocal_block(instantiation, norm=Affine).apply)(frozen, X)
    chex.assert_trees_all_close(z, expected, rtol=1e-4, atol=1e-4)


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

    variables = random_variables(Network(), X)
    frozen = freeze_batch_norm(variables)
    params, frozen_params = paths(variables["params"]), paths(frozen["params"])
    assert frozen_params.keys() == params.keys()
    changed = {name for name in params if not np.array_equal(frozen_params[name], params[name])}
    blocks = ("first", "tail/last")
    assert changed == {f"{block}/out_norm/{leaf}" for block in blocks for leaf in ("scale", "bias")}
    with pytest.raises(ValueError, match=r"must hold batch_stats.*\['params'\]"):
        freeze_batch_norm(frozen)


@each_norm
def test_padding_keeps_its_value_and_influences_nothing(norm):
    block = nonlocal_block("embedded_gaussian", norm=norm)
    variables = random_variables(block, X)

    @jax.jit
    def apply(x):
        mask = jnp.asarray(MASK)
        return block.apply(variables, x, mask=mask, train=True, mutable=["batch_stats"])

    (z, state) = apply(X)
    (spoilt, spoilt_state) = apply(np.where(MASK[..., None], X, np.float32(1e3)))
    chex.assert_trees_all_close(spoilt[MASK], z[MASK], rtol=1e-5)
    chex.assert_trees_all_close(spoilt_state, state, rtol=1e-5)
    chex.assert_trees_all_equal(z[~MASK], X[~MASK])
    assert (spoilt[~MASK] == 1e3).all()


@pytest.mark.parametrize("norm", [*NORMS.values(), nn.InstanceNorm], ids=[*NORMS, "instance"])
def test_masked_statistics_are_those_of_the_real_positions(norm):
    block = nonlocal_block("dot_product", subsample=False, norm=norm)
    variables = random_variables(block, X)

    @jax.jit
    def run(x, mask):
        options = {"train": True, "mutable": ["batch_stats"]}
        masked = block.apply(variables, x, mask=mask, **options)
        return masked, block.apply(variables, x[:, :, :, :4], **options)

    (z, state), (alone, state_alone) = run(X, REAL)
    chex.assert_trees_all_close(z[:, :, :, :4], alone, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(state, state_alone, rtol=1e-4, atol=1e-6)


@each_norm
def test_samples_of_padding_alone_spoil_nothing(norm):
    """Batches are filled up with empty samples: values, statistics and gradients stay finite."""
    block = nonlocal_block("dot_product", norm=norm)
    variables = random_variables(block, X)

    @jax.jit
    def step(x, mask):
        def loss(params):
            inputs = {**variables, "params": params}
            z, state = block.apply(inputs, x, mask=mask, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(z)), (z, state)

        return jax.grad(loss, has_aux=True)(variables["params"])

    second_empty = MASK.copy()
    second_empty[1] = False
    for mask in (second_empty, np.zeros_like(MASK)):
        gradient, (z, state) = step(X, mask)
        chex.assert_tree_all_finite((gradient, state))
        chex.assert_trees_all_equal(z[1], X[1])
        assert bool(gradient["out"]["kernel"].any()) is bool(mask.any())


def test_the_residual_ratio_is_that_of_the_real_positions():
    block = nonlocal_block("dot_product")
    variables = random_variables(block, X)

    @jax.jit
    def run(x):
        return block.apply(variables, x, mask=jnp.asarray(MASK), mutable=["intermediates"])

    z, state = run(np.where(MASK[..., None], X, np.float32(1e3)))
    expected = np.linalg.norm(z[MASK] - X[MASK]) / np.linalg.norm(X[MASK])
    np.testing.assert_allclose(state["intermediates"]["residual_ratio"][0], expected, rtol=1e-4)


def test_dtypes():
    block = nonlocal_block("embedded_gaussian", dtype=jnp.bfloat16)
    _, _, variables, exact = new_and_trained("embedded_gaussian")
    shapes = jax.eval_shape(block.init, jax.random.key(1), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    z = jax.jit(block.apply)(variables, jnp.asarray(X, jnp.bfloat16))
    chex.assert_type(z, jnp.bfloat16)
    chex.assert_trees_all_close(z.astype(jnp.float32), exact, rtol=0.1, atol=0.1)


def test_an_operation_made_inside_a_network_keeps_its_parameters_in_the_block():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = NonLocalBlock(EmbeddedGaussian(), name="a")(x)
            return nonlocal_block("dot_product", name="b")(x)

    params = jax.eval_shape(Network().init, jax.random.key(0), X)["params"]
    assert set(params) == {"a", "b"}
    assert set(params["a"]) == set(params["b"]) == {"operation", "out", "out_norm"}


def test_an_nnx_model_can_hold_a_block():
    x = jnp.asarray(X[:, :1])

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(6, 6, rngs=rngs)
            self.block = nnx.bridge.ToNNX(nonlocal_block("embedded_gaussian"), rngs=rngs)
            nnx.bridge.lazy_init(self.block, x)

        def __call__(self, x):
            return self.block(self.linear(x))

    model = Model(nnx.Rngs(0))

    @nnx.jit
    def run(model, x):
        gradient = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
        return model(x), model.linear(x), gradient

    z, block_input, gradient = run(model, x)
    chex.assert_trees_all_close(z, block_input)
    scale = gradient["block"]["out_norm"]["scale"]
    assert np.abs(scale[...]).max() > 1e-4


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
def test_bad_options_are_errors_that_list_the_good_ones(arguments, error, message):
    with pytest.raises(error, match=message):
        nonlocal_block(**arguments)
