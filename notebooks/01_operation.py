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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/01_operation.ipynb)
#
# The non-local operation computes each position's response as a weighted sum over all positions,
#
# $$ y_i = \frac{1}{C(x)} \sum_j f(x_i, x_j)\, g(x_j) \qquad (1) $$
#
# Here it is as the paper writes it, then as the library runs it, then as the residual block that goes into a network.
# About a minute on a CPU.

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
# ## Eq. 1, by a double loop
#
# Of every pair of positions $f$ says how much $j$ means to $i$; $C$ normalises. With $f = e^{\theta_i \cdot \phi_j}$ and
# $C = \sum_j f$ this is the *embedded Gaussian*, a softmax over $j$. Positions that ask are queries, those that are summed keys;
# where keys are subsampled there are fewer of them, and the paper's $N$, which the sum is divided by below, is their number $M$.

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
# | concatenation (Eq. 5) | $\mathrm{ReLU}(w_f \cdot [\theta_i, \phi_j])$ | $M$ | at least 0, of any size |
#
# `nl.ops.affinity` gives $f / C$; `nl.ops.definition` states all of this in a screen of code.

# %%
w_f = jax.random.normal(keys[3], (2 * d,))
for name in ("gaussian", "embedded_gaussian", "dot_product", "concatenation"):
    more = [w_f] if name == "concatenation" else []
    affinity = nl.ops.affinity(name, theta, phi, *more)
    row = affinity[0]
    print(f"{name:18s} {affinity.shape}, row 0 {np.round(row, 2)}, sum {row.sum():.2f}")

# %% [markdown]
# Nothing about it is particular to images: positions may be those of a sequence, an image or a video. Some may be padding: a key
# whose mask is False is neither summed nor counted.

# %%
key_mask = jnp.arange(M) < 4
masked = nl.ops.dot_product(theta, phi, g, key_mask=key_mask)
np.abs(masked - nl.ops.dot_product(theta, phi[:4], g[:4])).max()

# %% [markdown]
# ## Never N×M
#
# The sum can be had without the matrix of all pairs, and exactly: the Gaussians go over it in tiles, the dot product is
# $\theta (\phi^T g) / M$, and the concatenation needs but a sort. `implementation="auto"` takes the one that is forecast to be
# the fastest; whatever runs, it equals the definition.

# %%
rows = [jax.random.normal(k, (3000, 32)) for k in keys[:3]]
for name, implementation in {
    "embedded_gaussian": "streaming",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}.items():
    operation = getattr(nl.ops, name)
    more = [jnp.ones(64)] if name == "concatenation" else []
    dense = operation(*rows, *more, implementation="dense")
    fast = operation(*rows, *more, implementation=implementation)
    difference = jnp.abs(dense - fast).max() / jnp.abs(dense).max()
    print(f"{name:18s} {implementation:13s} largest difference {difference:.1e}")

# %% [markdown]
# ## The layer: it owns θ, φ and g, and subsamples the keys
#
# `nl.layers.EmbeddedGaussian` and its three siblings are Flax Linen modules over (B, N, C), (B, H, W, C) or (B, T, H, W, C).
# Max pooling of 2×2 leaves a fourth of the keys (the paper's subsampling), never fewer queries.

# %%
x = jax.random.normal(jax.random.key(1), (2, 4, 14, 14, 16))
layer = nl.layers.EmbeddedGaussian()
variables = layer.init(jax.random.key(2), x)
y, affinity = layer.apply(variables, x, return_map=True)
print(y.shape, affinity.shape, "= (B, 4·14·14 queries, 4·7·7 keys)")

# %% [markdown]
# ## The block: $z_i = W_z y_i + x_i$ (Eq. 6)
#
# BatchNorm after $W_z$ starts with a scale of 0, so a new block is the identity: put into a trained network, it changes nothing
# until it is trained.

# %%
block = nl.layers.nonlocal_block("embedded_gaussian", preset="paper")
variables = block.init(jax.random.key(2), x)
bool((block.apply(variables, x) == x).all())

# %% [markdown]
# ## What a map looks like, before any training
#
# The Gaussian of an image's own colours looks along its vector: from bright sky to bright sky, from the shade under the eaves to all
# that is dark, and from a grey spot among the leaves, whose vector is short once the mean is taken away, at everything alike. A photograph that comes with scikit-learn, every 8th
# pixel; from three positions:

# %%
from sklearn.datasets import load_sample_image

photo = jnp.asarray(load_sample_image("china.jpg"))[None, ::8, ::8] / 255.0
by_colour = nl.layers.nonlocal_block("gaussian", subsample=False)
sharper = 6 * (photo - 0.5)
variables = by_colour.init(jax.random.key(0), sharper)
maps = nl.visualize.affinities(by_colour, variables, sharper)
nl.visualize.heatmap(maps["NonLocalBlock"], photo, [(8, 40), (30, 20), (45, 60)])

# %% [markdown]
# Next: [02, train a block and look at it](02_train_and_look.ipynb).
