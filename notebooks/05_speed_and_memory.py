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
# # Speed and memory: what `auto` selects, and why
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/05_speed_and_memory.ipynb)
#
# Eq. 1 over N positions has N² pairs. For 4×56×56 positions their matrix takes 630 MB
# in float32, for one clip and one block, and training stores it. The fast
# implementations of the library compute the same result without it. The notebook takes
# less than a minute on a CPU.

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
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import nonlocal_jax as nl

# %% [markdown]
# ## The implementations
#
# `nl.ops.explain` reports what would run for arrays of given shapes, and why, without
# computing anything.


# %%
def rows(n, d=256):
    return jax.ShapeDtypeStruct((1, n, d), jnp.float32)


for name in ("embedded_gaussian", "dot_product", "concatenation"):
    print(name, nl.ops.explain(name, rows(12544), rows(3136), rows(3136)), sep="\n")

# %% [markdown]
# - **streaming** processes the keys in tiles and keeps a running sum and maximum of
#   each row; its gradient recomputes the tiles.
# - **cudnn** is NVIDIA's fused kernel for half precision.
# - **flash** is a fused kernel for TPUs, which `auto` never takes.
# - **reassociated** is $\theta (\phi^T g) / M$: a $d \times e$ matrix instead of an
#   $N \times M$ matrix.
# - **sorted** sorts the keys of the concatenation by $b_j = w_\phi \cdot \phi_j$. The
#   ReLU of $a_i + b_j$ keeps the keys with $b_j > -a_i$, whose sums are prefix sums.
#
# For small N and M the dense implementation is the fastest, so `auto` selects it:

# %%
for n in (49, 196, 784, 3136, 12544):
    names = [
        nl.ops.explain(name, rows(n), rows(n), rows(n)).implementation
        for name in ("embedded_gaussian", "dot_product", "concatenation")
    ]
    print(f"N = {n:6,}: {', '.join(names)}")

# %% [markdown]
# ## Measurements on this machine
#
# Medians of interleaved runs of the operation alone. (In a clone of the repository,
# `make bench` also measures gradients, and compares with torch and mmcv.)

# %%
CASES = {
    "embedded_gaussian": "streaming",
    "dot_product": "reassociated",
    "concatenation": "sorted",
}
SIZES = (512, 1024, 2048, 4096)


def measure(n, d=64, rounds=5):
    theta, phi, g = (jax.random.normal(jax.random.key(i), (n, d)) for i in range(3))
    runs = {}
    for name, fast in CASES.items():
        extra = [jnp.ones(2 * d)] if name == "concatenation" else []
        for implementation in ("dense", fast):
            operation = getattr(nl.ops, name)
            call = jax.jit(functools.partial(operation, implementation=implementation))
            call(theta, phi, g, *extra).block_until_ready()
            runs[name, implementation] = (call, (theta, phi, g, *extra))
    times = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (call, arguments) in runs.items():
            begun = time.perf_counter()
            call(*arguments).block_until_ready()
            times[key].append(time.perf_counter() - begun)
    return {key: 1e3 * float(np.median(value)) for key, value in times.items()}


measured = {n: measure(n) for n in SIZES}
figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True, layout="constrained")
for ax, (name, fast) in zip(axes, CASES.items()):
    for implementation, style in (("dense", "o--"), (fast, "o-")):
        times = [measured[n][name, implementation] for n in SIZES]
        ax.loglog(SIZES, times, style, label=implementation)
    ax.set(title=name.replace("_", " "), xlabel="positions, N = M")
    ax.set(xticks=SIZES, xticklabels=SIZES)
    ax.minorticks_off()
    ax.legend(frameon=False)
_ = axes[0].set_ylabel("ms")

# %% [markdown]
# ## Memory
#
# `nl.plan` reports the memory that each block of a network needs. For comparison, the
# memory analysis of XLA for the compiled block:

# %%
block = nl.layers.nonlocal_block("embedded_gaussian")
x = jax.ShapeDtypeStruct((1, 4, 56, 56, 64), jnp.float32)
print(nl.plan(x.shape, block)[0])

variables = jax.eval_shape(block.init, jax.random.key(0), x)
compiled = jax.jit(block.apply).lower(variables, x).compile()
print(f"XLA: {compiled.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB forward")

# %% [markdown]
# ## The whole network, layer by layer
#
# `nl.models.cost` counts parameters and multiply-adds without running the network.

# %%
model = nl.models.video_resnet(50, "i3d_3x1x1", nonlocal_blocks=5, preset="slowfast")
cost = nl.models.cost(model, (1, 8, 224, 224, 3))
for line in str(cost).splitlines():
    if "nonlocal_res4_5" in line or "parameters," in line:
        print(line)

# %% [markdown]
# Ways to save memory: `remat=True` recomputes residual blocks in the backward pass;
# `dtype=jnp.bfloat16` halves the activations (sums and logits stay in float32);
# `subsample=(1, 4, 4)` leaves fewer keys; `axes="space"` and `group_size` restrict the
# sums to fewer positions.
#
# Next: [06, many devices](06_many_devices.ipynb).
