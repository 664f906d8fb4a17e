# `make demo` and `make test` need nothing but a Python of 3.11 or newer; everything else is set up in .venv.
SHELL := /bin/bash
SEED ?= 0
STEPS ?=
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help setup demo test test-vllm test-peer test-e2e lint format proto clean

help:                 ## show this list
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY)       ## make .venv with everything the project needs

$(READY): pyproject.toml scripts/setup_venv.sh scripts/venv.sh
	@scripts/setup_venv.sh
	@touch $@

demo: $(READY)        ## distil the bundled student from the bundled teacher (SEED=0)
	@$(BIN)/opd demo --seed $(SEED) $(if $(STEPS),--steps $(STEPS))

# Two files at a time, but for whole processes, which wait for clocks: they have the machine to themselves.
test: lint            ## lint, types and every test, with a real Redis and real gRPC
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit tests/contract
	$(BIN)/python -m pytest tests/integration

test-vllm:            ## the contract tests of teacher engines and rollouts on vLLM, in .venv-vllm (made when not there)
	@scripts/setup_vllm.sh
	OPD_REQUIRE_VLLM=1 .venv-vllm/bin/python -m pytest tests/contract/engines tests/contract/rollouts
	OPD_REQUIRE_VLLM=1 VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 \
	    .venv-vllm/bin/python -m pytest tests/contract/engines -k "not process"
	OPD_REQUIRE_VLLM=1 VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 \
	    .venv-vllm/bin/python -m pytest tests/contract/rollouts -k "new_version and hostile"

test-peer: $(READY)   ## a training step beside TRL's, in .venv-peer (made when it is not there)
	@scripts/setup_peer.sh
	OPD_REQUIRE_PEER=1 $(BIN)/python -m pytest tests/integration/benchmarks

test-e2e: $(READY)    ## the images and docker-compose.yml in a real Docker engine: this machine's, or one of our own (root)
	$(BIN)/python -m pytest tests/e2e
	@cat .e2e/images.txt 2>/dev/null || true

lint: $(READY)        ## ruff, strict types, spelling, generated code and schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	scripts/generate_proto.sh --check
	scripts/check_proto.sh

format: $(READY)      ## let ruff format and sort the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(READY)       ## generate opd/wire/pb from proto/
	scripts/generate_proto.sh

clean:                ## remove what was made here, .venv included
	rm -rf .venv .venv-vllm .venv-peer .buf .e2e .kubernetes build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
