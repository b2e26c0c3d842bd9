# Everything runs inside .venv, which `make` builds on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart
# pytest workers; each keeps one core busy compiling.
JOBS ?= 2

# An environment of the lowest versions that setup.py allows, and the tests that hold it to them.
LOWEST := .venv-lowest
LOWEST_TESTS := tests/test_packaging.py tests/test_config.py tests/test_figures.py tests/test_main.py \
	tests/test_network.py tests/data/distilled/test_coreset.py tests/data/test_sources.py \
	tests/data/test_pipeline.py tests/evaluators/test_calibration.py \
	tests/evaluators/test_classification.py tests/evaluators/test_generation.py tests/io \
	tests/losses/test_divergence.py tests/models/test_dit.py tests/sampling/test_flow_sampling.py \
	tests/theory/test_kernel_regression.py tests/training

.PHONY: quickstart test test-all test-lowest docs lint format clean

$(VENV)/.installed: setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "kd needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test,colab,docs]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/python -m kd.main --config=configs/vision/logit_kd.py:cpu --workdir=$(WORKDIR)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS) -m 'not slow'

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(JOBS)

$(LOWEST)/.installed: setup.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet uv
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python \
		--resolution=lowest-direct --editable '.[test]'
	touch $@

# Warnings of old versions are not ours.
test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n $(JOBS) -m 'not slow' -o filterwarnings= --disable-warnings \
		$(LOWEST_TESTS)

# The site, docs/_build/html/index.html; a link that leads nowhere is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) docs/_build docs/made .cache .pytest_cache .mypy_cache .ruff_cache build *.egg-info
