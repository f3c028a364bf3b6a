"""The fast paths where they differ from the definition inside: several tiles and blocks, ties, offsets, precision."""

import importlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nonlocal_jax import ops
from nonlocal_jax.ops import softmax

concatenation = importlib.import_module(
    "nonlocal_jax.ops.concatenation"
)  # the package has a function of this name

FAST = {
    "gaussian": "streaming",
    "embedded_gaussian": "streaming",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
BATCH, N, M, D, E = 3, 41, 29, 5, 34

each_fast = pytest.mark.parametrize(("instantiation", "implementation"), FAST.items())


@pytest.fixture
def small_parts(monkeypatch):
    """Tiles, leaves and blocks so small that all loops turn and all padding is there at a test's sizes."""
    machine = ops.machine.backend()
    monkeypatch.setitem(softmax.TILE, machine, 16)
    monkeypatch.setitem(softmax.TILE_NUMBERS, machine, 1)
    monkeypatch.setattr(concatenation, "LEAF", 2)
    monkeypatch.setattr(concatenation, "BLOCK", 3)
    monkeypatch.setitem(concatenation.AT_ONCE, machine, 7 * E)
    jax.clear_caches()
    yield
    jax.clear_caches()


def make_inputs(n=N, m=M, d=D, e=E, batch=(BATCH,), dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"theta": (*batch, n, d), "phi": (*batch, m, d), "g": (*batch, m, e), "w_f": (2 * d,)}
    return {
        name: jax.random.normal(k, s).astype(dtype)
        for k, (name, s) in zip(keys, shapes.items(), strict=True)
    }


def respond(instantiation, implementation, inputs, **options):
    names = (
        ("theta", "phi", "g", "w_f") if instantiation == "concatenation" else ("theta", "phi", "g")
    )
    return getattr(ops, instantiation)(
        *(inputs[name] for name in names), implementation=implementation, **options
    )


def value_and_gradients(instantiation, implementation, inputs, **options):
    """The response, and the gradients of Σ cos(index) · response."""

    def loss(inputs):
        y = respond(instantiation, implementation, inputs, **options)
        return jnp.sum(
            y.astype(jnp.promote_types(y.dtype, jnp.float32))
            * jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        ), y

    gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
    return {"y": y} | gradients


def assert_equal_to_dense(instantiation, implementation, inputs, **options):
    fast, dense = (
        value_and_gradients(instantiation, name, inputs, **options)
        for name in (implementation, "dense")
    )
    for name, expected in dense.items():
        scale = max(float(jnp.abs(expected).max()), 1.0)
        np.testing.assert_allclose(fast[name], expected, rtol=2e-5, atol=1e-5 * scale, err_msg=name)


@pytest.mark.usefixtures("small_parts")
@each_fast
@pytest.mark.parametrize(
    ("n", "m", "masked"), [(N, M, False), (M, N, True), (32, 16, False), (1, 2, False)]
)
def test_equal_to_dense_in_many_parts(instantiation, implementation, n, m, masked):
    inputs = make_inputs(n, m)
    mask = jax.random.bernoulli(jax.random.key(5), 0.6, (BATCH, m)) if masked else None
    assert_equal_to_dense(instantiation, implementation, inputs, key_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_equal_to_dense_where_the_affinity_is_kept(masked):
    """Keys wider than values, as in a Gaussian block."""
    inputs = make_inputs(d=11, e=7)
    mask = jnp.ones((BATCH, M), bool).at[0, 3:].set(False).at[1].set(False) if masked else None
    assert softmax.keeps(BATCH * N * M * 4, ops.machine.backend()) == (
        jax.default_backend() == "cpu"
    )
    assert_equal_to_dense("gaussian", "streaming", inputs, key_mask=mask)


@each_fast
def test_equal_to_dense_at_the_sizes_of_a_network(instantiation, implementation):
    """Several tiles and blocks of the sizes that run."""
    inputs = make_inputs(1100, 300, 16, 48, batch=(2,)) | {"w_f": jnp.linspace(-1, 1, 32) / 4}
    inputs["theta"] /= 4
    assert_equal_to_dense(instantiation, implementation, inputs)


@pytest.mark.usefixtures("small_parts")
@each_fast
def test_without_a_batch_and_under_vmap(instantiation, implementation):
    inputs = make_inputs()
    batched = respond(instantiation, implementation, inputs)
    axes = {name: None if name == "w_f" else 0 for name in inputs}
    each = jax.vmap(lambda inputs: respond(instantiation, implementation, inputs), in_axes=(axes,))(
        inputs
    )
    chex.assert_trees_all_close(each, batched, rtol=1e-5, atol=1e-6)
    empty = make_inputs(batch=(0,))
    chex.assert_shape(respond(instantiation, implementation, empty), (0, N, E))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "values", ["ties", "all_equal", "all_kept", "none_kept", "integers_at_the_kink"]
)
def test_sorted_keys_with_ties(values):
    """The ReLU's derivative at 0 is 0, in both."""
    inputs = make_inputs(d=1) | {"w_f": jnp.ones(2)}
    a, b = {
        "ties": (jnp.round(inputs["theta"]), jnp.round(inputs["phi"])),
        "all_equal": (0 * inputs["theta"] - 1, 0 * inputs["phi"] + 1),
        "all_kept": (inputs["theta"] + 9, inputs["phi"]),
        "none_kept": (inputs["theta"] - 9, inputs["phi"]),
        "integers_at_the_kink": (-jnp.round(5 * inputs["theta"]), jnp.round(5 * inputs["phi"])),
    }[values]
    assert_equal_to_dense("concatenation", "sorted", inputs | {"theta": a, "phi": b})


@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_sorted_keys_lose_nothing_to_an_offset(offset):
    """With 1,000 added to every b and taken from every a, plain prefix sums of b·g would lose three digits."""
    inputs = make_inputs(300, 200, 1) | {"w_f": jnp.ones(2)}
    inputs["theta"], inputs["phi"] = (
        jnp.round(inputs["theta"] * 1024) / 1024,
        jnp.round(inputs["phi"] * 1024) / 1024,
    )
    y = respond("concatenation", "sorted", inputs)
    moved = inputs | {"theta": inputs["theta"] - offset, "phi": inputs["phi"] + offset}
    np.testing.assert_allclose(respond("concatenation", "sorted", moved), y, atol=1e-5)


@pytest.mark.parametrize("spoil", [np.nan, np.inf])
def test_a_key_without_a_finite_projection_shows(spoil):
    """Sorted to an end, it could vanish; the definition's response is not finite, and so is this."""
    inputs = make_inputs(d=1) | {"w_f": jnp.ones(2)}
    inputs["phi"] = inputs["phi"].at[1, 3].set(spoil)
    y, dense = respond("concatenation", "sorted", inputs), respond("concatenation", "dense", inputs)
    assert not jnp.isfinite(dense[1]).any()
    assert jnp.isnan(y[1]).all()
    chex.assert_trees_all_close(y[::2], dense[::2], rtol=1e-5, atol=1e-6)


def test_projections_of_minus_infinity_are_left_out_as_by_the_definition():
    inputs = make_inputs(d=1) | {"w_f": jnp.ones(2)}
    inputs["phi"] = inputs["phi"].at[1, 3].set(-np.inf)
    inputs["theta"] = inputs["theta"].at[0, 2].set(-np.inf)
    y = respond("concatenation", "sorted", inputs)
    chex.assert_trees_all_close(y, respond("concatenation", "dense", inputs), rtol=1e-5, atol=1e-6)
    assert not y[0, 2].any()


def relative_error(y, expected):
    return np.linalg.norm(np.asarray(y, np.float64) - expected) / np.linalg.norm(expected)


@each_fast
@pytest.mark.parametrize(("dtype", "factor"), [(jnp.float32, 2.0), (jnp.bfloat16, 1.5)])
def test_errors_against_float64_are_those_of_dense(instantiation, implementation, dtype, factor):
    inputs = make_inputs(2500, 1300, 8, 16, batch=(), dtype=dtype)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), inputs)
        expected = jax.tree.map(np.asarray, value_and_gradients(instantiation, "dense", wide))
    fast, dense = (
        value_and_gradients(instantiation, name, inputs) for name in (implementation, "dense")
    )
    for name in ("y", "theta", "phi", "g"):
        limit = factor * relative_error(dense[name], expected[name]) + 1e-7
        assert relative_error(fast[name], expected[name]) <= limit, name


