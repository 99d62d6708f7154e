# make demo [DATA=my.jsonl] [SEED=0]   fine-tune a real 4-bit model and score it before and after
# make test                            every check and test
# make docs                            the API reference, from docstrings, into build/docs
# make lint | format | bench | clean
# make cuda-test | sanitize | cuda-bench   on a machine with a GPU: its tests, compute-sanitizer, timings
#
# Needs Python 3.10+, a C++ compiler and a package index. Everything else goes into .venv, with the versions of
# constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEED ?= 0

# Tools such as cmake and ninja come from the environment, whatever the machine has.
export PATH := $(abspath $(BIN)):$(PATH)
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
FAILED = { echo "moka: that did not succeed, see above: it needs a package index that pip can reach, and a C++ compiler" >&2; exit 1; }
CPP_FILES := $(shell find csrc $(wildcard tests/cpp) -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := setup.py pyproject.toml $(wildcard _backend/*.py) $(filter csrc/%,$(CPP_FILES))

.PHONY: demo test lint format kernels ctest pytest docs bench clean cuda-test sanitize cuda-bench
.DELETE_ON_ERROR:
.NOTPARALLEL:

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py --seed $(SEED) $(if $(DATA),--data "$(DATA)")

test: lint kernels ctest docs pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

kernels: $(VENV)/.base
	$(BIN)/python .ci/cuda_kernels.py

ctest: $(VENV)/.test
	for preset in release asan; do \
	  cmake --preset $$preset && cmake --build --preset $$preset && ctest --preset $$preset || exit 1; \
	done

pytest: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

docs: $(VENV)/.test
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs moka moka.algebra moka.convert moka.data \
	  moka.embedded moka.errors moka.evaluate moka.factors moka.gates moka.kpsvd moka.presets moka.rules \
	  moka.integrations.peft moka.integrations.preflight moka.integrations.trainer moka.loading moka.train

bench: $(VENV)/.test
	$(BIN)/python benchmarks/run.py

cuda-test: $(VENV)/.test
	$(BIN)/python -m pytest -m cuda $(PYTEST_ARGS)

# The caching allocator would hide accesses out of bounds. initcheck misses what cuBLAS' 16-bit kernels store (by bulk
# copies), so it does not look at copies to the host.
sanitize: $(VENV)/.test
	printf '%s\n' memcheck racecheck synccheck "initcheck --check-api-memory-access no" | xargs -P 4 -I TOOL sh -c ' \
	  out=$$(PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool TOOL --error-exitcode 1 \
	    $(BIN)/python -m pytest -q -x tests/test_cuda_sanitize.py 2>&1); status=$$?; echo "TOOL: $$out"; exit $$status'

cuda-bench: $(VENV)/.test
	benchmarks/run_cuda.sh benchmarks/results

clean:
	rm -rf $(VENV) build dist *.egg-info moka/_C*.so

# The stamps say what is installed: torch and the build tools first, because moka compiles against that torch.
$(VENV)/.base: constraints.txt .ci/preflight.py
	@$(PYTHON) .ci/preflight.py
	$(PYTHON) -m venv $(VENV)
	@echo "moka: installing torch and the build tools into $(VENV) (minutes, the first time)"
	@$(PIP_INSTALL) torch numpy setuptools ninja || $(FAILED)
	touch $@

$(VENV)/.demo: $(VENV)/.base $(SOURCES)
	@echo "moka: installing what the demo needs, and compiling the extension (about a minute)"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[all]" || $(FAILED)
	touch $@

$(VENV)/.test: $(VENV)/.base $(SOURCES)
	@echo "moka: installing what the tests need, and compiling the extension (about a minute)"
	@$(PIP_INSTALL) --no-build-isolation --editable ".[dev]" || $(FAILED)
	touch $@ $(VENV)/.demo
