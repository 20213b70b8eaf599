# make demo     the whole way: export, train from two devices, merge, compare
# make demo-camera    a camera in the dark: frozen, HO-SFL and first-order side by side, with their memory
# make check    format check, lint, types, the tests of the protocol and the house, and the pages: under a minute
# make test     format check, lint, types, tests; what CI runs
# make wheels   wheels with the compiled kernel for Linux on x86-64 and aarch64, and the source archive, in dist/
# make test-aarch64    the device's tests on aarch64 wheels, under qemu; needs root
# make test-onnxruntime    the tests of edge, protocol and export with the oldest and the newest ONNX Runtime
# make fuzz     damaged frames and sequences for the protocol, as many as FRAMES= and SEQUENCES= say; a table
# make chaos    runs whose processes and connections are broken at random, SEEDS=1-20; they must end with the same bits
# make bench    speed and memory, as tables
# make audit    known vulnerabilities of the versions in constraints.txt, as PyPI knows them; needs the internet
# make lint     format check, lint, types
# make format   format the code
# make completion    the scripts that complete hosl-edge's words in a shell, made anew

PYTHON ?= python3
CHECKED ?= tests/test_rooms.py tests/test_pages.py tests/protocol
ONNXRUNTIMES ?= onnxruntime==1.23.2 onnxruntime
ONNXRUNTIME_TESTS ?= tests/edge tests/protocol tests/export
FRAMES ?= 200000
SEQUENCES ?= 3000
SEEDS ?= 1-20
# One more than there are cores: many tests wait for a process or a device.
WORKERS ?= $(shell expr $$(nproc) + 1)
CHAOS ?= --work .cache/chaos
VENV ?= .venv
BIN := $(VENV)/bin

# Where this is set, each program that a test starts compiles torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-hosl demo-camera check test wheels test-aarch64 test-onnxruntime fuzz chaos bench audit lint format completion clean

# What is imported is compiled then; to compile all of torch and transformers takes a minute and more.
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard build_*.py) protocol/hosl_protocol/arithmetic/kernel.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e ".[cloud,export,dev]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/reviews/demo.py

demo-hosl: $(VENV)/installed
	$(BIN)/python examples/reviews/demo.py --config examples/reviews/hosl.toml

demo-camera: $(VENV)/installed
	$(BIN)/python examples/camera/demo.py

check: lint
	$(BIN)/pytest -q -n auto --dist loadfile $(CHECKED)

# Beside mypy, which leaves a core idle: else each worker of pytest would compile all of this for itself.
test: $(VENV)/installed
	$(BIN)/python -c "import torch._dynamo, torch.onnx, transformers, peft, onnxscript, schemathesis" & \
	    $(MAKE) --no-print-directory lint && wait
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

# In a folder of their own, so that to make wheels takes neither torch nor a C compiler.
.cache/wheels/installed: constraints.txt
	$(PYTHON) -m venv .cache/wheels
	.cache/wheels/bin/pip install -qq --disable-pip-version-check -c constraints.txt auditwheel hatchling ziglang
	touch $@

wheels: .cache/wheels/installed
	rm -rf dist
	.cache/wheels/bin/python -m hatchling build -d dist -t sdist
	for machine in x86_64 aarch64; do \
	    HOSL_WHEEL_FOR=$$machine .cache/wheels/bin/python -m hatchling build -d dist -t wheel || exit 1; \
	    .cache/wheels/bin/auditwheel show dist/*_$$machine.whl | grep -o "\"manylinux_2_17_$$machine\"" | sort -u | grep . || \
	        { echo "auditwheel gives the wheel for $$machine another tag than its name has"; exit 1; }; \
	done

test-aarch64: $(VENV)/installed
	PYTHON=$(BIN)/python tests/aarch64.sh

# Each in a folder of its own that Python looks into first. 1.23.2 is the newest for Python 3.10; without a number it is
# PyPI's newest.
test-onnxruntime: $(VENV)/installed
	for wanted in $(ONNXRUNTIMES); do \
	    $(BIN)/pip install -qq --no-deps --disable-pip-version-check --upgrade --target .cache/$$wanted $$wanted || exit 1; \
	    export PYTHONPATH=$$PWD/.cache/$$wanted; \
	    $(BIN)/python -c "import onnxruntime; print('== onnxruntime', onnxruntime.__version__)" || exit 1; \
	    $(BIN)/pytest -n auto --dist loadfile $(ONNXRUNTIME_TESTS) || exit 1; \
	done

fuzz: $(VENV)/installed
	$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e ".[fuzz]" || echo "no wheel of atheris here"
	PYTHONPATH=tests/helpers $(BIN)/python tests/fuzz.py --frames $(FRAMES) --sequences $(SEQUENCES)

chaos: $(VENV)/installed
	PYTHONPATH=tests:tests/helpers $(BIN)/python -m chaos.seeds --seeds $(SEEDS) $(CHAOS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tests/device_imports.py
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

completion: $(VENV)/installed
	$(BIN)/python build_completion.py

bench: $(VENV)/installed
	for script in tests/benchmarks/*.py tests/benchmarks/cloud/*.py; do echo "== $$script"; $(BIN)/python $$script || exit 1; done

audit:
	$(PYTHON) -m venv .cache/audit
	.cache/audit/bin/pip install -qq --disable-pip-version-check pip-audit
	.cache/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) dist build/kernel examples/*/work .mypy_cache .pytest_cache .ruff_cache .hypothesis
