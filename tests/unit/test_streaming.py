"""Streaming on the real moshi runtime (random weights): sessions, text steering, loading."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megaspeech.config.schema import StreamsSection
from megaspeech.data.tasks import PROMPT_FRAMES, Task, Timing, lay_out, text_stream
from megaspeech.data.tokenizer import Tokenizer, train_tokenizer
from megaspeech.data.transcript import written_words
from megaspeech.streaming import runtime, session
from megaspeech.streaming.scoring import answer_text
from megaspeech.streaming.session import Answer, Request, acoustic_delay, answer
from megaspeech.streaming.steering import PATIENCE, TextScript

PAD, EPAD = 3, 0
UNDELAYED = (0,) * 9
DELAYED = (0, 0, 1, 1, 2, 0, 1, 1, 1)
ASR, TTS, S2ST = Task("asr", "en", "en"), Task("tts", "en", "en"), Task("s2st", "ja", "en")
TIMING = Timing(task_delay=3, speech_lead=1)
SILENCE = np.array([5, 6, 7, 8])


def streams(delays: tuple[int, ...] = UNDELAYED) -> StreamsSection:
    return StreamsSection(text_cardinality=64, num_codebooks=4, num_given_codebooks=4, cardinality=32, delays=delays)


def lm_config(delays: tuple[int, ...] = UNDELAYED) -> dict:
    return {
        "dim": 64, "text_card": 64, "existing_text_padding_id": PAD, "n_q": 8, "dep_q": 4, "card": 32,
        "num_heads": 4, "num_layers": 2, "hidden_scale": 4.125, "causal": True, "context": 16, "max_period": 10000,
        "gating": "silu", "norm": "rms_norm_f32", "positional_embedding": "rope", "depformer_dim": 32,
        "depformer_dim_feedforward": 132, "depformer_num_heads": 4, "depformer_num_layers": 2,
        "depformer_multi_linear": True, "depformer_pos_emb": "none", "depformer_weights_per_step": True,
        "delays": list(delays),
    }  # fmt: skip


@pytest.fixture(scope="module")
def models() -> dict:
    """By delays: a model large enough in its weights that greedy tokens vary from frame to frame."""
    result = {}
    for delays in (UNDELAYED, DELAYED):
        torch.manual_seed(1)
        lm = runtime.import_moshi().LMModel(**lm_config(delays)).eval()
        with torch.no_grad():
            for name, weight in lm.named_parameters():
                if "emb" in name or "depformer" in name and weight.dim() == 2:
                    weight.mul_(3.0)
        result[delays] = lm
    return result


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = np.random.default_rng(0)
    return train_tokenizer(
        [" ".join(rng.choice(words, 5)) for _ in range(200)], vocabulary_size=64, languages=["en", "ja"]
    )


def heard(num_frames: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 32, (4, num_frames))


def run(lm: torch.nn.Module, requests: list[Request], tokenizer: Tokenizer, delays: tuple[int, ...]) -> list[Answer]:
    return answer(lm, requests, tokenizer=tokenizer, streams=streams(delays), timing=TIMING, silence=SILENCE)


def three_requests(tokenizer: Tokenizer) -> list[Request]:
    words = tuple(tuple(tokenizer.encode_word(word)) for word in ("three", "seven", "zero"))
    return [
        Request(ASR, num_frames=30, heard=heard(18)),
        Request(TTS, num_frames=41, words=words),
        Request(S2ST, num_frames=25, heard=heard(23, seed=1)),
    ]


# ---- session -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delays", [UNDELAYED, DELAYED])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_streamed_tokens_are_those_of_the_training_forward(models, tokenizer, delays, index) -> None:
    request = three_requests(tokenizer)[index]
    got = run(models[delays], [request], tokenizer, delays)[0]
    codes = lay_out(
        request.task, text=got.text, heard=request.heard, spoken=None, silence=SILENCE, timing=TIMING,
        streams=streams(delays),
    )[:, : request.num_frames]  # fmt: skip
    codes[1:5] = got.codes
    with torch.no_grad():
        out = models[delays](torch.from_numpy(codes)[None])
    forward_codes, valid = out.logits[0].argmax(-1).numpy(), out.mask[0].numpy()
    assert valid.sum() == valid.size - sum(delays[1:5])
    np.testing.assert_array_equal(got.codes[valid], forward_codes[valid])
    assert len(np.unique(got.codes)) > 10, "constant answers would prove nothing"
    logits = out.text_logits[0, 0].clone()
    if request.words is not None:
        logits[:, [token for token in range(64) if token not in (PAD, EPAD)]] = float("-inf")
    script = TextScript(tokenizer.encode_prompt(request.task), words=request.words, streams=streams())
    assert got.text.tolist() == [script.choose(token) for token in logits.argmax(-1).tolist()]
    assert len(np.unique(got.text)) > 5


@pytest.mark.parametrize("delays", [UNDELAYED, DELAYED])
def test_a_batch_gives_what_each_request_gives_alone(models, tokenizer, delays) -> None:
    requests = three_requests(tokenizer)
    together = run(models[delays], requests, tokenizer, delays)
    for request, of_batch in zip(requests, together, strict=True):
        alone = run(models[delays], [request], tokenizer, delays)[0]
        np.testing.assert_array_equal(of_batch.text, alone.text)
        np.testing.assert_array_equal(of_batch.codes, alone.codes)
        assert of_batch.codes.shape == (4, request.num_frames)
        assert of_batch.step_seconds.shape == (request.num_frames,) and (of_batch.step_seconds > 0).all()


@pytest.mark.parametrize("delays", [UNDELAYED, DELAYED])
def test_warming_up_leaves_no_trace(models, tokenizer, delays, monkeypatch) -> None:
    """Only a GPU is warmed up; here it is done for a CPU."""
    cold = run(models[delays], three_requests(tokenizer), tokenizer, delays)
    steps = []
    monkeypatch.setattr(session, "WARMED_UP", ("cpu",))
    monkeypatch.setattr(runtime.import_moshi().LMGen, "step", _counted(runtime.import_moshi().LMGen.step, steps))
    warm = run(models[delays], three_requests(tokenizer), tokenizer, delays)
    assert len(steps) == session.WARM_UP + max(len(one.text) for one in cold) + max(delays)
    for one, other in zip(cold, warm, strict=True):
        np.testing.assert_array_equal(one.text, other.text)
        np.testing.assert_array_equal(one.codes, other.codes)


def _counted(step, steps: list):
    return lambda *arguments: (steps.append(1), step(*arguments))[1]


def test_text_is_known_in_its_step_and_codes_after_their_delay(models, tokenizer) -> None:
    """What `LMGen.step` itself returns, held back by the largest delay, is the same answer."""
    request = Request(ASR, num_frames=20, heard=heard(30))
    got = run(models[DELAYED], [request], tokenizer, DELAYED)[0]
    prompt = tokenizer.encode_prompt(ASR)
    seen: list[int] = []

    def force_prompt(tokens: torch.Tensor) -> None:
        if len(seen) < PROMPT_FRAMES:
            tokens[0] = prompt[len(seen)]
        seen.append(int(tokens[0]))

    generator = runtime.make_generator(models[DELAYED], on_text_hook=force_prompt)
    fed = np.concatenate([np.full((4, 1 + PROMPT_FRAMES), -1), request.heard], axis=1)
    with generator.streaming(1):
        for step in range(22):
            out = generator.step(torch.from_numpy(fed[None, :, step : step + 1]))
            if step < 20:
                assert seen[step] == got.text[step]
            if step < 2:
                assert out is None
            else:
                assert out[0, 0, 0] == got.text[step - 2]
                np.testing.assert_array_equal(out[0, 1:, 0].numpy(), got.codes[:, step - 2])


def test_heard_audio_reaches_the_model_in_its_frame_and_not_before(models, tokenizer) -> None:
    first, second = heard(18), heard(18)
    second[:, 9] = (second[:, 9] + 1) % 32
    one, two = (run(models[UNDELAYED], [Request(ASR, 30, heard=h)], tokenizer, UNDELAYED)[0] for h in (first, second))
    frame = TIMING.speech_origin(ASR) + 9
    np.testing.assert_array_equal(one.codes[:, : frame + 1], two.codes[:, : frame + 1])
    assert (one.codes[:, frame + 1] != two.codes[:, frame + 1]).any()


def test_tts_writes_the_words_it_is_given(models, tokenizer) -> None:
    request = three_requests(tokenizer)[1]
    got = run(models[UNDELAYED], [dataclasses.replace(request, num_frames=90)], tokenizer, UNDELAYED)[0]
    assert answer_text(got, tokenizer=tokenizer) == "three seven zero"
    assert [word.word for word in written_words(got.text, tokenizer=tokenizer)] == ["three", "seven", "zero"]


def test_no_requests_no_answers(models, tokenizer) -> None:
    assert run(models[UNDELAYED], [], tokenizer, UNDELAYED) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(ASR, 10), "heard must be the codes"),
        (Request(ASR, 10, heard=np.zeros((3, 4), int)), "of 4 codebooks"),
        (Request(ASR, 10, heard=np.full((4, 4), 32)), "knows 0 to 31"),
        (Request(ASR, 2, heard=np.zeros((4, 4), int)), "num_frames = 2"),
        (Request(ASR, 9, heard=np.zeros((4, 4), int), words=((20,),)), "words must be None"),
        (Request(TTS, 10), "words must be the text"),
        (Request(TTS, 10, words=((64,),)), "knows 0 to 63"),
        (Request(TTS, 10, words=((),)), "without pieces"),
    ],
)
def test_bad_requests_are_named(models, tokenizer, request_, message) -> None:
    with pytest.raises(ValueError, match=message):
        run(models[UNDELAYED], [request_], tokenizer, UNDELAYED)


def test_streams_of_another_model_are_refused(models, tokenizer) -> None:
    with pytest.raises(ValueError, match="streams.delays = .* exported with"):
        run(models[UNDELAYED], [Request(ASR, 10, heard=heard(4))], tokenizer, DELAYED)


# ---- steering ------------------------------------------------------------------------------------------------------


def test_script_follows_the_model_and_then_its_patience() -> None:
    script = TextScript([4, 8], words=[(20, 21), (30,)], streams=streams())
    proposed = [EPAD, EPAD, PAD, PAD, EPAD] + [EPAD] * 2 + [PAD] * (PATIENCE + 1) + [PAD, EPAD, EPAD]
    expected = [4, 8, PAD, PAD, EPAD, 20, 21] + [PAD] * PATIENCE + [EPAD, 30, PAD, PAD]
    assert [script.choose(token) for token in proposed] == expected


def test_script_of_an_ideal_model_is_the_training_layout() -> None:
    laid_out = text_stream([(5, (20, 21)), (11, (30,))], prompt=[4, 8], num_frames=15, streams=streams())
    script = TextScript([4, 8], words=[(20, 21), (30,)], streams=streams())
    assert [script.choose(token) for token in laid_out.tolist()] == laid_out.tolist()


def test_free_script_only_forces_the_prompt() -> None:
    script = TextScript([4, 8], words=None, streams=streams())
    assert [script.choose(token) for token in (50, 51, 52, PAD)] == [4, 8, 52, PAD]


# ---- runtime -------------------------------------------------------------------------------------------------------


def export(lm: torch.nn.Module, directory: Path) -> None:
    """As an exporter writes it: packed names, every step's weights in one tensor."""
    tensors: dict[str, list[torch.Tensor]] = {}
    for name, tensor in lm.state_dict().items():
        for split, packed in ((".in_projs.", ".in_proj_weight"), (".out_projs.", ".out_proj.weight")):
            if split in name:
                name = name[: name.index(split)] + packed
        tensors.setdefault(name, []).append(tensor)
    save_file({name: torch.cat(parts).contiguous() for name, parts in tensors.items()}, directory / "model.safetensors")
    config = lm_config(tuple(lm.delays)) | {"model_type": "moshi", "lm_gen_config": {}, "tokenizer_name": "t.model"}
    (directory / "config.json").write_text(json.dumps(config))


