PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# three workers for two cores, since many tests wait for a process; the longest files first (tests/conftest.py)
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-fast lint docs clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

install: $(VENV)/.installed  ## .venv with the library and its tools

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install  ## train, sample and measure an adapter on a CPU, in 9 minutes
	$(BIN)/python train_scripts/demo_quad.py --output_dir runs/demo

test: install  ## all tests
	$(PYTEST)

test-fast: install  ## without the tests that launch processes, train, measure, or draw many samples
	$(PYTEST) tests/context tests/data tests/adapter tests/test_adapter_format.py \
		tests/test_paths.py tests/hub/test_model_card.py tests/training/test_config.py tests/training/test_objective.py \
		tests/pipelines/test_composable_pipeline.py tests/pipelines/test_inversion.py

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs  ## the site, in build/site; no warning passes
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:  ## remove .venv, builds and runs
	rm -rf $(VENV) build *.egg-info runs
