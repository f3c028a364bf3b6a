"""The non-local block, z_i = W_z y_i + x_i (Eq. 6), and the conventions of each published implementation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers.convolution import dot_over_positions
from nonlocal_jax.layers.instantiations import (
    Concatenation,
    DotProduct,
    EmbeddedGaussian,
    Gaussian,
    Initializer,
    NonLocalOperation,
    he_normal,
    zero_bias,
)
from nonlocal_jax.layers.norm import BatchNorm, across_devices
from nonlocal_jax.layers.presets import PRESETS, Preset
from nonlocal_jax.layers.tap import enclosing_block
from nonlocal_jax.types import Affinity, Array, Features, Instantiation, PositionMask, Scalar


class NonLocalBlock(nn.Module):
    """A residual block around a non-local operation: z_i = norm(W_z y_i) + x_i.            (Eq. 6)

    A new block is the identity: the norm's scale starts at 0 or, without a norm, W_z and its bias do. So it can be put
    into a trained network without changing its answer. There is no ReLU after the sum.

    Attributes:
        operation: computes y; one of `Gaussian`, `EmbeddedGaussian`, `DotProduct`, `Concatenation`. It becomes this
            block's own submodule `operation`.
        norm: makes the norm after W_z: `BatchNorm` (trained), `Affine` (a frozen one), `nn.GroupNorm`, `nn.LayerNorm`,
            a `functools.partial` of one of them, or None.
        out_bias: whether W_z has a bias; None is yes exactly when no norm follows.
        kernel_init: initialiser of W_z.
        bias_init: from the fan-in to the initialiser of W_z's bias.
        zero_init: whether the block starts as the identity.
        dtype: of W_z and the norm; None is that of the input and parameters.
        param_dtype: of their parameters.

    Source: section 3.3.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 10))
    >>> block = NonLocalBlock(EmbeddedGaussian())
    >>> z, variables = block.init_with_output(jax.random.key(1), x)
    >>> bool((z == x).all())
    True
    >>> state = block.apply(variables, x, mutable=["intermediates"])[1]
    >>> state["intermediates"]["operation"]["affinity"][0].shape  # (B, N, M): 4·6·6 queries, 4·3·3 pooled keys
    (2, 144, 36)
    """

    operation: NonLocalOperation
    norm: Callable[..., nn.Module] | None = BatchNorm
    out_bias: bool | None = None
    kernel_init: Initializer = he_normal
    bias_init: Callable[[int], Initializer] = zero_bias
    zero_init: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        # Made inside another module's `__call__`, the operation would be that module's child, and so would its parameters be.
        parent = self.operation.parent
        if isinstance(parent, nn.Module) and not isinstance(parent, NonLocalBlock):
            self.operation = self.operation.clone(parent=None, name=None)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Features,
        *,
        mask: PositionMask | None = None,
        train: bool = False,
        return_map: bool = False,
    ) -> Features | tuple[Features, Affinity]:
        """z, of the shape of x.

        Args:
            x: (B, *positions, C), with one, two or three position axes.
            mask: (B, *positions) of bool, False where x is padding. Padding influences nothing and keeps its value; only
                a batch of nothing but padding moves the statistics of BatchNorm, which would have none otherwise.
            train: whether BatchNorm uses, and updates, the statistics of this batch; "batch_stats" must then be mutable.
            return_map: whether the affinity f / C is returned as well.

        Returns:
            (B, *positions, C); with `return_map` also (B, ..., N, M).

        Raises:
            ValueError, TypeError: as the operation does.
        """
        with enclosing_block(self):
            y: Any = self.operation(x, mask=mask, return_map=return_map)
        if return_map:
            y, affinity = y
        zeros = nn.initializers.zeros
        without_norm = self.norm is None
        starts_zero = self.zero_init and without_norm
        residual = nn.Dense(
            x.shape[-1],
            use_bias=without_norm if self.out_bias is None else self.out_bias,
            kernel_init=zeros if starts_zero else self.kernel_init,
            bias_init=zeros if starts_zero else self.bias_init(y.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dot_over_positions,
            name="out",
        )(y)
        if self.norm is not None:
            residual = self._normalise(self.norm, residual, mask, train)
        if mask is not None:
            residual = jnp.where(mask[..., None], residual, 0)
        if self.is_mutable_collection("intermediates") and not self.is_initializing():
            self.sow(
                "intermediates",
                "residual_ratio",
                _residual_ratio(residual, x, mask, self.operation.axis_name),
            )
        z = (x + residual).astype(x.dtype)
        return (z, affinity) if return_map else z

    def _normalise(
        self, norm: Callable[..., nn.Module], x: Array, mask: Array | None, train: bool
    ) -> Array:
        options: dict[str, Any] = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
        axis_name = None if self.is_initializing() else self.operation.axis_name
        options |= across_devices(norm, axis_name)
        module = norm(dtype=self.dtype, param_dtype=self.param_dtype, name="out_norm", **options)
        if isinstance(module, nn.BatchNorm):
            return module(
                x, use_running_average=not train, mask=_never_empty(mask, x, 0, axis_name)
            )
        if isinstance(module, nn.GroupNorm | nn.InstanceNorm):
            if mask is not None and axis_name is not None:
                raise ValueError(
                    "GroupNorm must have no mask where positions are split over devices: Flax averages the devices' means "
                    "whatever their counts. Take BatchNorm or LayerNorm."
                )
            return module(x, mask=_never_empty(mask, x, 1))
        return module(x)  # by position: padding cannot reach the others


def _never_empty(
    mask: Array | None, x: Array, first_axis: int, axis_name: str | None = None
) -> Array | None:
    """The mask for a norm over the axes from `first_axis` on, of the shape of x.

    Statistics of no position at all would be NaN, and so would gradients; where all is padding, all counts, and still
    adds 0 to x.
    """
    if mask is None:
        return None
    real = mask.any(axis=tuple(range(first_axis, mask.ndim)), keepdims=True)
    empty = ~real if axis_name is None else jax.lax.pmax(real.astype(jnp.int32), axis_name) == 0
    return jnp.broadcast_to((mask | empty)[..., None], x.shape)


def _residual_ratio(residual: Array, x: Array, mask: Array | None, axis_name: str | None) -> Scalar:
    """‖W_z y‖ / ‖x‖ over the real positions, of all devices of `axis_name`: 0 as long as the block is the identity."""
    x = x if mask is None else jnp.where(mask[..., None], x, 0)
    squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in (residual, x)]
    if axis_name is not None:
        squares = jax.lax.psum(squares, axis_name)
    norm, of_x = map(jnp.sqrt, squares)
    return norm / jnp.where(of_x == 0, 1, of_x)


OPERATIONS: dict[Instantiation, type[NonLocalOperation]] = {
    "gaussian": Gaussian,
    "embedded_gaussian": EmbeddedGaussian,
    "dot_product": DotProduct,
    "concatenation": Concatenation,
}


def nonlocal_block(
    instantiation: Instantiation, preset: Preset = "paper", **overrides: Any
) -> NonLocalBlock:
    """A non-local block in the conventions of one source.

    | preset              | softmax scale | pooling       | biases            | initialisation    | ε of BN      |
    |---------------------|---------------|---------------|-------------------|-------------------|--------------|
    | `paper`             | 1             | after φ and g | none              | He                | 1e-5         |
    | `caffe2`            | d^-0.5        | before        | all               | N(0, 0.01)        | 1.0000001e-5 |
    | `slowfast`          | d^-0.5        | before        | all               | He, by fan-out    | 1e-5         |
    | `non_local_pytorch` | 1             | after φ and g | all               | PyTorch's default | 1e-5         |
    | `mmcv`              | d^-0.5        | none          | θ, φ, g (*)       | N(0, 0.01) (*)    | 1e-5         |

    (*) W_z has a bias when no norm follows; W_z and w_f are initialised as He, by fan-out.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation"; `caffe2` and `slowfast` have the
            embedded Gaussian and the dot product only.
        preset: whose conventions.
        **overrides: any attribute of the operation or of `NonLocalBlock`; one that both have goes to both.

    Returns:
        The block, an identity until it is trained.

    Raises:
        ValueError: an unknown instantiation or preset, or one that the preset's source does not have.
        TypeError: an unknown attribute.

    >>> block = nonlocal_block("embedded_gaussian", preset="caffe2", subsample=(1, 3, 3))
    >>> block.operation.use_scale, block.operation.pool_order, block.operation.subsample
    (True, 'before', (1, 3, 3))
    """
    checks.one_of("instantiation", instantiation, OPERATIONS)
    checks.one_of("preset", preset, PRESETS)
    convention = PRESETS[preset].block
    if instantiation not in convention.instantiations:
        has = " and ".join(map(repr, convention.instantiations))
        raise ValueError(
            f"preset {preset!r} has no {instantiation!r}: {PRESETS[preset].title} has {has}."
        )

    operation_type = OPERATIONS[instantiation]
    of_operation, of_block = _attributes(operation_type), _attributes(NonLocalBlock) - {"operation"}
    if unknown := overrides.keys() - of_operation - of_block:
        known = ", ".join(sorted(of_operation | of_block))
        raise TypeError(
            f"a {instantiation} block has no attribute {', '.join(sorted(unknown))}; it has {known}."
        )
    chosen = {
        field.name: getattr(convention, field.name) for field in dataclasses.fields(convention)
    }
    out = {"kernel_init": chosen.pop("out_kernel_init") or convention.kernel_init}
    for_operation, for_block = chosen | overrides, chosen | out | overrides
    operation = operation_type(
        **{name: value for name, value in for_operation.items() if name in of_operation - {"name"}},
        parent=None,
    )
    return NonLocalBlock(
        operation, **{name: value for name, value in for_block.items() if name in of_block}
    )


def _attributes(module: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(module)} - {"parent"}
