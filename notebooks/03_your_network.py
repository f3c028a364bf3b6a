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
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/03_your_network.ipynb)
#
# The output of a non-local block has the shape of its input, so a block can be placed
# between any two layers. It can be added before or after training, because a new block
# is the identity. The notebook takes less than a minute on a CPU.

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
# `describe` lists every block and raises an error if their number is not the expected
# one. Because a new block is the identity, a missing block would not show in the
# output. The parameters of the block are in `params`, as those of any layer; the
# statistics of its BatchNorm are in `batch_stats`.
#
# ## Adding a block to a trained network
#
# Combine the trained variables with those of the new block. The output of the network
# does not change.

# %%
trunk = Network(nonlocal_block=False)
trained = trunk.init(jax.random.key(2), images)  # stands for a trained network
fresh = model.init(jax.random.key(3), images)
extended = {
    "params": {**trained["params"], "nonlocal": fresh["params"]["nonlocal"]},
    "batch_stats": fresh["batch_stats"],
}
trunk_logits = trunk.apply(trained, images)
logits = model.apply(extended, images)
print("largest change of the logits:", float(jnp.abs(logits - trunk_logits).max()))
assert (logits == trunk_logits).all()

# %% [markdown]
# In training, pass `train=True` and `mutable=["batch_stats"]`, so that BatchNorm
# updates its statistics. The scale γ of this BatchNorm is 0, but its gradient is not,
# so the block learns from the first step.


# %%
def loss(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    y, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return (y**2).mean(), updates["batch_stats"]


value_and_gradient = jax.value_and_grad(loss, has_aux=True)
(value, batch_stats), gradient = value_and_gradient(*extended.values())
print("gradient of γ:", jnp.abs(gradient["nonlocal"]["out_norm"]["scale"]).max())
print("updated mean:", batch_stats["nonlocal"]["out_norm"]["mean"][:3])

# %% [markdown]
# ## Flax NNX
#
# `nnx.bridge.ToNNX` turns a Linen module into an NNX module. In training, pass
# `mutable` to its call; the module stores the updated statistics.


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
identity = bool((nnx_model.nonlocal_block(x) == x).all())
print(nnx_model(images).shape, "block is the identity:", identity)


# %%
@nnx.jit
def nnx_gradient(model):
    return nnx.grad(lambda model: (model(images, train=True) ** 2).mean())(model)


gradient = nnx_gradient(nnx_model)
print(
    "gradient of γ:",
    jnp.abs(gradient["nonlocal_block"]["out_norm"]["scale"][...]).max(),
)
print("updated mean:", nnx_model.nonlocal_block.out_norm["mean"][...][:3])

# %% [markdown]
# Affinity maps ([notebook 02](02_train_and_look.ipynb)) work for Linen and NNX:

# %%
maps = nl.visualize.affinities(nnx_model, None, images)
print({name: (m.queries, m.keys) for name, m in maps.items()})

# %% [markdown]
# ## Which block, where, and how many
#
# - *Which*: all four pairwise functions perform similarly in the paper (Table 2a). The
#   dot product and the concatenation are the fastest in this library; the embedded
#   Gaussian is the most common.
# - *Where*: res3 or res4, where maps are neither too large nor too coarse (Table 2b).
#   By default, the paper inserts one block right before the last residual block of
#   res4.
# - *How many*: 5 or 10 blocks improve the accuracy more than 1 (Table 2c).
# - *Presets* follow the published implementations where these differ: scale of the
#   softmax, order of pooling, biases, initialisation.
#
# The paper's video networks take all of this as arguments:

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
