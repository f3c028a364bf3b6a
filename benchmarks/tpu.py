"""Compiles for TPUs without having one, and reports what their compiler estimates.

    make tpu                                         # creates .venv-tpu, then compiles a small part
    .venv-tpu/bin/python -m benchmarks.tpu           # everything that is not in the results yet
    .venv-tpu/bin/python -m benchmarks.tpu --again --only v5e:1x1/operation
    .venv-tpu/bin/python -m benchmarks.tpu --report-only

libtpu compiles on any Linux machine, and gives the same figures each time. They say what the
compiler expects, and not what was measured on a chip. Results go to results/compiled/tpu.json and
README.md in benchmarks/. A network takes up to ten minutes to compile on one core, and everything
about four hours.
"""

import tyro

from benchmarks.compiled.command import Config, main

if __name__ == "__main__":
    main(tyro.cli(Config), "tpu")
