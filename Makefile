# `make demo` and `make test` set up what they need on a fresh machine: a virtual environment and the packages.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.installed
unexport PYTHONDONTWRITEBYTECODE  # tests start hundreds of processes, each of which would compile the package anew

.PHONY: demo types test test-matrix mutants docs bench-gpu clean

# The program `deepspeed` names its interpreter in its first line, which ends at the first space of a path.
demo: $(READY)
	"$(BIN)/python" -m deepspeed.launcher.runner finetune_demo/finetune_cogvlm.py

types: $(READY)  # mypy by [tool.mypy] of pyproject.toml: strict for lora/, parallel/, files/ and adapters/
	"$(BIN)/python" -m mypy sat_lora

# Many tests wait rather than compute, so three run at a time; those of a file share what is made for them.
WORKERS ?= 3

test: $(READY)
	"$(BIN)/python" -m pytest --numprocesses $(WORKERS) --dist loadfile

# Tests of what changes break most, without those that start ranks or programs: to be done while somebody waits.
FAST := tests/test_layers.py tests/test_words.py tests/lora tests/parallel tests/files tests/adapters tests/data tests/training/settings
FAST += tests/cogvlm/inputs tests/watchdog/test_verdict.py tests/docs/test_pages.py
FAST += $(addprefix tests/cases/test_,conversations.py formats.py keys.py layouts.py left_out.py patterns.py texts.py what_is_said.py)
RANKS := adapters/test_merge lora/test_optimizer_groups lora/deltas/test_delta_kernels parallel/test_distributed

.PHONY: check lint

check: lint types  # what a commit has to pass
	"$(BIN)/python" -m pytest --numprocesses $(WORKERS) --dist loadfile $(FAST) $(RANKS:%=--ignore=tests/%.py)

lint: $(READY)
	"$(BIN)/python" -m ruff format --check
	"$(BIN)/python" -m ruff check

# An hour and more: every layout, and every other long test. A busy machine is waited for.
test-matrix: WORKERS = 2  # its tests start more ranks, and tell times
test-matrix: export SAT_LORA_TEST_PATIENCE ?= 5
test-matrix: $(VENV)/.matrix-installed
	"$(BIN)/python" -m pytest -m matrix --numprocesses $(WORKERS) --dist loadfile -v -rf --durations 40; status=$$?; \
	"$(BIN)/python" -m tests.distributed.matrix && exit $$status

$(VENV)/.matrix-installed: $(READY)  # the page is opened in a browser where there is one: apt-get install chromium
	"$(BIN)/python" -m pip install -q -c constraints.txt -e '.[matrix]'
	touch $@

# Small changes of lora/ and files/, at most 25 of a file: do these tests notice? MUTANTS="--per-file 0 --file FILE": all of one.
MUTANT_TESTS := tests/lora tests/files tests/cases/test_patterns.py --ignore=tests/lora/deltas/test_delta_kernels.py
MUTANTS ?=

mutants: $(VENV)/.mutants-installed
	"$(BIN)/python" -m tests.support.mutants --workers $(WORKERS) $(MUTANTS) $(MUTANT_TESTS)

$(VENV)/.mutants-installed: $(READY)
	"$(BIN)/python" -m pip install -q -c constraints.txt -e '.[mutants]'
	touch $@

docs: $(VENV)/.docs-installed  # the pages of docs/ into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 "$(BIN)/python" -m mkdocs build --strict

$(VENV)/.docs-installed: $(READY)
	"$(BIN)/python" -m pip install -q -c constraints.txt -e '.[docs]'
	touch $@

STAGES ?= tests adapter step decode loop run
OUT ?= runs/bench-gpu

bench-gpu:  # with the machine's own Python and packages; eight minutes of an H200 or H100
	$(PYTHON) -m benchmarks.bench_gpu --stages $(STAGES) --out $(OUT)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install -q -c constraints.txt -e '.[test,demo]'
	touch $@

clean:
	rm -rf "$(VENV)" runs finetune_demo/captchas finetune_demo/conversations site
