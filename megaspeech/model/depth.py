"""The depth transformer: the codebooks of one frame, each with weights of its own, for many frames at once.

Frames are independent, so tensor parallel ranks share the frames, not the weights: no collective inside, and the
weights' gradients are summed over the group after the step (`parallel.reductions`). One batched matmul a projection
serves all codebooks.

Per frame with temporal output h (moshi's `LMModel.forward_depformer_training`):
    x_0 = in_0 h + text_embedding(text),   x_q = in_q h + embedding_{q-1}(token of codebook q-1),
then pre-norm attention over codebooks (causal, no positions) and SwiGLU, no final norm, and head_q.

Codebooks may share sets of weights (`depth.weights_per_step_schedule`): Q codebooks, S sets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config
from megaspeech.kernels import Kernels
from megaspeech.model.counting import padded_rows, used_rows
from megaspeech.model.embedding import table_offsets


class CodebookLinear(torch.nn.Module):
    """One matrix a codebook, drawn uniformly within +-1/sqrt(in) as torch's Linear (and moshi) does.

    The parameter is `[S * in, out]`, because Megatron-FSDP shards rows of the first axis and cuts through larger ones.

    Args:
        num_sets: S, different matrices.
        width_in, width_out: of each.
        dtype: of the parameter.
        schedule: the set that each codebook uses; None where Q = S and each has its own.
    """

    def __init__(
        self,
        num_sets: int,
        width_in: int,
        width_out: int,
        *,
        dtype: torch.dtype,
        schedule: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_sets, self.schedule, bound = num_sets, schedule, 1 / math.sqrt(width_in)
        drawn = torch.empty(num_sets, width_in, width_out).uniform_(-bound, bound)
        self.weight = torch.nn.Parameter(drawn.to(dtype).flatten(0, 1))

    @property
    def weight_QIO(self) -> Tensor:
        """`[Q, in, out]`."""
        sets_SIO = self.weight.unflatten(0, (self.num_sets, -1))
        if self.schedule is None:
            return sets_SIO
        return torch.stack([sets_SIO[index] for index in self.schedule])  # whose gradients are summed in one order

    def forward(self, x_QNI: Tensor) -> Tensor:
        """`[Q, N, in]`, or `[N, in]` shared by the codebooks, -> `[Q, N, out]`."""
        return torch.matmul(x_QNI, self.weight_QIO)


class CodebookHeads(CodebookLinear):
    """The codebooks' heads, with their cross entropies."""

    def __init__(self, *sizes: int, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__(*sizes, dtype=dtype)
        self.kernel = kernels.codebook_cross_entropy.codebook_cross_entropy

    def forward(self, x_QND: Tensor, targets_QN: Tensor | None = None) -> tuple[Tensor, Tensor] | Tensor:
        """(cross entropy FP32, correct) `[Q, N]` each, where a target of -1 costs nothing; without targets the logits
        `[Q, N, V]` FP32."""
        if targets_QN is None:
            return super().forward(x_QND).float()
        return self.kernel(x_QND, self.weight_QIO, targets_QN)


class DepthNorm(torch.nn.Module):
    """RMSNorm over the depth width, shared by the codebooks; see `model.norm`."""

    def __init__(self, width: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DepthLayer(torch.nn.Module):
    """x + proj(attention(norm(x))), then x + out(silu(gate) * up), per codebook."""

    is_sharded_alone = True
    """Fully sharded data parallelism gathers its parameters when it is called."""

    def __init__(self, config: Config, *, kernels: Kernels, dtype: torch.dtype) -> None:
        super().__init__()
        shape = config.depth
        linear = partial(CodebookLinear, config.num_weight_sets, dtype=dtype, schedule=shape.weights_per_step_schedule)
        self.kernel = kernels.depth_attention.depth_attention
        self.groups, self.head_width = shape.num_query_groups, shape.hidden_size // shape.num_attention_heads
        eps = config.model.layernorm_epsilon
        self.attention_norm = DepthNorm(shape.hidden_size, eps=eps, dtype=dtype)
        heads = shape.num_attention_heads + 2 * self.groups  # queries, then keys, then values
        self.qkv = linear(shape.hidden_size, heads * self.head_width)
        self.proj = linear(shape.hidden_size, shape.hidden_size)
        self.mlp_norm = DepthNorm(shape.hidden_size, eps=eps, dtype=dtype)
        self.fc1 = linear(shape.hidden_size, 2 * shape.ffn_hidden_size)
        self.fc2 = linear(shape.ffn_hidden_size, shape.hidden_size)

    def forward(self, x_QND: Tensor) -> Tensor:
        """`[Q, N, D]` -> `[Q, N, D]`."""
        qkv_QNCE = self.qkv(self.attention_norm(x_QND)).unflatten(-1, (-1, self.head_width))
        x_QND = x_QND + self.proj(self.kernel(qkv_QNCE, num_query_groups=self.groups))
        gate, up = self.fc1(self.mlp_norm(x_QND)).chunk(2, dim=-1)
        return x_QND + self.fc2(F.silu(gate) * up)


class DepthTransformer(MegatronModule):
    """From temporal outputs and the tokens of the frame to the codebooks' cross entropies."""

    def __init__(self, config: Config, *, megatron: TransformerConfig, kernels: Kernels) -> None:
        super().__init__(megatron)
        streams, shape, dtype = config.streams, config.depth, megatron.params_dtype
        self.embedding_kernel = kernels.stream_embedding.packed_embedding
        # Codebook q reads text for q = 0, codebook q - 1 otherwise: the first Q streams, the last codebook left out.
        read = streams.cardinalities[: streams.num_codebooks]
        schedule = shape.weights_per_step_schedule if shape.multi_linear else None
        sizes = (config.num_input_sets, config.temporal.hidden_size, shape.hidden_size)
        self.input = CodebookLinear(*sizes, dtype=dtype, schedule=schedule)
        width = shape.low_rank_embeddings or shape.hidden_size
        table = torch.empty(padded_rows(read), width).normal_(std=width**-0.5)
        table[used_rows(read) :] = 0
        self.embedding = torch.nn.Parameter(table.to(dtype))
        self.low_rank = torch.nn.Identity()
        if shape.low_rank_embeddings:
            self.low_rank = CodebookLinear(streams.num_codebooks, width, shape.hidden_size, dtype=dtype)
        self.register_buffer("offsets", torch.tensor(table_offsets(read)), persistent=False)
        self.layers = torch.nn.ModuleList(
            DepthLayer(config, kernels=kernels, dtype=dtype) for _ in range(shape.num_layers)
        )
        sizes = (streams.num_codebooks, shape.hidden_size, streams.cardinality)
        self.heads = CodebookHeads(*sizes, kernels=kernels, dtype=dtype)
        for parameter in self.parameters():
            parameter.tensor_parallel_partial = True  # each rank saw its frames only: see parallel.reductions

    def hidden(self, hidden_NH: Tensor, tokens_QN: Tensor) -> Tensor:
        """Outputs of the last layer `[Q, N, D]`.

        Args:
            hidden_NH: the temporal transformer's output of N frames.
            tokens_QN: what each codebook reads: the frame's text token, then its first Q - 1 codebooks (delayed,
                initial tokens included, -1 adds nothing).
        """
        # As Q "samples" of one stream: every codebook's token is looked up by itself, nothing is summed.
        rows_Q1N = (tokens_QN + self.offsets[:, None]).where(tokens_QN >= 0, tokens_QN)[:, None]
        x_QNE = self.embedding_kernel(rows_Q1N, self.embedding, offsets=torch.zeros_like(self.offsets[:1]))
        return self.run_layers(self.input(hidden_NH) + self.low_rank(x_QNE))

    def run_layers(self, x_QND: Tensor) -> Tensor:
        """All layers, one after the other; `parallel.graphs` may put another way in its place."""
        recompute = self.config.recompute_granularity == "full" and torch.is_grad_enabled()
        for layer in self.layers:
            x_QND = tensor_parallel.checkpoint(layer, False, x_QND) if recompute else layer(x_QND)
        return x_QND

    def forward(
        self, hidden_NH: Tensor, tokens_QN: Tensor, targets_QN: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """What `CodebookHeads` gives for the frames."""
        return self.heads(self.hidden(hidden_NH, tokens_QN), targets_QN)
