"""Finding the non-local operations of a network, and reading or replacing what they compute.

Every non-local operation evaluates Eq. 1 through `nonlocal_response`, which reports the call to the
listeners of `tap`. This is the one way in which `describe`, `plan`, `models.cost`, `weights.verify`
and `visualize.affinities` find the operations of a network, so they find those of other libraries
as well if these call `nonlocal_response`. A residual block names itself as `enclosing_block`, so
that tools report the block rather than the operation inside it, and may offer its residual ratio:

>>> import flax.linen as nn, jax, jax.numpy as jnp
>>> from nonlocal_jax.layers import describe, sow_residual_ratio
>>> class RelationBlock(nn.Module):
...     @nn.compact
...     def __call__(self, x):  # (B, N, C)
...         theta, phi, g = (nn.Dense(4, name=name)(x) for name in ("theta", "phi", "g"))
...         with enclosing_block(self):
...             y = nonlocal_response(self, "embedded_gaussian", theta, phi, g, scale=0.5)
...         residual = nn.Dense(x.shape[-1], name="out", kernel_init=nn.initializers.zeros)(y)
...         sow_residual_ratio(self, residual, x)
...         return x + residual
>>> x = jnp.ones((2, 7, 3))
>>> network = nn.Sequential([nn.Dense(8), RelationBlock()])
>>> variables = network.init(jax.random.key(0), x)
>>> print(describe(network, variables, x, expected=1)[0])
layers_1: RelationBlock, 148 parameters, ‖block output‖/‖input‖ 0
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import flax.linen as nn

from nonlocal_jax import ops
from nonlocal_jax.types import (
    Affinity,
    AffinityToAll,
    Array,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)

Axes = Literal["spacetime", "space", "time"]


@dataclasses.dataclass(frozen=True)
class SumLayout:
    """Which positions of a feature map the rows of θ, φ and g are.

    Attributes:
        positions: Size of the map of the queries: (N,), (H, W) or (T, H, W).
        window: Max pooling of the keys along each of these axes; 1 where they are not pooled.
        axes: "spacetime" sums over all positions, "space" over those of one frame, "time" over
            those of one pixel.
        groups: Number of temporal groups that are summed separately; None for one sum over all
            frames.
    """

    positions: tuple[int, ...]
    window: tuple[int, ...]
    axes: Axes = "spacetime"
    groups: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class PairwiseCall:
    """One evaluation of Eq. 1 inside a network.

    Attributes:
        module: The module that called `nonlocal_response`.
        block: The residual block around it, as `enclosing_block` names it; None where there is
            none.
        instantiation: The pairwise function f.
        theta: (B, ..., N, d), the queries θ(x_i).
        phi: (B, ..., M, d), the keys φ(x_j).
        g: (B, ..., M, e), the values.
        w_f: (2d,), for the concatenation; None otherwise.
        scale: Factor of the logits of the embedded Gaussian; 1 otherwise.
        key_mask: (B, ..., M) of bool, or None.
        implementation: The implementation that was requested.
        axis_name: The mapped axis over whose devices positions are split, or None.
        layout: Which positions of the feature map the rows are; None if the module did not say.
    """

    module: nn.Module
    block: nn.Module | None
    instantiation: Instantiation
    theta: Queries
    phi: Keys
    g: Values
    w_f: Array | None
    scale: float | Array
    key_mask: KeyMask | None
    implementation: ops.Implementation
    axis_name: str | None
    layout: SumLayout | None

    def respond(self, implementation: ops.Implementation | None = None) -> Responses:
        """Computes y (B, ..., N, e), with the requested implementation unless another is given."""
        options: dict[str, Any] = {
            "key_mask": self.key_mask,
            "axis_name": self.axis_name,
            "implementation": implementation or self.implementation,
        }
        match self.instantiation:
            case "gaussian":
                return ops.gaussian(self.theta, self.phi, self.g, **options)
            case "embedded_gaussian":
                return ops.embedded_gaussian(
                    self.theta, self.phi, self.g, scale=self.scale, **options
                )
            case "dot_product":
                return ops.dot_product(self.theta, self.phi, self.g, **options)
            case "concatenation":
                assert self.w_f is not None
                return ops.concatenation(self.theta, self.phi, self.g, self.w_f, **options)

    def affinity(self) -> Affinity | AffinityToAll:
        """Computes the dense map f / C (B, ..., N, M)."""
        return ops.affinity(
            self.instantiation,
            self.theta,
            self.phi,
            self.w_f,
            scale=self.scale,
            key_mask=self.key_mask,
            axis_name=self.axis_name,
        )


Listener = Callable[[PairwiseCall], Responses | None]
# Context variables, so that threads that trace at the same time do not hear each other's calls.
_listeners: contextvars.ContextVar[tuple[Listener, ...]] = contextvars.ContextVar(
    "listeners", default=()
)
_block: contextvars.ContextVar[nn.Module | None] = contextvars.ContextVar("block", default=None)


@contextlib.contextmanager
def enclosing_block(block: nn.Module) -> Iterator[None]:
    """Context manager that names the residual block around the operations inside.

    A block calls this itself, because under lifted transformations such as `nn.remat` it is not the
    parent of its operation.

    Args:
        block: The block, usually `self`.
    """
    token = _block.set(block)
    try:
        yield
    finally:
        _block.reset(token)


@contextlib.contextmanager
def tap(listener: Listener) -> Iterator[None]:
    """Context manager that reports every call of `nonlocal_response` to a listener.

    Calls are reported while JAX traces the network. A jitted function that JAX has already traced
    for the same shapes is not traced again and reports nothing.

    Args:
        listener: Called with each `PairwiseCall`, in the order in which the operations run. If it
            returns an array, the array replaces the response; None leaves the response unchanged.

    >>> import jax, jax.numpy as jnp
    >>> from nonlocal_jax.layers import nonlocal_block
    >>> model = nn.Sequential([nn.Dense(8), nonlocal_block("dot_product")])
    >>> shapes = []
    >>> def listener(call):
    ...     shapes.append((call.instantiation, call.theta.shape, call.phi.shape))
    >>> with tap(listener):
    ...     out = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 6, 4, 3)))
    >>> shapes
    [('dot_product', (2, 24, 4), (2, 6, 4))]
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def nonlocal_response(
    module: nn.Module,
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    w_f: Array | None = None,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    implementation: ops.Implementation = "auto",
    axis_name: str | None = None,
    layout: SumLayout | None = None,
) -> Responses:
    """Evaluates Eq. 1 for a module of a network and reports the call to the listeners of `tap`.

    y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)                                                    (Eq. 1)

    Args:
        module: The module that computed θ, φ and g, usually `self`.
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        theta: (B, ..., N, d), the queries; for the Gaussian, x.
        phi: (B, ..., M, d), the keys; for the Gaussian, x or x subsampled.
        g: (B, ..., M, e), the values.
        w_f: (2d,), for the concatenation only.
        scale: Factor of the logits, for the embedded Gaussian only.
        key_mask: (B, ..., M) of bool, True for a real key.
        implementation: Passed to `nonlocal_jax.ops`.
        axis_name: Passed to `nonlocal_jax.ops`.
        layout: Which positions of the feature map the rows are. Without it, affinity maps are drawn
            over (N,) and (M,).

    Returns:
        (B, ..., N, e) in the dtype of g.

    Raises:
        ValueError, TypeError: As the operation of `nonlocal_jax.ops` does.

    >>> import jax, jax.numpy as jnp
    >>> class Attention(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         theta, phi, g = (nn.Dense(4, name=name)(x) for name in ("theta", "phi", "g"))
    ...         return nonlocal_response(self, "embedded_gaussian", theta, phi, g, scale=0.5)
    >>> Attention().init_with_output(jax.random.key(0), jnp.ones((2, 7, 3)))[0].shape
    (2, 7, 4)
    """
    call = PairwiseCall(
        module,
        _block.get(),
        instantiation,
        theta,
        phi,
        g,
        w_f,
        scale,
        key_mask,
        implementation,
        axis_name,
        layout,
    )
    response: Responses | None = None
    for listener in _listeners.get():
        replacement = listener(call)
        response = response if replacement is None else replacement
    return call.respond() if response is None else response
