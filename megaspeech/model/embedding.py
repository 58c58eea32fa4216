"""The packed table of all stream embeddings, its rows sharded over the tensor parallel group."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megaspeech.config.schema import StreamsSection
from megaspeech.kernels import Kernels
from megaspeech.model.counting import padded_rows, used_rows
from megaspeech.model.frames import on_context_rank


def table_offsets(cardinalities: Sequence[int]) -> list[int]:
    """First row of each stream in a packed table of `cardinality + 1` rows a stream (the last is the initial token)."""
    offsets = [0]
    for cardinality in cardinalities[:-1]:
        offsets.append(offsets[-1] + cardinality + 1)
    return offsets


class StreamEmbedding(VocabParallelEmbedding):
    """Raw codes to the temporal transformer's input; delays and initial tokens are applied on the way."""

    is_sharded_alone = True
    """Fully sharded data parallelism gathers its parameters when it is called."""

    def __init__(
        self, streams: StreamsSection, *, megatron: TransformerConfig, kernels: Kernels, atomic_gradient: bool
    ) -> None:
        super().__init__(
            padded_rows(streams.cardinalities), megatron.hidden_size, init_method=megatron.init_method, config=megatron
        )
        self.config = megatron
        with torch.no_grad():
            self.weight[max(0, used_rows(streams.cardinalities) - self.vocab_start_index) :] = 0
        self.kernel = partial(kernels.stream_embedding.stream_embedding, atomic=atomic_gradient)
        self.register_buffer("delays", torch.tensor(streams.delays), persistent=False)
        self.register_buffer("initial", torch.tensor(streams.cardinalities), persistent=False)
        self.register_buffer("offsets", torch.tensor(table_offsets(streams.cardinalities)), persistent=False)

    def forward(self, codes_BST: Tensor, starts_T: Tensor | None = None) -> Tensor:
        """`[T, B, H]`; under context and sequence parallelism this rank's frames of it.

        `starts_T`: of a packed row, see `frames.sample_starts`.
        """
        frames = None
        if self.config.context_parallel_size > 1:
            frames = on_context_rank(torch.arange(codes_BST.shape[-1], device=codes_BST.device))
        partial_TBH = self.kernel(
            codes_BST,
            self.weight,
            delays=self.delays,
            initial=self.initial,
            offsets=self.offsets,
            first_row=self.vocab_start_index,
            frames=frames,
            starts=starts_T,
        )
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(partial_TBH)
        return reduce_from_tensor_model_parallel_region(partial_TBH)
