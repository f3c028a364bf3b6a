"""The non-local block, z_i = W_z y_i + x_i (Eq. 6), in the conventions of each published source."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nonlocal_jax import checks
from nonlocal_jax.layers.convolution import dot_over_positions
from nonlocal_jax.layers.initializers import Initializer
from nonlocal_jax.layers.instantiations import (
    Concatenation,
    DotProduct,
    EmbeddedGaussian,
    Gaussian,
    NonLocalOperation,
    he_normal,
    zero_bias,
)
from nonlocal_jax.layers.norm import BatchNorm, apply_norm
from nonlocal_jax.layers.presets import PRESETS, Preset, presets_table
from nonlocal_jax.layers.residual_ratio import sow_residual_ratio
from nonlocal_jax.layers.response import enclosing_block
from nonlocal_jax.types import Affinity, Array, Features, Instantiation, PositionMask


class NonLocalBlock(nn.Module):
    """A residual block around a non-local operation: z_i = norm(W_z y_i) + x_i.            (Eq. 6)

    A new block is the identity: the norm's scale starts at 0 or, without a norm, W_z and its bias
    do. It can therefore be inserted into a trained network without changing its output. There is no
    ReLU after the sum.

    Attributes:
        operation: Computes y: a `Gaussian`, `EmbeddedGaussian`, `DotProduct` or `Concatenation`. It
            becomes the block's submodule `operation`.
        norm: Makes the norm after W_z: `BatchNorm` (trained), `Affine` (a frozen one),
            `nn.GroupNorm`, `nn.LayerNorm`, a `functools.partial` of one of them, or None.
        out_bias: Whether W_z has a bias. None means exactly when no norm follows.
        kernel_init: Initializer of W_z.
        bias_init: Maps the fan-in to the initializer of W_z's bias.
        zero_init: Whether the block starts as the identity.
        dtype: Dtype of W_z and the norm. If None, it is inferred from the input and the parameters.
        param_dtype: Dtype of their parameters.

    Source: section 3.3.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (2, 4, 6, 6, 10))
    >>> block = NonLocalBlock(EmbeddedGaussian())
    >>> variables = jax.jit(block.init)(jax.random.key(1), x)
    >>> z, state = jax.jit(lambda x: block.apply(variables, x, mutable=["intermediates"]))(x)
    >>> bool((z == x).all())
    True
    >>> (affinity,) = state["intermediates"]["operation"]["affinity"]
    >>> affinity.shape  # (B, N, M): 4·6·6 queries, 4·3·3 pooled keys
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
        # Flax makes an operation that is constructed inside another module's `__call__` a child of
        # that module, which would then own its parameters. A clone without parent is the block's.
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
        """Computes z, of the shape of x.

        Args:
            x: (B, *positions, C), with one, two or three position axes.
            mask: (B, *positions) of bool, False where x is padding. Padding influences nothing and
                keeps its value. Only a batch of nothing but padding moves BatchNorm's statistics,
                which would otherwise be those of no position.
            train: Whether BatchNorm uses, and updates, the statistics of this batch. "batch_stats"
                must then be mutable.
            return_map: Whether to return the affinity f / C as well.

        Returns:
            (B, *positions, C); with `return_map` also (B, ..., N, M).

        Raises:
            ValueError, TypeError: As the operation does.
        """
        with enclosing_block(self):
            y: Any = self.operation(x, mask=mask, return_map=return_map)
        if return_map:
            y, affinity = y
        axis_name = None if self.is_initializing() else self.operation.axis_name
        residual = self._project(y, x.shape[-1])
        if self.norm is not None:
            zero_scale: Any = {"scale_init": nn.initializers.zeros} if self.zero_init else {}
            residual = apply_norm(
                self.norm,
                residual,
                train=train,
                axis_name=axis_name,
                mask=mask,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name="out_norm",
                **zero_scale,
            )
        if mask is not None:
            residual = jnp.where(mask[..., None], residual, 0)
        sow_residual_ratio(self, residual, x, mask, axis_name)
        z = (x + residual).astype(x.dtype)
        return (z, affinity) if return_map else z

    def _project(self, y: Array, features: int) -> Array:
        """Computes W_z y."""
        has_norm = self.norm is not None
        starts_zero = self.zero_init and not has_norm
        zeros = nn.initializers.zeros
        return nn.Dense(
            features,
            use_bias=not has_norm if self.out_bias is None else self.out_bias,
            kernel_init=zeros if starts_zero else self.kernel_init,
            bias_init=zeros if starts_zero else self.bias_init(y.shape[-1]),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            dot_general=dot_over_positions,
            name="out",
        )(y)


OPERATIONS: dict[Instantiation, type[NonLocalOperation]] = {
    "gaussian": Gaussian,
    "embedded_gaussian": EmbeddedGaussian,
    "dot_product": DotProduct,
    "concatenation": Concatenation,
}


def nonlocal_block(
    instantiation: Instantiation, preset: Preset = "paper", **overrides: Any
) -> NonLocalBlock:
    """Makes a non-local block in the conventions of one source.

    PRESETS_TABLE

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation". `caffe2`
            and `slowfast` have the embedded Gaussian and the dot product only.
        preset: The source whose conventions the block has.
        **overrides: Any attribute of the operation or of `NonLocalBlock`. One that both have is set
            on both.

    Returns:
        The block, an identity until it is trained.

    Raises:
        ValueError: If the instantiation or the preset is unknown, or the source has no such block.
        TypeError: If an attribute is unknown.

    >>> block = nonlocal_block("embedded_gaussian", preset="caffe2", subsample=(1, 3, 3))
    >>> block.operation.use_scale, block.operation.pool_order, block.operation.subsample
    (True, 'before', (1, 3, 3))
    """
    checks.one_of("instantiation", instantiation, OPERATIONS)
    checks.one_of("preset", preset, PRESETS)
    conventions = PRESETS[preset].block
    if instantiation not in conventions.instantiations:
        available = " and ".join(map(repr, conventions.instantiations))
        raise ValueError(
            f"preset {preset!r} has no {instantiation!r}: {PRESETS[preset].title} has {available}."
        )
    operation_class = OPERATIONS[instantiation]
    operation_attributes = _attributes(operation_class) - {"name"}
    block_attributes = _attributes(NonLocalBlock) - {"operation"}
    attributes = operation_attributes | block_attributes
    if unknown := overrides.keys() - attributes:
        raise TypeError(
            f"A {instantiation} block has no attribute {', '.join(sorted(unknown))}; "
            f"it has {', '.join(sorted(attributes))}."
        )
    fields = dataclasses.fields(conventions)
    defaults = {field.name: getattr(conventions, field.name) for field in fields}
    projection_defaults = {
        "norm": conventions.norm,
        "kernel_init": conventions.out_kernel_init or conventions.kernel_init,
    }
    operation_options = _select(defaults | overrides, operation_attributes)
    block_options = _select(defaults | projection_defaults | overrides, block_attributes)
    return NonLocalBlock(operation_class(**operation_options, parent=None), **block_options)


# The table in the docstring is that of `PRESETS`, so it cannot be out of date.
nonlocal_block.__doc__ = (nonlocal_block.__doc__ or "").replace(
    "PRESETS_TABLE", presets_table().replace("\n", "\n    ")
)


def _attributes(module: type[nn.Module]) -> set[str]:
    return {field.name for field in dataclasses.fields(module)} - {"parent"}


def _select(options: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}
