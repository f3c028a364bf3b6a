# Each target creates its environment when it is missing or its requirements changed.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
TPU := .venv-tpu
READY := $(VENV)/.ready
PARITY_READY := $(PARITY)/.ready
TPU_READY := $(TPU)/.ready
BROWSER := $(VENV)/.browser
# Python itself compiles what is imported, which is a small part of what is installed.
PIP_FLAGS := --quiet --disable-pip-version-check --no-compile
# Container images set it. Then each process compiles JAX and the tests from source again, and pytest takes 45 s instead
# of 16 to collect them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo quick test test-faults check parity tpu bench docs notebooks lock clean

demo: $(READY)  ## train a control and a non-local network on toy videos, offline: after the installation about 3 minutes on 2 idle cores
	$(VENV)/bin/python -m experiments.toy_video --output runs/demo

quick: $(READY)  ## the tests without processes, browser, notebooks and whole networks, in about 8 minutes on 2 cores
	$(VENV)/bin/python -m pytest -m 'not (faults or processes or browser or notebooks or networks)'

test: $(READY) $(BROWSER)  ## every test, doctest and notebook, then `make parity`
	$(VENV)/bin/python -m pytest
	$(MAKE) parity

test-faults: $(READY)  ## kill runs again and again while they train and save
	$(VENV)/bin/python -m pytest -m faults tests/training

check: $(READY)  ## check formatting, lint and types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

parity: $(PARITY_READY)  ## compare with the peers, in torch, in a separate environment
	$(PARITY)/bin/python -m pytest tests/parity

tpu: $(TPU_READY)  ## compile a few programs for TPUs, without one, and check what their compiler says, in about 4 minutes
	$(TPU)/bin/python -m pytest -n 1 tests/tpu
	$(TPU)/bin/python -m benchmarks.tpu --small

bench: $(PARITY_READY)  ## measure speed, memory and precision against the peers, in about an hour on 2 cores
	$(PARITY)/bin/python -m benchmarks.first_minute
	$(PARITY)/bin/python -m benchmarks.video
	$(PARITY)/bin/python -m benchmarks.training
	$(PARITY)/bin/python -m benchmarks

docs: $(READY)  ## build the site in site/html and execute the notebooks; warnings are errors
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going docs site/html

notebooks: $(READY)  ## write each notebook from the Python file next to it
	$(VENV)/bin/jupytext --quiet --update --to ipynb notebooks/*.py

lock:  ## update requirements.txt
	uv pip compile --universal --python-version 3.11 --all-extras --custom-compile-command "make lock" --quiet --upgrade pyproject.toml --output-file requirements.txt

clean:  ## remove the environments, caches, and outputs of the experiments
	rm -rf $(VENV) $(PARITY) $(TPU) runs site

$(READY): requirements.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --requirement requirements.txt
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@

# Tests of the page of `visualize.explore` need a Chromium: an installed one, Debian's package, or playwright's.
$(BROWSER): $(READY)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; } \
	|| $(VENV)/bin/python -m playwright install --with-deps chromium
	@touch $@

# CPU builds of torch are enough. On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.
$(PARITY_READY): requirements.txt requirements-parity.txt requirements-parity-peers.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(PARITY)
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --requirement requirements.txt --requirement requirements-parity.txt
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --no-deps --requirement requirements-parity-peers.txt
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@

# libtpu has an environment of its own, because JAX looks for a TPU wherever it is installed.
$(TPU_READY): requirements.txt requirements-tpu.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(TPU)
	$(TPU)/bin/python -m pip install $(PIP_FLAGS) --requirement requirements.txt --requirement requirements-tpu.txt
	$(TPU)/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@
