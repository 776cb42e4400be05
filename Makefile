# Trains and tests ringflash in a virtual environment that it makes itself. `make help` lists the commands.

PYTHON ?= python3
ARGS ?=
TORCH ?=
TRITON ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SPACE := $(subst ,, )

.DEFAULT_GOAL := help
.PHONY: help install train test test-torch test-triton lint doctor warm clean

help:
	@echo 'make train    train a small model on every GPU of this machine, or on two CPU processes'
	@echo '              make train ARGS="data.path=corpus/ optimizer.lr=1e-3" passes Hydra overrides'
	@echo 'make test     run the tests; make test ARGS="-k mask" runs some of them'
	@echo 'make test-torch TORCH=2.11.0   run the tests with another version of torch'
	@echo 'make test-triton TRITON=3.6.0  compile the Hopper kernels, and launch, with another version of triton'
	@echo 'make lint     check formatting, style and types'
	@echo 'make doctor   show what this machine has and what to change'
	@echo 'make warm ARGS="head_dims=128 heads=32/8"   compile the kernels of a job on GPUs ahead of it'
	@echo 'make install  make .venv and install, nothing else; PYTHON=python3.12 chooses the interpreter'
	@echo 'make clean    remove .venv and all caches; runs/ stays'

# torchrun would set one thread per process; the processes share the cores instead.
train: $(INSTALLED)
	@gpus=$$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())'); \
	processes=$$([ "$$gpus" -gt 0 ] && echo "$$gpus" || echo 2); \
	threads=$$(( $$(nproc) / processes )); \
	export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( threads > 0 ? threads : 1 ))}; \
	$(BIN)/torchrun --standalone --nproc-per-node="$$processes" launch/train.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

# Users have other versions than constraints.txt names, and what one traces or compiles another may refuse. In an
# environment of its own, with the triton that this torch brings; the tests of kernels are for test-triton.
test-torch:
	@[ -n "$(TORCH)" ] || { echo 'which version? make test-torch TORCH=2.11.0' >&2; exit 1; }
	[ -x .torch-$(TORCH)/bin/python ] || $(PYTHON) -m venv .torch-$(TORCH)
	grep -v -e '^torch==' -e '^triton==' -e '^setuptools==' constraints.txt > .torch-$(TORCH)/constraints.txt
	.torch-$(TORCH)/bin/python -m pip install --constraint .torch-$(TORCH)/constraints.txt torch==$(TORCH)
	.torch-$(TORCH)/bin/python -m pip install --constraint .torch-$(TORCH)/constraints.txt --editable '.[huggingface,test]'
	.torch-$(TORCH)/bin/python -m pytest --ignore=tests/kernels --ignore=tests/packaging $(ARGS)

# What an own launcher hands to the driver follows Triton's, whose launcher is another one in each version.
TRITON_TESTS := $(addprefix tests/kernels/test_,hopper_ahead_of_time.py hopper_narrow.py hopper_launches.py direct_launch.py)

test-triton: $(INSTALLED)
	@[ -n "$(TRITON)" ] || { echo 'which version? make test-triton TRITON=3.6.0' >&2; exit 1; }
	[ -d .triton-$(TRITON) ] || $(BIN)/python -m pip install --no-deps --target .triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=.triton-$(TRITON) TRITON_CACHE_DIR=.triton-$(TRITON)/cache $(BIN)/python -m pytest $(TRITON_TESTS) $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

doctor: $(INSTALLED)
	@$(BIN)/python launch/doctor.py

warm: $(INSTALLED)
	@$(BIN)/python launch/warm.py $(ARGS)

install: $(INSTALLED)

# What is in .venv already is used as it is; PYTHON only makes a new one.
INTERPRETER = $(shell [ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON))
NO_PYTHON = { echo "no $(PYTHON) here; name Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
VERSION = -c 'import sys; print("%d.%d" % sys.version_info[:2])'

# A PYTHON that was asked for, on the command line or in the environment, is not passed over in silence.
ifneq ($(origin PYTHON),file)
.PHONY: asked-python
asked-python:
	@[ -x $(BIN)/python ] || exit 0; \
	asked=$$($(PYTHON) $(VERSION)) || $(NO_PYTHON); \
	there=$$($(BIN)/python $(VERSION)); \
	[ "$$asked" = "$$there" ] || \
	    { echo "PYTHON=$(PYTHON) is Python $$asked, and $(VENV) has Python $$there: make clean first" >&2; exit 1; }

$(INSTALLED): | asked-python
endif

# --constraint does not reach the environments in which pip builds packages from source. Variables do: PIP_CONSTRAINT
# with older pip, PIP_BUILD_CONSTRAINT with newer. A URL, because pip splits their values at spaces.
$(INSTALLED): export PIP_CONSTRAINT = file://$(subst $(SPACE),%20,$(CURDIR))/constraints.txt
$(INSTALLED): export PIP_BUILD_CONSTRAINT = $(PIP_CONSTRAINT)

# torch comes first and alone: beside other packages pip could choose another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(INTERPRETER) >/dev/null || $(NO_PYTHON)
	@$(INTERPRETER) -c 'import sys; sys.exit("ringflash needs Python 3.11 or newer, and $(INTERPRETER) is %d.%d.%d: $(if $(wildcard $(BIN)/python),make clean && )make PYTHON=..." % sys.version_info[:3] if sys.version_info < (3, 11) else 0)'
	@[ -x $(BIN)/python ] || $(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv)" >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[huggingface,test]'
	@touch $@

clean:
	rm -rf $(VENV) .torch-* .triton-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
