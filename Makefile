# `make demo` and `make test` set up .venv by themselves; `make help` lists the rest.
#
# What is done is remembered in .venv/.stamps, so a later run starts at once. The package is installed
# in editable mode: a change to Python needs nothing, a change to csrc rebuilds the library in place.

PYTHON    ?= python3
TORCH     ?= torch
ABI_TORCH ?= 2.13.0
SUITE     ?= pool
ARGS      ?=

# `make gpu` leaves the environment alone: set one up with `make setup test`, or name another.
GPU_PYTHON        ?= .venv/bin/python
COMPUTE_SANITIZER ?= $(shell command -v compute-sanitizer)

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# No later step may replace the torch that is installed.
KEEP   := -c $(STAMPS)/constraints.txt

# Without native code (on request, or for want of a compiler) there is another package to install,
# so it has a stamp of its own.
NO_NATIVE := $(filter-out 0,$(POOLING_EXT_NO_NATIVE))$(if $(shell command -v $(firstword $(CXX))),,none)
PACKAGE   := $(STAMPS)/package$(if $(NO_NATIVE),-no-native)
CSRC      := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*/*.*)
STAND_IN  := $(wildcard tests/cuda_on_cpu/*)
CUDA_ON_CPU := $(if $(NO_NATIVE),,build/cuda_on_cpu.so)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo finetune test bench gpu lint format abi sanitize sanitize-cpu sanitize-cuda setup clean distclean FORCE

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | \
	    while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done
	@echo 'Variables: TORCH="torch==X", PYTHON, CXX, ABI_TORCH, SUITE, ARGS (passed to the program that is run).'

demo: $(STAMPS)/demo ## run examples/accelerate_resnet.py and write demo.png
	$(BIN)/python examples/accelerate_resnet.py $(ARGS)

finetune: $(STAMPS)/demo ## run examples/finetune.py, on handwritten digits unless ARGS="--data DIR"
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(STAMPS)/test $(CUDA_ON_CPU) ## run the whole test suite, in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

bench: $(STAMPS)/bench ## measure against PyTorch (SUITE=pool, block, depthwise or model); writes benchmarks/results
	$(BIN)/python -m benchmarks $(SUITE) $(ARGS)

gpu: ## on a machine with a GPU: build, test, sanitize, measure (GPU_PYTHON: an environment that is there)
	$(GPU_PYTHON) setup.py build_ext --inplace
	$(GPU_PYTHON) -m pytest -q -m gpu $(ARGS)
	$(if $(COMPUTE_SANITIZER),for tool in memcheck racecheck; do \
	    $(COMPUTE_SANITIZER) --tool $$tool --error-exitcode 1 $(GPU_PYTHON) tests/gpu_smoke.py || exit; done)
	$(GPU_PYTHON) -m benchmarks gpu

lint: $(STAMPS)/lint $(STAMPS)/test ## check style and types at the pinned versions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CLANG_FORMATTED)
	$(BIN)/pyright

format: $(STAMPS)/lint ## reformat Python and C++
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CLANG_FORMATTED)

CLANG_FORMATTED = $(shell find csrc tests/cuda_on_cpu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

setup: $(PACKAGE) ## make .venv, install PyTorch, build and install the package

# --- .venv ---------------------------------------------------------------------------------------

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# A torch that .venv has already is kept, unless TORCH asks for another one.
ifneq ($(origin TORCH),file)
ifneq ($(shell cat $(STAMPS)/torch 2>/dev/null),$(TORCH))
$(STAMPS)/torch: FORCE
endif
TORCH_ASKED := yes
endif

$(STAMPS)/torch: | $(BIN)/python
	@mkdir -p $(STAMPS)
	@if [ -n "$(TORCH_ASKED)" ] || ! $(BIN)/python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null; \
	then set -x; $(PIP) install "$(TORCH)" torchvision; fi
	@$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(STAMPS)/constraints.txt
	$(PIP) install $(KEEP) torchvision "setuptools>=77" "pybind11>=2.13" ninja
	@echo '$(TORCH)' > $@

$(PACKAGE): pyproject.toml setup.py $(CSRC) | $(STAMPS)/torch
	$(if $(filter-out csrc/%,$?),$(PIP) install -v $(KEEP) --no-build-isolation -e .,$(BIN)/python setup.py build_ext --inplace)
	@touch $@

# The package is there, so pip only adds what its extra names.
EXTRAS := $(addprefix $(STAMPS)/,demo test bench lint)
$(EXTRAS): $(STAMPS)/%: pyproject.toml | $(PACKAGE)
	$(PIP) install $(KEEP) "pooling_ext[$*]"
	@touch $@

# The CUDA kernels as a library for the CPU, which stands in for a GPU's in the tests.
build/cuda_on_cpu.so: $(CSRC) $(STAND_IN) setup.py | $(PACKAGE)
	$(BIN)/python setup.py cuda_on_cpu

# --- the stable ABI ------------------------------------------------------------------------------

# Runs the library built in this checkout, not a copy built again, under another PyTorch.
ABI := build/abi

$(ABI)/torch-$(ABI_TORCH): | $(BIN)/python
	$(BIN)/python -m venv $(ABI)
	$(ABI)/bin/python -m pip --disable-pip-version-check install "torch==$(ABI_TORCH)" numpy
	@rm -f $(ABI)/torch-*
	@touch $@

abi: $(PACKAGE) $(ABI)/torch-$(ABI_TORCH) ## run the built library under an older PyTorch (ABI_TORCH)
	PYTHONPATH="$(CURDIR)" $(ABI)/bin/python tests/abi_smoke.py

# --- sanitizers ----------------------------------------------------------------------------------

FUZZERS  := build/fuzz_kernels build/fuzz_batch_norm build/fuzz_batch_norm_relu_max_pool build/fuzz_depthwise
KERNELS  := $(wildcard csrc/cpu/*_kernels.cpp csrc/kernels/cpu/*/*_kernels.cpp)
SANITIZE := $(CXX) -std=c++20 -O1 -g -pthread -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
# Runs what follows on each word that it is given, on as many at a time as there are cores.
AT_ONCE  := tr ' ' '\n' | xargs -P $$(nproc) -I{}

