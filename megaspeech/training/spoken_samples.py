"""What the model would say, for TensorBoard: the codes it finds likeliest, given a validation sample's own past.

Teacher-forced, because that runs through any layout's pipeline; the streamed answer is scored by `streaming`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import numpy as np
import torch
from torch import Tensor

from megaspeech.codecs.protocol import Codec
from megaspeech.config import Config
from megaspeech.data.batch import Batch
from megaspeech.data.tasks import ZERO_TOKEN
from megaspeech.parallel.groups import Grid
from megaspeech.parallel.schedule import run_microbatches
from megaspeech.training.forward_step import forward_logits
from megaspeech.training.journal import Journal

SPOKEN = ("tts-", "s2st-", "s2s-")


def log_spoken_sample(
    journal: Journal,
    *,
    step: int,
    chunks: Sequence[torch.nn.Module],
    valid: Mapping[str, Iterable[list[Batch]]],
    codec: Codec | None,
    config: Config,
    grid: Grid,
) -> None:
    """Write sound and spectrogram of the first validation sample of every spoken task; all ranks call this."""
    for task in (name for name in valid if name.rpartition("/")[-1].startswith(SPOKEN)):
        device = next(chunks[0].parameters()).device
        # An interleaved pipeline runs as many microbatches at a time as it has stages: the same one again.
        batch, repeats = next(iter(valid[task]))[0].to(device), config.parallel.pipeline_model_parallel_size
        for chunk in chunks:
            chunk.eval()
        with torch.no_grad():
            outputs = run_microbatches(
                forward_logits,
                chunks=chunks,
                microbatches=[batch] * (repeats if len(chunks) > 1 else 1),
                num_frames=batch.num_frames,
                micro_batch_size=config.training.micro_batch_size,
                forward_only=True,
            )
        for chunk in chunks:
            chunk.train()
        if grid.is_main and codec is not None:
            _, audio_BQTV = outputs[0]
            end = batch.num_frames if batch.bounds_D is None else int(batch.bounds_D[1])
            codes_QT = _undelayed(audio_BQTV[0, :, :end].argmax(-1), delays=config.streams.delays[1:])
            codes_QT = codes_QT[:, batch.codes_BST[0, 0, :end].cpu() != ZERO_TOKEN]
            samples_N = codec.decode(codes_QT[None].cpu())[0].clamp(-1, 1)
            picture = spectrogram_picture(samples_N.numpy())
            journal.audio(step, f"spoken/{task}", samples_N, sample_rate=codec.sample_rate, spectrogram=picture)


def _undelayed(codes_QT: Tensor, *, delays: tuple[int, ...]) -> Tensor:
    """Every codebook moved left by its delay; the last frames repeat."""
    num_frames = codes_QT.shape[1]
    rows = [
        row[torch.arange(delay, num_frames + delay).clamp(max=num_frames - 1)]
        for row, delay in zip(codes_QT, delays, strict=False)
    ]
    return torch.stack(rows)


def spectrogram_picture(samples_N: np.ndarray, *, window: int = 512, hop: int = 128) -> np.ndarray:
    """Log magnitude spectrogram in colour, `[height, width, 3]` in [0, 1], low frequencies at the bottom."""
    magnitude = torch.stft(
        torch.from_numpy(samples_N), window, hop, window=torch.hann_window(window), return_complex=True
    ).abs()
    decibels = 20 * torch.log10(magnitude.clamp(min=1e-5))
    scaled = ((decibels - decibels.max()).clamp(min=-80) / 80 + 1).flip(0).numpy()
    return matplotlib.colormaps["magma"](scaled)[..., :3]
