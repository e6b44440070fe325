# `make demo` and `make test` need nothing but Python and make: they create .venv and install into it what is missing.
# A stamp in .venv stands for each set of packages and is older than setup.py or pyproject.toml when it has to be renewed.

PYTHON ?= python3
VENV ?= .venv
# Test processes. Each runs torch on one thread: on small models more threads only get in each other's way.
WORKERS ?= 2
# More options for pytest, as in `make test ARGS="-k delay -x"`.
ARGS ?=

BIN := $(VENV)/bin
METADATA := setup.py pyproject.toml
PYTEST := TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/pytest
LINTED := $(VENV)/.quality-installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test slow style quality bench nano clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed  ## ask nano a question; the answer is printed as it is generated, and spoken in reply.wav
	HF_HUB_OFFLINE=1 $(BIN)/minimind-o chat --text "Where does a pig live?" --voice rms --out reply.wav

test: $(VENV)/.test-installed  ## run the tests, but for the slow ones
	$(PYTEST) -n $(WORKERS) $(ARGS)

slow: $(VENV)/.test-installed  ## run the slow tests (some build and install: they need a package index)
	$(PYTEST) -m slow $(ARGS)

style: $(LINTED)  ## repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A type checker looks for `minimind_o_hf.modeling` in `minimind_o_hf/`: it is given the installed layout, as links. It
# does not look into linked folders: of `data`, `modeling` and `processing` it knows what others import from them.
quality: $(LINTED)  ## check style, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types
	@$(BIN)/python -c "import os, shutil as s; s.copytree('$(CURDIR)/minimind_o_hf', 'build/types/minimind_o_hf', \
		copy_function=os.symlink, ignore=s.ignore_patterns('data', 'nano', '__pycache__'))"
	@ln -s $(CURDIR)/minimind_o_hf/data $(CURDIR)/modeling $(CURDIR)/processing build/types/minimind_o_hf/
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## measure generation at the released size
	$(BIN)/python benchmarks/generation.py $(ARGS)

nano: $(VENV)/.test-installed  ## train the nano model from nothing in work/nano (hours; ARGS=--quick: a smoke run in work/nano-quick); needs flite
	@command -v flite > /dev/null || { echo "No flite found. On Debian and Ubuntu: apt install flite" >&2; exit 1; }
	$(BIN)/python training_scripts/nano/nano.py work/nano$(findstring -quick,$(ARGS)) $(ARGS)

clean:  ## remove what was built and cached; the environment stays (rm -rf .venv)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .coverage reply*.wav
	find . -name .venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { echo "No $(PYTHON) found: install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" --version 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || \
		{ echo "No virtual environment could be made in $(VENV). On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(METADATA) | $(VENV)/.created
	$(BIN)/python -m pip install --editable .
	@touch $@

$(VENV)/.test-installed: $(METADATA) | $(VENV)/.created
	$(BIN)/python -m pip install --editable ".[test,pipeline,train]"
	@touch $@ $(VENV)/.installed

$(LINTED): $(METADATA) | $(VENV)/.created
	$(BIN)/python -m pip install --editable ".[quality]"
	@touch $@ $(VENV)/.installed
