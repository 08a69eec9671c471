# `make demo` and `make test` set up .venv by themselves; `make help` lists the rest.
#
# What is done is remembered in .venv/.stamps, so a later run starts at once. The package is installed
# in editable mode: a change to Python needs nothing, a change to csrc rebuilds the library in place.

PYTHON    ?= python3
TORCH     ?= torch
# The oldest PyTorch that is supported, and the one under which `make abi` runs the library.
OLDEST_TORCH ?= 2.11.0
ABI_TORCH    ?= $(OLDEST_TORCH)
CLANG     ?= clang++
SUITE     ?= pool
ARGS      ?=

# `make gpu` leaves the environment alone: set one up with `make setup test`, or name another.
GPU_PYTHON        ?= .venv/bin/python
GPU_OUT           ?= build/gpu

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
CSRC      := $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.* csrc/*/*/*/*.*)
STAND_IN  := $(wildcard tests/cuda_on_cpu/*)
CUDA_ON_CPU := $(if $(NO_NATIVE),,build/cuda_on_cpu.so)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo docs finetune test test-quick bench gpu gpu-first gpu-second lint format abi oldest triton-oldest \
        wheel wheel-test clang cuda sanitize sanitize-cpu \
        sanitize-cuda arm arm-tools setup clean distclean FORCE

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | \
	    while IFS='|' read -r target text; do printf '%-18s %s\n' "$$target" "$$text"; done
	@echo 'Variables: TORCH="torch==X", PYTHON, CXX, CLANG, OLDEST_TORCH, ABI_TORCH, POOLING_EXT_CUDA, TORCH_CUDA_ARCH_LIST,'
	@echo '           SUITE, ARGS (passed to the program that is run).'

demo: $(STAMPS)/demo ## run examples/accelerate_resnet.py and write demo.png
	$(BIN)/python examples/accelerate_resnet.py $(ARGS)

finetune: $(STAMPS)/demo ## run examples/finetune.py, on handwritten digits unless ARGS="--data DIR"
	$(BIN)/python examples/finetune.py $(ARGS)

test: $(STAMPS)/test $(CUDA_ON_CPU) ## run the whole test suite, in as many processes as there are cores
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

test-quick: $(STAMPS)/test $(CUDA_ON_CPU) ## run a few cases of every test that is not slow (tests/common/quick.py)
	$(BIN)/python -m pytest -n auto --dist worksteal --quick $(ARGS)

bench: $(STAMPS)/bench ## measure against PyTorch (SUITE=pool, block, conv, depthwise or model); writes benchmarks/results
	$(BIN)/python -m benchmarks $(SUITE) $(ARGS)

# Each builds for itself, goes on past what fails and writes what it finds into a folder: see benchmarks/gpu_run.
gpu-first: ## on a machine with a GPU, 5.5 minutes: build, try every kernel, time operators, run the tests
	$(GPU_PYTHON) -m benchmarks.gpu_run first --out $(GPU_OUT)/first $(ARGS)

gpu-second: ## the same, 4.5 minutes: ResNet-50, convolutions, a profiler and a sanitizer
	$(GPU_PYTHON) -m benchmarks.gpu_run second --out $(GPU_OUT)/second --libraries $(GPU_OUT)/first $(ARGS)

gpu: ## both (GPU_PYTHON: an environment that is there; GPU_OUT: a folder for the results)
	-$(MAKE) gpu-first
	$(MAKE) gpu-second

docs: $(STAMPS)/docs ## build the documentation into build/docs; any warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs $(ARGS)

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

cuda: | $(PACKAGE) ## compile the CUDA kernels too, for TORCH_CUDA_ARCH_LIST or the GPUs that are visible
	POOLING_EXT_CUDA=1 $(BIN)/python setup.py build_ext --inplace

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
EXTRAS := $(addprefix $(STAMPS)/,demo test bench lint docs wheel)
$(EXTRAS): $(STAMPS)/%: pyproject.toml | $(PACKAGE)
	$(PIP) install $(KEEP) "pooling_ext[$*]"
	@touch $@

# The CUDA kernels as a library for the CPU, which stands in for a GPU's in the tests.
build/cuda_on_cpu.so: $(CSRC) $(STAND_IN) setup.py | $(PACKAGE)
	$(BIN)/python setup.py cuda_on_cpu

# --- other versions of PyTorch, another compiler ---------------------------------------------------

# An environment with another PyTorch than .venv's.
$(foreach version,$(sort $(ABI_TORCH) $(OLDEST_TORCH)),build/torch-$(version)/installed): build/torch-%/installed: | $(BIN)/python
	$(BIN)/python -m venv build/torch-$*
	build/torch-$*/bin/python -m pip --disable-pip-version-check install "torch==$*" torchvision numpy "setuptools>=77" "pybind11>=2.13" \
	    ninja pytest pytest-timeout pytest-xdist hypothesis
	@touch $@

