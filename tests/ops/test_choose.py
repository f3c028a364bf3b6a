"""Which implementation is chosen, how the choice is explained, and how a new one is added."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ops.operands import TOY, call, make_operands, registered

from nonlocal_jax import ops


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


RES3 = (shaped(1, 3136, 256), shaped(1, 784, 256), shaped(1, 784, 256))
RES4 = (shaped(1, 784, 512), shaped(1, 196, 512), shaped(1, 196, 512))
HEAD_512 = (shaped(1, 9, 512, dtype=jnp.bfloat16),) * 3
WIDE_VALUES = tuple(shaped(1, 9, size, dtype=jnp.bfloat16) for size in (64, 64, 32))
HALF = (shaped(1, 9, 64, dtype=jnp.float16),) * 3
VERY_WIDE = (shaped(1, 9, 1025),) * 3


@pytest.mark.parametrize(
    ("instantiation", "shapes", "platform", "expected"),
    [
        ("embedded_gaussian", RES3, "cpu", "streaming"),
        ("embedded_gaussian", RES4, "cpu", "dense"),
        ("gaussian", RES3, "gpu", "dense"),
        ("dot_product", RES3, "cpu", "reassociated"),
        ("dot_product", RES4, "cpu", "dense"),  # 2NM < d(N + M)
        ("concatenation", RES3, "cpu", "sorted"),
        ("concatenation", (shaped(784, 4, 64),) * 3, "cpu", "dense"),
        # What XLA:TPU estimates the fewest cycles for.
        ("embedded_gaussian", (shaped(64, 49, 256),) * 3, "tpu", "streaming"),
        ("embedded_gaussian", RES3, "tpu", "streaming"),
        ("concatenation", RES3, "tpu", "dense"),
        ("concatenation", (shaped(8, 12544, 256),) * 3, "tpu", "dense"),
        ("dot_product", RES3, "tpu", "reassociated"),
        ("dot_product", RES4, "tpu", "dense"),
    ],
)
def test_auto_chooses_by_shape(instantiation, shapes, platform, expected):
    explanation = ops.explain(instantiation, *shapes, platform=platform)
    assert explanation.implementation == expected
    assert expected in str(explanation)


def test_auto_runs_what_explain_says():
    """The FLOPs that XLA counts tell which implementation ran."""
    operands = jax.eval_shape(lambda: make_operands(300, 200, 8, 8, batch=(1,)))
    explanation = ops.explain("dot_product", operands["theta"], operands["phi"], operands["g"])
    assert explanation.implementation == "reassociated"

    def count_flops(implementation):
        lowered = jax.jit(lambda x: call("dot_product", implementation, x)).lower(operands)
        return lowered.compile().cost_analysis()["flops"]

    flops = {name: count_flops(name) for name in ("auto", "dense", "reassociated")}
    assert flops["auto"] == flops["reassociated"] < flops["dense"] / 5
    costs = {cost.implementation: cost for cost in explanation.costs}
    np.testing.assert_allclose(flops["auto"], costs["reassociated"].flops[0], rtol=0.05)


BAD_REQUESTS = {
    "cuDNN on CPU": (
        lambda: ops.explain("embedded_gaussian", *RES3, implementation="cudnn", platform="cpu"),
        r"'cudnn' is not available here: cuDNN needs an NVIDIA GPU.*'cpu'\. "
        r"Available: 'auto', 'dense', 'streaming'",
    ),
    "cuDNN in float32": (
        lambda: ops.explain("embedded_gaussian", *RES3, implementation="cudnn", platform="gpu"),
        r"float16 and bfloat16, and the inputs are float32.*Available:",
    ),
    "cuDNN with 512 channels": (
        lambda: ops.explain("gaussian", *HEAD_512, implementation="cudnn", platform="gpu"),
        r"head size must be a multiple of 8 up to \d+ on this GPU; got 512 channels.*Available:",
    ),
    "cuDNN with narrow values": (
        lambda: ops.explain("gaussian", *WIDE_VALUES, implementation="cudnn", platform="gpu"),
        r"values as wide as keys; got 32 and 64 channels",
    ),
    "flash on CPU": (
        lambda: ops.explain("gaussian", *RES3, implementation="flash", platform="cpu"),
        r"'flash' is not available here: JAX's Pallas kernel needs a TPU.*'cpu'\. Available:",
    ),
    "flash in float16": (
        lambda: ops.explain("gaussian", *HALF, implementation="flash", platform="tpu"),
        r"takes bfloat16 and float32, and the inputs are float16",
    ),
    "flash with many channels": (
        lambda: ops.explain("gaussian", *VERY_WIDE, implementation="flash", platform="tpu"),
        r"memory for 1024 channels of float32; got 1025",
    ),
    "cuDNN on TPU": (
        lambda: ops.explain("gaussian", *RES3, implementation="cudnn", platform="tpu"),
        r"Available: 'auto', 'dense', 'streaming', 'flash'",
    ),
    "implementation of another operation": (
        lambda: ops.explain("gaussian", *RES3, implementation="sorted"),
        r"implementation of gaussian must be one of 'auto', 'dense', 'streaming', 'cudnn', "
        r"'flash'; got 'sorted'",
    ),
    "platform": (
        lambda: ops.explain("gaussian", *RES3, platform="npu"),
        r"platform must be one of 'cpu', 'gpu', 'tpu'.*'npu'",
    ),
    "more rows than int32 can count": (
        lambda: ops.explain("concatenation", shaped(2**31, 1), shaped(3, 1), shaped(3, 1)),
        r"at most 2,147,483,647; got shape \(2147483648, 1\)",
    ),
}


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(("function", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_unavailable_implementations_say_why_and_what_is_available(function, message):
    with pytest.raises(ValueError, match=message):
        function()


def test_a_new_kernel_is_one_row():
    rows = jnp.ones((1, 2, 3))
    with registered(TOY):
        for implementation in ("toy", "auto"):  # "auto" takes what is forecast to be the fastest
            y = ops.dot_product(rows, rows, rows, implementation=implementation)
            np.testing.assert_array_equal(y, jnp.full((1, 2, 3), 9.0))
        explanation = ops.explain("dot_product", rows, rows, rows)
        assert explanation.implementation == "toy"
        assert "\ntoy" in str(explanation)
        refused = ops.explain("dot_product", *RES4, platform="cpu")
        assert refused.implementation == "dense"
        assert "a toy takes few channels" in str(refused)
        with pytest.raises(ValueError, match=r"'toy' is not available here: a toy takes few chan"):
            ops.explain("dot_product", *RES4, implementation="toy")
        with pytest.raises(ValueError, match=r"of gaussian must be one of .*; got 'toy'"):
            ops.gaussian(rows, rows, rows, implementation="toy")
    with pytest.raises(ValueError, match=r"must be one of 'auto', 'dense', 'reassociated'; got"):
        ops.dot_product(rows, rows, rows, implementation="toy")


def test_auto_never_takes_what_is_only_on_request():
    toy = dataclasses.replace(TOY, only_on_request="it is a toy")
    with registered(toy):
        explanation = ops.explain("dot_product", *RES4, platform="cpu")
        small = ops.explain("dot_product", *(shaped(1, 9, 64),) * 3)
        requested = ops.explain("dot_product", *(shaped(1, 9, 64),) * 3, implementation="toy")
    assert "a toy takes few channels" in str(explanation)
    assert small.implementation == "dense"
    assert "\ntoy          only on request: it is a toy" in str(small)
    assert requested.implementation == "toy"
    assert "only on request" not in str(requested)


def test_a_kernel_is_compared_with_a_dense_one_that_needs_no_memory():
    rows = shaped(2**21, 256)
    explanation = ops.explain("concatenation", rows, rows, rows, platform="tpu")
    assert explanation.implementation == "sorted"
    assert "temporary" not in explanation.reason
