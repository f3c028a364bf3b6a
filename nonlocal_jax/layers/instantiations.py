"""The non-local operation as a layer, one module for each pairwise function: y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j).

The modules own W_g, W_θ, W_φ and w_f and choose which positions are summed; `nonlocal_jax.ops` does the sum. θ, φ and g
are 1×1×1 convolutions, which over channels-last arrays are `nn.Dense`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from nonlocal_jax import ops
from nonlocal_jax.layers.convolution import dot_over_positions
from nonlocal_jax.layers.pooling import max_pool, pool_mask
from nonlocal_jax.layers.tap import Axes, SumLayout, nonlocal_response
from nonlocal_jax.types import Affinity, Array, Embedded, Features, PositionMask, PRNGKeyArray

Initializer = Callable[..., Array]
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def zero_bias(fan_in: int) -> Initializer:
    """The usual bias initialiser, whatever the fan-in."""
    return nn.initializers.zeros


class NonLocalOperation(nn.Module):
    """What the four instantiations share: the embeddings, the subsampling, the positions that are summed.

    Attributes:
        inner_features: channels of θ, φ and g; None is half of the input's, at least 1.
        subsample: max pooling of the keys and values, never of the queries. True is the paper's: 2 along every spatial
            axis (1×2×2 in video) over which the sum runs; a tuple gives the window along each position axis; False is none.
        pool_order: "after" pools φ(x) and g(x), as the paper; "before" pools x once for both, as video-nonlocal-net and
            PySlowFast. The two differ numerically. The Gaussian's keys are the pooled x in both.
        axes: "spacetime" sums over all positions; "space" over those of the same frame, "time" over those of the same
            pixel; both of these want (T, H, W) positions.
        group_size: the frames of one temporal group; a position sees those of its own group alone. None is all frames.
        use_bias: whether θ, φ and g have a bias.
        kernel_init: initialiser of W_θ, W_φ and W_g, and of w_f where it has no other.
        bias_init: from the fan-in to the initialiser of the biases, because PyTorch's default depends on it.
        dtype: of the computation; None is that of the input and parameters. Logits and sums stay float32.
        param_dtype: of the parameters.
        implementation: passed to `nonlocal_jax.ops`.
        axis_name: under `jax.shard_map` or `jax.pmap`, the mapped axis over whose devices the first position axis is split
            (the frames of a video); keys of all devices are summed, and each holds the response of its own positions.
    """

    inner_features: int | None = None
    subsample: bool | tuple[int, ...] = True
    pool_order: Literal["after", "before"] = "after"
    axes: Axes = "spacetime"
    group_size: int | None = None
    use_bias: bool = False
    kernel_init: Initializer = he_normal
    bias_init: Callable[[int], Initializer] = zero_bias
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: ops.Implementation = "auto"
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Features, *, mask: PositionMask | None = None, return_map: bool = False
    ) -> Embedded | tuple[Embedded, Affinity]:
        """The response y of every position.

        Args:
            x: (B, *positions, C), with one, two or three position axes: (N,), (H, W) or (T, H, W).
            mask: (B, *positions) of bool, False where x is padding. Padding is neither summed nor counted, and what it
                holds has no influence. Where keys are pooled, a window is real if any of its positions is.
            return_map: whether the affinity f / C is returned as well.

        Returns:
            (B, *positions, inner_features); with `return_map` also (B, ..., N, M).

        Raises:
            ValueError: an option or a shape that does not fit; the message names what was expected.
            TypeError: x that is not floating point, or a mask that is not bool.
        """
        window = self._check(x, mask)
        positions = x.shape[1:-1]
        if self.dtype is not None:
            x = x.astype(self.dtype)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        if self.pool_order == "before":
            pooled = max_pool(x, window, mask)
            theta, phi, g = self._theta(x), self._phi(pooled), self._dense("g", pooled)
        else:
            theta, phi, g = (
                self._theta(x),
                max_pool(self._phi(x), window, mask),
                max_pool(self._dense("g", x), window, mask),
            )
        groups = None if self.group_size is None else positions[0] // self.group_size
        key_mask = (
            None
            if mask is None
            else to_rows(pool_mask(mask, window)[..., None], self.axes, groups)[..., 0]
        )
        theta, phi, g = (to_rows(a, self.axes, groups) for a in (theta, phi, g))
        layout = SumLayout(positions, window, self.axes, groups)
        y, affinity = self._respond(theta, phi, g, key_mask, layout, return_map)
        y = _from_rows(y, self.axes, positions)
        return y if affinity is None or not return_map else (y, affinity)

    def _theta(self, x: Array) -> Array:
        return self._dense("theta", x)

    def _phi(self, x: Array) -> Array:
        return self._dense("phi", x)

    def _dense(self, name: str, x: Array) -> Array:
        return nn.Dense(
            max(x.shape[-1] // 2, 1) if self.inner_features is None else self.inner_features,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init(x.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dot_over_positions,
            name=name,
        )(x)

    def pairwise(self, theta: Array) -> dict[str, Any]:
        """The name of f as "instantiation", and its parameters and options, as `nonlocal_response` takes them."""
        raise NotImplementedError

    def _respond(
        self,
        theta: Array,
        phi: Array,
        g: Array,
        key_mask: Array | None,
        layout: SumLayout,
        return_map: bool,
    ) -> tuple[Array, Array | None]:
        """Returns y and, if it is requested, the affinity (B, ..., N, M)."""
        # Parameters are made outside the map; and over space, or within groups, all keys of a query are on its device.
        splits = not self.is_initializing() and self.axes != "space" and self.group_size is None
        options: dict[str, Any] = self.pairwise(theta)
        options |= {"key_mask": key_mask, "axis_name": self.axis_name if splits else None}
        y = nonlocal_response(
            self,
            theta=theta,
            phi=phi,
            g=g,
            implementation=self.implementation,
            layout=layout,
            **options,
        )
        sown = self.is_mutable_collection("intermediates") and not self.is_initializing()
        if not (sown or return_map):
            return y, None
        affinity = ops.affinity(theta=theta, phi=phi, **options)
        if sown:
            self.sow("intermediates", "affinity", affinity)
        return y, affinity

    def _check(self, x: Array, mask: Array | None) -> tuple[int, ...]:
        """Raise what `__call__` says it raises; return the pooling window."""
        positions = x.shape[1:-1]
        if len(positions) not in (1, 2, 3):
            raise ValueError(
                f"x must have shape (B, *positions, C) with one, two or three position axes; got shape {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point; got {x.dtype}.")
        if self.inner_features is not None and self.inner_features < 1:
            raise ValueError(
                f"inner_features must be at least 1, or None for half the channels; got {self.inner_features}."
            )
        for name, value, options in (
            ("axes", self.axes, ("spacetime", "space", "time")),
            ("pool_order", self.pool_order, ("after", "before")),
        ):
            if value not in options:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}."
                )
        if self.axes != "spacetime" and len(positions) != 3:
            raise ValueError(
                f"axes={self.axes!r} wants (T, H, W) positions, x of rank 5; got shape {x.shape}."
            )
        self._check_groups(positions)
        if mask is not None:
            if getattr(mask, "dtype", None) != jnp.bool_:
                raise TypeError(
                    f"mask must be an array of bool, True where x is real; got {getattr(mask, 'dtype', type(mask))}."
                )
            if mask.shape != x.shape[:-1]:
                raise ValueError(
                    f"mask must have shape {x.shape[:-1]}, one entry per position; got {mask.shape}."
                )
        return self.subsampling(positions)

    def _check_groups(self, positions: tuple[int, ...]) -> None:
        if self.group_size is None:
            return
        if self.axes == "space" or len(positions) != 3:
            raise ValueError(
                f"group_size wants (T, H, W) positions and a sum over time; got {len(positions)} position axes "
                f"and axes={self.axes!r}."
            )
        if self.group_size < 1 or positions[0] % self.group_size:
            raise ValueError(
                f"group_size must divide the {positions[0]} frames; got {self.group_size}."
            )

    def subsampling(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """The window of the keys' max pooling on a map of these sizes. Raises ValueError where it does not fit."""
        time_axes = 1 if len(positions) == 3 else 0
        if isinstance(self.subsample, bool):
            spatial = 2 if self.subsample and self.axes != "time" else 1
            window: tuple[int, ...] = (1,) * time_axes + (spatial,) * (len(positions) - time_axes)
        elif isinstance(self.subsample, Sequence):
            window = tuple(self.subsample)
        else:
            raise ValueError(
                f"subsample must be True, False or a size for each position axis; got {self.subsample!r}."
            )
        if len(window) != len(positions) or min(window) < 1:
            raise ValueError(
                f"subsample must have {len(positions)} sizes of at least 1; got {window}."
            )
        if any(size > length for size, length in zip(window, positions, strict=True)):
            raise ValueError(
                f"the subsampling window {window} must not be larger than the map {positions}; use a smaller one."
            )
        if self.axis_name is not None and not self.is_initializing() and positions[0] % window[0]:
            raise ValueError(
                f"the subsampling window {window} must divide the part of the first position axis that each device of "
                f"{self.axis_name!r} holds; got {positions[0]}."
            )
        if self.axes == "space" and window[0] > 1:
            raise ValueError(
                f"axes='space' sums over one frame, so its window must be 1 in time; got {window}."
            )
        if self.axes == "time" and max(window[1:]) > 1:
            raise ValueError(
                f"axes='time' sums over one pixel, so its window must be 1 in space; got {window}."
            )
        if self.group_size is not None and self.group_size % window[0]:
            raise ValueError(
                f"a window of {window[0]} frames must divide group_size {self.group_size}."
            )
        return window