abi: $(PACKAGE) build/torch-$(ABI_TORCH)/installed ## run the built library under an older PyTorch (ABI_TORCH)
	PYTHONPATH="$(CURDIR)" build/torch-$(ABI_TORCH)/bin/python tests/packaging/abi_smoke.py

# Makes $(1) a copy of the tree, with what is compiled already: kernels depend on neither Python nor PyTorch.
define copy_tree
rm -rf $(1)
mkdir -p $(1)/build
cp -a csrc pooling_ext tests setup.py pyproject.toml README.md LICENSE $(1)
cp -a $(wildcard build/native build/cuda) $(1)/build
rm -f $(1)/pooling_ext/*.so
endef

OLDEST        := build/torch-$(OLDEST_TORCH)
OLDEST_PYTHON := $(CURDIR)/$(OLDEST)/bin/python
# There the CUDA kernels are compiled wherever there is nvcc.
WITH_CUDA     := $(if $(shell command -v nvcc),POOLING_EXT_CUDA=1 TORCH_CUDA_ARCH_LIST=$(or $(TORCH_CUDA_ARCH_LIST),9.0))

# What a machine with a GPU has besides PyTorch and pytest is not known, so its tests are collected with little more.
oldest: $(PACKAGE) $(OLDEST)/installed ## build, load and test under the oldest PyTorch (OLDEST_TORCH), in a copy of the tree
	$(call copy_tree,$(OLDEST)/tree)
	cd $(OLDEST)/tree && $(WITH_CUDA) $(OLDEST_PYTHON) setup.py build_ext --inplace
	cd $(OLDEST)/tree && $(OLDEST_PYTHON) tests/packaging/abi_smoke.py --built-here
	cd $(OLDEST)/tree && PYTHONPATH=. $(OLDEST_PYTHON) -m pytest -q -n auto tests/ops/test_compile.py tests/gpu/test_triton_compiled.py -k "not sm_80 and not sm_100 and not gfx942" $(ARGS)
	$(BIN)/python tests/common/saving_worker.py write $(OLDEST)/saved
	cd $(OLDEST)/tree && $(OLDEST_PYTHON) tests/common/saving_worker.py read ../saved
	env -u CI PYTHONPATH=. $(OLDEST_PYTHON) -m pytest -qq --collect-only -m gpu tests

triton-oldest: $(PACKAGE) $(OLDEST)/installed ## compile the Triton kernels for every GPU under the oldest PyTorch's Triton
	$(call copy_tree,$(OLDEST)/triton)
	cd $(OLDEST)/triton && POOLING_EXT_NO_NATIVE=1 PYTHONPATH=. $(OLDEST_PYTHON) -m pytest -q -n auto tests/gpu/test_triton_compiled.py $(ARGS)

# PyTorch's libraries stay out: the ones that are there when the package is imported are used. CPU kernels alone;
# GPUs have Triton's. What of the package was built before is left out of it too.
wheel: $(STAMPS)/wheel ## build dist/*.whl with the CPU kernels, for any supported PyTorch
	rm -rf build/lib* build/bdist* build/wheel dist
	POOLING_EXT_CUDA=0 $(PIP) wheel --no-deps --no-build-isolation -w build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m auditwheel repair -w dist \
	    --exclude 'libtorch*' --exclude 'libc10*' build/wheel/*.whl

# What `make wheel-test` installs the wheel with, each in an environment of its own.
WHEEL_TORCH ?= torch==$(OLDEST_TORCH) torch

wheel-test: | $(BIN)/python ## install dist/*.whl in bare environments (WHEEL_TORCH) and run the smoke test there
	$(BIN)/python tests/packaging/check_wheel.py dist/*.whl $(addprefix --torch ,$(WHEEL_TORCH)) $(ARGS)

clang: $(PACKAGE) ## build with clang++ (CLANG) in a copy of the tree, and test that; any warning is an error
	$(call copy_tree,build/clang)
	cd build/clang && CXX="$(CLANG)" POOLING_EXT_CXXFLAGS=-Werror POOLING_EXT_CUDA=0 $(abspath $(BIN))/python setup.py build_ext --inplace
	cd build/clang && $(abspath $(BIN))/python tests/packaging/abi_smoke.py --built-here

# --- sanitizers ----------------------------------------------------------------------------------

FUZZERS  := $(patsubst csrc/tests/%.cpp,build/%,$(wildcard csrc/tests/fuzz_*.cpp))
KERNELS  := $(wildcard csrc/kernels/cpu/*/*_kernels.cpp)
SANITIZE := $(CXX) -std=c++20 -O1 -g -pthread -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc
NEEDED_BY_FUZZERS := $(wildcard csrc/common/*.h csrc/kernels/cpu/*.h csrc/kernels/cpu/*/*.h csrc/tests/*.h) $(KERNELS) \
                     $(FUZZERS:build/%=csrc/tests/%.cpp)
# Runs what follows on each word that it is given, on as many at a time as there are cores.
AT_ONCE  := tr ' ' '\n' | xargs -P $$(nproc) -I{}

# The kernels once for all programs.
build/sanitized/objects: $(NEEDED_BY_FUZZERS)
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
	    $(BIN)/python tests/gpu/gpu_smoke.py --on-cpu

# --- arm64 ---------------------------------------------------------------------------------------

# From Debian's packages g++-aarch64-linux-gnu and qemu-user.
ARM_CXX   ?= aarch64-linux-gnu-g++
QEMU_ARM  ?= qemu-aarch64
# setup.py compiles with -O3, which takes three times as long.
ARM_LEVEL ?= -O1
ARM       := $(ARM_CXX) -std=c++20 $(ARM_LEVEL) -pthread -fno-trapping-math -fno-math-errno -Wno-psabi -Icsrc
ARM_FUZZERS := $(FUZZERS:build/%=build/arm/%)

arm: arm-tools $(ARM_FUZZERS) ## cross-compile the CPU kernels for arm64 and fuzz them under qemu-user (ARGS: jobs)
	echo $(ARM_FUZZERS) | $(AT_ONCE) $(QEMU_ARM) {} $(ARGS)

arm-tools:
	@for tool in $(ARM_CXX) $(QEMU_ARM); do command -v $$tool >/dev/null || { \
	    echo "make arm: there is no $$tool; Debian has both in g++-aarch64-linux-gnu and qemu-user" >&2; exit 1; }; done

# Convolutions alone have products and sums fused, as in setup.py.
build/arm/objects: $(NEEDED_BY_FUZZERS) | arm-tools
	@mkdir -p build/arm
	echo $(KERNELS:.cpp=) $(FUZZERS:build/%=csrc/tests/%) | $(AT_ONCE) sh -c \
	    'case {} in */conv/*) fuse=fast ;; *) fuse=off ;; esac; \
	    $(ARM) -ffp-contract=$$fuse -c {}.cpp -o build/arm/$$(basename {}).o'
	@touch $@

# Static, so that qemu needs no libraries of arm64.
$(ARM_FUZZERS): build/arm/%: build/arm/objects
	$(ARM) -static build/arm/$*.o $(patsubst %.cpp,build/arm/%.o,$(notdir $(KERNELS))) -o $@

# --- cleaning ------------------------------------------------------------------------------------

clean: ## remove what was built, but keep .venv
	rm -rf build dist *.egg-info pooling_ext/_C*.so pooling_ext/_cuda*.so $(STAMPS)/package* .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)
