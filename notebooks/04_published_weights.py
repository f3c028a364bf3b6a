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
# # Published weights: load, verify, predict, see
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/nonlocal-jax/nonlocal_jax/blob/main/notebooks/04_published_weights.ipynb)
#
# The library reads the files of video-nonlocal-net, PySlowFast, mmaction2, pytorchvideo, Non-local_pytorch, torchvision and timm, by a
# reader that runs nothing of what is in them; torch is not wanted. On Colab this notebook downloads PySlowFast's I3D NLN 8×8 R50
# (142 MB; PySlowFast reports 74.0% on Kinetics-400 with 30 views); elsewhere it writes a small file of random weights under the same
# names, so that all of it runs offline. About a minute.

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
    stages = (1, 1, 2, 1)  # residual blocks of each; a non-local one in res4
    model = nl.models.video_resnet(
        stages,
        "i3d_3x1x1",
        {"res4": (0,)},
        clip="8x8",
        preset="slowfast",
        width_per_group=16,
    )
    random = jax.jit(model.init)(jax.random.key(0), jnp.zeros(model.example.shape))
    nl.weights.save(file, random, names="caffe2")
print(f"{file.name}: {file.stat().st_size / 1e6:.0f} MB")

# %% [markdown]
# ## Load
#
# The names in this file are Caffe2's; PySlowFast runs the weights in a network of its own conventions, which `preset="slowfast"` has.
# Every entry of the file must find its place and every leaf of the network its entry; what does not is an error that says so, never
# silence.

# %%
report = nl.weights.load_report(file, model)
print("\n".join(str(report).splitlines()[:8]))
variables = nl.weights.load(file, model)

# %% [markdown]
# On the command line: `python -m nonlocal_jax.weights inspect FILE` says what a file holds, and the call that makes its network.
#
# ## Verify
#
# The weights against the file, the fast layers against their definitions, stage by stage:

# %%
check = nl.weights.verify(file, model)
print("\n".join(str(check).splitlines()[-8:]))
assert check.ok

# %% [markdown]
# ## Predict
#
# A clip is 8 frames, 8 apart, normalised as the source does, with the shorter side at 256 (96 where the weights are random, to be quick).
# Here the library makes a short H.264 file to read; put the name of your own video in its place.

# %%
from nonlocal_jax.data import stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import TestingClips, normalise
from nonlocal_jax.data.sampling import InTime

numbers = {"train": 2, "val": 1, "test": 1}
lists = stand_in.make(folder / "videos", "kinetics", numbers=numbers)
video = lists["train"].with_name("train0000.mp4")
size = 256 if DOWNLOAD else 96
one = Annotations((Record(video, (0,)),), 1)
clip = list(TestingClips(one, InTime(8, 8), 1, "centre", size).read(0))[-1]
logits = jax.jit(model.apply)(variables, normalise(jnp.asarray(clip)[None]))
score = float(jax.nn.softmax(logits).max())
print(f"{video.name}: {clip.shape}, class {int(logits.argmax())} with {score:.2f}")

# %% [markdown]
# In a clone of the repository, `python -m experiments.predict VIDEO --weights FILE --page looked.html` does this with 30 views, as the
# released code, and draws where it looked.
#
# ## See
#
# The maps of every block, over the frames of the video itself. Positions of res4 are 16 pixels apart, and `to_pixels` knows what
# they see:

# %%
maps = nl.visualize.affinities(model, variables, normalise(jnp.asarray(clip)[None]))
name, block = list(maps.items())[-1]
query = tuple(n // 2 for n in block.queries)
seen = nl.visualize.to_pixels(block, query)
print(f"{name}: {block.queries} queries, {block.keys} keys")
print(f"{query} sees, in frame, row and column, {seen.first} to {seen.last}")
nl.visualize.arrows(block, clip, query)

# %%
nl.visualize.explore(maps, clip, folder / "explore.html", title=video.name)

# %% [markdown]
# Next: [05, speed and memory](05_speed_and_memory.ipynb).
