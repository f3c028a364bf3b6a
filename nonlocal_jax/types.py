"""The tensor vocabulary: each kind of array is named here once.

Axes: `b` batch, `t` frames, `h` and `w` rows and columns, `c` channels; `n` query positions, `m`
    key
positions, `d` channels of θ and φ, `e` channels of g. `*b` stands for any number of leading axes.
`*positions` stands for one, two or three axes: (N,), (H, W) or (T, H, W). The annotations are
checked at run time under pytest only.
"""

from typing import Literal

from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Scalar

Instantiation = Literal["gaussian", "embedded_gaussian", "dot_product", "concatenation"]

# Inputs and outputs of layers.
Features = Float[Array, "b *positions c"]
Embedded = Float[Array, "b *positions e"]  # the same positions, other channels
Pooled = Float[Array, "b *pooled c"]  # the same channels, fewer positions
PositionMask = Bool[
    Array, "b *positions"
]  # True where the input is real, False where it is padding
PooledMask = Bool[Array, "b *pooled"]

# Eq. 1: y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j).
Queries = Float[Array, "*b n d"]  # θ(x_i)
Keys = Float[Array, "*b m d"]  # φ(x_j)
Values = Float[Array, "*b m e"]  # g(x_j)
Responses = Float[Array, "*b n e"]  # y_i
Affinity = Float[Array, "*b n m"]  # f(x_i, x_j) / C(x)
AffinityToAll = Float[Array, "*b n all_m"]  # the same to the keys of all devices
KeyMask = Bool[Array, "*b m"]
ConcatenationWeights = Float[Array, " two_d"]  # w_f: the weights of θ, then those of φ

# Images, videos and their labels.
Image = Float[Array, "b h w c"]
Video = Float[Array, "b t h w c"]
Labels = Int[Array, " b"]
Logits = Float[Array, "b classes"]

__all__ = [
    "Affinity",
    "AffinityToAll",
    "Array",
    "ConcatenationWeights",
    "Embedded",
    "Features",
    "Image",
    "Instantiation",
    "KeyMask",
    "Keys",
    "Labels",
    "Logits",
    "PRNGKeyArray",
    "Pooled",
    "PooledMask",
    "PositionMask",
    "Queries",
    "Responses",
    "Scalar",
    "Values",
    "Video",
]
