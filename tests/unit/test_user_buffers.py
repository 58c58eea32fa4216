"""Buffers for tensor parallel communication: their size, and who cannot have them. They need several GPUs to run."""

from __future__ import annotations

from pathlib import Path

import pytest
from one_rank import make_config

from megaspeech.config import Config
from megaspeech.parallel.requirements import require_machine
from megaspeech.parallel.user_buffers import buffered_frames, initialise_user_buffers


def config_of(directory: Path, *overrides: str) -> Config:
    parallel = ("tensor_model_parallel_size=2", "sequence_parallel=true", "tp_comm_overlap=true")
    lengths = ("data.num_frames=96", "data.length_multiple=96", "training.micro_batch_size=4")
    return make_config(directory, *(f"parallel.{each}" for each in parallel), *lengths, *overrides)


def test_buffers_hold_a_microbatch(tmp_path: Path) -> None:
    assert buffered_frames(config_of(tmp_path)) == 4 * 96


def test_a_context_parallel_rank_holds_its_share_of_what_fp8_pads(tmp_path: Path) -> None:
    config = config_of(tmp_path, "precision.recipe=fp8-blockwise", "parallel.context_parallel_size=2")
    assert buffered_frames(config) == 4 * 1536 // 2  # 96 to a multiple of 96 and of 128 frames on each of 2 x 2 ranks


def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parallel.tp_comm_overlap needs a GPU, and here is none; set it false"):
        require_machine(config_of(tmp_path))


def test_nobody_else_is_asked(tmp_path: Path) -> None:
    initialise_user_buffers(make_config(tmp_path))
