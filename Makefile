# Each command makes its own environment when it is missing or its requirements changed.
PYTHON ?= python3
VENV := .venv
PARITY := .venv-parity
READY := $(VENV)/.ready
PARITY_READY := $(PARITY)/.ready
BROWSER := $(VENV)/.browser
PIP_FLAGS := --quiet --disable-pip-version-check

.PHONY: demo test test-faults check parity bench docs notebooks lock clean

demo: $(READY)  ## train the control and the non-local network on toy videos, offline, about 3 minutes on 2 cores
	$(VENV)/bin/python -m experiments.toy_video --output runs/demo

test: $(READY) $(BROWSER)  ## the tests, the doctests and the notebooks, then `make parity`
	$(VENV)/bin/python -m pytest
	$(MAKE) parity

test-faults: $(READY)  ## runs killed again and again, in training and in saving
	$(VENV)/bin/python -m pytest -m faults tests

check: $(READY)  ## format, lint, types
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

parity: $(PARITY_READY)  ## against the peers, in torch, in an environment of its own
	$(PARITY)/bin/python -m pytest tests/parity

bench: $(PARITY_READY)  ## measure speed, memory and precision beside the peers, about an hour on 2 cores
	$(PARITY)/bin/python -m benchmarks.video
	$(PARITY)/bin/python -m benchmarks.training
	$(PARITY)/bin/python -m benchmarks

docs: $(READY)  ## the site, in site/html; the notebooks are run; warnings are errors
	$(VENV)/bin/sphinx-build --quiet --fail-on-warning --keep-going docs site/html

notebooks: $(READY)  ## write each notebook anew from the Python file beside it
	$(VENV)/bin/jupytext --quiet --update --to ipynb notebooks/*.py

lock:  ## write requirements.txt anew
	uv pip compile --universal --python-version 3.11 --all-extras --custom-compile-command "make lock" --quiet --upgrade pyproject.toml --output-file requirements.txt

clean:  ## remove the environments and what the experiments wrote
	rm -rf $(VENV) $(PARITY) runs site

$(READY): requirements.txt pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --requirement requirements.txt
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@

# The page of `visualize.explore` is tested in a Chromium: this machine's, else Debian's package, else playwright's download.
$(BROWSER): $(READY)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium > /dev/null; } \
	|| $(VENV)/bin/python -m playwright install --with-deps chromium
	@touch $@

# CPU builds of torch do: on Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.
$(PARITY_READY): requirements.txt requirements-parity.txt requirements-parity-peers.txt pyproject.toml Makefile
	$(PYTHON) -m venv --clear $(PARITY)
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --requirement requirements.txt --requirement requirements-parity.txt
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --no-deps --requirement requirements-parity-peers.txt
	$(PARITY)/bin/python -m pip install $(PIP_FLAGS) --no-deps --editable .
	@touch $@
