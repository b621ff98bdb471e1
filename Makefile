# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# uv installs several times faster than pip, which does it where uv cannot be had.
UV := 0.13.9
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-all check perf setup clean

help:
	@echo "make demo   distil, benchmark and report on real handwriting (minutes, offline, on a CPU)"
	@echo "make test   the tests        make test-all  also the slow ones and those in a browser"
	@echo "make check  ruff and mypy    make perf      speed ratios"
	@echo "make setup  only the environment (.venv)"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dimo needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	@echo "installing into .venv (about 6 GB with PyTorch)"
	$(PIP) "uv==$(UV)" && $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e ".[dev]" || \
	  $(PIP) -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/dimo demo

# A process a core with one thread each is faster than one process with all of them. Tests that ask
# for more threads must not wait by spinning on a core that the other process needs. A process that
# has done its half takes over tests from the other.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist worksteal

test: $(READY)
	$(PYTEST) -m "not slow and not browser and not gpu and not network"

test-all: $(READY)
	$(PYTEST) -m "not gpu and not network"

check: $(READY)
	$(BIN)/ruff check dimo bench tests
	$(BIN)/ruff format --check dimo bench tests
	$(BIN)/mypy

perf: $(READY)
	$(BIN)/python -m pytest -q -s tests/perf --override-ini=python_files='perf_*.py' --override-ini=pythonpath=tests/perf

clean:
	rm -rf .venv runs dist .mypy_cache .ruff_cache .pytest_cache
