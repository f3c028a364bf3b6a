"""Measures one row of `benchmarks.first_minute` in a fresh process, on one core.

    python -m benchmarks.first_minute_worker MEASURE FOLDER     # prints JSON

Every function returns CPU seconds, or ratios of them, by name. Those whose name ends in "_peer"
measure what a row is compared with. FOLDER holds the files that `files` writes.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Measured = dict[str, float]
RES4 = (2, 4, 14, 14, 1024)  # features of I3D R50 of 2 clips of 8 frames
RES3 = (2, 4, 28, 28, 256)
CALLS = 7
ATTENTION = ((1, 2049, 64), (1, 2304, 64), (1, 4096, 64), (4, 2304, 32), (1, 4096, 16))
BATCH = 128
FORMATS = {
    "torch": "r101.pyth",
    "legacy torch": "r101_legacy.pyth",
    "safetensors": "r101.safetensors",
    "Caffe2": "r101.pkl",
    "Orbax": "r101_orbax",
}


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Returns the CPU seconds of one call, until its arrays are computed."""
    import jax

    begun = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - begun


def fastest(function: Callable[[], Any]) -> float:
    """Returns the least CPU seconds of a few calls."""
    return min(cpu_seconds(function) for _ in range(CALLS))


def start() -> None:
    """Starts JAX, which no row counts."""
    import jax

    jax.block_until_ready(jax.numpy.zeros(1) + 1)


def imports(folder: Path) -> Measured:
    """Import of the library, after jax and flax."""
    import flax.linen  # noqa: F401
    import jax  # noqa: F401

    begun = time.process_time()
    import nonlocal_jax  # noqa: F401

    return {"seconds": time.process_time() - begun}


def operations(folder: Path) -> Measured:
    """The second call without jit over the jitted call."""
    import jax
    import jax.numpy as jnp

    import nonlocal_jax as nl

    rows = functools.partial(jax.random.normal, jax.random.key(0))
    pairs = rows((2, 3136, 64)), rows((2, 784, 64)), rows((2, 784, 64))
    ratios = {}
    for instantiation, implementation in (
        ("gaussian", "streaming"),
        ("embedded_gaussian", "dense"),
        ("embedded_gaussian", "streaming"),
        ("dot_product", "reassociated"),
        ("concatenation", "dense"),
        ("concatenation", "sorted"),
    ):
        operation = functools.partial(getattr(nl.ops, instantiation), implementation=implementation)
        w_f = (jnp.ones(128),) if instantiation == "concatenation" else ()
        name = f"{instantiation.replace('_', ' ')}, {implementation}"
        ratios[name] = _over_jitted(operation, *pairs, *w_f)
    return ratios


def blocks(folder: Path) -> Measured:
    """The same for whole blocks."""
    import jax
    import jax.numpy as jnp

    import nonlocal_jax as nl
    from nonlocal_jax.layers.block import OPERATIONS

    x, ratios = jnp.ones(RES4), {}
    for instantiation in OPERATIONS:
        block = nl.layers.nonlocal_block(instantiation)
        variables = jax.jit(block.init)(jax.random.key(0), x)
        ratios[instantiation.replace("_", " ")] = _over_jitted(block.apply, variables, x)
    return ratios


def _over_jitted(function: Callable[..., Any], *arguments: Any) -> float:
    import jax

    jitted = jax.jit(function)
    for warm in (function, jitted):
        jax.block_until_ready(warm(*arguments))
    return fastest(lambda: function(*arguments)) / fastest(lambda: jitted(*arguments))


def affinities(folder: Path) -> Measured:
    """One row of every map of I3D R50, for a clip of 64×64 pixels."""
    import jax.numpy as jnp
    import numpy as np

    import nonlocal_jax as nl

    model, variables = _r50()
    clip = jnp.ones((1, 8, 64, 64, 3))

    def draw() -> None:
        for affinity in nl.visualize.affinities(model, variables, clip).values():
            np.asarray(affinity.rows((0,) * len(affinity.queries)))

    first, second = cpu_seconds(draw), cpu_seconds(draw)
    return {"first": first, "seconds": second}


def cifar(folder: Path) -> Measured:
    """From the start of the process to the end of the first step of ResNet-20."""
    import jax
    import numpy as np

    from experiments import cifar
    from nonlocal_jax import training

    class TimedRun(training.Run):
        seconds = 0.0

        def log(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = self.seconds or time.process_time()
            super().log(*args, **kwargs)

    def data(step: int) -> Iterator[Any]:
        while True:
            yield {
                "inputs": np.zeros((BATCH, 32, 32, 3), np.uint8),
                "labels": np.arange(BATCH, dtype=np.int32) % 10,
                "position": np.arange(BATCH, dtype=np.uint32),
            }

    config = cifar.Config(dataset="cifar10", nonlocal_blocks=())
    trainer = cifar.make_trainer(config, 10)
    options = dataclasses.replace(cifar.loop_options(config), steps=1)
    run = TimedRun(folder / f"run{os.getpid()}", {})
    with run:
        training.fit(trainer, options, run, training.make_mesh(), data, key=jax.random.key(0))
    return {"seconds": run.seconds}


def cifar_peer(folder: Path) -> Measured:
    """The same step in plain Flax and optax."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.plain_flax import PlainResNet20

    network = PlainResNet20()
    images, labels = jnp.zeros((BATCH, 32, 32, 3)), jnp.arange(BATCH) % 10
    optimiser = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, 0.9, nesterov=True))

    @jax.jit
    def init(key: Any) -> Any:
        variables = network.init(key, images[:1])
        return variables, optimiser.init(variables["params"])

    @jax.jit
    def step(variables: Any, state: Any) -> Any:
        def loss(params: Any) -> Any:
            logits, updated = network.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated

        gradients, updated = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = optimiser.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **updated}, state

    jax.block_until_ready(step(*init(jax.random.key(0))))
    return {"seconds": time.process_time()}


def initial_values(folder: Path) -> Measured:
    """Compilation of the initial values of I3D R50, and of its forward pass."""
    import nonlocal_jax as nl

    return _compile(nl.models.video_resnet(50, "i3d_3x1x1", 5, clip="8x8"))


def initial_values_peer(folder: Path) -> Measured:
    """The same in plain Flax."""
    from benchmarks.plain_flax import PlainI3D

    return _compile(PlainI3D())


def _compile(model: Any) -> Measured:
    import jax
    import jax.numpy as jnp

    clip, key = jax.ShapeDtypeStruct((1, 8, 224, 224, 3), jnp.float32), jax.random.key(0)
    variables = jax.eval_shape(model.init, key, clip)
    init = cpu_seconds(jax.jit(model.init).lower(key, clip).compile)
    apply = cpu_seconds(jax.jit(model.apply).lower(variables, clip).compile)
    return {"init": init, "apply": apply, "ratio": init / apply}


def concatenation(folder: Path) -> Measured:
    """Trace and compilation of a training step's forward pass and gradients of a block."""
    return _trace_and_compile("concatenation")


def concatenation_peer(folder: Path) -> Measured:
    """The same for another block."""
    return _trace_and_compile("embedded_gaussian")


def _trace_and_compile(instantiation: Any) -> Measured:
    import jax
    import jax.numpy as jnp

    import nonlocal_jax as nl

    x = jax.ShapeDtypeStruct(RES3, jnp.float32)
    block = nl.layers.nonlocal_block(instantiation)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), shapes)

    def loss(params: Any, x: Any) -> Any:
        z, updated = block.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return z.sum(), updated

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return {"seconds": cpu_seconds(lambda: gradient.lower(shapes["params"], x).compile() and None)}


def attention(folder: Path) -> Measured:
    """The embedded Gaussian and its gradients."""
    import jax

    import nonlocal_jax as nl

    found = {}
    for batch, positions, channels in ATTENTION:
        keys = jax.random.split(jax.random.key(0), 4)
        *operands, dy = (jax.random.normal(key, (batch, positions, channels)) for key in keys)
        operation = functools.partial(nl.ops.embedded_gaussian, scale=channels**-0.5)

        @jax.jit
        def differentiate(dy: Any, *operands: Any, operation: Any = operation) -> Any:
            y, pull = jax.vjp(operation, *operands)
            return y, pull(dy)

        run = functools.partial(differentiate, dy, *operands)
        run()
        found[f"{batch}×{positions}, d = {channels}"] = fastest(run)
    return found


def attention_peer(folder: Path) -> Measured:
    """scaled_dot_product_attention and its gradients."""
    import torch

    torch.set_num_threads(1)
    found = {}
    for batch, positions, channels in ATTENTION:
        operands = [torch.randn(batch, 1, positions, channels, requires_grad=True) for _ in "tpg"]
        dy = torch.randn(batch, 1, positions, channels)

        def run(operands: Any = operands, dy: Any = dy) -> float:
            begun = time.process_time()
            y = torch.nn.functional.scaled_dot_product_attention(*operands)
            torch.autograd.grad(y, operands, dy)
            return time.process_time() - begun

        run()
        found[f"{batch}×{positions}, d = {channels}"] = min(run() for _ in range(CALLS))
    return found


def load(folder: Path, file: str) -> Measured:
    """A file of I3D R101 into the network."""
    import nonlocal_jax as nl
    from benchmarks.worker import CLEAR_REFS, status

    preset: Any = "caffe2" if file.endswith(".pkl") else "slowfast"
    model = nl.models.video_resnet(101, "i3d_3x1x1", 5, clip="8x8", preset=preset)
    path = folder / file
    size = sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())
    measured = {}
    if CLEAR_REFS.exists():
        CLEAR_REFS.write_text("5")  # resets the high-water mark
        before = status("VmRSS")
    measured["seconds"] = cpu_seconds(lambda: nl.weights.load(path, model))
    if CLEAR_REFS.exists():
        measured["peak over file"] = (status("VmHWM") - before) / size
    return measured


