# `make demo` and `make test` do all their own set-up; they need Python 3.11 or later and make.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.14; do python$$v -c "" 2>/dev/null && echo python$$v && break; done || echo python3)
BIN = .venv/bin
OUT ?= slimgpt-demo
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint docs clean

help:
	@echo "make demo   prune SmolLM2-135M-Instruct and compare it with itself, into $(OUT)/"
	@echo "make test   run the tests"
	@echo "make lint   ruff, import contract, types"
	@echo "make docs   the reference pages, and the site into site/"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("SlimGPT needs Python 3.11 or later, this is %d.%d; set PYTHON=/path/to/python" % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/ready
	$(BIN)/slimgpt demo $(OUT) --overwrite

test: .venv/ready
	$(BIN)/python -m pytest -q -n auto

test-slow: .venv/ready
	$(BIN)/python -m pytest -q -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: .venv/ready
	$(BIN)/python docs/make_reference.py
	$(BIN)/python docs/build_site.py

clean:
	rm -rf .venv build dist site
