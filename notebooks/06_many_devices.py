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
# # Many devices: meshes, and positions that are split
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/06_many_devices.ipynb)
#
# Training runs on any mesh of devices by `jax.jit`; a clip that one device cannot hold is split over several by its frames, and each
# position still sees all. Here on four CPU devices that JAX simulates, wherever it runs; on a TPU or GPUs take the same code
# without the cell that simulates. About a minute.

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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from nonlocal_jax import training
from nonlocal_jax.data.toy_video import Scene, load_scans, make_clips
from nonlocal_jax.models.toy_video import ToyVideoNet

import nonlocal_jax as nl

assert len(jax.devices()) == 4
jax.devices()

# %% [markdown]
# ## Batches over devices
#
# A mesh has the axes `data` and `positions`. The batch is split over `data`; one compiled step has its collectives; and the result is
# that of one device but for rounding.

# %%
clips = make_clips("same_digit", jax.random.key(0), load_scans("train"), 8, Scene())
batch = {"inputs": np.asarray(clips.video), "labels": np.asarray(clips.labels)}
model = ToyVideoNet(2, nl.layers.nonlocal_block("dot_product"))
trainer = training.Trainer(training.classification(model), optax.sgd(0.1))
# On the host, as a step takes the place of its state.
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
# `shardings = training.state_sharding(mesh, state, "sharded")` splits parameters and optimiser state as well (ZeRO, FSDP).
# Many hosts: `--distributed`, see the page on many hosts.
#
# ## One clip over devices
#
# With `axis_name` a block sums over the keys of all devices: they are gathered or go around a ring, and the dot product sends but one
# d×e matrix. Frames are split; each device holds the answer of its own.

# %%
x = jax.random.normal(jax.random.key(3), (1, 8, 14, 14, 32))
mesh = jax.sharding.Mesh(np.array(jax.devices()), ("positions",))
frames = P(None, "positions")

for name in ("embedded_gaussian", "dot_product", "concatenation"):
    alone = nl.layers.nonlocal_block(name, zero_init=False)
    block_variables = alone.init(jax.random.key(4), x)
    split = nl.layers.nonlocal_block(name, zero_init=False, axis_name="positions")
    specs = {"in_specs": (P(), frames), "out_specs": frames}
    over_devices = jax.shard_map(split.apply, mesh=mesh, check_vma=False, **specs)
    z = jax.jit(over_devices)(block_variables, x)
    difference = jnp.abs(z - alone.apply(block_variables, x)).max()
    shards = (
        f"{len(z.addressable_shards)} shards of {z.addressable_shards[0].data.shape}"
    )
    print(f"{name:18s} {shards}, largest difference {difference:.1e}")
    assert difference < 1e-4

# %% [markdown]
# ## Seeing where the data is

# %%
jax.debug.visualize_array_sharding(z[0, :, :, 0, 0])

# %% [markdown]
# Whole networks take `axis_name` too, `nl.models.video_resnet(..., axis_name="positions")`: convolutions and poolings fetch the
# frames at their borders from the neighbours. `training.make_mesh(positions=4)` is the mesh on which `training` runs them.
