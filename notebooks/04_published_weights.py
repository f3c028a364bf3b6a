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
# # Published weights: load, verify, predict, visualize
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/04_published_weights.ipynb)
#
# The library reads the weight files of video-nonlocal-net, PySlowFast, mmaction2,
# pytorchvideo, Non-local_pytorch, torchvision and timm. Its reader does not execute
# code from the files and does not need torch. On Colab this notebook downloads
# PySlowFast's I3D NLN 8×8 R50 (142 MB), for which PySlowFast reports 74.0% on
# Kinetics-400 with 30 views. Elsewhere it writes a small file of random weights with
# the same names, so that everything runs offline in less than a minute.

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
import pathlib
import tempfile
import urllib.request

import jax
import jax.numpy as jnp

import nonlocal_jax as nl

DOWNLOAD = "google.colab" in sys.modules
folder = pathlib.Path(tempfile.mkdtemp())

# %%
if DOWNLOAD:
    file = folder / "I3D_NLN_8x8_R50.pkl"
    address = "https://dl.fbaipublicfiles.com/pyslowfast/model_zoo/kinetics400/"
    urllib.request.urlretrieve(address + file.name, file)
    model = nl.models.video_resnet(
        50, "i3d_3x1x1", nonlocal_blocks=5, clip="8x8", preset="slowfast"
    )
else:
    file = folder / "weights.safetensors"
    stages = (1, 1, 1, 1)  # residual blocks of each stage; a non-local one in res3
    model = nl.models.video_resnet(
        stages,
        "i3d_3x1x1",
        {"res3": (0,)},
        clip="8x8",
        preset="slowfast",
        width_per_group=4,
    )
    random = jax.jit(model.init)(jax.random.key(0), jnp.zeros(model.example.shape))
    nl.weights.save(file, random, names="caffe2")
print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB")

# %% [markdown]
# ## Load
#
# This file uses the parameter names of Caffe2, but PySlowFast runs the weights with its
# own conventions, which `preset="slowfast"` selects. Each entry of the file must match
# a parameter of the network and each parameter an entry; otherwise loading raises an
# error that lists the differences.

# %%
report = nl.weights.load_report(file, model)
print("\n".join(str(report).splitlines()[:8]))
variables = nl.weights.load(file, model)

# %% [markdown]
# On the command line, `python -m nonlocal_jax.weights inspect FILE` prints the contents
# of a file and the call that creates its network.
#
# ## Verify
#
# `verify` compares the weights with the file, and the fast layers with their
# definitions, stage by stage:

# %%
check = nl.weights.verify(file, model)
print("\n".join(str(check).splitlines()[-8:]))
assert check.ok

# %% [markdown]
# ## Predict
#
# A clip has 8 frames, every 8th of the video, normalised as in the source. The shorter
# side is scaled to 256 pixels, or to 64 for the random weights, which is faster. The
# library generates a short H.264 file as input; replace it by your own video.

# %%
from nonlocal_jax.data import stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import TestingClips, normalise
from nonlocal_jax.data.sampling import InTime

numbers = {"train": 2, "test": 1}
lists = stand_in.make(folder / "videos", "kinetics", numbers=numbers)
video = lists["train"].with_name("train0000.mp4")
size = 256 if DOWNLOAD else 64
annotations = Annotations((Record(video, (0,)),), 1)
clip = list(TestingClips(annotations, InTime(8, 8), 1, "centre", size).read(0))[-1]
logits = jax.jit(model.apply)(variables, normalise(jnp.asarray(clip)[None]))
score = float(jax.nn.softmax(logits).max())
print(f"{video.name}: {clip.shape}, class {int(logits.argmax())}, score {score:.2f}")

# %% [markdown]
# In a clone of the repository, `python -m experiments.predict VIDEO --weights FILE
# --page page.html` averages 30 views, as the released code does, and writes a page with
# the attention.
#
# ## Visualize
#
# The affinity maps of the blocks are drawn over the frames of the video. Neighbouring
# positions of a map are 8 or 16 pixels apart, and `to_pixels` returns the receptive
# field of each:

# %%
maps = nl.visualize.affinities(model, variables, normalise(jnp.asarray(clip)[None]))
name, block = list(maps.items())[-1]
query = tuple(n // 2 for n in block.queries)
field = nl.visualize.to_pixels(block, query)
print(f"{name}: {block.queries} queries, {block.keys} keys")
print(f"{query} depends on (frame, row, column) {field.first} to {field.last}")
nl.visualize.arrows(block, clip, query)

# %%
nl.visualize.explore(maps, clip, folder / "explore.html", title=video.name)

# %% [markdown]
# Next: [05, speed and memory](05_speed_and_memory.ipynb).
