"""A sentencepiece model as the files of a tokenizer of transformers: the same ids for the same text.

But for one thing: transformers finds the names of control pieces (`</s>`, `<asr>`) in a text and makes them those
pieces, which sentencepiece never does.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

import sentencepiece

from megaspeech.codecs.neural import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNIGRAM = 1
"""A `TrainerSpec.ModelType` of sentencepiece_model.proto: what Kyutai's tokenizers are, and ours."""


class Saveable(Protocol):
    """A tokenizer, a feature extractor or a processor."""

    def save_pretrained(self, folder: str) -> Any:
        """Write its files."""
        ...


def saved(thing: Saveable) -> dict[str, bytes]:
    """The files that transformers writes for it, by name."""
    with tempfile.TemporaryDirectory() as folder:
        thing.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def fast_tokenizer(model: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a sentencepiece `.model` file.

    Raises:
        ValueError: it is no unigram model.
        ImportError: transformers is not installed; says how to.
    """
    transformers = import_transformers()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    names = {name: getattr(processor, f"{name}_id")() for name in ("unk", "bos", "eos", "pad")}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=_backend(model),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": processor.id_to_piece(piece) for name, piece in names.items() if piece >= 0},
    )


def _backend(model: Path) -> Any:
    """By transformers' own converter of Moshi's tokenizer, told what this model does with spaces."""
    import tokenizers
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import MoshiConverter

    class Converter(MoshiConverter):
        def normalizer(self, proto: Any) -> Any:
            spec, steps = proto.normalizer_spec, []
            if spec.precompiled_charsmap:
                steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
            if spec.remove_extra_whitespaces:
                steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
            if spec.add_dummy_prefix:
                steps.append(normalizers.Prepend(" "))
            return normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])

        def pre_tokenizer(self, replacement: str, add_prefix_space: bool) -> None:
            return None  # the space before the first word is the normaliser's: before this it is one more, as it should

    converter = Converter(str(model))
    if (kind := converter.proto.trainer_spec.model_type) != UNIGRAM:
        raise ValueError(f"{model}: a sentencepiece model of type {kind}, and only unigram ones ({UNIGRAM}) are known")
    converter.original_tokenizer = SimpleNamespace(add_prefix_space=converter.proto.normalizer_spec.add_dummy_prefix)
    return converter.converted()
