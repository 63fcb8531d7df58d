# make demo           a small model, trained from nothing and sampled, in minutes on a CPU
# make test           the tests
# make test-slow      the tests that take minutes each, or come in hundreds
# make lint           ruff: lint, and whether everything is formatted
# make clean          removes .venv and caches; runs (out/) and datasets stay
#
# All of them make .venv and install requirements.txt into it, once. To choose:
#   PYTHON=python3.12   the Python to use (3.10 or newer)
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

.PHONY: demo test test-slow lint clean

demo: $(INSTALLED)
	$(RUN) train.py config/quickstart.py
	$(RUN) sample.py --out_dir=$(DEMO_OUT) --prompt="The function returns" --num_samples=1 --max_new_tokens=100
	@echo "run log: $$(ls -t $(DEMO_OUT)/run_*.jsonl | head -n 1)"

test: $(INSTALLED)
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) tests

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test-slow: $(INSTALLED)
	$(RUN) -m pytest -q $(SIDE_BY_SIDE) -m slow tests

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.10 or newer: make PYTHON=python3.12" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r requirements.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
