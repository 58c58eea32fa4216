"""What is summed over ranks beyond what megatron-core sums."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megaspeech.parallel.reductions import _local_gradient


@pytest.mark.parametrize("rank, expected", [(0, [2, 3, 4]), (1, [5, 6, 7, 8]), (2, [])])
def test_of_a_sharded_gradient_the_own_range_alone_is_summed(rank: int, expected: list[int]) -> None:
    """Three ranks share a bucket of 15 numbers; the parameter is its numbers 2 to 8."""
    parameter = torch.nn.Parameter(torch.zeros(7))
    bucket = SimpleNamespace(grad_data=torch.arange(15.0), param_to_index={parameter: (2, 9)})
    group = SimpleNamespace(
        param_to_bucket={parameter: bucket},
        intra_distributed_optimizer_instance_size=3,
        intra_distributed_optimizer_instance_rank=rank,
    )
    options = SimpleNamespace(use_distributed_optimizer=True)
    chunk = SimpleNamespace(ddp_config=options, param_to_bucket_group={parameter: group})
    assert _local_gradient(parameter, chunk).tolist() == expected
