# make demo     the whole way: export, train from two devices, merge, compare
# make test     format check, lint, types, tests; what CI runs
# make test-aarch64    the device's tests on aarch64 wheels, under qemu; needs root
# make bench    speed and memory, as tables
# make lint     format check, lint, types
# make format   format the code

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-hosl test test-aarch64 bench lint format clean

$(VENV)/installed: pyproject.toml constraints.txt build_kernel.py protocol/hosl_protocol/kernel.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[cloud,export,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/reviews/demo.py

demo-hosl: $(VENV)/installed
	$(BIN)/python examples/reviews/demo.py --config examples/reviews/hosl.toml

test: lint
	$(BIN)/pytest

test-aarch64: $(VENV)/installed
	PYTHON=$(BIN)/python tests/aarch64.sh

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed
	for script in tests/benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

clean:
	rm -rf $(VENV) examples/*/work .mypy_cache .pytest_cache .ruff_cache .hypothesis
