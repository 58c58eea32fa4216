"""The speech-text language model of one pipeline stage, or of one chunk of an interleaved stage.

Equal, logit for logit, to `moshi.models.lm.LMModel` with the same weights. `codes_BST` are the raw codes of a sample,
text first, then the predicted and the given codebooks; shifting and delaying happen inside.
"""

from __future__ import annotations

import copy

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megaspeech.config import Config
from megaspeech.config.schema import TemporalSection
from megaspeech.kernels import load_kernels
from megaspeech.kernels.stream_embedding.reference import delayed_codes
from megaspeech.model.depth import DepthTransformer
from megaspeech.model.embedding import StreamEmbedding
from megaspeech.model.frames import from_context_ranks, on_context_rank, sample_starts
from megaspeech.model.losses import Losses, stream_losses
from megaspeech.model.temporal import TemporalTransformer, transformer_config
from megaspeech.model.transfer import to_device

ZERO_TOKEN = -1
"""No input, no loss; as the first stream's token, padding (`data.tasks` writes it)."""


class SpeechTextModel(MegatronModule):
    """Embedding (first chunk), temporal layers (every chunk), text head and depth transformer (last chunk).

    Args:
        config: the run.
        pre_process, post_process: whether this is the first, the last chunk of the pipeline.
        vp_stage: which chunk of its stage it is, under an interleaved pipeline.
    """

    def __init__(self, config: Config, *, pre_process: bool, post_process: bool, vp_stage: int | None = None) -> None:
        megatron = transformer_config(config)
        super().__init__(megatron)
        # Names that megatron's schedule, wrapper and gradient reductions read:
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False

        self.streams = config.streams
        self.num_predicted = 1 + config.streams.num_codebooks
        kernels = load_kernels(config.model.kernels)
        if pre_process:
            atomic = config.model.embedding_gradient == "atomic"
            self.embedding = StreamEmbedding(config.streams, megatron=megatron, kernels=kernels, atomic_gradient=atomic)
        self.temporal = TemporalTransformer(
            config, megatron=megatron, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage
        )
        if post_process:
            self.text_head = tensor_parallel.ColumnParallelLinear(
                megatron.hidden_size,
                config.streams.text_cardinality,
                config=_without_apex(megatron),
                init_method=megatron.init_method,
                bias=False,
                gather_output=False,
            )
            self.depth = None  # a model that writes text alone has none
            if config.streams.num_codebooks:
                self.depth = DepthTransformer(config, megatron=megatron, kernels=kernels)
            self._add_extra_heads(config.temporal, dtype=megatron.params_dtype)
            self.register_buffer("delays", torch.tensor(config.streams.delays), persistent=False)
            self.register_buffer("initial", torch.tensor(config.streams.cardinalities), persistent=False)

    def _add_extra_heads(self, shape: TemporalSection, *, dtype: torch.dtype) -> None:
        """Kept and not trained, so no parameter."""
        if shape.num_extra_heads:
            sizes = (shape.num_extra_heads, shape.extra_heads_dim, shape.hidden_size)
            self.register_buffer("extra_heads", torch.zeros(sizes, dtype=dtype))

    def set_input_tensor(self, hidden: Tensor | list[Tensor | None] | None) -> None:
        """Hand over what the previous stage sent; the pipeline schedule calls this."""
        self.temporal.set_input_tensor(hidden[0] if isinstance(hidden, list) else hidden)

    def forward(
        self,
        codes_BST: Tensor,
        weights_BPT: Tensor | None = None,
        depth_frames_BT: Tensor | None = None,
        *,
        bounds_D: Tensor | None = None,
    ) -> Tensor | Losses | tuple[Tensor, Tensor]:
        """One microbatch through this stage.

        Args:
            codes_BST: integer codes; -1 is no input and no loss.
            weights_BPT: weight of every predicted token in the loss, 0 for none; None asks for logits.
            depth_frames_BT: bool, which frames have a codebook that weighs, delays applied. On the host, so that the
                number of them need not be asked of the device, which waits; None asks it.
            bounds_D: where the samples of a packed row begin, its padding, and T; None where each row is one sample.
                Attention and delays stay within a sample.

        Returns:
            `hidden_TBH` for the next chunk; of the last one its `Losses`, or without weights the logits, FP32: text
            `[B, T, V_text]` and audio `[B, Q, T, V]`. Position t of a codebook predicts its token of frame t - delay.
        """
        starts_T = None if bounds_D is None else sample_starts(bounds_D, num_frames=codes_BST.shape[-1])
        hidden_TBH = self.embedding(codes_BST, starts_T) if self.pre_process else None
        hidden_TBH = self.temporal(hidden_TBH, padding_BT=codes_BST[:, 0] == ZERO_TOKEN, bounds_D=bounds_D)
        if not self.post_process:
            return hidden_TBH
        tokens_BPT = self._delayed(codes_BST, fill=self.initial, starts_T=starts_T)
        if weights_BPT is None:
            return self._logits(hidden_TBH, tokens_BPT)
        # Initial tokens weigh nothing.
        weights_BPT = self._delayed(weights_BPT, fill=torch.zeros_like(self.initial), starts_T=starts_T)
        if depth_frames_BT is None:
            depth_frames_BT = (weights_BPT[:, 1:] > 0).any(1)
        tokens_BPT, weights_BPT, depth_frames_BT = map(on_context_rank, (tokens_BPT, weights_BPT, depth_frames_BT))
        return stream_losses(
            self._text_loss(hidden_TBH, tokens_BPT[:, 0], weights_BPT[:, 0]),
            self._audio_loss(hidden_TBH, tokens_BPT, weights_BPT, depth_frames_BT),
            tensor_parallel_size=self.config.tensor_model_parallel_size,
        )

    def _delayed(self, x_BST: Tensor, *, fill: Tensor, starts_T: Tensor | None) -> Tensor:
        """The predicted streams of `x_BST`, each moved right by its acoustic delay `[B, P, T]`."""
        own = slice(0, self.num_predicted)
        return delayed_codes(x_BST[:, own], shifts=self.delays[own], fill=fill[own], starts_T=starts_T)

    def _logits(self, hidden_TBH: Tensor, tokens_BPT: Tensor) -> tuple[Tensor, Tensor]:
        text_TBV = gather_from_tensor_model_parallel_region(self.text_head(hidden_TBH)[0])
        if self.config.sequence_parallel:
            hidden_TBH = gather_from_sequence_parallel_region(hidden_TBH, tensor_parallel_output_grad=False)
        text_TBV, hidden_TBH = from_context_ranks(text_TBV), from_context_ranks(hidden_TBH)
        if self.depth is None:
            audio_BQTV = text_TBV.new_zeros(text_TBV.shape[1], 0, text_TBV.shape[0], self.streams.cardinality)
            return text_TBV.transpose(0, 1).float(), audio_BQTV.float()
        audio_QNV = self.depth(hidden_TBH.flatten(0, 1), _frames_first(tokens_BPT)[:-1].flatten(1))
        audio_QTBV = audio_QNV.unflatten(1, hidden_TBH.shape[:2])
        return text_TBV.transpose(0, 1).float(), audio_QTBV.permute(2, 0, 1, 3)

    def _text_loss(self, hidden_TBH: Tensor, tokens_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TBV, _ = self.text_head(hidden_TBH)  # vocabulary sharded; gathers the frames under sequence parallelism
        targets_TB, weights_TB = tokens_BT.T.contiguous(), weights_BT.T
        correct_TB = _largest_token(logits_TBV.detach()) == targets_TB
        # A zero token is no class: it is given one, and the weight 0.
        loss_TB = tensor_parallel.vocab_parallel_cross_entropy(logits_TBV.float(), targets_TB.clamp(min=0))
        weights_TB = weights_TB * (targets_TB >= 0)
        return loss_TB.flatten(), correct_TB.flatten(), weights_TB.flatten()

    def _audio_loss(
        self, hidden_TBH: Tensor, tokens_BPT: Tensor, weights_BPT: Tensor, depth_frames_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This tensor parallel rank's share of the frames: the one sequence parallelism leaves it anyway."""
        if self.depth is None:
            none_QN = hidden_TBH.new_zeros(0, 0, dtype=torch.float32)
            return none_QN, none_QN.bool(), none_QN
        tokens_PTB, weights_QTB = _frames_first(tokens_BPT), _frames_first(weights_BPT)[1:]
        kept_TB = depth_frames_BT.T
        size = self.config.tensor_model_parallel_size
        if size > 1 and not self.config.sequence_parallel:
            missing = -hidden_TBH.shape[0] % size  # frames of weight 0, so that every rank gets as many
            hidden_TBH, tokens_PTB, weights_QTB, kept_TB = (
                F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing))
                for x, axis in ((hidden_TBH, 0), (tokens_PTB, 1), (weights_QTB, 1), (kept_TB, 0))
            )
            hidden_TBH = scatter_to_sequence_parallel_region(hidden_TBH)
        frames = hidden_TBH.shape[0]
        first = parallel_state.get_tensor_model_parallel_rank() * frames if size > 1 else 0
        share = slice(first, first + frames)
        # Frames without weight (silence left out, padding, nothing to say) never enter the depth transformer.
        rows_N = to_device(_places(kept_TB[share]), hidden_TBH.device)
        tokens_PN, weights_QN = (x[:, share].flatten(1).index_select(1, rows_N) for x in (tokens_PTB, weights_QTB))
        targets_QN = tokens_PN[1:].masked_fill(weights_QN == 0, -1)
        loss_QN, correct_QN = self.depth(hidden_TBH.flatten(0, 1).index_select(0, rows_N), tokens_PN[:-1], targets_QN)
        return loss_QN, correct_QN, weights_QN