def test_loads_what_was_exported(models, tokenizer, tmp_path) -> None:
    export(models[DELAYED], tmp_path)
    lm = runtime.load_runtime(tmp_path)
    assert not lm.training and lm.dtype == torch.float32
    request = Request(ASR, 12, heard=heard(18))
    first, second = (run(model, [request], tokenizer, DELAYED)[0] for model in (models[DELAYED], lm))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.text, second.text)


def test_broken_exports_are_named(models, tmp_path) -> None:
    with pytest.raises(ValueError, match="config.json; export"):
        runtime.load_runtime(tmp_path)
    export(models[UNDELAYED], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, message in (
        (config | {"dim": 32}, "export the checkpoint again"),
        (config | {"no_such_key": 1}, "no_such_key"),
        (config | {"context": None}, "key context is missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            runtime.load_runtime(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        runtime.load_runtime(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors; export"):
        runtime.load_runtime(tmp_path)


def test_without_moshi_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "moshi.models", None)
    with pytest.raises(ImportError, match=f"pip install --no-deps moshi=={runtime.MOSHI_VERSION}"):
        runtime.import_moshi()


def test_pin_is_that_of_the_constraints() -> None:
    import moshi

    assert moshi.__version__ == runtime.MOSHI_VERSION
    constraints = Path(__file__).parents[2] / "constraints.txt"
    assert f"moshi=={runtime.MOSHI_VERSION}" in constraints.read_text().split()


def test_acoustic_delay_is_that_of_the_own_codebooks() -> None:
    assert acoustic_delay(streams(DELAYED)) == 2
