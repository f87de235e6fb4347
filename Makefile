# make demo      train, attack and picture a model: five minutes on two cores
# make test      the tests, on TensorFlow (KERAS_BACKEND=jax or torch: there)
# make slow      the tests that make test leaves out: they take longest
# make lint      ruff's rules, its format, the levels of imports, the types
# make results   docs/results.md from the records in results/
# make docs      the documentation site, in site/; a dead link fails
# make docs-flags  docs/flags.md from the fields that declare the settings
# make notebook  run view_images.ipynb on the newest run, into runs/
# make peers     install the attack libraries that benchmarks/parity.py compares with
#
# Everything is installed into .venv by the first of them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Most of a test's time is one core's tracing: two at a time take half as long.
PYTEST_FLAGS ?= --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Only errors from the libraries: their start-up notes hide our own lines.
export TF_CPP_MIN_LOG_LEVEL ?= 3
export GRPC_VERBOSITY ?= ERROR
export MPLBACKEND ?= Agg

DEMO_RUN := runs/cluttered_digits-multi_gaze-demo
# The notebook's run; empty is the newest.
RUN ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test slow lint results docs docs-flags notebook peers clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Saccade needs Python 3.11 or newer; $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1). Write: make PYTHON=/path/to/python" \
	    >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; a changed setup.cfg installs again.
$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

.venv: $(VENV)/.installed-test

demo: $(VENV)/.installed-test
	$(BIN)/python trainer.py --tag=demo --overwrite
	$(BIN)/python adversary.py --run=$(DEMO_RUN) --overwrite \
	  --epsilon=0.05,0.1,0.2 --steps=20 --num_examples=200
	@echo
	@echo "The run is $(DEMO_RUN). Its records and pictures:"
	@find $(DEMO_RUN) -name results.json -o -name '*.png' | sort | \
	  sed 's/^/  /'
	@echo "See it all, in order: make notebook"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m 'not slow'

slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

results: $(VENV)/.installed-test
	$(BIN)/python experiments/results.py

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-flags: $(VENV)/.installed-test
	$(BIN)/python -m saccade.cli.flags_page trainer adversary > docs/flags.md

notebook: $(VENV)/.installed-notebook
	@mkdir -p runs
	RUN="$(RUN)" $(BIN)/python -m nbconvert --to notebook --execute \
	  --ExecutePreprocessor.kernel_name=python3 --log-level=ERROR \
	  --output-dir runs --output view_images.ipynb view_images.ipynb
	$(BIN)/python -m nbconvert --to html --log-level=ERROR \
	  runs/view_images.ipynb
	@echo "Executed: runs/view_images.ipynb, and runs/view_images.html to read"

peers: $(VENV)/.installed-peers
	$(BIN)/python -m pip install --quiet --no-deps 'torchattacks>=3.5.1'

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache site
