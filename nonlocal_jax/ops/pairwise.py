"""The public functions: each checks its arguments, chooses a kernel and calls it."""

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from nonlocal_jax.ops import arguments, choose, definition, platforms, sharded
from nonlocal_jax.ops.choose import Implementation
from nonlocal_jax.ops.kernels.kernel import Kernel, Operands
from nonlocal_jax.types import (
    Affinity,
    AffinityToAll,
    Array,
    ConcatenationWeights,
    Instantiation,
    KeyMask,
    Keys,
    Queries,
    Responses,
    Values,
)

Function = TypeVar("Function", bound=Callable[..., Any])

# The parts of the docstrings that the pairwise functions share; `{shared}` stands for them.
_ARGUMENTS = {
    "x": "The features (..., N, c), one row for each position that gets a response.",
    "keys": "The same features (..., M, c) at the positions that are summed: `x` itself, or `x` "
    "subsampled.",
    "theta": "The embedded queries θ(x_i), (..., N, d).",
    "phi": "The embedded keys φ(x_j), (..., M, d).",
    "g": "The values (..., M, e).",
    "w_f": "The weights (2d,) that project a pair to a number: first those of θ, then those of φ.",
    "scale": "Factor of the logits: 1 in the paper, d^-0.5 in video-nonlocal-net and PySlowFast.",
    "key_mask": "Mask (..., M) of bool, True for a real key. A masked key is left out of the sum "
    "and of C(x), whatever it contains; as a query, the same position still needs finite features.",
    "implementation": "How the sum is computed, which does not change the result: a name in the "
    "table of `nonlocal_jax.ops`, or 'auto'.",
    "axis_name": "Name of the mapped axis over whose devices the positions are split. Queries, "
    "keys, values and mask are then this device's, and the sum runs over the keys of all devices.",
}
_RETURNS_AND_RAISES = """\
Returns:
    (..., N, e) in g's dtype. The response of a query whose keys are all masked is 0.

Raises:
    ValueError: If shapes do not match, there are no queries or keys, or the implementation is
        unknown or not available.
    TypeError: If inputs are not floating point, or the mask is not bool."""


def _fill_docstring(function: Function) -> Function:
    """Replaces `{shared}` in a docstring by the sections Args, Returns and Raises."""
    if function.__doc__ is None:  # under `python -OO`
        return function
    wrap = textwrap.TextWrapper(96, initial_indent=4 * " ", subsequent_indent=8 * " ").fill
    names = inspect.signature(function).parameters
    arguments_section = [wrap(f"{name}: {_ARGUMENTS[name]}") for name in names]
    shared = "\n".join(["Args:", *arguments_section, "", _RETURNS_AND_RAISES])
    # Python 3.13 removes the indentation of docstrings, older versions do not.
    function.__doc__ = inspect.cleandoc(function.__doc__).replace("{shared}", shared)
    return function


