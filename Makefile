# Two commands for a fresh machine with Python 3.11 and a compiler: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test sanitize lint docs bench clean

NATIVE := CMakeLists.txt $(wildcard quire/kernels/csrc/*)

$(VENV)/torch:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0"
	touch $@

$(VENV)/base: $(VENV)/torch pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --editable .
	touch $@

# Not on top of base: each of them compiles the kernels.
$(VENV)/dev: $(VENV)/torch pyproject.toml $(NATIVE)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $(VENV)/base $@

demo: $(VENV)/base
	$(BIN)/quire run examples/prompts.jsonl -o demo-output.jsonl --temperature 0 --fresh
	@echo "The first results, of demo-output.jsonl:"
	@$(BIN)/python examples/show.py demo-output.jsonl 6

test: $(VENV)/dev lint
	$(BIN)/pytest -n $(JOBS)

sanitize: $(VENV)/dev
	.ci/sanitize

lint: $(VENV)/dev
	$(BIN)/ruff check quire tests training examples docs benchmarks
	$(BIN)/ruff format --check quire tests training examples docs benchmarks
	$(BIN)/mypy

docs: $(VENV)/dev
	$(BIN)/python docs/generate.py

bench: $(VENV)/dev
	$(BIN)/quire bench

clean:
	rm -rf $(VENV) build bench-out demo-output.jsonl*