@pytest.mark.usefixtures("small_parts")
def test_scale_has_a_gradient():
    inputs = make_inputs(dtype=jnp.float32)

    def loss(scale, implementation):
        return jnp.sum(jnp.sin(respond("embedded_gaussian", implementation, inputs, scale=scale)))

    gradients = [jax.grad(loss)(jnp.float32(0.3), name) for name in ("streaming", "dense")]
    np.testing.assert_allclose(*gradients, rtol=1e-4)


@each_fast
def test_memory_grows_with_positions_not_with_pairs(instantiation, implementation):
    """At 4,096 × 4,096 the affinity would be 64 MiB; also the gradient stays far below."""
    inputs = jax.eval_shape(lambda: make_inputs(4096, 4096, 16, 16, batch=(1,)))
    compiled = (
        jax.jit(lambda inputs: value_and_gradients(instantiation, implementation, inputs))
        .lower(inputs)
        .compile()
    )
    assert compiled.memory_analysis().temp_size_in_bytes < 24 << 20


def test_sorted_keys_scatter_nothing():
    inputs = jax.eval_shape(make_inputs)
    for implementation, expected in (("sorted", False), ("dense", False)):
        lowered = jax.jit(
            lambda inputs: value_and_gradients("concatenation", implementation, inputs)
        ).lower(inputs)
        assert bool(re.search(r"stablehlo\.scatter", lowered.as_text())) is expected
    scatters = (
        jax.jit(jax.grad(lambda x: jnp.sum(x[jnp.array([0, 0])]))).lower(jnp.ones(3)).as_text()
    )
    assert "stablehlo.scatter" in scatters  # so the search can find one


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


