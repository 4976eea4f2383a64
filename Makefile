PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-fast lint clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(BIN)/python train_scripts/demo_quad.py --output_dir runs/demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# without the tests that launch processes, train, or draw many samples
test-fast: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/context tests/data tests/evaluation tests/adapter \
		tests/test_adapter_format.py tests/training/test_config.py tests/training/test_objective.py \
		tests/training/test_scm_fit.py tests/training/test_initialization.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info runs
