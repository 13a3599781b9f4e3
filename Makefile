# Treeline's commands. `make demo` and `make test` set up what they need.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: $(INSTALLED) ## Make .venv with the locked dependencies, and fetch the default model
	$(BIN)/treeline models pull default

# torch goes first and alone, so that pip takes a CPU build where one is at hand.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "pip==25.3"
	$(BIN)/pip install --progress-bar on --quiet "torch==2.13.0"
	$(BIN)/pip install --progress-bar on --quiet -r requirements.lock
	touch $(STAMP)

# Builds the kernels where there is a C compiler.
$(INSTALLED): $(STAMP) setup.py treeline/pyproject.toml $(wildcard lm/kernels/*.? lm/kernels/*/*.?)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e ./treeline -e .
	touch $(INSTALLED)

demo: setup ## The main job: start everything, stream answers, compare with plain decoding, stop
	$(BIN)/treeline demo

serve: setup ## Start everything and keep it running; Ctrl-C stops
	$(BIN)/treeline serve

test: setup ## The whole test suite
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-slow: setup ## Tests that take minutes: every policy against transformers on the default model
	$(BIN)/python -m pytest -m slow --override-ini addopts="-q -s"

chaos: $(INSTALLED) ## Break every service on purpose, compare every text: MINUTES=2 SEED=0
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),2) --seed $(or $(SEED),0)

fuzz: $(INSTALLED) ## Mutated messages to every RPC of every port: INPUTS=100000
	$(BIN)/python -m tests.chaos.fuzz --inputs $(or $(INPUTS),100000)

lint: $(INSTALLED) ## Style, types, contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/buf format -d --exit-code
	$(BIN)/buf breaking --against proto/released.binpb

# An old generator: what it writes runs with protobuf 4.25 to 7 and grpcio 1.62 and later, so clients need no newer ones.
proto: ## Regenerate the code of the contracts
	$(PYTHON) -m venv build/proto
	build/proto/bin/pip install --quiet "grpcio-tools==1.62.3" "setuptools<81"
	build/proto/bin/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/treeline/v1/*.proto

# Only what clients speak: the other contracts are between services of one version, and may change freely.
release-contract: $(INSTALLED) ## Record the clients' contract, which `make lint` lets nobody break
	$(BIN)/buf build --path proto/treeline/v1/generation.proto --exclude-source-info -o proto/released.binpb

docs: $(INSTALLED) ## Regenerate the reference pages
	$(BIN)/python docs/generate.py

site: $(INSTALLED) ## The documentation as a site in build/site; a broken link fails
	$(BIN)/mkdocs build --strict --quiet

wheels: ## Build both distributions into build/wheels, from a copy without anything untracked
	rm -rf build/source build/wheels
	mkdir -p build/source
	git ls-files -z | xargs -0 cp --parents --target-directory build/source
	cp LICENSE build/source/treeline
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheels build/source/treeline build/source

clean: ## Remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info build lm/_kernels*.so

.PHONY: help setup demo serve test test-slow chaos fuzz lint proto release-contract docs site wheels clean
