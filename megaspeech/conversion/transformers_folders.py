"""Folders that transformers' `from_pretrained` opens, as stored models, and the files of such a folder.

What kind a model is, is told by what it speaks: with codebooks of its own it is `MoshiForConditionalGeneration`
(`transformers_moshi`), without `KyutaiSpeechToTextForConditionalGeneration` (`transformers_stt`). A Mimi is part of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaspeech.codecs.neural import import_transformers
from megaspeech.codecs.weights import CONFIG_FILE
from megaspeech.config import Config, as_toml, config_of, read_config
from megaspeech.conversion.deferred import Deferred, Weights
from megaspeech.conversion.mimi_files import INSIDE, Mimi, first_codebooks, open_mimi
from megaspeech.conversion.moshi import RUN_FILE, TOKENIZER_FILE
from megaspeech.conversion.rules import Rule, to_foreign, to_native
from megaspeech.conversion.safetensors_files import open_safetensors
from megaspeech.conversion.stored import Companions, ForeignFiles, StoredModel
from megaspeech.conversion.transformers_moshi import moshi_config, moshi_generation, moshi_rules, moshi_sections
from megaspeech.conversion.transformers_stt import stt_config, stt_generation, stt_rules, stt_sections
from megaspeech.conversion.transformers_text import fast_tokenizer, saved
from megaspeech.data.tasks import PROMPT_FRAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig
