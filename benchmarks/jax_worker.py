"""Runs this library's operations and blocks on request, in a separate process."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nonlocal_jax as nl
from benchmarks import cases, network
from benchmarks.cases import Case, Floats, Job
from benchmarks.machine import installed_versions
from benchmarks.worker import serve

# The packages that bring CUDA to JAX.
CUDA = [
    package.format(major)
    for package in ("jax-cuda{}-plugin", "nvidia-cudnn-cu{}")
    for major in (12, 13)
]


class Jax:
    """Competitors written in JAX. Every run is one compiled function."""

    backend = jax.default_backend()

    def prepare(self, job: Job) -> Callable[[], Sequence[Any]]:
        if job.case.section == "network":
            return network.prepare(job)
        function, arguments = build(job)
        return lambda: jax.tree.leaves(function(*arguments))

    def wait(self, outputs: Sequence[Any]) -> None:
        jax.block_until_ready(outputs)

    def facts(self, job: Job) -> dict[str, Any]:
        if job.case.section == "network":
            lowered = network.lowered(job)
        else:
            function, arguments = build(job)
            lowered = function.lower(*arguments)
        start = time.perf_counter()
        analysis: Any = lowered.compile().memory_analysis()
        seconds, temporary = time.perf_counter() - start, int(analysis.temp_size_in_bytes)
        facts = {
            "xla_temporary_bytes": temporary,
            "compile_seconds": seconds,
            "implementation": chosen(job),
        }
        return facts if self.backend == "cpu" else facts | {"temporary_bytes": temporary}

    def device_peak(self, run: Callable[[], Sequence[Any]]) -> int | None:
        return None  # `facts` reports what the compiler says

    def as_numpy(self, output: Any) -> Floats:
        return np.asarray(output.astype(jnp.float32))

    def versions(self) -> dict[str, str]:
        names = installed_versions(("jax", "jaxlib", "flax", "optax", "numpy"))
        if self.backend == "cpu":
            return names
        return names | installed_versions(CUDA) | {"device": jax.devices()[0].device_kind}


def chosen(job: Job) -> str | None:
    """Returns the implementation that "auto" takes for an operation."""
    if job.case.section in ("block", "network") or job.competitor != "auto":
        return None
    theta, phi, g = (jnp.asarray(x, job.dtype) for x in cases.inputs(job.case)[:3])
    return str(nl.ops.explain(job.case.instantiation, theta, phi, g).implementation)


def build(job: Job) -> tuple[Any, tuple[Any, ...]]:
    """Returns the compiled function of a job and its arguments, on the device."""
    function, arguments = _block(job) if job.case.section == "block" else _operation(job)
    return jax.jit(function), jax.tree.map(lambda x: jnp.asarray(x, job.dtype), arguments)


def _operation(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    arguments = cases.inputs(job.case)
    if job.competitor == "copy":
        read = (
            arguments[:1] if job.direction == "forward" else [cases.cotangent(job.case), *arguments]
        )
        return lambda *arrays: [array + 1 for array in arrays], tuple(read)
    operation = functools.partial(
        getattr(nl.ops, job.case.instantiation), implementation=job.competitor
    )
    if job.direction == "forward":
        return operation, tuple(arguments)

    def value_and_gradients(cotangent: jax.Array, *inputs: jax.Array) -> Any:
        y, pull = jax.vjp(operation, *inputs)
        return y, pull(cotangent)

    return value_and_gradients, (cases.cotangent(job.case), *arguments)


def _block(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Forward uses the running statistics of BatchNorm; both directions use those of the batch."""
    block = nl.layers.nonlocal_block(
        job.case.instantiation, preset="mmcv", subsample=job.case.m < job.case.n
    )
    params, statistics = _variables(job.case)
    x = cases.features(job.case)
    if job.direction == "forward":
        return block.apply, ({"params": params, "batch_stats": statistics}, x)

    def value_and_gradients(
        cotangent: jax.Array, statistics: Any, params: Any, x: jax.Array
    ) -> Any:
        def train(params: Any, x: jax.Array) -> Any:
            return block.apply(
                {"params": params, "batch_stats": statistics},
                x,
                train=True,
                mutable=["batch_stats"],
            )

        z, pull, updated = jax.vjp(train, params, x, has_aux=True)
        return z, pull(cotangent), updated

    return value_and_gradients, (cases.cotangent(job.case), statistics, params, x)


def _variables(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the block's parameters and batch statistics, from the weights that all competitors
    share.
    """
    w = cases.weights(case)
    dense = [name for name in ("theta", "phi", "g") if f"{name}.kernel" in w]
    operation: dict[str, Any] = {
        name: {"kernel": w[f"{name}.kernel"], "bias": w[f"{name}.bias"]} for name in dense
    }
    if "w_f" in w:
        operation["w_f"] = w["w_f"]
    norm = {"scale": w["scale"], "bias": w["bias"]}
    params = {"operation": operation, "out": {"kernel": w["out.kernel"]}, "out_norm": norm}
    return params, {"out_norm": {"mean": w["mean"], "var": w["var"]}}


if __name__ == "__main__":
    serve(Jax())
