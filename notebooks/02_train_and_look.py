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
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/02_train_and_look.ipynb)
#
# Two handwritten digits appear for two frames each, one after the other and far apart.
# Do they have the same class? A network that processes each frame by itself and
# averages at the end cannot tell. With one non-local block it can, because each
# position of one digit can attend to the other digit. We train such a network on
# scanned digits (they come with scikit-learn) and look at its attention. The notebook
# takes about a minute on a CPU; more steps give a better network.

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

import flax.linen as nn
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from nonlocal_jax import training
from nonlocal_jax.data.toy_video import Scene, load_scans, make_clips

import nonlocal_jax as nl

# 8 frames of 24×24 pixels; the digits are at least 10 pixels apart.
scene = Scene(size=24, distance=10)
scans = {split: load_scans(split) for split in ("train", "test")}  # disjoint

# %% [markdown]
# ## The clips
#
# Clips are generated on the device from a random key; equal keys give equal clips. The
# thin strokes are distractors.

# %%
test = make_clips("same_digit", jax.random.key(2018), scans["test"], 256, scene)
figure, axes = plt.subplots(2, 8, figsize=(12, 3.4), layout="constrained")
for row, clip, label in zip(axes, test.video, test.labels):
    row[0].set_ylabel(["different", "same"][int(label)])
    for ax, frame in zip(row, clip):
        ax.imshow(frame[..., 0], cmap="gray_r", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])

# %% [markdown]
# ## The network
#
# Four convolutions process one frame at a time. The block is the only layer that
# combines frames, apart from the average at the end. In the network with a block, the
# convolutions are frozen.


# %%
class Network(nn.Module):
    num_classes: int
    block: nn.Module | None = None

    @nn.compact
    def __call__(self, clip, train=False):
        frozen = self.block is not None
        x = clip.reshape(-1, *clip.shape[2:])  # frames become images
        for i, (features, stride) in enumerate(((16, 1), (32, 2), (64, 2), (64, 1))):
            x = nn.Conv(features, (3, 3), stride, use_bias=False, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(frozen or not train, name=f"norm{i}")(x))
        x = x.reshape(*clip.shape[:2], *x.shape[1:])
        if self.block is not None:
            x = self.block(jax.lax.stop_gradient(x), train=train)
        x = nn.relu(nn.Dense(64, name="hidden")(x))
        return nn.Dense(self.num_classes, name="head")(x.mean(axis=(1, 2, 3)))


block = nl.layers.nonlocal_block("dot_product", subsample=False)
model = Network(num_classes=2, block=block)

# %% [markdown]
# ## Training
#
# `training.Trainer` describes a training step: the loss, the optimiser and how
# BatchNorm takes its statistics. The convolutions are first trained on single digits.
# Then the block is inserted, as the identity, and trained on clips together with the
# layers after it. (In a clone of the repository, `python -m experiments.toy_video`
# trains larger networks with all pairwise functions, logs and checkpoints.)


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
            if start is not None:  # all trained variables but those of the head
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


trunk = train(Network(num_classes=10), "single_digit", 160, 64, 4e-3)
variables = train(model, "same_digit", 160, 32, 3e-3, start=trunk)

# %%
answers = jax.jit(model.apply)(variables, test.video).argmax(-1)
accuracy = (answers == test.labels).mean()
print(f"accuracy on test clips: {accuracy:.0%} (chance is 50%)")
print(nl.describe(model, variables, test.video[:1], expected=1)[0])
assert accuracy > 0.6

# %% [markdown]
# ## What does the block attend to?
#
# `nl.visualize.affinities` returns the affinity map of every block; its rows are
# computed on request. `arrows` draws the 20 largest weights of one position, as in
# Figure 3 of the paper. The query is the centre of the first digit.

# %%
maps = nl.visualize.affinities(model, variables, test.video[:64])
paper = 1 - test.video[:64].clip(0, 1)  # dark ink on white


def first_digit(clip):
    return nl.visualize.from_pixels(maps["block"], test.places[clip, 0])


nl.visualize.arrows(maps["block"], paper, first_digit(0))

# %%
nl.visualize.heatmap(maps["block"], paper, [first_digit(0), (4, 0, 0)])

# %% [markdown]
# Do the arrows end on the other digit more often than chance? `to_pixels` returns the
# pixels that each key depends on, so the arrows can be counted:

# %%
block_map = maps["block"]
keys = np.moveaxis(np.indices(block_map.keys), 0, -1).reshape(-1, 3)
centres = nl.visualize.to_pixels(block_map, keys, of="keys").centre
ratios = []
for clip in range(64):
    frame, row, column = np.asarray(test.places[clip, 1])
    hit = (np.abs(centres[:, 1:] + 0.5 - (row, column)) <= 4).all(-1)
    hit &= (frame <= centres[:, 0]) & (centres[:, 0] < frame + 2)
    _, top = block_map[clip].top(20, first_digit(clip))
    ends = np.ravel_multi_index(tuple(top[0, 0].T), block_map.keys)
    ratios.append(hit[ends].mean() / hit.mean())

same = np.asarray(test.labels[:64]) == 1
ratios = np.array(ratios)
for name, clips in {"different": ~same, "same": same}.items():
    ratio = ratios[clips].mean()
    print(f"{name} digits: {ratio:.1f} times as many arrows as by chance")
    assert ratio > 5

# %% [markdown]
# ## Attention between frames, and between queries
#
# How much does each frame attend to each other frame? And does the attention depend on
# the query? GCNet found networks in which all queries attend to the same keys.

# %%
nl.visualize.time_by_time(maps["block"])

# %%
nl.visualize.query_dependence(maps)

# %% [markdown]
# ## Every position, interactively
#
# `explore` writes a single HTML file that works offline, by mouse, touch and keyboard.

# %%
query = first_digit(0)
nl.visualize.explore(maps, paper, "explore.html", query=query, title="Same class?")

# %% [markdown]
# Next: [03, a block in your own network](03_your_network.ipynb).