def _without_apex(megatron: TransformerConfig) -> TransformerConfig:
    """megatron-core's own linear layer adds its weight's gradient to DDP's by a kernel of Apex; else autograd does."""
    own = copy.copy(megatron)
    own.gradient_accumulation_fusion &= _grad_accum_fusion_available
    return own


def _largest_token(logits_TBV: Tensor) -> Tensor:
    """The token of the largest logit `[T, B]`, where tensor parallel ranks share the vocabulary: each tells of its own
    largest one, so that nobody holds the logits of all."""
    largest_TB1, token_TB1 = logits_TBV.max(-1, keepdim=True)
    token_TB1 = token_TB1 + parallel_state.get_tensor_model_parallel_rank() * logits_TBV.shape[-1]
    largest_TBR, token_TBR = map(gather_from_tensor_model_parallel_region, (largest_TB1, token_TB1))
    return token_TBR.gather(-1, largest_TBR.argmax(-1, keepdim=True)).squeeze(-1)


def _places(kept_TB: Tensor) -> Tensor:
    """Numbers of the frames kept, or 0 where none is: attention kernels refuse an empty batch."""
    rows_N = kept_TB.flatten().nonzero().flatten()
    return rows_N if len(rows_N) else rows_N.new_zeros(1)


def _frames_first(x_BPT: Tensor) -> Tensor:
    """`[B, P, T]` -> `[P, T, B]`, the order of the temporal transformer's frames."""
    return x_BPT.permute(1, 2, 0)