def load_peer(folder: Path) -> Measured:
    """The file of torch.save by torch.load."""
    import torch

    path = folder / FORMATS["torch"]
    begun = time.process_time()
    torch.load(path, weights_only=True)
    return {"seconds": time.process_time() - begun}


def save(folder: Path) -> Measured:
    """The first checkpoint of a process, with the variables of I3D R50."""
    from nonlocal_jax.training.checkpoints import Checkpoints

    _, variables = _r50()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of an earlier round

    def write() -> None:
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            checkpoints.save(1, variables, {})
            checkpoints.wait()

    return {"seconds": cpu_seconds(write)}


def restore(folder: Path) -> Measured:
    """The checkpoint of `save`, in another process."""
    from nonlocal_jax.training.checkpoints import Checkpoints

    _, variables = _r50()

    def read() -> Any:
        with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
            restored = checkpoints.restore(variables)
            assert restored is not None
            return restored.state

    return {"seconds": cpu_seconds(read)}


def save_peer(folder: Path) -> Measured:
    """The same variables by Orbax alone, which keeps no digests."""
    import orbax.checkpoint

    _, variables = _r50()

    def write() -> None:
        checkpointer = orbax.checkpoint.StandardCheckpointer()
        checkpointer.save(folder / "bare_orbax", variables, force=True)
        checkpointer.wait_until_finished()

    return {"seconds": cpu_seconds(write)}


def restore_peer(folder: Path) -> Measured:
    """The variables that `save_peer` wrote."""
    import jax
    import orbax.checkpoint

    _, variables = _r50()
    shapes = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, variables)
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    return {"seconds": cpu_seconds(lambda: checkpointer.restore(folder / "bare_orbax", shapes))}


def _r50() -> tuple[Any, Any]:
    """Returns I3D R50 and its variables."""
    import jax
    import numpy as np

    import nonlocal_jax as nl

    model = nl.models.video_resnet(50, "i3d_3x1x1", 5, clip="8x8")
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
    variables = jax.tree.map(
        lambda leaf: jax.device_put(np.full(leaf.shape, 0.01, leaf.dtype)), shapes
    )
    return model, variables


def files(folder: Path) -> Measured:
    """Writes I3D R101 with random weights in every format."""
    import jax
    import numpy as np
    import orbax.checkpoint
    import torch

    import nonlocal_jax as nl

    def variables(preset: Any) -> Any:
        model = nl.models.video_resnet(101, "i3d_3x1x1", 5, clip="8x8", preset=preset)
        shapes = jax.eval_shape(model.init, jax.random.key(0), model.example)
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), shapes)

    arrays = nl.weights.export(variables("slowfast"), "slowfast")
    state = {
        "model_state": {
            name: torch.tensor(np.ascontiguousarray(array)) for name, array in arrays.items()
        }
    }
    torch.save(state, folder / FORMATS["torch"])
    torch.save(state, folder / FORMATS["legacy torch"], _use_new_zipfile_serialization=False)
    nl.weights.save(folder / FORMATS["safetensors"], variables("slowfast"))
    blobs = nl.weights.export(variables("caffe2"), "caffe2")
    blobs = {name: np.ascontiguousarray(array) for name, array in blobs.items()}
    blobs |= {f"{name}_momentum": np.zeros_like(array) for name, array in blobs.items()}
    (folder / FORMATS["Caffe2"]).write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    checkpointer = orbax.checkpoint.StandardCheckpointer()
    checkpointer.save(folder / FORMATS["Orbax"], variables("slowfast"))
    checkpointer.wait_until_finished()
    return {}


MEASURES: dict[str, Callable[[Path], Measured]] = {
    "imports": imports,
    "operations": operations,
    "blocks": blocks,
    "affinities": affinities,
    "cifar": cifar,
    "cifar_peer": cifar_peer,
    "initial_values": initial_values,
    "initial_values_peer": initial_values_peer,
    "concatenation": concatenation,
    "concatenation_peer": concatenation_peer,
    "attention": attention,
    "attention_peer": attention_peer,
    "load_peer": load_peer,
    "save": save,
    "save_peer": save_peer,
    "restore": restore,
    "restore_peer": restore_peer,
    "files": files,
    **{f"load {name}": functools.partial(load, file=file) for name, file in FORMATS.items()},
}
# Measures that count what JAX and the imports cost.
FROM_THE_START = ("imports", "cifar", "cifar_peer", "attention_peer", "load_peer")


def main(measure: str, folder: str) -> None:
    """Runs one measure and prints its results."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if measure not in FROM_THE_START:
        start()
    print(json.dumps(MEASURES[measure](Path(folder))))


if __name__ == "__main__":
    main(*sys.argv[1:])