class Gaussian(NonLocalOperation):
    """f(x_i, x_j) = exp(x_i · x_j), C(x) = Σ_j f; parameters W_g.                         (Eq. 2)

    Subsampling pools x itself for the keys. Source: section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 8, 6, 6, 10))
    >>> y, variables = Gaussian().init_with_output(jax.random.key(0), x)
    >>> y.shape
    (2, 8, 6, 6, 5)
    """

    def _theta(self, x: Array) -> Array:
        return x

    def _phi(self, x: Array) -> Array:
        return x

    def pairwise(self, theta: Array) -> dict[str, Any]:
        return {"instantiation": "gaussian"}


class EmbeddedGaussian(NonLocalOperation):
    """f(x_i, x_j) = exp(θ(x_i) · φ(x_j)), C(x) = Σ_j f; parameters W_θ, W_φ, W_g.         (Eq. 3)

    Attributes:
        use_scale: whether the logits are multiplied by inner_features^-0.5, as in video-nonlocal-net, PySlowFast and mmcv;
            the paper does not.

    Source: section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 7, 5, 10))
    >>> y, state = EmbeddedGaussian().init_with_output(jax.random.key(0), x, mutable=["params", "intermediates"])
    >>> y.shape
    (2, 7, 5, 5)
    """

    use_scale: bool = False

    def pairwise(self, theta: Array) -> dict[str, Any]:
        scale = theta.shape[-1] ** -0.5 if self.use_scale else 1.0
        return {"instantiation": "embedded_gaussian", "scale": scale}


