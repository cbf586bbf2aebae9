# Everything starts here.  `make demo` and `make test` do all the set-up on a fresh machine.
#
#   make demo        train a network across four processes on real images, then compare with one process
#   make test        the whole test suite            (PYTEST_ARGS="-k channel" for a part of it; "-n 0" one after the other)
#   make fuzz        a million hostile inputs        (FUZZ_ARGS="--target record --seconds 60" for a part of it)
#   make lint        ruff: rules and format          make format   let ruff mend them
#   make types       mypy --strict
#   make contracts   import contracts
#   make chaos       10,000 messages over a line that breaks hundreds of times (SEED=n repeats a run)
#   make kills       kill -9 a private training 50 times: ledger never below the wire, journal whole (SEED=n repeats a run)
#   make wheel       build sdist and wheel in dist/
#   make strangers   train with 2,000 strangers at the port: how many times as long it takes (two minutes, idle machine)
#   make check       all of the above, as .ci/run does
#   make clean       remove what these made
#
# PYTHON=python3.12 picks another interpreter (3.11 or newer), VENV=DIR another place for the environment.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
FUZZ_ARGS ?=
SEED ?= 0

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz chaos kills lint format types contracts wheel strangers check install clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp for each set of packages: a second `make` starts at once.  The environment comes with pip of its own.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"splitsec needs Python 3.11 or newer, and {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	@echo "==> making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing splitsec and what the examples need (a minute or two the first time)"
	@$(PIP_INSTALL) -e '.[examples]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing splitsec and what tests and checks need (a minute or two the first time)"
	@$(PIP_INSTALL) -e '.[test,dev]'
	@touch $@

$(VENV)/installed-fuzz: $(VENV)/installed-dev
	@echo "==> installing the fuzzer that looks at branches, where there is one for this machine"
	@$(PIP_INSTALL) -e '.[test,dev,fuzz]'
	@touch $@

install: $(VENV)/installed-dev

demo: $(VENV)/installed-demo
	@echo "==> training examples/vanilla: three clinics and a server, one process each, every message encrypted"
	@rm -rf out/demo
	@$(BIN)/splitsec simulate examples/vanilla --out out/demo
	@echo "==> training the same network in one process, in plain PyTorch, to compare"
	@$(BIN)/python examples/compare.py examples/vanilla out/demo

test: $(VENV)/installed-dev
	@echo "==> pytest: the whole suite (some minutes)"
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: $(VENV)/installed-dev
	@SPLITSEC_CHAOS=1 SPLITSEC_CHAOS_SEED=$(SEED) $(BIN)/python -m pytest -s tests/transports/test_reconnect.py -k in_full

kills: $(VENV)/installed-dev
	@echo "==> killing a private training 50 times"
	@$(BIN)/python -m tests.kills --kills 50 $(if $(filter-out 0,$(SEED)),--seed $(SEED))

fuzz: $(VENV)/installed-fuzz
	@echo "==> fuzzing (a million inputs take some ten minutes; what fails is kept in out/fuzz)"
	@$(BIN)/python -m tests.fuzz $(FUZZ_ARGS)

lint: $(VENV)/installed-dev
	@echo "==> ruff"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check --diff .

format: $(VENV)/installed-dev
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

types: $(VENV)/installed-dev
	@echo "==> mypy --strict"
	@$(BIN)/mypy --no-error-summary

contracts: $(VENV)/installed-dev
	@echo "==> import contracts"
	@$(BIN)/lint-imports --no-logo

wheel: $(VENV)/installed-dev
	@echo "==> building sdist and wheel in dist/"
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist . >/dev/null
	@ls dist

strangers: $(VENV)/installed-dev
	@echo "==> training in peace and with 2,000 strangers at the port, in turn"
	@$(BIN)/python -m splitsec.bench.strangers

check:
	@.ci/run

clean:
	rm -rf $(VENV) dist build out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
