# Everything runs inside .venv, which `make` builds on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# pytest workers; each keeps one core busy compiling.
JOBS ?= 2

.PHONY: quickstart test test-all lint format clean

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kd needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test,colab]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=$(WORKDIR)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) -m 'not slow'

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
