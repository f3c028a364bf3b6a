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
# is the identity. The notebook takes about a minute on a CPU.

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
import functools
import hashlib
import http.client
import tempfile
import urllib.request
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
import sklearn.datasets
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
# Here is a ResNet-18 in the layout of torchvision and timm, with a place for a block
# right before the last residual block of the third stage (res4 in the paper).


# %%
class ResidualBlock(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        conv = functools.partial(nn.Conv, self.features, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm, momentum=0.9, use_running_average=not train
        )
        y = conv((3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = norm(name="bn2")(conv((3, 3), padding=1, name="conv2")(y))
        if y.shape != x.shape:
            x = conv((1, 1), self.stride, name="downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    widths: tuple[int, ...]
    num_classes: int
    nonlocal_block: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        conv = nn.Conv(
            self.widths[0], (7, 7), 2, padding=3, use_bias=False, name="conv1"
        )
        norm = nn.BatchNorm(momentum=0.9, use_running_average=not train, name="bn1")
        x = nn.max_pool(nn.relu(norm(conv(x))), (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, features in enumerate(self.widths, start=1):
            stride = 1 if stage == 1 else 2
            x = ResidualBlock(features, stride, name=f"layer{stage}_0")(x, train)
            if stage == 3 and self.nonlocal_block:
                block = nl.layers.nonlocal_block("embedded_gaussian", name="nonlocal")
                x = block(x, train=train)
            x = ResidualBlock(features, 1, name=f"layer{stage}_1")(x, train)
        return nn.Dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


# %% [markdown]
# Its variables have the names of the PyTorch file, except for dots and the last part,
# so a few lines load one.

# %%
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
LEAVES |= {"mean": "running_mean", "var": "running_var"}


def name_in_file(path):
    _, *modules, leaf = (key.key for key in path)  # without the collection
    return ".".join([*modules, LEAVES[leaf]]).replace("_0", ".0").replace("_1", ".1")


def to_torch(array):  # (H, W, in, out) -> (out, in, H, W), and (in, out) -> (out, in)
    return array.transpose((3, 2, 0, 1)) if array.ndim == 4 else array.T


def from_torch(array):
    return array.transpose((2, 3, 1, 0)) if array.ndim == 4 else array.T


def load_resnet18(file):
    """Returns the network of a torchvision or timm file, and its variables."""
    arrays = nl.weights.read(file).arrays
    widths = tuple(len(arrays[f"layer{i}.0.conv1.weight"]) for i in (1, 2, 3, 4))
    network = ResNet18(widths, len(arrays["fc.bias"]))
    example = jnp.zeros((1, 64, 64, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), example)
    return network, jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(from_torch(arrays[name_in_file(path)])), shapes
    )


# %% [markdown]
# The file is torchvision's ResNet-18, trained on ImageNet (47 MB). If it cannot be
# downloaded, or is not the expected one, the notebook trains a narrow network on the
# scanned digits of scikit-learn instead, in a few seconds, and writes a file of the
# same layout.

# %%
ADDRESS = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
SIZE = 46_830_571  # bytes
SHA256 = "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec"


def download(file):
    """Returns whether the file was downloaded; without a connection it is not."""
    try:
        with urllib.request.urlopen(ADDRESS, timeout=20) as response:
            content = response.read(SIZE + 1)
    except (OSError, http.client.HTTPException) as error:
        print(f"no download: {error!r}")
        return False
    if hashlib.sha256(content).hexdigest() != SHA256:
        print(f"no download: {len(content):,} bytes of another file")
        return False
    file.write_bytes(content)
    return True


# %%
def read_digits():
    """Returns scans (1797, 64, 64, 3), from 0 to 1, and the digits they show."""
    digits = sklearn.datasets.load_digits()
    large = (digits.images / 16).repeat(8, axis=1).repeat(8, axis=2)
    return np.repeat(large[..., None], 3, axis=-1).astype(np.float32), digits.target


def train_on_digits(file, steps=60):
    network = ResNet18((8, 16, 32, 64), num_classes=10)
    images, labels = read_digits()
    variables = network.init(jax.random.key(0), images[:1])
    optimiser = optax.adam(3e-3)

    @jax.jit
    def step(variables, state, images, labels):
        def loss(params):
            logits, updates = network.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates

        params = variables["params"]
        gradient, updates = jax.grad(loss, has_aux=True)(params)
        changes, state = optimiser.update(gradient, state)
        return {"params": optax.apply_updates(params, changes), **updates}, state

    state = optimiser.init(variables["params"])
    for seed in range(steps):
        batch = np.random.default_rng(seed).choice(1500, 64)
        variables, state = step(variables, state, images[batch], labels[batch])
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    arrays = {name_in_file(path): to_torch(np.asarray(leaf)) for path, leaf in leaves}
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, file
    )


folder = Path(tempfile.mkdtemp())
file = folder / "resnet18.pth"
if download(file):
    photos = np.stack(sklearn.datasets.load_sample_images().images)[:, :224, :224]
    pictures = (photos / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    pictures = pictures.astype(np.float32)
else:
    file = folder / "resnet18.safetensors"
    train_on_digits(file)
    pictures, labels = (part[1500:] for part in read_digits())

trunk, trained = load_resnet18(file)
trunk_logits = trunk.apply(trained, pictures)
print(f"{file.stat().st_size:,} bytes, widths {trunk.widths}")
print("classes:", trunk_logits.argmax(axis=-1)[:20])
if len(pictures) > 2:
    print(
        "accuracy on held-out digits:", (trunk_logits.argmax(axis=-1) == labels).mean()
    )

# %% [markdown]
# `insert` puts the trained variables into those of the network with the block, in all
# collections. The answer does not change: on a CPU, it is the same bit for bit. On a
# GPU, convolutions round to TF32 and their algorithms are chosen by measuring, so two
# programs may round differently, and the comparison allows a hundredth of the largest
# logit. Variables that have no place in the new network, or do not fit, are an error.

# %%
network = trunk.clone(nonlocal_block=True)
fresh = network.init(jax.random.key(3), pictures[:1])
variables = nl.layers.insert(trained, fresh)
logits = network.apply(variables, pictures)
print("largest change of the logits:", float(jnp.abs(logits - trunk_logits).max()))
is_exact = jax.default_backend() == "cpu"
tolerance = 0.0 if is_exact else 0.01 * float(jnp.abs(trunk_logits).max())
np.testing.assert_allclose(logits, trunk_logits, rtol=0, atol=tolerance)
print(*nl.describe(network, variables, pictures[:1], expected=1), sep="\n")

# %% [markdown]
# The running statistics of every BatchNorm are among the trained variables. With those
# of the new network, the answers are wrong:

# %%
mixed = {"params": variables["params"], "batch_stats": fresh["batch_stats"]}
mixed_logits = network.apply(mixed, pictures)
print("with fresh statistics:", float(jnp.abs(mixed_logits - trunk_logits).max()))

# %% [markdown]
# In training, pass `train=True` and `mutable=["batch_stats"]`, so that BatchNorm
# updates its statistics. The scale γ of the block's BatchNorm is 0, but its gradient is
# not, so the block learns from the first step.


# %%
def loss(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    y, updates = network.apply(
        variables, pictures[:32], train=True, mutable=["batch_stats"]
    )
    return (y**2).mean(), updates["batch_stats"]


value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
(value, batch_stats), gradient = value_and_gradient(
    variables["params"], variables["batch_stats"]
)
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
# `insert` works on NNX states as well:
# `nnx.update(network, nl.layers.insert(nnx.state(trunk), nnx.state(network)))`.
# `describe` and affinity maps ([notebook 02](02_train_and_look.ipynb)) take NNX models,
# with None in place of the variables:

# %%
print(*nl.describe(nnx_model, None, images, expected=1), sep="\n")
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
