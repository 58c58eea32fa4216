# Every command a user or CI needs. `make` prints them.
PYTHON ?= python3
VENV ?= .venv
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

# State that lets an 8B's step fit one H200; the depths that tell what all layers of the peer would take, which do not.
STEP := tools/measure_throughput.py model.kernels=triton parallel.grad_reduce_in_fp32=false \
	optimizer.use_precision_aware_optimizer=true optimizer.exp_avg_dtype=bf16 optimizer.exp_avg_sq_dtype=bf16
RECIPES := bf16,fp8-delayed,fp8-tensorwise,fp8-blockwise

gpu: ## what needs a GPU: its tests, recipes compared, the benchmarks (where CUDA is, not in .venv)
	$(PYTHON) -m pytest -m gpu tests/gpu
	$(PYTHON) -m pytest tests/unit/test_transformer_engine.py
	$(MAKE) runs/quickstart/shards/rejected.jsonl PYTHON=$(PYTHON)
	$(PYTHON) tools/compare_recipes.py examples/quickstart/config.toml optimizer.lr=5e-4 \
	  model.transformer_impl=transformer_engine --output runs/recipes --json docs/measurements/recipes_gpu.json
	$(PYTHON) kernels/benchmarks/run.py --output docs/measurements
	for model in moshi-7b 8b; do $(PYTHON) $(STEP) --model $$model --recipe $(RECIPES) \
	  --peer moshi --peer-layers 4,12 --json docs/measurements/throughput_$$model.json || exit 1; done
	$(PYTHON) $(STEP) --model 40b --layers 4 --sample-frames 1024 --recipe $(RECIPES) \
	  --json docs/measurements/throughput_40b_4_layers.json
	$(PYTHON) tools/measure_codecs.py --batches 1,8,32,128 --json docs/measurements/codec_speed_gpu.json
	for model in 8b moshi-7b; do $(PYTHON) tools/measure_latency.py $$model --codec --batches 1,2,4,8,16,32,64 \
	  --json docs/measurements/latency_$$model.json || exit 1; done

# The digits to train on. Where espeak-ng or DALI is missing: carry runs/quickstart/{shards,codec,tokenizer.model} there.
runs/quickstart/shards/rejected.jsonl:
	$(PYTHON) examples/quickstart/corpus.py runs/quickstart/corpus
	$(PYTHON) tools/prepare_data.py examples/quickstart/config.toml

# Lines of versions.env as arguments: Apptainer refuses one that it has no use for.
GPU_PINS = $(shell sed -n '/^CPU_/!s/^[A-Z_]*=/--build-arg &/p' docker/versions.env)
CPU_PINS = $(shell sed -n '/^CPU_\|^TORCH=/s/^/--build-arg /p' docker/versions.env)

image: ## the GPU image, by Docker (docker/README.md)
	docker build $(GPU_PINS) -f docker/Dockerfile -t megaspeech .

image-cpu: ## the CPU image; PIP_EXTRA_INDEX_URL=PyTorch's CPU index
	docker build $(CPU_PINS) --build-arg PIP_EXTRA_INDEX_URL -f docker/Dockerfile.cpu -t megaspeech-cpu .

sif: ## the GPU image by Apptainer, where there is no Docker
	apptainer build $(GPU_PINS) megaspeech.sif docker/apptainer.def

clean: ## remove what the quickstart made, not .venv
	rm -rf runs/quickstart

.PHONY: help venv quickstart test check gpu image image-cpu sif clean
.DEFAULT_GOAL := help
