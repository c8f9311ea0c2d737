# The README's two commands. Each builds its own virtual environment when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test slow docs libtpu lint types doctest format clean

quickstart: $(VENV)/.experiments  ## train uniform and LinUpper on embedded text, compare, write a report
	$(BIN)/python -m experiments.compare --config=configs/quickstart.py \
	  --weightings=uniform,linupper:1.0 --seeds=3 --workdir=runs/quickstart

test: $(VENV)/.dev  ## the default tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

slow: $(VENV)/.dev  ## the tests that take minutes: kills, two processes, ...
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

doctest: $(VENV)/.dev
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q --doctest-modules jaxrw

docs: $(VENV)/.docs  ## the documentation, in build/docs; a public name without documentation fails
	JAX_PLATFORMS=cpu $(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs

libtpu: $(VENV)/.experiments  ## the TPU compiler, for --compile_for, in a folder of its own
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --upgrade --target .libtpu \
	  "$$($(BIN)/python -m experiments.hardware)"

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .libtpu build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) and "Python 3.11 to 3.13 is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[experiments]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[experiments,docs]'
	touch $@ $(VENV)/.experiments

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/.experiments
