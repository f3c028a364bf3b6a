"""Compiles for an NVIDIA H100 without having one, and reports the memory of every program.

    python3 -m venv .venv-gpu
    .venv-gpu/bin/python -m pip install -r requirements.txt -r requirements-gpu.txt
    export JAX_PLATFORMS=cpu
    .venv-gpu/bin/python -m benchmarks.gpu           # everything that is not in the results yet
    .venv-gpu/bin/python -m benchmarks.gpu --again --only h100/operation
    .venv-gpu/bin/python -m benchmarks.gpu --report-only

XLA estimates no times for GPUs, so the programs have memory only; `nonlocal_jax.compiler.gpu` says
what it leaves out. Results go to results/compiled/gpu.json and README.md in benchmarks/. Everything
takes about ten minutes on one core.
"""

import tyro

from benchmarks.compiled.command import Config, main

if __name__ == "__main__":
    main(tyro.cli(Config), "gpu")
