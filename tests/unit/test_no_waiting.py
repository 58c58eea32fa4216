"""A step asks the device for nothing: what it needs to know of a batch, the host knows.

Tensors of the meta device have no values. A forward and a backward pass that gets through with all that a GPU would
hold on it, parameters and batch, has copied nothing to the host and has waited for nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.data.batch import Batch, collate
from megaspeech.model import speech_text_model
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.model.temporal import transformer_config
from megaspeech.training.forward_step import make_forward_step

pytestmark = pytest.mark.usefixtures("one_rank")


def meta_model(directory: Path) -> SpeechTextModel:
    model = SpeechTextModel(make_config(directory), pre_process=True, post_process=True)
    model.temporal.rope.inv_freq = model.temporal.rope.inv_freq.to("meta")  # no buffer
    return model.to("meta")


def meta_batch(directory: Path) -> Batch:
    """Two samples on the meta device, with a mask on the host in which some frames enter the depth transformer."""
    config = make_config(directory)
    streams = config.streams
    weights = torch.ones(1 + streams.num_codebooks, 20)
    weights[:, 5:9] = 0
    item = {"codes": torch.ones(streams.num_streams, 20).numpy(), "weights": weights.numpy(), "rejected": ()}
    batch = collate([item, item], length=20, config=config)
    assert 0 < batch.depth_frames_BT.sum() < batch.depth_frames_BT.numel()
    return batch.to("meta")


def test_forward_and_backward(tmp_path: Path) -> None:
    model, batch = meta_model(tmp_path), meta_batch(tmp_path)
    sums = torch.ones(2, device="meta", dtype=torch.float64)
    step = make_forward_step(weight_sums=sums, num_microbatches=1, dp_size=1, tensor_parallel_size=1)
    losses, loss_function = step(iter([batch]), model)
    loss, report = loss_function(losses)
    loss.backward()
    assert all(value.device.type == "meta" for value in report.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_pipeline_does_not_wait_after_every_message(tmp_path: Path) -> None:
    megatron = transformer_config(make_config(tmp_path, "parallel.pipeline_model_parallel_size=2"))
    assert megatron.batch_p2p_comm and not megatron.batch_p2p_sync


def test_tensor_parallel_ranks_exchange_no_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, gathered = meta_model(tmp_path), meta_batch(tmp_path), []
    monkeypatch.setattr(
        speech_text_model, "gather_from_tensor_model_parallel_region", lambda x: gathered.append(x.shape[-1]) or x
    )
    model(batch.codes_BST, batch.weights_BPT, batch.depth_frames_BT)
    assert gathered and set(gathered) == {1}


def test_weights_of_a_bf16_run_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's Float16Module makes BF16 of what it is handed by position."""
    config = make_config(tmp_path, "precision.recipe=bf16")
    model = SpeechTextModel(config, pre_process=True, post_process=True)
    batch, seen = meta_batch(tmp_path), {}
    monkeypatch.setattr(model, "forward", lambda *_, **named: seen.update(named) or torch.zeros(1))
    step = make_forward_step(weight_sums=torch.ones(2), num_microbatches=1, dp_size=1, tensor_parallel_size=1)
    step(iter([batch]), Float16Module(model.config, model))
    assert seen["weights_BPT"].dtype is torch.float32


def test_packed_rows_ask_nothing_either(tmp_path: Path) -> None:
    model, batch = meta_model(tmp_path), meta_batch(tmp_path)
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32, device="meta")
    losses = model(batch.codes_BST[:1], batch.weights_BPT[:1], batch.depth_frames_BT[:1], bounds_D=bounds)
    losses[0].sum().backward()


def test_the_depth_transformer_sees_the_frames_that_weigh_alone(tmp_path: Path) -> None:
    model, batch = meta_model(tmp_path), meta_batch(tmp_path)
    seen = []
    model.depth.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[0]))
    model(batch.codes_BST, batch.weights_BPT, batch.depth_frames_BT)
    assert seen == [int(batch.depth_frames_BT.sum())]


def test_without_the_hosts_mask_the_device_is_asked(tmp_path: Path) -> None:
    """So the tests above would see it."""
    model, batch = meta_model(tmp_path), meta_batch(tmp_path)
    with pytest.raises((NotImplementedError, RuntimeError), match="nonzero|meta"):
        model(batch.codes_BST, batch.weights_BPT)