RES3 = (shaped(1, 3136, 256), shaped(1, 784, 256), shaped(1, 784, 256))
RES4 = (shaped(1, 784, 512), shaped(1, 196, 512), shaped(1, 196, 512))


@pytest.mark.parametrize("packed", [32, 64])
@pytest.mark.parametrize(("width", "size"), [(3, 5), (16, 70_000), (32, 1), (32, 3000)])
def test_argsort_is_stable_whatever_fits_beside_the_row(packed, width, size, monkeypatch):
    monkeypatch.setitem(concatenation.PACKED, ops.machine.backend(), packed)
    values = np.random.default_rng(0).integers(0, 1 << width, size, np.uint32)
    values[1::3] = values[0]
    rows = jax.jit(lambda x: concatenation._argsort(x, width))(values)
    chex.assert_trees_all_equal(rows, np.argsort(values, kind="stable").astype(np.int32))


@pytest.mark.parametrize(
    ("instantiation", "shapes", "backend", "expected"),
    [
        ("embedded_gaussian", RES3, "cpu", "streaming"),
        ("embedded_gaussian", RES4, "cpu", "dense"),
        ("gaussian", RES3, "gpu", "dense"),
        ("dot_product", RES3, "cpu", "reassociated"),
        ("dot_product", RES4, "cpu", "dense"),  # 2NM < d(N + M)
        ("concatenation", RES3, "cpu", "sorted"),
        ("concatenation", (shaped(784, 4, 64),) * 3, "cpu", "dense"),
    ],
)
def test_auto_chooses_by_shape(instantiation, shapes, backend, expected):
    explanation = ops.explain(instantiation, *shapes, backend=backend)
    assert explanation.implementation == expected
    assert expected in str(explanation)


def test_auto_is_what_explain_says():
    """The FLOPs that XLA counts tell which one ran."""
    inputs = jax.eval_shape(lambda: make_inputs(300, 200, 8, 8, batch=(1,)))
    expected = ops.explain("dot_product", inputs["theta"], inputs["phi"], inputs["g"])
    assert expected.implementation == "reassociated"
    flops = {
        name: jax.jit(lambda inputs: respond("dot_product", name, inputs))
        .lower(inputs)
        .compile()
        .cost_analysis()["flops"]
        for name in ("auto", "dense", "reassociated")
    }
    assert flops["auto"] == flops["reassociated"] < flops["dense"] / 5
    (cost,) = (cost for cost in expected.costs if cost.implementation == "reassociated")
    np.testing.assert_allclose(flops["auto"], cost.flops[0], rtol=0.05)


BAD_INPUT = {
    "cuDNN on CPU": (
        lambda: ops.explain("embedded_gaussian", *RES3, implementation="cudnn", backend="cpu"),
        r"'cudnn' cannot serve here: cuDNN needs an NVIDIA GPU.*'cpu'.*Possible are 'auto', 'dense', 'streaming'",
    ),
    "cuDNN in float32": (
        lambda: ops.explain("embedded_gaussian", *RES3, implementation="cudnn", backend="gpu"),
        r"float16 and bfloat16, and the inputs are float32.*Possible are",
    ),
    "cuDNN at head size 512": (
        lambda: ops.explain(
            "gaussian",
            *(shaped(1, 9, 512, dtype=jnp.bfloat16),) * 3,
            implementation="cudnn",
            backend="gpu",
        ),
        r"head size is a multiple of 8 up to \d+ on this GPU; got 512 channels.*Possible are",
    ),
    "cuDNN with wider values": (
        lambda: ops.explain(
            "gaussian",
            *(shaped(1, 9, size, dtype=jnp.bfloat16) for size in (64, 64, 32)),
            implementation="cudnn",
            backend="gpu",
        ),
        r"values as wide as keys; got 32 and 64 channels",
    ),
    "another operation's": (
        lambda: ops.gaussian(*(jnp.ones((2, 3)),) * 3, implementation="sorted"),
        r"implementation of gaussian must be one of 'auto', 'dense', 'streaming', 'cudnn'; got 'sorted'",
    ),
    "backend": (
        lambda: ops.explain("gaussian", *RES3, backend="npu"),
        r"backend must be one of 'cpu', 'gpu', 'tpu'.*'npu'",
    ),
    "no queries": (
        lambda: ops.concatenation(
            jnp.ones((0, 3)), jnp.ones((2, 3)), jnp.ones((2, 5)), jnp.ones(6)
        ),
        r"theta must hold at least one query.*got shape \(0, 3\)",
    ),
    "no keys": (
        lambda: ops.concatenation(
            jnp.ones((2, 3)), jnp.ones((0, 3)), jnp.ones((0, 5)), jnp.ones(6)
        ),
        r"phi must hold at least one key.*got shape \(0, 3\)",
    ),
    "more rows than int32 counts": (
        lambda: ops.explain("concatenation", shaped(2**31, 1), shaped(3, 1), shaped(3, 1)),
        r"at most 2,147,483,647; got shape \(2147483648, 1\)",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(("call", "message"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_what_cannot_serve_says_why_and_what_can(call, message):
    with pytest.raises(ValueError, match=message):
        call()
