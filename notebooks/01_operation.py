# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The operation: from Eq. 1 to the block
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/01_operation.ipynb)
#
# The non-local operation computes the response at a position as a weighted sum over
# all positions,
#
# $$ y_i = \frac{1}{C(x)} \sum_j f(x_i, x_j)\, g(x_j) \qquad (1) $$
#
# This notebook computes it as the paper writes it, then as the library runs it, and
# then as the residual block that goes into a network. It takes less than a minute on
# a CPU.

# %%
import shutil
import sys

if "google.colab" in sys.modules:
    address = "git+https://github.com/nonlocal-jax/nonlocal_jax"
    cuda = "'jax[cuda12]'" if shutil.which("nvidia-smi") else ""
    get_ipython().run_line_magic(
        "pip", f"install --quiet 'nonlocal_jax[experiments] @ {address}' {cuda}"
    )

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl

# %% [markdown]
# ## Eq. 1 as a double loop
#
# The pairwise function $f$ weights position $j$ for the response at position $i$, and
# $C$ normalises the weights. With $f = e^{\theta_i \cdot \phi_j}$ and $C = \sum_j f$
# this is the *embedded Gaussian*, a softmax over $j$. The positions $i$ are the
# queries and the positions $j$ the keys. The keys can be subsampled; then their number
# $M$ is smaller than the number of queries $N$.

# %%
N, M, d, e = 5, 7, 3, 2  # queries, keys, their width, the width of the values
keys = jax.random.split(jax.random.key(0), 4)
theta = jax.random.normal(keys[0], (N, d))
phi = jax.random.normal(keys[1], (M, d))
g = jax.random.normal(keys[2], (M, e))

y = np.zeros((N, e))
for i in range(N):
    f = [np.exp(np.dot(theta[i], phi[j])) for j in range(M)]
    y[i] = sum(f[j] * np.asarray(g[j]) for j in range(M)) / sum(f)

np.abs(y - nl.ops.embedded_gaussian(theta, phi, g)).max()

# %% [markdown]
# ## Four pairwise functions
#
# | | $f(x_i, x_j)$ | $C(x)$ | rows of $f / C$ |
# |---|---|---|---|
# | Gaussian (Eq. 2) | $e^{x_i \cdot x_j}$ | $\sum_j f$ | sum to 1 |
# | embedded Gaussian (Eq. 3) | $e^{\theta_i \cdot \phi_j}$ | $\sum_j f$ | sum to 1 |
# | dot product (Eq. 4) | $\theta_i \cdot \phi_j$ | $M$ | signed |
# | concatenation (Eq. 5) | $\mathrm{ReLU}(w_f \cdot [\theta_i, \phi_j])$ | $M$ | ≥ 0 |
#
# The paper divides the last two by $N$, which is $M$ where keys are subsampled.
# `nl.ops.affinity` returns $f / C$, and `nl.ops.definition` states all four functions
# in one screen of code.

# %%
w_f = jax.random.normal(keys[3], (2 * d,))
for name in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    extra = [w_f] if name == "concatenation" else []
    affinity = nl.ops.affinity(name, theta, phi, *extra)
    row = np.asarray(affinity[0], float)
    print(f"{name:18s} {affinity.shape}, row 0 {np.round(row, 2)}, sum {row.sum():.2f}")

# %% [markdown]
# Positions can be those of a sequence, an image or a video. Some can be padding: a key
# whose mask is False is left out of the sum and of $C$.

# %%
key_mask = jnp.arange(M) < 4
masked = nl.ops.dot_product(theta, phi, g, key_mask=key_mask)
np.abs(masked - nl.ops.dot_product(theta, phi[:4], g[:4])).max()

# %% [markdown]
# ## No N×M matrix
#
# The sum can be computed exactly without storing the matrix of all pairs: the Gaussians
# stream over tiles of it, the dot product is $\theta (\phi^T g) / M$, and the
# concatenation sorts the keys. `implementation="auto"` selects the one that is expected
# to be the fastest. All of them equal the definition up to rounding.

# %%
rows = [jax.random.normal(k, (3000, 32)) for k in keys[:3]]
for name, implementation in {
    "embedded_gaussian": "streaming",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}.items():
    operation = getattr(nl.ops, name)
    extra = [jnp.ones(64)] if name == "concatenation" else []
    dense = operation(*rows, *extra, implementation="dense")
    fast = operation(*rows, *extra, implementation=implementation)
    difference = jnp.abs(dense - fast).max() / jnp.abs(dense).max()
    print(f"{name:18s} {implementation:13s} largest difference {difference:.1e}")

# %% [markdown]
# ## The layer: θ, φ, g and the subsampling of the keys
#
# `nl.layers.EmbeddedGaussian`, `Gaussian`, `DotProduct` and `Concatenation` are Flax
# Linen modules for inputs (B, N, C), (B, H, W, C) or (B, T, H, W, C). By default, 2×2
# max pooling reduces the number of keys to a quarter, as in the paper; the number of
# queries stays the same.

# %%
x = jax.random.normal(jax.random.key(1), (2, 4, 14, 14, 16))
layer = nl.layers.EmbeddedGaussian()
variables = layer.init(jax.random.key(2), x)
y, affinity = layer.apply(variables, x, return_map=True)
print(y.shape, affinity.shape, "= (B, 4·14·14 queries, 4·7·7 keys)")

# %% [markdown]
# ## The block: $z_i = W_z y_i + x_i$ (Eq. 6)
#
# The BatchNorm after $W_z$ starts with a scale of 0, so a new block is the identity.
# Inserted into a trained network, it changes nothing until it is trained.

# %%
block = nl.layers.nonlocal_block("embedded_gaussian", preset="paper")
variables = block.init(jax.random.key(2), x)
bool((block.apply(variables, x) == x).all())

# %% [markdown]
# ## An affinity map, before any training
#
# The Gaussian of the colours of an image attends to similar colours. The image is a
# photograph that comes with scikit-learn, at every 8th pixel; subtracting 0.5 roughly
# removes the mean colour. The position in the sky attends to the brightest sky, and
# the one in the shadow of the eaves to everything dark. The grey spot among the leaves
# has a short colour vector after the subtraction, so it attends to all positions about
# alike.

# %%
from sklearn.datasets import load_sample_image

photo = jnp.asarray(load_sample_image("china.jpg"))[None, ::8, ::8] / 255.0
block = nl.layers.nonlocal_block("gaussian", subsample=False)
sharper = 6 * (photo - 0.5)
variables = block.init(jax.random.key(0), sharper)
maps = nl.visualize.affinities(block, variables, sharper)
nl.visualize.heatmap(maps["NonLocalBlock"], photo, [(8, 40), (30, 20), (45, 60)])

# %% [markdown]
# Next: [02, train a block and look at its attention](02_train_and_look.ipynb).
