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
# # Train a block, and look at what it attends to
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/02_train_and_look.ipynb)
#
# Two handwritten digits appear for two frames each, one after the other, far apart: are they of one class? An ordinary network that
# sees each frame alone and averages at the end cannot tell. One non-local block before its last residual block can, because each
# position of one digit can look at the other. We train it on real scans (they come with scikit-learn) and look.
# About two minutes on a CPU; more steps make it better.

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

import jax
import numpy as np
import optax
from nonlocal_jax import training
from nonlocal_jax.data.toy_video import Scene, load_scans, make_clips
from nonlocal_jax.models.toy_video import ToyVideoNet

import nonlocal_jax as nl

# 8 frames of 24×24 pixels, the digits at least 10 apart
scene = Scene(size=24, distance=10)
scans = {split: load_scans(split) for split in ("train", "test")}  # no scan is in both

# %% [markdown]
# ## The clips
#
# They are made on the device from a random key. The same key gives the same clips.

# %%
import matplotlib.pyplot as plt

test = make_clips("same_digit", jax.random.key(2018), scans["test"], 256, scene)
figure, axes = plt.subplots(2, 8, figsize=(12, 3.4), layout="constrained")
for row, clip, label in zip(axes, test.video, test.labels):
    row[0].set_ylabel(["different", "same"][int(label)])
    for ax, frame in zip(row, clip):
        ax.imshow(frame[..., 0], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])

# %% [markdown]
# ## Training
#
# `training.Trainer` is what a step does, for any loss: gradient, optimiser, BatchNorm's statistics. First the trunk learns
# single digits; then the block is inserted, the identity at first, and everything but the stem is trained on clips.
# (In a clone of the repository, `python -m experiments.toy_video` does the same with a log, checkpoints and every pairwise function.)


# %%
def train(model, task, steps, batch_size, learning_rate, start=None):
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 50, steps)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    trainer = training.Trainer(training.classification(model), optimiser, schedule)
    step = jax.jit(functools.partial(training.train_step, trainer), donate_argnums=0)
    state = None
    for i in range(steps):
        key = jax.random.fold_in(jax.random.key(0), i)
        clips = make_clips(task, key, scans["train"], batch_size, scene)
        batch = {"inputs": clips.video, "labels": clips.labels}
        if state is None:
            variables = jax.jit(model.init)(jax.random.key(1), clips.video[:1])
            if start is not None:  # the trained leaves, but for the head
                variables = merge(start, variables)
            state = trainer.init(jax.random.key(2), batch, variables)
        state, metrics = step(state, batch)
        if (i + 1) % 50 == 0:
            print(f"{task}: step {i + 1} of {steps}, loss {metrics['loss']:.3f}")
    return state.variables


def merge(trained, fresh):
    if not isinstance(fresh, dict):
        return trained
    return {
        name: merge(trained[name], leaf) if name in trained and name != "head" else leaf
        for name, leaf in fresh.items()
    }


block = nl.layers.nonlocal_block("dot_product", subsample=False)
model = ToyVideoNet(num_classes=2, block=block, freeze_stem=True)
trunk = train(ToyVideoNet(num_classes=10), "single_digit", 300, 128, 4e-3)
variables = train(model, "same_digit", 200, 32, 2e-3, start=trunk)

# %%
answers = jax.jit(model.apply)(variables, test.video).argmax(-1)
right = (answers == test.labels).mean()
print(f"right on {right:.0%} of the test clips; chance is 50%")
print(nl.describe(model, variables, test.video[:1], expected=1)[0])

# %% [markdown]
# ## Where does it look?
#
# One line gives the map of every block, from which rows are computed as they are asked for; one more draws the 20 largest weights of
# a position as arrows, as the paper's Figure 3. The query is the middle of the first digit.

# %%
maps = nl.visualize.affinities(model, variables, test.video[:64])
paper = 1 - test.video[:64].clip(0, 1)  # dark ink on white


def on_first_digit(clip):
    return nl.visualize.from_pixels(maps["block"], test.places[clip, 0])


nl.visualize.arrows(maps["block"], paper, on_first_digit(0))

# %%
nl.visualize.heatmap(maps["block"], paper, [on_first_digit(0), (4, 0, 0)])

# %% [markdown]
# Do the arrows land on the other digit more often than chance? `to_pixels` says which pixels each key sees, so this can be counted:

# %%
keys = np.moveaxis(np.indices(maps["block"].keys), 0, -1).reshape(-1, 3)
centres = nl.visualize.to_pixels(maps["block"], keys, of="keys").centre
ratios = []
for clip in range(64):
    frame, row, column = np.asarray(test.places[clip, 1])
    on = (np.abs(centres[:, 1:] + 0.5 - (row, column)) <= 4).all(-1)
    on &= (frame <= centres[:, 0]) & (centres[:, 0] < frame + 2)
    _, top = maps["block"][clip].top(20, on_first_digit(clip))
    landed = np.ravel_multi_index(tuple(top[0, 0].T), maps["block"].keys)
    ratios.append(on[landed].mean() / on.mean())
print(f"on average {np.mean(ratios):.1f} times as often as if they landed anywhere")
assert np.mean(ratios) > 5

# %% [markdown]
# ## How much each frame looks at each, and whether the query matters at all
#
# GCNet found that in some networks all queries look at the same. Here is how to ask.

# %%
nl.visualize.time_by_time(maps["block"])

# %%
nl.visualize.query_dependence(maps)

# %% [markdown]
# ## Every position, with the mouse
#
# `explore` writes one file that works offline, by keyboard and on a phone.

# %%
query = on_first_digit(0)
nl.visualize.explore(maps, paper, "explore.html", query=query, title="One class?")

# %% [markdown]
# Next: [03, a block in your own network](03_your_network.ipynb).
