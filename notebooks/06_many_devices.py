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
# # Many devices: meshes, and splitting positions
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/06_many_devices.ipynb)
#
# Training runs on any mesh of devices through `jax.jit`. A clip that does not fit on
# one device can be split over several along its frames; each position still attends to
# all others. This notebook uses four CPU devices that JAX simulates. On TPUs or GPUs,
# use the same code without the two lines that set `os.environ`. It takes less than a
# minute.

# %%
import sys

if "google.colab" in sys.modules:
    address = "git+https://github.com/nonlocal-jax/nonlocal_jax"
    get_ipython().run_line_magic(
        "pip", f"install --quiet 'nonlocal_jax[experiments] @ {address}'"
    )

# %%
import os

flags = os.environ.get("XLA_FLAGS", "")  # set before JAX starts
os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from nonlocal_jax import training

import nonlocal_jax as nl

assert len(jax.devices()) == 4
jax.devices()

# %% [markdown]
# ## Batches over devices
#
# A mesh has the axes `data` and `positions`. The batch is split over `data`, and XLA
# inserts the collectives into the compiled step. The result equals that of one device
# up to rounding.


# %%
class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(16, (1, 3, 3), strides=(1, 2, 2))(x))
        x = nl.layers.nonlocal_block("dot_product", name="block")(x, train=train)
        return nn.Dense(2)(x.mean(axis=(1, 2, 3)))


random = np.random.default_rng(0)
inputs = random.normal(size=(8, 8, 16, 16, 1)).astype(np.float32)
batch = {"inputs": inputs, "labels": random.integers(0, 2, 8)}
model = Network()
trainer = training.Trainer(training.classification(model), optax.sgd(0.1))
# Copied to the host, because a step donates the memory of its state.
variables = jax.device_get(jax.jit(model.init)(jax.random.key(1), batch["inputs"][:1]))

results = {}
for name, devices in {"one": jax.devices()[:1], "all": jax.devices()}.items():
    mesh = training.make_mesh(devices=devices)
    state = trainer.init(jax.random.key(2), batch, variables)
    shardings = training.state_sharding(mesh, state)
    step = training.sharded_step(trainer, mesh, shardings)
    state, metrics = step(jax.device_put(state, shardings), training.put(batch, mesh))
    results[name] = jax.device_get((metrics["loss"], state.params))
    print(f"{name}: {dict(mesh.shape)}, loss {results[name][0]:.6f}")

differences = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), results["one"][1], results["all"][1]
)
largest = max(jax.tree.leaves(differences))
print(f"largest difference of a parameter after a step: {largest:.1e}")
assert largest < 1e-4

# %% [markdown]
# `training.state_sharding(mesh, state, "sharded")` also splits parameters and optimiser
# state (ZeRO, FSDP). For several hosts, see `--distributed` on the page about many
# hosts.
#
# ## One clip over several devices
#
# With `axis_name`, a block sums over the keys of all devices. The keys are gathered or
# passed around a ring; the dot product only sends a d×e matrix. Frames are split, and
# each device computes the output of its own frames.

# %%
x = jax.random.normal(jax.random.key(3), (1, 8, 14, 14, 32))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("positions",))
frames = P(None, "positions")

for name in ("embedded_gaussian", "dot_product", "concatenation"):
    whole = nl.layers.nonlocal_block(name, zero_init=False)
    block_variables = whole.init(jax.random.key(4), x)
    split = nl.layers.nonlocal_block(name, zero_init=False, axis_name="positions")
    specs = {"in_specs": (P(), frames), "out_specs": frames}
    sharded = jax.shard_map(split.apply, mesh=mesh, check_vma=False, **specs)
    z = jax.jit(sharded)(block_variables, x)
    difference = jnp.abs(z - whole.apply(block_variables, x)).max()
    shards = (
        f"{len(z.addressable_shards)} shards of {z.addressable_shards[0].data.shape}"
    )
    print(f"{name:18s} {shards}, largest difference {difference:.1e}")
    assert difference < 1e-4

# %% [markdown]
# ## Where the data is

# %%
jax.debug.visualize_array_sharding(z[0, :, :, 0, 0])

# %% [markdown]
# Whole networks also accept `axis_name`, as in `nl.models.video_resnet(...,
# axis_name="positions")`: convolutions and pooling fetch the frames at their borders
# from neighbouring devices. `training.make_mesh(positions=4)` creates the mesh on which
# `training` runs them.
