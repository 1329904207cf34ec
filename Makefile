# make demo | test | check: each sets itself up in .venv first, where python3 and make are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test check clean
.DELETE_ON_ERROR:

help:
	@echo "make demo   train on the built-in demo data, privately (a minute or two)"
	@echo "make test   the default test suite (a few minutes)"
	@echo "make check  everything that CI runs"
	@echo "make setup  only the environment in $(VENV); PYTHON=python3.12 picks another Python"
	@echo "make clean  remove $(VENV) and what the tools cached"

demo: $(READY)
	$(BIN)/fedfuse simulate simulations/quickstart.toml

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check:
	.ci/run

setup: $(READY)

# torch goes first, alone: so pip settles the one large package before it weighs the others.
$(READY): pyproject.toml constraints.txt $(wildcard fedfuse/kernels/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
