# make demo           a small model, trained from nothing and sampled, in minutes on a CPU
# make check          while you work: lint, and the tests that take milliseconds each
# make test           the tests
# make test-slow      the tests that take minutes each, or come in hundreds
# make test-versions  the tests of make check under the oldest and the newest Python, the oldest PyTorch and the oldest
#                     transformers that are supported, each in an environment of its own (.venv-…, several GB); under the
#                     oldest PyTorch also training and several processes, under the oldest transformers also conversion
# make lint           ruff: lint, and whether everything is formatted
# make clean          removes the environments and caches; runs (out/) and datasets stay
#
# All of them make .venv and install requirements.txt into it, once. To choose:
#   PYTHON=python3.12   the Python to use (3.10 or newer)
#   PYTHON_OLDEST=…, PYTHON_NEWEST=…   those of test-versions
#   TORCH_INDEX=<url>   a package index of PyTorch builds, e.g. the CPU-only ones of https://download.pytorch.org/whl/cpu
#   JOBS=4              how many tests run side by side, each with one thread (as many as there are processors; 0: one by one)
# pip's own settings (PIP_INDEX_URL, pip.conf …) are honoured.

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
DEMO_OUT := out/quickstart
JOBS ?= auto
SIDE_BY_SIDE := -n $(JOBS) --maxprocesses=8 --dist=worksteal

VERSIONS := python-oldest python-newest torch-oldest transformers-oldest

.PHONY: demo check test test-slow test-versions $(VERSIONS:%=test-%) lint clean

demo: $(INSTALLED)
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py --out_dir=$(DEMO_OUT) --prompt="The function returns" --num_samples=1 --max_new_tokens=100
	@echo "run log: $$(ls -t $(DEMO_OUT)/run_*.jsonl | head -n 1)"

check: lint
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not long" tests

test: $(INSTALLED)
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) tests

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test-slow: $(INSTALLED)
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) -m slow tests

PIP_INSTALL := -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or newer: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP_INSTALL) requirements.txt
	@touch $@

# Of each environment: its Python, and the one line of requirements.txt that is another there (by sed).
PYTHON_OLDEST ?= python3.10
PYTHON_NEWEST ?= python3.14
PYTHON_OF_python-oldest := $(PYTHON_OLDEST)
PYTHON_OF_python-newest := $(PYTHON_NEWEST)
OTHER_torch-oldest = s/^torch==[^ ]*/torch==$(shell sed -n 's/^ *"torch>=\([^"]*\)".*/\1/p' pyproject.toml)/
OTHER_transformers-oldest := s/^transformers>=/transformers==/
# … and what of `make test` runs there as well.
ALSO_torch-oldest := tests/distributed tests/test_resume.py tests/test_train.py tests/test_saving.py
ALSO_transformers-oldest := tests/test_huggingface.py tests/test_huggingface_foreign.py tests/test_huggingface_random.py

test-versions:
	$(MAKE) --keep-going $(VERSIONS:%=test-%)

$(VERSIONS:%=test-%): test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not long" tests
	$(if $(ALSO_$*),.venv-$*/bin/python -m pytest -q $(SIDE_BY_SIDE) $(ALSO_$*))

$(VERSIONS:%=.venv-%/.installed): .venv-%/.installed: requirements.txt pyproject.toml
	$(or $(PYTHON_OF_$*),$(PYTHON)) -m venv .venv-$*
	sed '$(OTHER_$*)' requirements.txt > .venv-$*/requirements.txt
	.venv-$*/bin/python $(PIP_INSTALL) .venv-$*/requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VERSIONS:%=.venv-%) .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
