"""`plan` reports the compiler's bytes, compiles equal blocks once, and finds every operation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import nonlocal_jax as nl
from nonlocal_jax.layers import planning


@pytest.fixture
def compilations(monkeypatch):
    """Counts compilations instead of compiling: each reports the number of those before it."""
    names = []

    def count(function, *arguments):
        names.append(function.__name__)
        return len(names)

    monkeypatch.setattr(planning, "temporary_bytes", count)
    return names


def measured_by_hand(block, x):
    variables = jax.eval_shape(block.init, jax.random.key(0), x)

    def step(variables, x, cotangent):
        def apply(params, x):
            inputs = {**variables, "params": params}
            return block.apply(inputs, x, train=True, mutable=["batch_stats"])

        z, pullback, state = jax.vjp(apply, variables["params"], x, has_aux=True)
        return z, pullback(cotangent), state

    forward = jax.jit(block.apply).lower(variables, x).compile()
    backward = jax.jit(step).lower(variables, x, x).compile()
    return tuple(c.memory_analysis().temp_size_in_bytes for c in (forward, backward))


def test_bytes_are_those_of_the_compiler():
    shape = (2, 14, 14, 32)
    (planned,) = nl.plan(shape, nl.layers.nonlocal_block("dot_product"))
    assert (planned.queries, planned.keys, planned.chosen) == (196, 49, "reassociated")
    block = nl.layers.nonlocal_block("dot_product", implementation="dense")
    by_hand = measured_by_hand(block, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert (planned.forward["dense"], planned.backward["dense"]) == by_hand
    assert planned.forward["dense"] > planned.forward["reassociated"]
    assert planned.backward["dense"] > planned.backward["reassociated"]
    assert planned.seconds > 0


def test_equal_blocks_are_compiled_once(compilations):
    """Five blocks in two stages are two distinct ones: two implementations, two programs each."""
    places = {"res3": (0, 1), "res4": (0, 1, 2)}
    model = nl.models.video_resnet((1, 2, 3, 1), "c2d", places, num_classes=3)
    plans = nl.plan((1, 4, 64, 64, 3), model)
    assert len(compilations) == 2 * 2 * 2
    assert [block.place for block in plans] == [
        f"nonlocal_{stage}_{i}" for stage, indices in places.items() for i in indices
    ]
    assert [block.seconds > 0 for block in plans] == [True, False, True, False, False]
    assert plans[0].forward == plans[1].forward != plans[2].forward == plans[4].forward
    assert "equal to a block above" in str(plans[1])


class RelationBlock(nn.Module):
    """A residual block of another library, with a positional `train` and a mask."""

    @nn.compact
    def __call__(self, x, train, mask=None):
        theta, phi, g = (nn.Dense(4, name=name)(x) for name in ("theta", "phi", "g"))
        with nl.layers.enclosing_block(self):
            y = nl.layers.nonlocal_response(
                self, "dot_product", theta, phi, g, key_mask=mask, implementation="dense"
            )
        y = nn.Dropout(0.5, deterministic=not train)(nn.Dense(x.shape[-1])(y))
        return x + nn.BatchNorm(use_running_average=not train)(y)


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        mask = jnp.ones(x.shape[:2], bool)
        x = nn.remat(RelationBlock, static_argnums=(2,))(name="relation")(x, train, mask)
        return nl.layers.DotProduct(name="standalone")(x)


def test_blocks_of_other_libraries_and_operations_without_a_block():
    relation, standalone = nl.plan((2, 12, 6), Network())
    assert (relation.place, relation.instantiation) == ("relation", "dot_product")
    assert (relation.queries, relation.keys, relation.chosen) == (12, 12, "dense")
    assert set(relation.forward) == set(relation.backward) == {"dense", "reassociated"}
    assert 0 < relation.forward["dense"] < relation.backward["dense"]
    assert (standalone.place, standalone.instantiation) == ("standalone", "dot_product")
    assert (standalone.queries, standalone.keys) == (12, 6)
    header, *rows = str(relation).splitlines()
    assert header.startswith("relation: dot_product, 12 queries × 12 keys (compiled in ")
    assert [row.split()[0] for row in rows] == ["dense", "reassociated"]
    assert [row.endswith(" MB with gradients <- runs") for row in rows] == [True, False]


def test_blocks_inside_scan_and_split_over_devices(compilations):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            block = nl.layers.nonlocal_block("dot_product", axis_name="positions", name="block")
            return block(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "batch_stats": 0}
            scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scan(name="steps")(x, None)[0]

    (planned,) = nl.plan((1, 8, 8, 6), Scanned())
    assert (planned.place, len(compilations)) == ("steps/block", 4)


def test_nothing_to_plan_and_inputs_that_do_not_fit():
    assert nl.plan((1, 3), nn.Dense(2)) == ()
    with pytest.raises(ValueError, match="one, two or three position axes"):
        nl.plan((2, 8), nl.layers.nonlocal_block("gaussian"))


class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([self.make_block(rngs) for _ in range(2)])

    def make_block(self, rngs):
        block = nnx.bridge.ToNNX(nl.layers.nonlocal_block("dot_product"), rngs=rngs)
        return block.lazy_init(jnp.zeros((1, 6, 6, 8)))

    @nnx.jit
    def __call__(self, x):
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_nnx_models(compilations):
    network = NnxNetwork(nnx.Rngs(0))
    network(jnp.zeros((2, 6, 6, 3)))  # what has been traced before is found as well
    first, second = nl.plan((2, 6, 6, 3), network)
    assert (first.place, second.place) == ("blocks/0", "blocks/1")
    assert (first.queries, first.keys) == (36, 9)
    assert len(compilations) == 4  # the second block is equal to the first
    assert (first.forward, first.backward) == (second.forward, second.backward)


def test_models_of_neither_api():
    with pytest.raises(TypeError, match="must be a Linen or an NNX module; got function"):
        nl.plan((2, 6, 6, 3), lambda x: x)


@pytest.mark.parametrize("shape", [(0, 4, 4, 8), (0, 3, 4, 4, 8)])
def test_an_empty_batch(shape):
    (planned,) = nl.plan(shape, nl.layers.nonlocal_block("embedded_gaussian"))
    assert planned.chosen == "dense"
