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
# To train it, say `train=True`, and let BatchNorm update its statistics: `mutable=["batch_stats"]`. The block's scale γ is 0, and its
# gradient is not: it learns from the first step on.


# %%
def loss(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    y, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return (y**2).mean(), updates["batch_stats"]


value_and_gradient = jax.value_and_grad(loss, has_aux=True)
(value, batch_stats), gradient = value_and_gradient(*with_block.values())
print("gradient of γ:", jnp.abs(gradient["nonlocal"]["out_norm"]["scale"]).max())
print("the mean that moved:", batch_stats["nonlocal"]["out_norm"]["mean"][:3])

# %% [markdown]
# ## Flax NNX
#
# `nnx.bridge.ToNNX` makes an NNX module of any Linen one. In training its call takes `mutable` too, and keeps the statistics.


# %%
class NnxNetwork(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 32, (3, 3), strides=2, rngs=rngs)
        block = nnx.bridge.ToNNX(nl.layers.nonlocal_block("dot_product"), rngs=rngs)
        self.nonlocal_block = block.lazy_init(jnp.zeros((1, 16, 16, 32)))
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x, train=False):
        x = nnx.relu(self.conv(x))
        mutable = ["batch_stats"] if train else False
        x = self.nonlocal_block(x, train=train, mutable=mutable)
        return self.head(x.mean(axis=(1, 2)))


nnx_model = NnxNetwork(nnx.Rngs(0))
x = nnx.relu(nnx_model.conv(images))
same = bool((nnx_model.nonlocal_block(x) == x).all())
print(nnx_model(images).shape, "and the identity:", same)


# %%
@nnx.jit
def nnx_gradient(model):
    return nnx.grad(lambda model: (model(images, train=True) ** 2).mean())(model)


gradient = nnx_gradient(nnx_model)
print(
    "gradient of γ:",
    jnp.abs(gradient["nonlocal_block"]["out_norm"]["scale"][...]).max(),
)
print("the mean that moved:", nnx_model.nonlocal_block.out_norm["mean"][...][:3])

# %% [markdown]
# What a block attends to is seen in Linen and NNX alike ([notebook 02](02_train_and_look.ipynb)):

# %%
maps = nl.visualize.affinities(nnx_model, None, images)
print({name: (one.queries, one.keys) for name, one in maps.items()})

# %% [markdown]
# ## Which block, where, how many
#
# - *Which*: all four pairwise functions do about as well in the paper (Table 2a); the dot product and the
#   concatenation are the fastest here, the embedded Gaussian is the most used.
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