class DotProduct(NonLocalOperation):
    """f(x_i, x_j) = θ(x_i) · φ(x_j), C(x) = N; parameters W_θ, W_φ, W_g.                  (Eq. 4)

    Source: section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 11, 10))
    >>> y, variables = DotProduct(inner_features=3).init_with_output(jax.random.key(0), x)
    >>> y.shape, sorted(variables["params"])
    ((2, 11, 3), ['g', 'phi', 'theta'])
    """

    def pairwise(self, theta: Array) -> dict[str, Any]:
        return {"instantiation": "dot_product"}


class Concatenation(NonLocalOperation):
    """f(x_i, x_j) = ReLU(w_f · [θ(x_i), φ(x_j)]), C(x) = N; parameters W_θ, W_φ, W_g, w_f.   (Eq. 5)

    Attributes:
        w_f_init: initialiser of w_f, called with the shape (2d, 1); None is `kernel_init`.

    Source: section 3.2. w_f has no bias, as in every published implementation.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 4, 4, 10))
    >>> y, variables = Concatenation().init_with_output(jax.random.key(0), x)
    >>> variables["params"]["w_f"].shape
    (10,)
    """

    w_f_init: Initializer | None = None

    def pairwise(self, theta: Array) -> dict[str, Any]:
        w_f = self.param("w_f", self._init_w_f, 2 * theta.shape[-1])
        return {"instantiation": "concatenation", "w_f": w_f.astype(theta.dtype)}

    def _init_w_f(self, key: PRNGKeyArray, size: int) -> Array:
        return (self.w_f_init or self.kernel_init)(key, (size, 1), self.param_dtype)[
            :, 0
        ]  # fan-in 2d, one output


def to_rows(x: Array, axes: Axes, groups: int | None) -> Array:
    """(B, *positions, c) -> (B, *outer, N, c): the positions that meet in one sum become one axis."""
    if axes == "space":
        return x.reshape(*x.shape[:2], -1, x.shape[-1])  # (B, T, H·W, c)
    outer = () if groups is None else (groups,)
    if axes == "time":
        x = jnp.moveaxis(x.reshape(*x.shape[:2], -1, x.shape[-1]), 1, 2)  # (B, H·W, T, c)
        outer = (x.shape[1], *outer)
    return x.reshape(x.shape[0], *outer, -1, x.shape[-1])


def _from_rows(y: Array, axes: Axes, positions: tuple[int, ...]) -> Array:
    """The inverse of `to_rows`."""
    if axes == "time":
        y = jnp.moveaxis(
            y.reshape(y.shape[0], math.prod(positions[1:]), positions[0], y.shape[-1]), 2, 1
        )
    return y.reshape(y.shape[0], *positions, y.shape[-1])
