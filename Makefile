# Every command a user or CI needs. `make` prints them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

help: ## print this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Versions come from constraints.txt alone. moshi goes in without its own pins, which exclude our torch.
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --quiet --progress-bar on -c constraints.txt --no-deps moshi
	touch $@

venv: $(VENV)/.ready ## make .venv and install

quickstart: $(VENV)/.ready ## speech -> training -> the moshi runtime -> answers, on any machine; goes on where it was
	$(BIN)/python examples/quickstart/run.py $(ARGS)

test: $(VENV)/.ready ## every test
	$(BIN)/python -m pytest

check: $(VENV)/.ready ## ruff and the house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/unit/test_house.py

gpu: ## what needs a GPU: its tests, recipes compared, the kernels' benchmarks (where CUDA is, not in .venv)
	$(PYTHON) -m pytest -m gpu tests/gpu
	$(MAKE) runs/quickstart/shards/valid PYTHON=$(PYTHON)
	$(PYTHON) tools/compare_recipes.py examples/quickstart/config.toml optimizer.lr=5e-4 \
	  model.transformer_impl=transformer_engine --output runs/recipes --json docs/measurements/recipes_gpu.json
	$(PYTHON) kernels/benchmarks/run.py --output docs/measurements

# The digits to train on. Where espeak-ng or DALI is missing: carry runs/quickstart/{shards,codec,tokenizer.model} there.
runs/quickstart/shards/valid:
	$(PYTHON) examples/quickstart/corpus.py runs/quickstart/corpus
	$(PYTHON) tools/prepare_data.py examples/quickstart/config.toml runs/quickstart/corpus/train.jsonl \
	  runs/quickstart/corpus/valid.jsonl

image: ## the GPU image, by Docker (docker/README.md)
	docker build $(shell sed -n 's/^[A-Z_]*=/--build-arg &/p' docker/versions.env) -f docker/Dockerfile -t megaspeech .

clean: ## remove what the quickstart made, not .venv
	rm -rf runs/quickstart

.PHONY: help venv quickstart test check gpu image clean
.DEFAULT_GOAL := help
