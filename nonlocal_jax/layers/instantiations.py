"""The non-local operation as a layer, one module for each pairwise function.

y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)                                                        (Eq. 1)

The modules own W_g, W_θ, W_φ and w_f and choose which positions are summed; `nonlocal_jax.ops`
computes the sum. θ, φ and g are 1×1×1 convolutions, which are `nn.Dense` on channels-last arrays.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import flax.linen as nn
import jax.numpy as jnp

from nonlocal_jax import checks, ops
from nonlocal_jax.layers.convolution import dot_over_positions
from nonlocal_jax.layers.initializers import Initializer, variance_scaling
from nonlocal_jax.layers.pooling import max_pool, pool_mask
from nonlocal_jax.layers.response import Axes, SumLayout, nonlocal_response
from nonlocal_jax.types import Affinity, Array, Embedded, Features, PositionMask, PRNGKeyArray

PoolOrder = Literal["after", "before"]
he_normal = variance_scaling(2.0, "fan_in", "normal")


def zero_bias(fan_in: int) -> Initializer:
    """The usual initializer of a bias, zeros for every fan-in."""
    return nn.initializers.zeros


class NonLocalOperation(nn.Module):
    """What the four instantiations share: embeddings, subsampling, and which positions are summed.

    Attributes:
        inner_features: Channels of θ, φ and g. Defaults to half of the input's, at least 1.
        subsample: Max pooling of the keys and values, never of the queries. True is the paper's: 2
            along every spatial axis (1×2×2 in video) over which the sum runs. A tuple gives the
            window along each position axis. False does not pool.
        pool_order: "after" pools φ(x) and g(x), as in the paper. "before" pools x once for both, as
            in video-nonlocal-net and PySlowFast. The two differ numerically. The Gaussian's keys
            are the pooled x in both.
        axes: "spacetime" sums over all positions, "space" over those of the same frame, "time" over
            those of the same pixel. The last two require (T, H, W) positions.
        group_size: Number of frames of a temporal group; a position sees its own group only. None
            makes all frames one group.
        use_bias: Whether θ, φ and g have a bias.
        kernel_init: Initializer of W_θ, W_φ and W_g, and of w_f unless that has its own.
        bias_init: From the fan-in to the initializer of the biases, because PyTorch's default
            depends on it.
        dtype: Dtype of the computation. If None, it is inferred from the input and the parameters.
            Logits and sums stay float32.
        param_dtype: Dtype of the parameters.
        implementation: Passed to `nonlocal_jax.ops`.
        axis_name: Under `jax.shard_map` or `jax.pmap`, the mapped axis over whose devices the first
            position axis (the frames of a video) is split. Keys of all devices are summed, and each
            device holds the responses of its own positions.
    """

    inner_features: int | None = None
    subsample: bool | tuple[int, ...] = True
    pool_order: PoolOrder = "after"
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
        """Computes the response y of every position.

        Args:
            x: (B, *positions, C), with one, two or three position axes: (N,), (H, W) or (T, H, W).
            mask: (B, *positions) of bool, False where x is padding. Padding is neither summed nor
                counted, and its values have no influence. Where keys are pooled, a window is real
                if any of its positions is.
            return_map: Whether to return the affinity f / C as well.

        Returns:
            (B, *positions, inner_features); with `return_map` also (B, ..., N, M).

        Raises:
            ValueError: If an option or a shape does not fit; the message says what was expected.
            TypeError: If x is not floating point or the mask is not bool.
        """
        self._check_input(x, mask)
        positions = x.shape[1:-1]
        window = self.subsampling(positions)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        theta = self._theta(x)
        if self.pool_order == "before":
            pooled = max_pool(x, window, mask)
            phi, g = self._phi(pooled), self._dense("g", pooled)
        else:
            phi = max_pool(self._phi(x), window, mask)
            g = max_pool(self._dense("g", x), window, mask)
        groups = None if self.group_size is None else positions[0] // self.group_size
        key_mask = None
        if mask is not None:
            pooled_mask = pool_mask(mask, window)[..., None]
            key_mask = to_rows(pooled_mask, self.axes, groups)[..., 0]
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
        half = max(x.shape[-1] // 2, 1)
        return nn.Dense(
            half if self.inner_features is None else self.inner_features,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init(x.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dot_over_positions,
            name=name,
        )(x)

    def pairwise(self, theta: Array) -> dict[str, Any]:
        """Returns f by name, its parameters and its options, as `nonlocal_response` takes them."""
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
        """Returns y and, if it is requested or sown, the affinity (B, ..., N, M)."""
        # Over space and within groups, all keys of a query are on its own device. Parameters are
        # initialised outside the map, where the axis does not exist.
        is_split = not self.is_initializing() and self.axes != "space" and self.group_size is None
        options: dict[str, Any] = self.pairwise(theta)
        options |= {"key_mask": key_mask, "axis_name": self.axis_name if is_split else None}
        y = nonlocal_response(
            self,
            theta=theta,
            phi=phi,
            g=g,
            implementation=self.implementation,
            layout=layout,
            **options,
        )
        is_sown = self.is_mutable_collection("intermediates") and not self.is_initializing()
        if not (is_sown or return_map):
            return y, None
        affinity = ops.affinity(theta=theta, phi=phi, **options)
        if is_sown:
            self.sow("intermediates", "affinity", affinity)
        return y, affinity

    def _check_input(self, x: Array, mask: Array | None) -> None:
        positions = x.shape[1:-1]
        if len(positions) not in (1, 2, 3):
            raise ValueError(
                "x must have shape (B, *positions, C) with one, two or three position axes; "
                f"got shape {x.shape}."
            )
        if x.shape[-1] == 0:
            raise ValueError(f"x must have at least one channel; got shape {x.shape}.")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"x must be floating point; got {x.dtype}.")
        if self.inner_features is not None:
            checks.at_least("inner_features", self.inner_features, 1)
        checks.one_of("axes", self.axes, get_args(Axes))
        checks.one_of("pool_order", self.pool_order, get_args(PoolOrder))
        if self.axes != "spacetime" and len(positions) != 3:
            raise ValueError(
                f"x must have (T, H, W) positions, rank 5, for axes={self.axes!r}; "
                f"got shape {x.shape}."
            )
        self._check_groups(positions)
        g_params = self.variables.get("params", {}).get("g", {})
        if "kernel" in g_params:  # not while parameters are initialised
            checks.channels("x", x.shape, nn.meta.unbox(g_params["kernel"]).shape[0])
        if mask is None:
            return
        if getattr(mask, "dtype", None) != jnp.bool_:
            raise TypeError(
                "mask must be an array of bool, True where x is real; "
                f"got {getattr(mask, 'dtype', type(mask))}."
            )
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask must have shape {x.shape[:-1]}, one entry per position; got {mask.shape}."
            )

    def _check_groups(self, positions: tuple[int, ...]) -> None:
        if self.group_size is None:
            return
        if self.axes == "space" or len(positions) != 3:
            raise ValueError(
                "group_size must be None unless x has (T, H, W) positions and sums run over time; "
                f"got {len(positions)} position axes and axes={self.axes!r}."
            )
        if self.group_size < 1 or positions[0] % self.group_size:
            raise ValueError(
                f"group_size must divide the {positions[0]} frames; got {self.group_size}."
            )

    def subsampling(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the window of the keys' max pooling on a map of these sizes.

        Raises:
            ValueError: If the window does not fit the map, the axes or the groups.
        """
        window = self._window(positions)
        if len(window) != len(positions) or min(window) < 1:
            raise ValueError(
                f"subsample must have {len(positions)} sizes of at least 1; got {window}."
            )
        lengths = zip(window, positions, strict=True)
        if any(isinstance(length, int) and size > length for size, length in lengths):
            raise ValueError(
                f"the subsampling window {window} must not be larger than the map {positions}; "
                "use a smaller one."
            )
        is_split = self.axis_name is not None and not self.is_initializing()
        if is_split and positions[0] % window[0]:
            raise ValueError(
                f"the subsampling window {window} must divide the part of the first position axis "
                f"that each device of {self.axis_name!r} holds; got {positions[0]}."
            )
        if self.axes == "space" and window[0] > 1:
            raise ValueError(
                f"the subsampling window must be 1 in time for axes='space'; got {window}."
            )
        if self.axes == "time" and max(window[1:]) > 1:
            raise ValueError(
                f"the subsampling window must be 1 in space for axes='time'; got {window}."
            )
        if self.group_size is not None and self.group_size % window[0]:
            raise ValueError(
                f"a subsampling window of {window[0]} frames must divide group_size; "
                f"got {self.group_size}."
            )
        return window

    def _window(self, positions: tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(self.subsample, bool):
            is_video = len(positions) == 3
            spatial = 2 if self.subsample and self.axes != "time" else 1
            return (1, spatial, spatial) if is_video else (spatial,) * len(positions)
        if isinstance(self.subsample, Sequence):
            return tuple(self.subsample)
        raise ValueError(
            "subsample must be True, False or a size for each position axis; "
            f"got {self.subsample!r}."
        )


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
        use_scale: Whether the logits are multiplied by inner_features^-0.5, as in
            video-nonlocal-net, PySlowFast and mmcv. The paper does not scale them.

    Source: section 3.2.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((2, 7, 5, 10))
    >>> y, variables = EmbeddedGaussian().init_with_output(jax.random.key(0), x)
    >>> y.shape
    (2, 7, 5, 5)
    """

    use_scale: bool = False

    def pairwise(self, theta: Array) -> dict[str, Any]:
        checks.one_of("use_scale", self.use_scale, (True, False))
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
    """f(x_i, x_j) = ReLU(w_f · [θ(x_i), φ(x_j)]), C(x) = N; parameters W_θ, W_φ, W_g, w_f. (Eq. 5)

    Attributes:
        w_f_init: Initializer of w_f, called with the shape (2d, 1). Defaults to `kernel_init`.

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
        # Initializers read the fan-in from a kernel's shape: w_f has a fan-in of 2d and one output.
        init = self.w_f_init or self.kernel_init
        return init(key, (size, 1), self.param_dtype)[:, 0]


def to_rows(x: Array, axes: Axes, groups: int | None) -> Array:
    """Joins the positions of one sum into one axis: (B, *positions, c) -> (B, *sums, N, c)."""
    groups_axis = () if groups is None else (groups,)
    length, *size = x.shape[1:-1]
    frame = math.prod(size)
    rows = length if groups is None else length // groups
    # Sizes instead of −1, which an empty batch would leave undetermined.
    if axes == "spacetime":
        return x.reshape(x.shape[0], *groups_axis, rows * frame, x.shape[-1])
    frames = x.reshape(*x.shape[:2], frame, x.shape[-1])  # (B, T, H·W, c)
    if axes == "space":
        return frames
    pixels = jnp.moveaxis(frames, 1, 2)  # (B, H·W, T, c)
    return pixels.reshape(*pixels.shape[:2], *groups_axis, rows, x.shape[-1])


def _from_rows(y: Array, axes: Axes, positions: tuple[int, ...]) -> Array:
    """The inverse of `to_rows`."""
    if axes == "time":
        pixels = y.reshape(y.shape[0], math.prod(positions[1:]), positions[0], y.shape[-1])
        y = jnp.moveaxis(pixels, 2, 1)
    return y.reshape(y.shape[0], *positions, y.shape[-1])
