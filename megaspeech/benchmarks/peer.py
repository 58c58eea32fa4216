"""Kyutai's own model, trained as moshi-finetune trains all of its weights on one GPU: what people would pick instead.

The model is the `moshi` package's `LMModel` with its own compiled functions, every transformer layer's activations
recomputed in the backward pass. The step follows moshi-finetune (train.py and finetune/, commit 2acc879, July 2025):
BF16 parameters; FP32 copies that torch's AdamW steps as torch chooses to, with FP32 gradients clipped to a norm of 1;
for each microbatch two weighted mean cross entropies, added, two token counts that the host waits for, and a wait for
the device before the next; gradients averaged over microbatches. Left out, in the peer's favour: its second cast of the
gradients back to BF16, its learning rate schedule, its logging.

Grouped queries are moshi's `kv_repeat`, whose keys and values are repeated in memory before attention.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config
from megaspeech.conversion.moshi_config import moshi_config
from megaspeech.data.batch import Batch
from megaspeech.model.temporal import DTYPES
from megaspeech.streaming.runtime import import_moshi

NOT_ARGUMENTS = ("model_type", "moshi_name")
"""Keys of the runtime's config.json that its loader reads and the model does not take."""
MAX_NORM = 1.0


class MoshiPeer:
    """An untrained `LMModel` of the run's shape, its optimizer and its step.

    Args:
        config: the run; its precision says how parameters are kept, BF16 or FP32.
        device: where it is trained.

    Raises:
        ValueError: moshi is not installed, or has no such model.
    """

    def __init__(self, config: Config, *, device: torch.device) -> None:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as moshi-finetune asks of torch
        arguments = {key: value for key, value in moshi_config(config).items() if key not in NOT_ARGUMENTS}
        try:
            loaders = import_moshi(device).loaders
        except ImportError as error:
            raise ValueError(str(error)) from error
        dtype = DTYPES[config.precision.params_dtype]
        torch.manual_seed(config.run.seed)
        with device:
            self.model = loaders.get_moshi_lm(
                None, arguments, device=device, dtype=dtype, lm_kwargs_overrides={"gradient_checkpointing": True}
            ).train()
        self.device, self.weights = device, config.loss
        self.parameters = list(self.model.parameters())
        self.main = [parameter.detach().float().clone() for parameter in self.parameters]
        section = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.main,
            lr=section.lr,
            betas=(section.adam_beta1, section.adam_beta2),
            eps=section.adam_eps,
            weight_decay=section.weight_decay,
        )

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(parameter.numel() for parameter in self.parameters)

    def step(self, batches: list[Batch]) -> float:
        """One optimizer step over some microbatches; returns their mean loss."""
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            codes_BST = batch.codes_BST.to(self.device, non_blocking=True)
            loss, masks = self.loss(codes_BST)
            loss.backward()
            total += loss.detach()
            for mask in masks:
                mask.sum().item()
            if number < len(batches):
                _wait()
        self._update(num_microbatches=len(batches))
        return total.item() / len(batches)

    def loss(self, codes_BST: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(the loss of a microbatch, the masks of its text and its audio tokens)."""
        output = self.model(codes_BST)
        text_B1T, audio_BQT = codes_BST[:, :1], codes_BST[:, 1 : 1 + self.model.dep_q]
        padding = (text_B1T == self.model.text_padding_token_id) | (text_B1T == self.model.end_of_text_padding_id)
        text_weights = output.text_mask.float().masked_fill(output.text_mask & padding, self.weights.text_padding)
        audio_weights = output.mask.float()
        audio_weights[:, 0] *= self.weights.semantic
        loss = _weighted_mean(output.text_logits, text_B1T, text_weights)
        loss = loss + _weighted_mean(output.logits, audio_BQT, audio_weights)
        return loss, (output.text_mask, output.mask)

    def _update(self, *, num_microbatches: int) -> None:
        """Step the FP32 copies by the mean gradients, and take them over."""
        for parameter, main in zip(self.parameters, self.main, strict=True):
            main.grad = parameter.grad.div_(num_microbatches).float()
            parameter.grad = None  # one after the other: both copies of all gradients would not fit
        torch.nn.utils.clip_grad_norm_(self.main, MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, main in zip(self.parameters, self.main, strict=True):
                parameter.copy_(main)


def _weighted_mean(logits_BKTV: Tensor, targets_BKT: Tensor, weights_BKT: Tensor) -> Tensor:
    """Cross entropy in FP32; where nothing is weighed logits may be NaN and targets -1."""
    logits, weights = logits_BKTV.flatten(0, -2).float(), weights_BKT.flatten()
    losses = F.cross_entropy(logits, targets_BKT.clamp(min=0).flatten(), reduction="none")
    return torch.where(weights > 0, losses * weights, 0.0).sum() / weights.sum()


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
