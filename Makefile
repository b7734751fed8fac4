# Every target prepares what it needs: the pinned environment in .venv, then the compiled extension.
#
#   make demo    train without gradients on real digits      make test    the default test suite
#   make bench   comparison with torch's own ways            make help    everything else
#
# PYTHON  the interpreter that makes .venv (3.11 or newer; default python3)
# PY      on the command line, an interpreter of your own: used as it is, nothing is installed
# ARGS    handed on to the demo, pytest or the bench: make demo ARGS="--seconds 20"
# setup.py reads PERTURBED_CUDA=0/1, DEBUG=1, MAX_JOBS, TORCH_CUDA_ARCH_LIST and CUDA_HOME.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
export PYTHONUNBUFFERED := 1

PYTHON ?= python3
VENV := .venv
ifneq ($(origin PY),command line)
  PY := $(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.requirements
endif

# ---- environment ------------------------------------------------------------------------------

# torch goes first and alone: whatever is built from source afterwards sees the pinned one.
$(VENV)/.requirements: requirements.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(None if v >= (3, 11) else f"requirements.txt needs Python 3.11 or newer, \
	$(PYTHON) is {v[0]}.{v[1]}; name another: make PYTHON=python3.12 ...")'
	@echo "Preparing $(VENV): torch and the pinned packages, which takes minutes the first time"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

# The site's packages, for `make docs` alone.
ifdef ENVIRONMENT
  ENVIRONMENT_DOCS := $(VENV)/.requirements-docs
endif
$(VENV)/.requirements-docs: docs/requirements.txt $(ENVIRONMENT)
	$(VENV)/bin/python -m pip install --quiet -c requirements.txt -r docs/requirements.txt
	touch $@

# torch guesses the toolkit from the place of nvcc, wrongly where that is a link or a wrapper script.
CUDA_HOME ?= /usr/local/cuda
ifneq ($(wildcard $(CUDA_HOME)/bin/nvcc),)
  export CUDA_HOME
endif

# ---- extension --------------------------------------------------------------------------------

# The stamp's name holds what a rebuild depends on beside the sources; ninja then compiles only the
# files that changed. FORCE: the stamp is worth nothing if the module it speaks of is gone.
CSRC := $(shell find csrc -type f)
FLAVOUR := cuda=$(or $(PERTURBED_CUDA),auto)-debug=$(or $(DEBUG),0)-$(subst /,_,$(PY))
EXTENSION := build/.extension-$(FLAVOUR)
FORCE := $(if $(wildcard perturbed/_C*.so),,FORCE)

$(EXTENSION): $(ENVIRONMENT) setup.py $(CSRC) $(FORCE)
	$(PY) setup.py build_ext --inplace
	@rm -f build/.extension-* && touch $@

DEMOS := demo $(addprefix demo-,conv control distributed hybrid lm minimize pso rl swarm zeroth)
.PHONY: FORCE help build install $(DEMOS) \
  test test-all test-cuda check-cuda check-link check-sanitizers check-races check-wheel bench bench-docs gpu lint format docs docs-serve clean
FORCE:

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  \1\t/' | expand -t 16

build: $(EXTENSION) ## compile the extension in place, only what changed

install: $(EXTENSION) ## make `import perturbed` work from any folder in .venv
	$(PY) -m pip install --no-build-isolation --no-deps --editable .

# Threads that sleep at a barrier instead of spinning: several times faster where others use the
# machine too, a few per cent slower where nobody does.
$(DEMOS): export OMP_WAIT_POLICY ?= PASSIVE
test test-all: export OMP_WAIT_POLICY ?= PASSIVE
# Tests run file by file in a process per core, of one thread each; those about threads say so.
test test-all: export OMP_NUM_THREADS ?= 1
PARALLEL := -n auto --dist loadfile

demo: $(EXTENSION) ## train a network of hard signs on MNIST digits
	PYTHONPATH=. $(PY) docs/examples/nes_mnist.py $(ARGS)

demo-conv: $(EXTENSION) ## train a convolutional network on the number of its errors
	PYTHONPATH=. $(PY) docs/examples/nes_convnet.py $(ARGS)

demo-control: $(EXTENSION) ## balance a pole and swing up an acrobot, in seconds
	PYTHONPATH=. $(PY) docs/examples/nes_control.py $(ARGS)

demo-distributed: $(EXTENSION) ## augmented random search over two processes, by torchrun
	PYTHONPATH=. $(PY) -m torch.distributed.run --standalone --nproc-per-node=2 \
	  docs/examples/distributed_ars.py $(ARGS)

demo-hybrid: $(EXTENSION) ## train twelve networks by gradients that learn from each other
	PYTHONPATH=. $(PY) docs/examples/hybrid_swarm.py $(ARGS)

demo-lm: $(EXTENSION) ## teach a small language model to write Python, by the parser's word
	PYTHONPATH=. $(PY) docs/examples/es_finetune_lm.py $(ARGS)

demo-minimize: $(EXTENSION) ## logistic regression of digits by methods of scipy, beside as much Adam
	PYTHONPATH=. $(PY) docs/examples/minimize_logistic.py $(ARGS)

demo-pso: $(EXTENSION) ## fit a small network by particle swarm optimisation, in seconds
	PYTHONPATH=. $(PY) docs/examples/pso_demo.py $(ARGS)

demo-rl: $(EXTENSION) ## teach a swimmer to swim, in MuJoCo, with every one of ten seeds
	PYTHONPATH=. $(PY) docs/examples/ars_swimmer.py --seeds 10 $(ARGS)

demo-swarm: $(EXTENSION) ## ten optimizers that age and die, beside one and beside NES, in minutes
	PYTHONPATH=. $(PY) docs/examples/optimizer_swarm.py $(ARGS)

demo-zeroth: $(EXTENSION) ## train a convolutional network by two losses a step, in minutes
	PYTHONPATH=. $(PY) docs/examples/random_grad_mnist.py $(ARGS)

# ---- tests ------------------------------------------------------------------------------------

test: $(EXTENSION) ## tests without the slow ones and the CUDA ones
	$(PY) -m pytest -q $(PARALLEL) -m "not slow and not cuda" $(ARGS)

test-all: $(EXTENSION) ## tests with the slow ones; CUDA ones where there is a GPU
	$(PY) -m pytest -q $(PARALLEL) $(ARGS)

test-cuda: $(EXTENSION) ## the CUDA tests alone, on a machine with a GPU
	$(PY) -m pytest -q -m cuda $(ARGS)

check-cuda: $(ENVIRONMENT) ## compile every .cu for sm_80, sm_90, sm_120; needs no GPU
	PYTHON=$(PY) tests/check_cuda.sh

check-sanitizers: $(ENVIRONMENT) ## tests of the operators under AddressSanitizer and UBSan; takes long
	PYTHON=$(PY) tests/check_sanitizers.sh $(ARGS)

check-races: $(ENVIRONMENT) ## tests about threads under ThreadSanitizer
	PYTHON=$(PY) tests/check_races.sh $(ARGS)

check-link: ## build, link and test with a CUDA build of torch (TORCH=2.11.0); several GB, no GPU
	PYTHON=$(PYTHON) tests/check_link.sh

check-wheel: $(EXTENSION) ## sdist and wheel, the wheel in a clean environment (TORCH=2.11.0: from the sdist, several GB)
	PYTHON=$(PY) tests/check_wheel.sh

# ---- measure, style, rest ---------------------------------------------------------------------

bench: $(EXTENSION) ## every noise family beside base, naive, stored noise and vmap
	$(PY) -m bench $(ARGS)

# RESULTS: name of the run in bench/results, e.g. 2026-11-21-amd-epyc-zen4-2-cores
# PEERS:   an interpreter with evox and evotorch beside torch, for their rows (optional)
RUN = bench/results/$(RESULTS)
bench-docs: $(EXTENSION) ## measure everything and write the tables of docs
	@test -n "$(RESULTS)" || { echo "name the run: make bench-docs RESULTS=DATE-MACHINE" >&2; exit 2; }
	status=0; \
	  $(PY) -m bench all --save $(RUN) $(if $(PEERS),--peers $(PEERS)) $(ARGS) > /dev/null || status=$$?; \
	  $(PY) -m bench.docs $(RUN).json; exit $$status

gpu: $(ENVIRONMENT) ## everything that needs a GPU: CUDA build, tests, memory checker, bench
	PYTHON=$(PY) tests/gpu.sh

CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
# git names the files, so that build products and caches are never read.
CXX_FILES = $$(git ls-files --cached --others --exclude-standard \
  -- {csrc,tests}/\*.{h,cpp,cu,cuh})

lint: $(ENVIRONMENT) ## ruff, clang-format and mypy, changing nothing
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(ENVIRONMENT) ## rewrite with ruff and clang-format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

# Reads the package without importing it: nothing is compiled. NO_MKDOCS_2_WARNING: no advertising.
docs docs-serve: export NO_MKDOCS_2_WARNING := 1
docs: $(ENVIRONMENT_DOCS) ## the documentation as a site in build/site; warnings are errors
	$(PY) -m mkdocs build --strict

docs-serve: $(ENVIRONMENT_DOCS) ## the same at http://127.0.0.1:8000, anew at every change
	$(PY) -m mkdocs serve --watch perturbed

clean: ## remove build products; .venv stays
	rm -rf build dist *.egg-info perturbed/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find perturbed bench tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
