# Two commands do it all on a fresh machine: `make run` and `make test`. Each may be given again at once and then
# does no needless work: what has been done leaves a stamp in .make/.

# Another build of torch, or another Python: make run TORCH='torch==2.13.0 --index-url ...' PYTHON=python3.12
TORCH ?= torch==2.13.0
PYTHON ?=
export PYTHON

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
VENV := .venv/bin
PIP := $(VENV)/python -m pip --disable-pip-version-check
NATIVE := pyproject.toml CMakeLists.txt $(wildcard src/headrace/kernels/csrc/*)
EXTRA = $(VENV)/python tools/extra.py

.PHONY: help run test check docs peaks quality clean
.DELETE_ON_ERROR:

help:
	@echo "make run    install, fetch SmolLM2-135M and answer the example pile: results.jsonl and its report"
	@echo "make test   install with the tools of development and run all tests"
	@echo "make check  formatting, lints, types, structure"
	@echo "make docs   build the documentation into site/"
	@echo "make peaks  measure what this machine can do; reports then say which share of it a run used"
	@echo "make quality TEXT=FILE  what each number format costs SmolLM2-135M on a text"
	@echo "make clean  remove what was built and installed here"

run: .make/package
	$(VENV)/headrace pull smollm2-135m
	$(VENV)/headrace run examples/pile.jsonl -o results.jsonl
	@echo "answers: results.jsonl, report: results.jsonl.report.json"

# Most tests keep one core busy: two processes take 60 % of the time, if torch starts no threads beside them.
test: .make/dev
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest --numprocesses 2 --dist worksteal

check: .make/dev
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/python -m pytest -q tests/test_structure.py

peaks: .make/package
	$(VENV)/headrace bench peaks

quality: .make/package
	@test -n "$(TEXT)" || { echo "name a text in UTF-8: make quality TEXT=novel.txt"; exit 2; }
	$(VENV)/headrace pull smollm2-135m
	$(VENV)/headrace eval ppl --text "$(TEXT)" --precision fp32
	$(VENV)/headrace eval agree --text "$(TEXT)" --precision bf16 --against fp32
	$(VENV)/headrace eval agree --text "$(TEXT)" --precision int8 --against bf16
	$(VENV)/headrace eval agree --text "$(TEXT)" --precision int4 --against bf16
	for group in 32 64 128; do $(VENV)/headrace quantize --text "$(TEXT)" --group $$group; done

docs: .make/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

.make/venv: tools/find-python
	@mkdir -p .make
	python=$$(sh tools/find-python) && "$$python" -m venv .venv
	@touch $@

.make/torch: .make/venv
	$(PIP) install $(TORCH)
	@touch $@

.make/package: .make/torch $(NATIVE)
	$(PIP) install --editable .
	@touch $@

# Only what an extra adds: installing the package again would build its extension again.
.make/dev: .make/package tools/extra.py
	$(EXTRA) dev | $(PIP) install --requirement /dev/stdin
	@touch $@

.make/docs: .make/package tools/extra.py
	$(EXTRA) docs | $(PIP) install --requirement /dev/stdin
	@touch $@

clean:
	rm -rf .venv .make build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
