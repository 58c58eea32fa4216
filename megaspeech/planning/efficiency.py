"""How much of a data sheet's rate is reached: every constant of the time model, in one place.

None is measured by this project yet: they are *assumed*, fitted so that the published tables of
`tests/unit/test_published_speed.py` come out within 15%: Megatron-LM's of H100s in BF16 (README of NVIDIA/Megatron-LM,
images/model_table.png, 2024), and NeMo 24.07's of H100s in FP8 (its docs/source/performance/performance_summary.md).
`docs/measurements/` is to replace them.
"""

from __future__ import annotations

PRODUCT = {"bf16": 0.65, "fp8": 0.63}
"""Of the peak of large matrix products, by their numbers; what NVIDIA's own runs leave after all else is counted."""
HALF_WIDTH = 500
"""Width of a model at which half of PRODUCT is reached: narrow products move more bytes an operation."""
HALF_ROWS = 128
"""Frames of a product at which half of it is reached: a tile of a matrix product's kernels has as many rows."""
DEPTH_PRODUCT = 0.50
"""Of BF16's peak, for the depth transformer's batched products, which are small. Assumed, fitted to nothing."""
ATTENTION = 0.40
"""Of BF16's peak, forward and backward (FlashAttention-3, arXiv 2407.08608, figures 5 and 6: 0.4 to 0.65 causal)."""
MEMORY = 0.70
"""Of the memory's bandwidth, for what is done number by number."""
NVLINK = 0.75
"""Of one direction's rate, for collectives in a node."""
NETWORK = 0.85
"""Of an adapter's rate, for collectives between nodes."""
TENSOR_HIDDEN = 0.5
"""Share of tensor parallel communication behind products, with `parallel.tp_comm_overlap`."""
PIPELINE_HIDDEN = 0.9
"""Share of what interleaved stages send that hides behind computation; of plain 1F1B nothing does."""
SHARDED_HIDDEN = 0.9
"""Share of fully sharded data parallelism's communication that can hide behind computation. Assumed, fitted to
nothing."""
BANDWIDTH_UNKNOWN = 2400.0
"""GB/s, where no source gave a GPU's: the slower of the memories that H100 cards have."""
STEP_OVERHEAD = 0.01
"""Seconds a step: the norm of the gradients, the host."""
MARGIN = 0.97
"""Of a GPU's memory, what is planned with."""
