"""Networks are exported for all platforms at once, without the forms that are fast on CPUs only."""

import functools
import math
import re

import chex
import compiled
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from variables import normal, random_variables

from nonlocal_jax.layers import nonlocal_block
from nonlocal_jax.models import ToyVideoNet, cifar_resnet, non_local_pytorch_mnist, video_resnet

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH = 3
VIDEO = {"depth": (1, 1, 1, 1), "nonlocal_blocks": {"res3": (0,)}, "width_per_group": 4}
NETWORKS = {
    "i3d": (video_resnet(kind="i3d_3x1x1", preset="caffe2", **VIDEO), (8, 32, 32, 3)),
    "c2d": (video_resnet(kind="c2d", instantiation="concatenation", **VIDEO), (8, 32, 32, 3)),
    "cifar": (cifar_resnet(8, {"res2": (0,)}, instantiation="dot_product"), (32, 32, 3)),
    "toy_video": (ToyVideoNet(2, nonlocal_block("embedded_gaussian"), "i3d"), (8, 16, 16, 1)),
    "mnist": (non_local_pytorch_mnist("gaussian"), (28, 28, 1)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exported_for_all_platforms_with_a_symbolic_batch(name):
    model, shape = NETWORKS[name]
    images = normal((BATCH, *shape))
    variables = random_variables(model, images)
    (batch,) = jax.export.symbolic_shape("b")
    symbolic = jax.ShapeDtypeStruct((batch, *shape), images.dtype)
    function = jax.jit(model.apply)
    exported = jax.export.export(function, platforms=PLATFORMS)(variables, symbolic)
    logits = jax.export.deserialize(exported.serialize()).call(variables, images)
    expected = function(variables, images)
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.usefixtures("as_users_see_it")  # a symbolic number is no int
@pytest.mark.parametrize(
    ("name", "sizes"), [("toy_video", "b, 8, 16, 16, 1"), ("c2d", "2, 4*t, 32, 32, 3")]
)
def test_gradients_are_exported_with_symbolic_sizes(name, sizes):
    model, shape = NETWORKS[name]
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((BATCH, *shape)))
    symbolic = jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes), jnp.float32)
    function = jax.jit(functools.partial(gradient, model))
    exported = jax.export.export(function, platforms=PLATFORMS)(shapes, symbolic)
    chex.assert_trees_all_equal_shapes(
        exported.out_tree.unflatten(exported.out_avals)[0], shapes["params"]
    )


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.networks
@pytest.mark.parametrize("preset", ["paper", "slowfast"])
def test_inference_is_exported_with_symbolic_sizes(preset):
    model = video_resnet(kind="i3d_3x1x1", preset=preset, **VIDEO | {"head_window": (2, 2)})
    clip = normal((2, 9, 96, 32, 3))
    variables = random_variables(model, clip)
    constraints = ["t >= 7", "h >= 3"]
    sizes = jax.export.symbolic_shape("b, t, 32*h, 32, 3", constraints=constraints)
    symbolic = jax.ShapeDtypeStruct(sizes, jnp.float32)
    function = jax.jit(model.apply)
    exported = jax.export.export(function, platforms=PLATFORMS)(variables, symbolic)
    logits = jax.export.deserialize(exported.serialize()).call(variables, clip)
    np.testing.assert_allclose(logits, function(variables, clip), rtol=1e-4, atol=1e-4)


def gradient(model, variables, images):
    """Returns the gradient of a training step, by the parameters."""

    def loss(params):
        logits, updated = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )
        return jnp.sum(nn.log_softmax(logits)[:, 0]), updated

    return jax.grad(loss, has_aux=True)(variables["params"])


def inline_calls(text):
    """Puts the text of each function in the place of its calls: equal layers share a function."""
    name = r"(?:func\.func [\w ]*| call )@([\w.]+)"
    functions = {
        re.match(name, function)[1]: function for function in re.split(r"(?=func\.func )", text)[1:]
    }

    def inline(function):
        head, *calls = re.split(r"(?= call @)", function)
        return head + "".join(call + inline(functions[re.match(name, call)[1]]) for call in calls)

    return inline(functions["main"])


def count_products_of_matrices(text):
    matrix = r"tensor<[\d?]+x\d+xf32>"
    return len(re.findall(rf"stablehlo\.dot_general .* : \({matrix}, {matrix}\)", text))


def has_maximum_of_negated(text):
    """Whether ReLU(x + y) is computed as max(x, −y) + y."""
    return any(
        re.search(rf"stablehlo\.maximum .*{re.escape(name)}\b", function)
        for function in text.split("func.func")
        for name in re.findall(r"(%\w+) = stablehlo\.negate", function)
    )


@pytest.mark.parametrize(("batch", "differentiated"), [("3", False), ("b", False), ("3", True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_forms_for_cpus_are_in_programs_for_cpus_only(name, batch, differentiated):
    model, shape = NETWORKS[name]
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape(batch), *shape), jnp.float32)
    example = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), example)
    function = functools.partial(gradient, model) if differentiated else model.apply
    # Each layer is computed once, and once more for the gradients of its input and its kernel. The
    # first layer's input has none.
    windows = [math.prod(leaf.shape[:-2]) for leaf in jax.tree.leaves(variables)]
    layers_with_windows = sum(size > 1 for size in windows)
    convolutions = 3 * layers_with_windows - 1 if differentiated else layers_with_windows
    dense_layers = 2 if name == "mnist" else 1  # of vectors without positions
    products = 3 * dense_layers if differentiated else dense_layers
    traced = jax.jit(function).trace(variables, images)
    for platform in ("cpu", "cuda", "tpu"):
        text = inline_calls(traced.lower(lowering_platforms=(platform,)).as_text())
        if platform == "cpu":
            assert count_products_of_matrices(text) > products
            assert has_maximum_of_negated(text) or name == "mnist"  # which has no residual block
        else:
            assert count_products_of_matrices(text) == products
            assert not has_maximum_of_negated(text)
            assert text.count("stablehlo.convolution") == convolutions
            assert "stablehlo.sort" not in text
            assert "stablehlo.while" not in text


def test_gradients_on_several_devices_have_no_conditional():
    """XLA keeps a conditional into which it has put a collective, and on CPU that may deadlock."""
    model, shape = NETWORKS["cifar"]
    mesh = Mesh(jax.devices()[:2], ("data",))
    split, replicated = (
        NamedSharding(mesh, PartitionSpec("data")),
        NamedSharding(mesh, PartitionSpec()),
    )
    images = jax.ShapeDtypeStruct((4, *shape), jnp.float32, sharding=split)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    step = jax.jit(functools.partial(gradient, model), out_shardings=replicated)
    computations = compiled.program(step.lower(variables, images)).computations.values()
    opcodes = {
        instruction.opcode for computation in computations for instruction in computation.values()
    }
    assert "all-reduce" in opcodes
    assert "conditional" not in opcodes
