"""Process groups of one rank."""

from __future__ import annotations

from datetime import timedelta

import torch
from megatron.core import parallel_state

from megaspeech.config.computation import ParallelSection
from megaspeech.parallel import groups


def test_every_group_waits_as_long_as_the_run_says() -> None:
    """megatron-core's own would give up after 30 minutes, before a watchdog of more has named who hangs."""
    groups.initialise(ParallelSection(), seed=1, timeout=4000.0)
    try:
        for group in (parallel_state.get_tensor_model_parallel_group(), parallel_state.get_data_parallel_group()):
            assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=4000)
    finally:
        groups.shut_down()
