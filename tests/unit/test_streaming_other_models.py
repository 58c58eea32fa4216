"""Models without codebooks of their own, and with one, streamed by the runtime: the native model's own answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi_folders import write_moshi
from one_rank import make_config, one_rank  # noqa: F401

from megaspeech.config import Config
from megaspeech.data.tasks import Task, Timing, lay_out
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer
from megaspeech.model.speech_text_model import SpeechTextModel
from megaspeech.streaming.runtime import load_runtime
from megaspeech.streaming.session import Answer, Request, answer

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(find_spec("moshi") is None, reason="moshi is not installed"),
]
ASR, TTS, S2ST = Task("asr", "en", "en"), Task("tts", "en", "en"), Task("s2st", "ja", "en")
TIMING = Timing(task_delay=3, speech_lead=1)
SILENCE = np.array([5, 6, 7, 8])
MODELS = {
    "text alone": ["streams.num_codebooks=0", "streams.delays=[0, 0, 1, 1, 1]"],
    "one codebook": ["streams.num_codebooks=1", "streams.num_given_codebooks=1", "streams.delays=[0, 1, 0]"],
    "shared weights": ["depth.weights_per_step_schedule=[0, 1, 0, 1]", "depth.multi_linear=false"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    texts = [" ".join(np.random.default_rng(seed).choice(words, 5)) for seed in range(200)]
    return train_tokenizer(texts, vocabulary_size=64, languages=["en", "ja"])


def build(directory: Path, name: str) -> tuple[Config, SpeechTextModel]:
    """A model large enough in its weights that tokens vary from frame to frame."""
    config = make_config(directory, "streams.text_cardinality=64", *MODELS[name])
    torch.manual_seed(2)
    model = SpeechTextModel(config, pre_process=True, post_process=True).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2.0)
    return config, model


def run(directory: Path, config: Config, model: SpeechTextModel, *, request: Request, tokenizer: Tokenizer) -> Answer:
    runtime = load_runtime(write_moshi(model.state_dict(), directory / "export", config=config))
    options = {"tokenizer": tokenizer, "streams": config.streams, "timing": TIMING, "silence": SILENCE}
    return answer(runtime, [request], **options)[0]


@pytest.mark.parametrize(
    "name, task", [("text alone", ASR), ("one codebook", S2ST), ("one codebook", ASR), ("shared weights", S2ST)]
)
def test_streamed_tokens_are_the_native_models(name: str, task: Task, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, model = build(tmp_path, name)
    own = config.streams.num_codebooks
    heard = np.random.default_rng(0).integers(0, 32, (config.streams.num_given_codebooks, 18))
    request = Request(task, num_frames=26, heard=heard)
    got = run(tmp_path, config, model, request=request, tokenizer=tokenizer)
    text = np.full(26, config.streams.text_pad_id)
    codes = lay_out(task, text=text, heard=heard, spoken=None, silence=SILENCE, timing=TIMING, streams=config.streams)
    codes = codes[:, :26]
    codes[0], codes[1 : 1 + own] = got.text, got.codes
    with torch.no_grad():
        text_BTV, audio_BQTV = model(torch.from_numpy(codes)[None])
    assert got.codes.shape == (own, 26) and len(np.unique(got.text)) > 5
    np.testing.assert_array_equal(got.text[2:], text_BTV[0, 2:].argmax(-1))  # the first two are the prompt's
    for codebook, delay in enumerate(config.streams.delays[1 : 1 + own]):
        np.testing.assert_array_equal(got.codes[codebook, : 26 - delay], audio_BQTV[0, codebook, delay:].argmax(-1))
        assert len(np.unique(got.codes[codebook])) > 5


def test_a_model_that_writes_text_alone_is_not_asked_to_speak(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config, model = build(tmp_path, "text alone")
    request = Request(TTS, num_frames=20, words=((4,),))
    with pytest.raises(ValueError, match="request tts-en: the model writes text alone .* ask it for asr or st"):
        run(tmp_path, config, model, request=request, tokenizer=tokenizer)
