"""What was compiled once is not compiled again: in a process, and from one process to the next."""

import functools
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from compilations import compilations, compiles_nothing_again
from flax import nnx
from variables import normal, random_variables

import nonlocal_jax as nl
from nonlocal_jax import layers, ops
from nonlocal_jax.layers.residual import relu_of_sum
from nonlocal_jax.ops.choose import kernels_of

INSTANTIATIONS = ("gaussian", "embedded_gaussian", "dot_product", "concatenation")
# Sizes that no other test has, so that the first call compiles: these rows make several tiles.
N, M, D = 1103, 1051, 6


@pytest.fixture(autouse=True)
def nothing_compiled():
    jax.clear_caches()


def rows(*shape):
    return jnp.asarray(normal(shape))


def implementations():
    for instantiation in INSTANTIATIONS:
        for kernel in kernels_of(instantiation):
            if kernel.name not in ("cudnn", "flash"):
                yield instantiation, kernel.name


def respond(instantiation, theta, phi, g, **options):
    if instantiation == "concatenation":
        return ops.concatenation(theta, phi, g, jnp.ones(2 * D), **options)
    return getattr(ops, instantiation)(theta, phi, g, **options)


TRANSFORMATIONS = {
    "none": lambda function, *rows: function(*rows),
    "vmap": lambda function, *rows: jax.vmap(function)(*rows),
    "grad": lambda function, *rows: jax.grad(
        lambda *rows: function(*rows).sum(), argnums=(0, 1, 2)
    )(*rows),
    "remat": lambda function, *rows: jax.grad(
        lambda *rows: jax.checkpoint(lambda *rows: function(*rows))(*rows).sum()
    )(*rows),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize(("instantiation", "implementation"), list(implementations()))
def test_operations(instantiation, implementation, transformation, masked):
    theta, phi, g = rows(2, N, D), rows(2, M, D), rows(2, M, 5)
    mask = jnp.arange(M) % 3 > 0

    def function(theta, phi, g):
        key_mask = jnp.broadcast_to(mask, phi.shape[:-1]) if masked else None
        return respond(
            instantiation, theta, phi, g, key_mask=key_mask, implementation=implementation
        )

    compiles_nothing_again(lambda: TRANSFORMATIONS[transformation](function, theta, phi, g))


@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_affinity(instantiation):
    w_f = jnp.ones(2 * D) if instantiation == "concatenation" else None
    theta, phi = rows(2, N, D), rows(2, M, D)
    compiles_nothing_again(lambda: ops.affinity(instantiation, theta, phi, w_f))


def test_an_operation_of_another_scale_or_mask_is_compiled():
    theta, phi, g = rows(2, N, D), rows(2, M, D), rows(2, M, 5)
    ops.embedded_gaussian(theta, phi, g)
    for options in ({"scale": 0.5}, {"key_mask": jnp.ones((2, M), bool)}):
        with compilations() as names:
            ops.embedded_gaussian(theta, phi, g, **options)
        assert "_compiled_response" in " ".join(names)


class Convolved(nn.Module):
    """A block between a convolution and a pooling, with everything that chooses by platform."""

    instantiation: str

    @nn.compact
    def __call__(self, x, *, train=False):
        x = layers.VideoConv(6, (3, 3, 3), name="conv")(x)
        block = layers.nonlocal_block(self.instantiation, name="block")
        x = relu_of_sum(x, block(x, train=train))
        return layers.strided_max_pool(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def apply_in_training(model, variables, x):
    z, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
    return z.sum()


MODULES = {
    "apply": lambda model, variables, x: model.apply(variables, x),
    "return_map": lambda model, variables, x: model.apply(variables, x, mutable=["intermediates"]),
    "vmap": lambda model, variables, x: jax.vmap(lambda x: model.apply(variables, x))(x[None]),
    "grad": lambda model, variables, x: jax.grad(functools.partial(apply_in_training, model))(
        variables, x
    ),
    "remat": lambda model, variables, x: jax.grad(
        jax.checkpoint(functools.partial(apply_in_training, model))
    )(variables, x),
    "nnx": lambda model, variables, x: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(x)(x),
}


@pytest.mark.parametrize("use", MODULES)
@pytest.mark.parametrize("instantiation", INSTANTIATIONS)
def test_blocks(instantiation, use):
    x = rows(2, 3, 9, 9, 5)
    model = Convolved(instantiation)
    variables = random_variables(model, x)
    compiles_nothing_again(lambda: MODULES[use](model, variables, x))


class Scanned(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x):
        def body(module, x, _):
            return module(x), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(self.inner, x, None)[0]


def test_nn_scan_compiles_the_loop_alone():
    """Flax makes the body of the loop in each call, whatever is in it."""

    def names_of(module):
        variables = random_variables(Scanned(module), x)
        for _ in range(2):
            Scanned(module).apply(variables, x)
        with compilations() as names:
            Scanned(module).apply(variables, x)
        return names

    x = rows(2, 7, 5)
    block = layers.nonlocal_block("concatenation", norm=None, subsample=False)
    assert names_of(block) == names_of(nn.Dense(5))


@pytest.mark.parametrize("model", ["linen", "nnx"])
def test_affinities(model):
    x = rows(1, 24, 24, 3)
    network = nn.Sequential([nn.Conv(8, (3, 3)), layers.nonlocal_block("concatenation")])
    variables = random_variables(network, x)
    if model == "nnx":
        network, variables = nnx.bridge.ToNNX(network, rngs=nnx.Rngs(0)).lazy_init(x), None

    def use():
        # Another object, as in a notebook whose cell is run again.
        same = network if model == "nnx" else network.clone()
        return {
            name: maps.rows((5, 7))
            for name, maps in nl.visualize.affinities(same, variables, x).items()
        }

    (looked,) = compiles_nothing_again(use).values()
    assert looked.shape == (1, 1, 12, 12)


SCRIPT = """
import jax, jax.numpy as jnp, flax.linen as nn
import nonlocal_jax as nl
missed = []
jax.monitoring.register_event_listener(
    lambda event, **_: missed.append(event) if event.endswith("cache_misses") else None
)
x = jnp.ones((1, 12, 12, 3))
model = nn.Sequential([nn.Conv(8, (3, 3)), nl.layers.nonlocal_block("concatenation")])
variables = jax.jit(model.init)(jax.random.key(0), x)
jax.block_until_ready(model.apply(variables, x))
nl.visualize.affinities(model, variables, x)
print(len(missed))
"""


def test_another_process_finds_the_programs(tmp_path):
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}

    def misses():
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert misses() > 5
    assert misses() == 0