# The kernels once for all programs.
build/sanitized/objects: $(wildcard csrc/common/*.h csrc/cpu/*.h csrc/kernels/cpu/*/*.h csrc/tests/*.h) $(KERNELS) $(FUZZERS:build/%=csrc/tests/%.cpp)
	@mkdir -p build/sanitized
	echo $(KERNELS:.cpp=) $(FUZZERS:build/%=csrc/tests/%) | \
	    $(AT_ONCE) sh -c '$(SANITIZE) -c {}.cpp -o build/sanitized/$$(basename {}).o'
	@touch $@

$(FUZZERS): build/%: build/sanitized/objects
	$(SANITIZE) build/sanitized/$*.o $(patsubst %.cpp,build/sanitized/%.o,$(notdir $(KERNELS))) -o $@

sanitize: sanitize-cpu sanitize-cuda ## run the kernels under AddressSanitizer and UndefinedBehaviorSanitizer

sanitize-cpu: $(FUZZERS)
	echo $(FUZZERS) | $(AT_ONCE) env {} $(ARGS)

# A small case of each CUDA kernel, in a Python into which the sanitizers are loaded first.
sanitize-cuda: | $(PACKAGE)
	$(BIN)/python setup.py cuda_on_cpu --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 POOLING_EXT_CUDA_ON_CPU=build/cuda_on_cpu_sanitized.so \
	    $(BIN)/python tests/gpu_smoke.py --on-cpu

# --- cleaning ------------------------------------------------------------------------------------

clean: ## remove what was built, but keep .venv
	rm -rf build dist *.egg-info pooling_ext/_C*.so pooling_ext/_cuda*.so $(STAMPS)/package* .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
