# Trains and tests ringflash in a virtual environment that it makes itself. `make help` lists the commands.

PYTHON ?= python3
ARGS ?=
TRITON ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test test-triton lint doctor clean

help:
	@echo 'make train    train a small model on every GPU of this machine, or on two CPU processes'
	@echo '              make train ARGS="data.path=corpus/ optimizer.lr=1e-3" passes Hydra overrides'
	@echo 'make test     run the tests; make test ARGS="-k mask" runs some of them'
	@echo 'make test-triton TRITON=3.6.0  compile the Hopper kernels with another version of triton'
	@echo 'make lint     check formatting and style'
	@echo 'make doctor   show what this machine has and what to change'
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

# GPU machines have other versions than constraints.txt names, and what one compiles another may refuse.
test-triton: $(INSTALLED)
	[ -n "$(TRITON)" ] || { echo 'which version? make test-triton TRITON=3.6.0' >&2; exit 1; }
	[ -d .triton-$(TRITON) ] || $(BIN)/python -m pip install --no-deps --target .triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=.triton-$(TRITON) TRITON_CACHE_DIR=.triton-$(TRITON)/cache $(BIN)/python -m pytest tests/kernels/test_hopper_ahead_of_time.py

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

doctor: $(INSTALLED)
	@$(BIN)/python launch/doctor.py

install: $(INSTALLED)

# torch comes first and alone: beside other packages pip could choose another build of it.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here; name Python 3.11 or newer: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit("ringflash needs Python 3.11 or newer, and $(PYTHON) is %d.%d.%d: make PYTHON=..." % sys.version_info[:3] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv)" >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[huggingface,test]'
	@touch $@

clean:
	rm -rf $(VENV) .triton-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
