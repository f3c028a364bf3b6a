"""The platforms that kernels are chosen for, and round figures of their speed.

What runs is chosen for the platform that a program is lowered for. It is known later than a
function is traced: `jax.export` and ahead-of-time compilation lower for platforms that the tracing
host may not have, and for several at once. So code for one platform is a branch of `by_platform`,
never an `if` on `jax.default_backend()`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import mlir

from nonlocal_jax.types import Array

T = TypeVar("T")
Choice = TypeVar("Choice")


class Platform(NamedTuple):
    """Speed of a platform. Only ratios matter: they decide between implementations.

    Attributes:
        flops: FLOPs of matrix products per second.
        bandwidth: Bytes per second to memory that was just allocated.
        cache: Bytes of temporaries that stay in the cache and cost nothing.
    """

    flops: float
    bandwidth: float
    cache: int

    def seconds(self, flops: int | float, moved: int | float) -> float:
        """Forecasts the time of `flops` FLOPs and of `moved` bytes of traffic to memory."""
        return flops / self.flops + moved / self.bandwidth


PLATFORMS = {
    "cpu": Platform(1.5e11, 1e10, 8 << 20),  # 2 cores
    "gpu": Platform(1e14, 2e12, 32 << 20),  # NVIDIA's
    # A v5e, by its compiler's estimates. Passes over an affinity in the vector memory cost as much.
    "tpu": Platform(1e14, 1e12, 0),
    "rocm": Platform(1e14, 2e12, 32 << 20),  # AMD's GPUs
}
# JAX's names of them where code is lowered; "rocm" and all others take the default branch.
_LOWERING_NAMES = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


def by_platform(
    choose: Callable[[str], Choice],
    compute: Callable[..., T],
    *operands: Any,
    platform: str | None = None,
) -> T:
    """Calls `compute(choice, *operands)` with the choice for the platform that is lowered for.

    Without `jax.jit`, JAX compiles the branches in each call, because they are new functions. So
    callers are jitted functions. They are not inlined, because gradients without `jax.jit` would
    again be those of new functions.

    Args:
        choose: Returns the choice for a platform in `PLATFORMS`. Platforms with equal choices share
            a branch; if all are equal, there is no branch at all.
        compute: A function of a choice and of trees of arrays. The shapes and dtypes of its result
            must not depend on the choice.
        *operands: The trees of arrays.
        platform: Platform whose choice is taken. None is the one that is lowered for.

    Returns:
        The result of `compute`. A platform that is not in `PLATFORMS` takes the choice of "rocm".

    >>> import jax.numpy as jnp
    >>> functions = {"cpu": jnp.sin, "gpu": jnp.cos, "tpu": jnp.cos, "rocm": jnp.cos}
    >>> traced = jax.jit(lambda x: by_platform(functions.get, lambda f, x: f(x), x)).trace(1.0)
    >>> texts = [traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")]
    >>> ["cosine" in text for text in texts]
    [False, True]
    """
    if platform is not None:
        return compute(choose(platform), *operands)
    default = choose("rocm")
    branches: dict[str, Callable[..., T]] = {}
    for name, lowering_name in _LOWERING_NAMES.items():
        choice = choose(name)
        if choice != default:
            branches[lowering_name] = functools.partial(compute, choice)
    if not branches:
        return compute(default, *operands)
    decide = functools.partial(
        jax.lax.platform_dependent, default=functools.partial(compute, default), **branches
    )
    return jax.checkpoint(decide, prevent_cse=False, policy=_keeps)(*operands)


def _keeps(primitive: Any, *_: Any, **__: Any) -> bool:
    """Policy of `jax.checkpoint` by which a gradient keeps everything but the platform's index.

    The index is a constant where it is lowered. A gradient that got it as an argument would be
    compiled as a conditional, which XLA does not remove if it has put a collective into it.
    """
    return str(primitive) != "platform_index"


def fail_if_lowered(message: str, shape: tuple[Any, ...], dtype: Any) -> Array:
    """Stands for a result that a platform cannot compute.

    It is an error only where it runs or is lowered, so it can be the branch of one platform in a
    program for another.

    Raises:
        ValueError: With the message, when it runs or is lowered.

    >>> traced = jax.jit(lambda: fail_if_lowered("not on this platform.", (2,), "float32")).trace()
    >>> traced.lower()
    Traceback (most recent call last):
    ValueError: not on this platform.
    """
    return jnp.full(shape, _fail_p.bind(message=message), dtype)


_fail_p = jax.extend.core.Primitive("fail_if_lowered")


@_fail_p.def_impl
def _fail(*, message: str) -> Array:
    raise ValueError(message)


@_fail_p.def_abstract_eval
def _fail_shape(*, message: str) -> jax.core.ShapedArray:
    return jax.core.ShapedArray((), jnp.float32)


def _lower_failure(context: Any, *, message: str) -> Any:
    raise ValueError(message)


mlir.register_lowering(_fail_p, _lower_failure)


def default_platform() -> str:
    """Returns the name in `PLATFORMS` of JAX's default backend, for reports and forecasts."""
    name = jax.default_backend()
    if name in ("cpu", "tpu"):
        return name
    capability = getattr(jax.devices()[0], "compute_capability", "")
    return "rocm" if str(capability).startswith("gfx") else "gpu"
