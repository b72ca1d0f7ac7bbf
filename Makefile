# make setup   the environment, in .venv
# make test    the whole test suite; installs what only tests need
# make demo    warm-up and reinforcement learning on 2 ranks, with figures and a picture in runs/demo
# make clean   remove what these made
#
# Variables: PYTHON (3.11 or newer), PIP_ARGS (for pip install, such as the index of CPU-only torch wheels),
# DEMO_ARGS (for tools/run_demo.py), TEST_ARGS (for pytest), TEST_WORKERS (files tested at a time).

PYTHON ?= python3
PIP_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
# most tests keep one core busy, and those with several processes wait for each other half of the time
TEST_WORKERS ?= 3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt $(PIP_ARGS)
# DeepSpeed compiles a small extension at its first use; it is kept inside the environment
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions

.PHONY: setup test demo clean

setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt constraints.txt tools/warm_up.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "megavg needs Python 3.11 or newer; set PYTHON=/path/to/python"; exit 1; }
	@command -v g++ >/dev/null || { echo "megavg needs a C++ compiler (g++), which DeepSpeed compiles with"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -r requirements.txt
	$(BIN)/python tools/warm_up.py
	@touch $@

$(VENV)/.ready-to-test: $(VENV)/.ready requirements-test.txt
	$(INSTALL) -r requirements-test.txt
	@touch $@

test: $(VENV)/.ready-to-test
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --durations=10 $(TEST_ARGS)

demo: setup
	$(BIN)/python tools/run_demo.py $(DEMO_ARGS)

clean:
	rm -rf $(VENV) runs .pytest_cache .hypothesis
