# `make demo` and `make test` do all their own set-up; they need Python 3.11 or later and make.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.14; do python$$v -c "" 2>/dev/null && echo python$$v && break; done || echo python3)
BIN = .venv/bin
OUT ?= slimgpt-demo
.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-slow wheel lint docs clean

help:
	@echo "make demo   prune SmolLM2-135M-Instruct and compare it with itself, into $(OUT)/"
	@echo "make test   run the tests"
	@echo "make wheel  build the package, install it into a fresh environment, prune a model with it"
	@echo "make test-oldest   some tests with the lowest versions that pyproject.toml allows"
	@echo "make lint   ruff, import contract, types"
	@echo "make docs   the reference pages, and the site into site/"

# What pruning needs, which takes half as long as the tools of `make test`.
.venv/pruning-ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("SlimGPT needs Python 3.11 or later, this is %d.%d; set PYTHON=/path/to/python" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/ready: .venv/pruning-ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/pruning-ready
	$(BIN)/slimgpt demo $(OUT) --overwrite

test: .venv/ready
	$(BIN)/python -m pytest -q -n auto

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

# The oldest versions live in an environment of their own.
.venv-oldest/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt $(TORCH) torch
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[hub,recover]" pytest pytest-xdist hypothesis filelock
	touch $@

test-oldest: .venv-oldest/ready
	# Padding changes the last bit of torch 2.8's products (6e-7 here); of today's it does not.
	.venv-oldest/bin/python -m pytest -q -n auto -k "not equal_to_the_bit and not export_and_verify and not prune_and_export" tests/calibration tests/checkpoint tests/cli tests/export tests/pipeline tests/planning tests/pruning tests/recovery tests/solver

wheel:
	sh .github/try_wheel.sh $(PYTHON) $(TORCH)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: .venv/ready
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/build_site.py

clean:
	rm -rf .venv .venv-oldest build dist site
