"""Hold the planner's counts against the real modules of the large models' stages, built as fake ranks; no GPU needed.

python tools/measure_stages.py --output docs/measurements/planning.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

from megaspeech.config import read_config

MODELS = {"8b": (2, 2), "40b": (8, 4), "70b": (8, 8)}
"""Tensor and pipeline size to build each preset at; 8 replicas of each."""
REPLICAS = 8
RECOMPUTE = {
    "nothing": [],
    "mlp": ["parallel.recompute_granularity=selective", 'parallel.recompute_modules=["mlp"]'],
    "all": ["parallel.recompute_granularity=full"],
}
HEAD = """\
# What a stage takes: planned, and in the flesh

Written by `python tools/measure_stages.py`. Each stage's real modules, wrapped in DDP with the distributed optimizer,
as a rank of tensor x pipeline x 8 replicas, without a GPU. State: bytes of weights, gradients and main weights, as
their buffers are. Activations: all storages that the graph of one microbatch of 4,096 frames holds. Local layers, BF16,
sequence parallelism. Of TransformerEngine's layers, and of a GPU's `max_memory_allocated`, nothing is measured yet.

| model | tensor x pipeline | recomputed | stage | parameters | state, GB | as planned | activations, GB | planned |
|---|---|---|---|---|---|---|---|---|
"""


def main(arguments: list[str] | None = None) -> int:
    """Run; see the module. Returns 1 where state is not as planned, or activations are not within 10%."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--output", type=Path, required=True, help="Markdown")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    rows, good = [], True
    for model in options.models.split(","):
        for recompute, keys in RECOMPUTE.items():
            for row, fits in _rows(model, recompute, keys):
                print(row, flush=True)
                rows.append(row)
                good &= fits
    options.output.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    return int(not good)


def _rows(model: str, recompute: str, keys: list[str]) -> list[tuple[str, bool]]:
    """(row, whether it is as planned) of the first, the second and the last stage."""
    from megaspeech.planning.activations import LOCAL
    from megaspeech.planning.memory import stage_memory
    from megaspeech.planning.truth import measure_stage

    tensor, stages = MODELS[model]
    overrides = [
        *(f"parallel.tensor_model_parallel_size={tensor}", f"parallel.pipeline_model_parallel_size={stages}"),
        *("parallel.sequence_parallel=true", "precision.recipe=bf16", "model.transformer_impl=local"),
        *("data.num_frames=4096", "temporal.context=4096"),  # a window would be a mask, which the local layers keep
        # One microbatch, so that what is planned in flight is that of one.
        *("training.micro_batch_size=1", f"training.global_batch_size={REPLICAS}"),
    ]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "config.toml")
        path.write_text(f'[model]\npreset = "{model}"\n')
        config = read_config(path, [*overrides, *keys], world_size=tensor * stages * REPLICAS)
    planned, found = stage_memory(config, data_parallel_size=REPLICAS, layer_kind=LOCAL), []
    for stage in sorted({0, 1, stages - 1}):
        real, plan = measure_stage(config, stage=stage, world_size=tensor * stages * REPLICAS), planned[stage]
        state = [plan.state[kind] for kind in ("weights", "gradients", "main weights")]
        same = state == [real.weights, real.gradients, real.main_weights]
        same &= real.parameters == sum(plan.parameters.values())
        near = plan.activations / real.activations - 1
        row = (
            f"| {model} | {tensor} x {stages} | {recompute} | {stage} | {real.parameters:,} "
            f"| {real.weights / 1e9:.3f}, {real.gradients / 1e9:.3f}, {real.main_weights / 1e9:.3f} "
            f"| {'to the byte' if same else 'no'} | {real.activations / 1e9:.3f} | {near:+.2%} |"
        )
        found.append((row, same and abs(near) < 0.1))
    return found


if __name__ == "__main__":
    sys.exit(main())
