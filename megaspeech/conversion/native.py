"""Native checkpoints of any layout, read a tensor at a time; `native_writing` writes them.

megatron-core keeps the layers of a stack as slices of one tensor, and the halves of a gated feed-forward matrix apart;
names follow TransformerEngine's layers. Where a native tensor lies is therefore asked of the model itself, built
without its numbers: `sharded_state_dict` of a whole model on one rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megaspeech.checkpoint.origin import CONFIG
from megaspeech.checkpoint.state import metadata
from megaspeech.checkpoint.store import check_whole
from megaspeech.config import Config, read_config
from megaspeech.config.computation import ParallelSection, PrecisionSection
from megaspeech.conversion.companions import named
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.stored import StoredModel
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.parallel import groups

SHAPED_BY = {
    "embedding.weight": "[streams] text_cardinality, cardinality, num_codebooks, num_given_codebooks, "
    "temporal.hidden_size",
    "linear_qkv": "temporal.num_attention_heads, num_query_groups, kv_channels, add_qkv_bias, hidden_size",
    "self_attention": "temporal.num_attention_heads, kv_channels, qk_layernorm, hidden_size",
    "linear_fc": "temporal.ffn_hidden_size, hidden_size",
    "experts": "temporal.num_moe_experts, moe_ffn_hidden_size",
    "temporal.": "temporal.hidden_size, num_layers",
    "text_head": "streams.text_cardinality, temporal.hidden_size",
    "depth.heads": "streams.num_codebooks, cardinality, depth.hidden_size",
    "depth.embedding": "streams.text_cardinality, cardinality, num_codebooks, depth.hidden_size",
    "depth.": "streams.num_codebooks and [depth]",
}
"""Of tensors whose names contain the word, the keys of the config that they take their shape from; the first counts."""


def whole_model(config: Config, *, device: str = "cpu") -> SpeechTextModel:
    """The model of a config, whole, with megatron-core's own layers, untrained; on "meta" without its numbers.

    Brings up a process group of one rank where there is none; `parallel.groups.shut_down` takes it down.
    """
    if not dist.is_initialized():
        groups.initialise(ParallelSection(), seed=config.run.seed)
    model = config.model.model_copy(update={"transformer_impl": "local", "kernels": "reference"})
    precision = PrecisionSection(recipe=config.precision.params_dtype)
    config = config.model_copy(update={"model": model, "precision": precision, "parallel": ParallelSection()})
    with torch.device(device):
        return SpeechTextModel(config, pre_process=True, post_process=True)


def native_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, precision) of every tensor of a config's model, by native name; nothing is allocated."""
    state = whole_model(config, device="meta").state_dict()
    return {name: (tuple(x.shape), x.dtype) for name, x in state.items() if isinstance(x, Tensor)}


def check_native(model: StoredModel) -> None:
    """Raises ValueError where the tensors are not those of the config, naming the odd one and what shapes it."""
    expected = native_shapes(model.config)
    for name, (shape, dtype) in expected.items():
        if name not in model.weights:
            raise ValueError(f"tensor {name} {list(shape)} is missing: the config wants it by {_shaped_by(name)}")
        if (found := model.weights[name].shape) != shape:
            raise ValueError(
                f"tensor {name} has shape {list(found)}, and the config makes it {list(shape)} "
                f"by {_shaped_by(name)}; give the config of this very model"
            )
        if (kept := model.weights[name].dtype) is not dtype:
            recipe = model.config.precision.recipe
            raise ValueError(
                f"tensor {name} is in {kept}, and precision.recipe = {recipe} keeps it in {dtype}; give --dtype"
            )
    if extra := [name for name in model.weights if name not in expected]:
        raise ValueError(f"tensor {extra[0]} is none of the config's model ({len(extra)} such): {_shaped_by(extra[0])}")


def _shaped_by(name: str) -> str:
    return next((keys for word, keys in SHAPED_BY.items() if word in name), "no key")


def load_weights(model: torch.nn.Module, weights: Weights) -> None:
    """Put weights into a model that was built for their config, in its own precision."""
    state = model.state_dict()
    with torch.no_grad():
        for name, one in weights.items():
            state[name].copy_(one.read())


def open_native(path: str | Path) -> StoredModel:
    """A checkpoint's model, whatever layout it was trained on, its weights unread.

    Raises:
        ValueError: the checkpoint is damaged, or is not of its config's model.
    """
    path = Path(path)
    check_whole(path)
    config, reader = read_config(path / CONFIG), FileSystemReader(path)
    index = reader.read_metadata()
    reader.set_up_storage_reader(index, is_coordinator=True)
    weights = {}
    for name, (place, shape) in places(config).items():
        dtype = _dtype(index, pieces(place, torch.empty(shape, device="meta")), name=name, path=path)
        weights[name] = Deferred(shape, dtype, _Reading(reader, index, place=place, shape=shape, dtype=dtype))
    return StoredModel(config, weights, named(config))


def _dtype(index: Metadata, wanted: list[ShardedTensor], *, name: str, path: Path) -> torch.dtype:
    """Of a tensor whose pieces an index knows; others are refused."""
    for piece in wanted:
        stored = index.state_dict_metadata.get(piece.key)
        if not isinstance(stored, TensorStorageMetadata):
            raise ValueError(f"checkpoint {path}: tensor {name} is missing; was {CONFIG} changed?")
        if tuple(stored.size) != tuple(piece.global_shape):
            raise ValueError(
                f"checkpoint {path}: tensor {name} is kept in {list(stored.size)}, and {CONFIG} makes that "
                f"{list(piece.global_shape)} by {_shaped_by(name)}; put back the config that was written with it"
            )
    return stored.properties.dtype


def places(config: Config) -> dict[str, tuple[ShardedBase, tuple[int, ...]]]:
    """(where a checkpoint keeps it, shape) of every tensor by native name."""
    model = whole_model(config, device="meta")
    state, places = model.state_dict(), model.sharded_state_dict(metadata=metadata())
    return {name: (places[name], tuple(x.shape)) for name, x in state.items() if isinstance(x, Tensor)}


def pieces(place: ShardedBase, tensor: Tensor) -> list[ShardedTensor]:
    """The parts of a native tensor that a checkpoint keeps apart, views of it, each with its place."""
    if isinstance(place, ShardedTensorFactory):
        return replace(place, data=tensor).build()
    return [replace(place, data=tensor, dtype=tensor.dtype)]


def chunk_of(piece: ShardedTensor) -> ChunkStorageMetadata:
    """The place of a piece in the tensor that a checkpoint keeps it in."""
    sizes = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return ChunkStorageMetadata(offsets=torch.Size(piece.global_offset), sizes=torch.Size(sizes))


class _Reading:
    """Reads one native tensor, from as many pieces as the ranks have saved."""

    def __init__(
        self,
        reader: FileSystemReader,
        index: Metadata,
        *,
        place: ShardedBase,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.reader, self.index, self.place, self.shape, self.dtype = reader, index, place, shape, dtype

    def __call__(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        for piece in pieces(self.place, tensor):
            chunk, stored = chunk_of(piece), self.index.state_dict_metadata[piece.key]
            items = create_read_items_for_chunk_list(piece.key, stored, [chunk])
            self.reader.read_data(LoadPlan(items), _Into(piece.data.view(chunk.sizes))).wait()
        return tensor


class _Into(DefaultLoadPlanner):
    """Has what is read put into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self.tensor
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(axis, offset, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is there already."""