@_fill_docstring
def gaussian(
    x: Queries,
    keys: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Gaussian: responses weighted by the similarity of the features themselves.

    f(x_i, x_j) = exp(x_i · x_j), C(x) = Σ_j f(x_i, x_j)                                   (Eq. 2)

    {shared}

    Source: section 3.2, Eq. 2.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> print(gaussian(x, x, jnp.array([[1.0], [0.0]])))  # e / (e + 1) and 1 / (e + 1)
    [[0.7310586 ]
     [0.26894143]]
    """
    x, keys, key_mask = arguments.check_pairs("x", x, "keys", keys, key_mask)
    g = arguments.check_values(g, keys)
    return _respond(Operands("gaussian", x, keys, g, key_mask), implementation, axis_name)


@_fill_docstring
def embedded_gaussian(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Embedded Gaussian: softmax attention.

    f(x_i, x_j) = exp(scale · θ(x_i) · φ(x_j)), C(x) = Σ_j f(x_i, x_j)                     (Eq. 3)

    {shared}

    Source: section 3.2, Eq. 3.

    >>> import jax.numpy as jnp
    >>> theta, phi = jnp.array([[2.0]]), jnp.array([[5.0], [5.0], [9.0]])
    >>> g = jnp.array([[1.0], [3.0], [7.0]])
    >>> print(embedded_gaussian(theta, phi, g, key_mask=jnp.array([True, True, False])))
    [[2.]]
    """
    scale = arguments.check_scale(scale)
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    g = arguments.check_values(g, phi)
    operands = Operands("embedded_gaussian", theta, phi, g, key_mask, scale=scale)
    return _respond(operands, implementation, axis_name)


@_fill_docstring
def dot_product(
    theta: Queries,
    phi: Keys,
    g: Values,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Dot product: responses weighted by the embedded similarity itself, without a softmax.

    f(x_i, x_j) = θ(x_i) · φ(x_j), C(x) = N                                                (Eq. 4)

    {shared}

    Source: section 3.2, Eq. 4. N is the number of keys that are summed, as in every published
    implementation.

    >>> import jax.numpy as jnp
    >>> dot_product(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]))
    Array([[4.]], dtype=float32)
    """
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    g = arguments.check_values(g, phi)
    return _respond(Operands("dot_product", theta, phi, g, key_mask), implementation, axis_name)


@_fill_docstring
def concatenation(
    theta: Queries,
    phi: Keys,
    g: Values,
    w_f: ConcatenationWeights,
    *,
    key_mask: KeyMask | None = None,
    implementation: Implementation = "auto",
    axis_name: str | None = None,
) -> Responses:
    """Concatenation: responses weighted by a learned projection of each pair.

    f(x_i, x_j) = ReLU(w_f · [θ(x_i), φ(x_j)]), C(x) = N                                   (Eq. 5)

    {shared}

    Source: section 3.2, Eq. 5, after Relation Networks. N is the number of keys that are summed, as
    in every published implementation.

    >>> import jax.numpy as jnp
    >>> w_f = jnp.array([1.0, -1.0])
    >>> concatenation(jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]), jnp.array([[1.0], [1.0]]), w_f)
    Array([[0.5]], dtype=float32)
    """
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    w_f = arguments.check_w_f(w_f, theta)
    g = arguments.check_values(g, phi)
    operands = Operands("concatenation", theta, phi, g, key_mask, w_f=w_f)
    return _respond(operands, implementation, axis_name)


def affinity(
    instantiation: Instantiation,
    theta: Queries,
    phi: Keys,
    w_f: ConcatenationWeights | None = None,
    *,
    scale: float | Array = 1.0,
    key_mask: KeyMask | None = None,
    axis_name: str | None = None,
) -> Affinity | AffinityToAll:
    """Returns the map f(x_i, x_j) / C(x): how much each position i takes from each position j.

    y = affinity @ g is Eq. 1. Rows of the two Gaussians are non-negative and sum to 1; those of the
    dot product are signed; those of the concatenation are non-negative and unbounded.

    Args:
        instantiation: "gaussian", "embedded_gaussian", "dot_product" or "concatenation".
        theta: The queries (..., N, d); for the Gaussian, x.
        phi: The keys (..., M, d); for the Gaussian, x or x subsampled.
        w_f: The weights (2d,) of the concatenation; None otherwise.
        scale: Factor of the logits of the embedded Gaussian; 1 otherwise.
        key_mask: Mask (..., M) of bool, True for a real key. Columns of masked keys are 0.
        axis_name: Name of the mapped axis over whose devices the positions are split. Rows are then
            this device's queries, and columns the keys of all devices.

    Returns:
        (..., N, M), float32 or wider.

    Raises:
        ValueError: If the instantiation is unknown, shapes do not match, there are no queries or
            keys, or `w_f` or `scale` is passed to an instantiation that has none.
        TypeError: If inputs are not floating point, or the mask is not bool.

    Source: section 3.1, Eq. 1.

    >>> import jax.numpy as jnp
    >>> affinity("dot_product", jnp.array([[2.0]]), jnp.array([[1.0], [3.0]]))
    Array([[1., 3.]], dtype=float32)
    """
    arguments.check_instantiation(instantiation)
    if w_f is not None and instantiation != "concatenation":
        raise ValueError(f"w_f belongs to the concatenation; {instantiation} has none.")
    scale_is_one = isinstance(scale, int | float) and scale == 1
    if not scale_is_one and instantiation != "embedded_gaussian":
        raise ValueError(f"scale belongs to the embedded Gaussian; {instantiation} has none.")
    scale = arguments.check_scale(scale)
    theta, phi, key_mask = arguments.check_pairs("theta", theta, "phi", phi, key_mask)
    if instantiation == "concatenation":
        w_f = arguments.check_w_f(w_f, theta)
    g = phi  # not used
    operands = Operands(instantiation, theta, phi, g, key_mask, scale, w_f)
    return _affinity(*_split(operands), axis_name)


def _respond(
    operands: Operands, implementation: Implementation, axis_name: str | None
) -> Responses:
    """Chooses a kernel and calls it."""
    choose.check_implementation(operands.instantiation, implementation)
    return _compiled_response(*_split(operands), implementation, axis_name)


def _split(operands: Operands) -> tuple[dict[str, Array], Operands]:
    """Splits operands into the arrays by name, and the rest, which is constant in a program."""
    arrays = {name: x for name, x in operands._asdict().items() if isinstance(x, jax.Array)}
    nothing: dict[str, Any] = dict.fromkeys(arrays)
    return arrays, operands._replace(**nothing)


def _join(arrays: dict[str, Any], constants: Operands) -> Operands:
    """Inverts `_split`, and sets masked keys and values to 0, so that NaN there has no effect."""
    operands = constants._replace(**arrays)
    if operands.key_mask is None:
        return operands
    real = operands.key_mask[..., None]
    return operands._replace(phi=jnp.where(real, operands.phi, 0), g=jnp.where(real, operands.g, 0))


# The next two functions are jitted for callers that are not. Kernels define new functions in each
# call, as bodies of loops and as branches for platforms, and JAX compiles each new function.


@partial(jax.jit, static_argnums=(1, 2))
def _affinity(
    arrays: dict[str, Array], constants: Operands, axis_name: str | None
) -> Affinity | AffinityToAll:
    instantiation, theta, phi, _, key_mask, scale, w_f = _join(arrays, constants)
    if axis_name is not None:
        key_mask, phi = sharded.gather(axis_name, key_mask, phi)
    return definition.affinity(instantiation, theta, phi, key_mask, scale, w_f)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _compiled_response(
    arrays: dict[str, Array],
    constants: Operands,
    implementation: Implementation,
    axis_name: str | None,
) -> Responses:
    operands = _join(arrays, constants)
    instantiation, theta, phi, g, key_mask, _, _ = operands
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    sizes = choose.sizes_of(instantiation, theta, phi, g, key_mask is not None, devices)
    if all(isinstance(size, int) and size == 1 for size in theta.shape[:-2]):
        operands = _squeeze_batch(operands)

    def choose_kernel(platform: str) -> tuple[Kernel, Any] | _Unavailable:
        options = {"split": axis_name is not None, "tracing": True}
        try:
            kernel, _ = choose.choose_kernel(sizes, implementation, platform, **options)
        except ValueError as error:
            return _Unavailable(str(error))
        return kernel, kernel.settings[platform]

    def compute(choice: tuple[Kernel, Any] | _Unavailable, arrays: dict[str, Any]) -> Responses:
        if isinstance(choice, _Unavailable):
            shape = (*arrays["theta"].shape[:-1], g.shape[-1])
            return platforms.fail_if_lowered(choice.reason, shape, g.dtype)
        return _call(*choice, operands._replace(**arrays), axis_name)

    choices = {name: choose_kernel(name) for name in platforms.PLATFORMS}
    if all(isinstance(choice, _Unavailable) for choice in choices.values()):
        raise ValueError(*choices[platforms.default_platform()])
    y = platforms.by_platform(choices.__getitem__, compute, _split(operands)[0])
    return y.reshape(*theta.shape[:-1], g.shape[-1])


class _Unavailable(NamedTuple):
    """The requested implementation is not available on a platform, for this reason."""

    reason: str


def _squeeze_batch(operands: Operands) -> Operands:
    """Removes the batch axes of a single sample; on CPU, matrix products are faster without."""
    theta, phi, g = (x.reshape(x.shape[-2:]) for x in (operands.theta, operands.phi, operands.g))
    key_mask = None if operands.key_mask is None else operands.key_mask.reshape(-1)
    return operands._replace(theta=theta, phi=phi, g=g, key_mask=key_mask)


def _call(kernel: Kernel, settings: Any, operands: Operands, axis_name: str | None) -> Responses:
    """Computes the responses in the dtype of g."""
    if axis_name is None:
        y = kernel.respond(operands, settings)
    elif kernel.respond_split is not None:
        y = kernel.respond_split(operands, settings, axis_name)
    else:
        y = kernel.respond(operands.gather_keys(axis_name), settings)
    return y.astype(operands.g.dtype)
