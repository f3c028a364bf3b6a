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
# # A block in your own network: Linen, NNX, and a pretrained one
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/03_your_network.ipynb)
#
# A non-local block takes and gives arrays of one shape, so it goes between any two layers. Put in before training or after: it is the
# identity until it is trained. Under a minute on a CPU.

# %%
import sys

if "google.colab" in sys.modules:
    address = "git+https://github.com/nonlocal-jax/nonlocal_jax"
    get_ipython().run_line_magic(
        "pip", f"install --quiet 'nonlocal_jax[experiments] @ {address}'"
    )

# %%
# %matplotlib inline
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import nonlocal_jax as nl

images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))

# %% [markdown]
# ## Flax Linen


# %%
class Network(nn.Module):
    nonlocal_block: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, name="conv1")(x))
        x = nn.relu(nn.Conv(64, (3, 3), strides=2, name="conv2")(x))
        if self.nonlocal_block:
            block = nl.layers.nonlocal_block("embedded_gaussian", name="nonlocal")
            x = block(x, train=train)
        return nn.Dense(10, name="head")(x.mean(axis=(1, 2)))


model = Network()
variables = model.init(jax.random.key(1), images)
print(*nl.describe(model, variables, images, expected=1), sep="\n")

# %% [markdown]
# `describe` lists every block and raises when there are not as many as you expect: as a new block is the identity, one that was
# forgotten would not show. Parameters are under `params` as those of any layer; BatchNorm's statistics under `batch_stats`.
#
# ## Into a trained network, without changing its answer
#
# Take the trained variables, add those of the block.

# %%
without = Network(nonlocal_block=False)
trained = without.init(jax.random.key(2), images)  # stands for a trained network
fresh = model.init(jax.random.key(3), images)
with_block = {
    "params": {**trained["params"], "nonlocal": fresh["params"]["nonlocal"]},
    "batch_stats": fresh["batch_stats"],
}
before = without.apply(trained, images)
after = model.apply(with_block, images)
print("largest change of an answer:", float(jnp.abs(after - before).max()))
assert (after == before).all()

# %% [markdown]
# The block's scale γ is 0, and its gradient is not: it learns from the first step on.


# %%
def loss(params):
    return (model.apply({**with_block, "params": params}, images) ** 2).sum()


jnp.abs(jax.grad(loss)(with_block["params"])["nonlocal"]["out_norm"]["scale"]).max()

# %% [markdown]
# ## Flax NNX
#
# `nnx.bridge.ToNNX` makes an NNX module of any Linen one.


# %%
class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 32, (3, 3), strides=2, rngs=rngs)
        block = nnx.bridge.ToNNX(nl.layers.nonlocal_block("dot_product"), rngs=rngs)
        self.nonlocal_block = block.lazy_init(jnp.zeros((1, 16, 16, 32)))
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = self.nonlocal_block(x)
        return self.head(x.mean(axis=(1, 2)))


nnx_model = NnxNetwork(nnx.Rngs(0))
x = nnx.relu(nnx_model.conv(images))
same = bool((nnx_model.nonlocal_block(x) == x).all())
print(nnx_model(images).shape, "and the identity:", same)

# %% [markdown]
# ## Which block, where, how many
#
# - *Which*: all four pairwise functions do about as well in the paper (Table 2a); the dot product is the fastest, the embedded
#   Gaussian the most used.
# - *Where*: res3 or res4, where maps are neither too large nor too coarse (Table 2b); one block right before the last residual block
#   of res4 is the paper's default.
# - *How many*: 5 or 10 help more than 1 (Table 2c).
# - *Presets* follow the published implementations where they differ: softmax scale, pooling order, biases, initialisation.
#
# The paper's video networks have all of this by name:

# %%
network = nl.models.video_resnet(
    50, "c2d", nonlocal_blocks={"res3": (1, 3), "res4": (1, 3, 5)}, num_classes=10
)
shapes = jax.eval_shape(network.init, jax.random.key(0), network.example)
print([name for name in shapes["params"] if name.startswith("nonlocal")])
for preset in ("paper", "caffe2"):
    operation = nl.layers.nonlocal_block("embedded_gaussian", preset).operation
    print(preset, operation.use_scale, operation.pool_order, operation.use_bias)

# %% [markdown]
# Next: [04, published weights](04_published_weights.ipynb).
