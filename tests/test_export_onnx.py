"""The ONNX graphs and their runner against torch: scores, codes and sound."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from minimind_o_hf.modeling.generation_minimind_o import penalize_repetition
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minimind_o_hf import MimiStreamingDecoder, MiniMindOProcessor, default_checkpoint, read_mark
from minimind_o_hf.export import load_whole
from minimind_o_hf.export_onnx import (
    TOLERANCE,
    _difference,
    _exportable_experts,
    _graphs,
    _model_graph,
    _write_graph,
    export_onnx,
)
from minimind_o_hf.onnx_runner import OnnxSpeaker, process_code_scores, process_text_scores

QUESTION = "What is three plus four?"

# The export of nano takes 65 s of a core, before the first test that asks for it.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The packaged nano, exported once: its folder and its report."""
    folder = tmp_path_factory.mktemp("export") / "nano-onnx"
    return folder, export_onnx(default_checkpoint(), folder)


@pytest.fixture
def speaker(exported):
    return OnnxSpeaker(exported[0], threads=1)


@pytest.fixture(scope="module")
def whole():
    """The packaged nano and its processor."""
    return load_whole(default_checkpoint()), MiniMindOProcessor.from_pretrained(default_checkpoint())


def answer(whole, content, voice=None):
    """torch's inputs for a question, and its greedy answer."""
    model, processor = whole
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        voice=voice,
        add_generation_prompt=True,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
    )
    return inputs, model.generate(**inputs, do_sample=False)


def split(steps):
    """Tokens and codes `(num_codebooks, frames)` of the runner's steps."""
    tokens, frames = zip(*steps, strict=True)
    return [token for token in tokens if token is not None], np.stack([f for f in frames if f is not None], axis=1)


def test_every_graph_is_compared_with_torch(exported):
    folder, report = exported
    assert list(report) == ["model.onnx", "codec.onnx", "audio_encoder.onnx", "vision_encoder.onnx"]
    assert all(size == (folder / name).stat().st_size for name, (size, _) in report.items())
    assert max(difference for _, difference in report.values()) <= TOLERANCE
    assert {file.name for file in folder.iterdir()} == {
        *report,
        *("config.json", "tokenizer.json", "voices.npz", "onnx_runner.py"),
    }


@pytest.mark.parametrize(("question", "voice"), [(QUESTION, None), (QUESTION, "awb"), ("Hi", "slt")])
def test_greedy_answers_are_torchs(speaker, whole, question, voice):
    inputs, wanted = answer(whole, question, voice)
    ids = speaker.prompt_ids(question)
    assert ids == inputs["input_ids"][0].tolist()
    tokens, codes = split(speaker.generate(ids, voice))
    assert tokens == wanted.sequences[0, wanted.prompt_length :].tolist()
    assert np.array_equal(codes, wanted.audio_codes[0].numpy())
    text, waveform = speaker.speak(question, voice)
    said = whole[1].decode(wanted)[0]
    assert text == said.text
    np.testing.assert_allclose(waveform, said.audio.numpy(), atol=TOLERANCE)


def test_half_a_voice_is_placed_as_in_torch(speaker, whole):
    """A voice of codes alone, longer than the prompt; and one of an embedding alone."""
    parts = speaker.voices["awb"]
    ids = speaker.prompt_ids("Hi")
    long = np.tile(parts["ref_codes"], (1, 20))[:, : len(ids) + 3]
    for voice in ({"ref_codes": long}, {"spk_emb": parts["spk_emb"]}):
        speaker.voices["half"] = voice
        _, wanted = answer(whole, "Hi", {name: torch.from_numpy(part) for name, part in voice.items()})
        assert np.array_equal(split(speaker.generate(ids, "half"))[1], wanted.audio_codes[0].numpy())


def test_speech_and_a_picture_go_through_the_encoders(speaker, whole):
    clip = 0.1 * np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    picture = np.random.default_rng(0).integers(256, size=(96, 96, 3), dtype=np.uint8)
    content = [{"type": "audio", "audio": clip}, {"type": "image", "image": picture}]
    inputs, wanted = answer(whole, content)
    (audio,) = speaker._session("audio_encoder.onnx").run(None, {"input_features": inputs["input_features"].numpy()})
    (image,) = speaker._session("vision_encoder.onnx").run(None, {"pixel_values": inputs["pixel_values"].numpy()})
    ids = inputs["input_ids"][0].tolist()
    tokens, codes = split(speaker.generate(ids, audio_features=audio, image_features=image))
    assert tokens == wanted.sequences[0, wanted.prompt_length :].tolist()
    assert np.array_equal(codes, wanted.audio_codes[0].numpy())
    with pytest.raises(ValueError, match=f"has {len(audio)} places for 0 `audio_features`"):
        next(speaker.generate(ids, image_features=image))


def test_codec_frame_by_frame_is_one_call(speaker, whole):
    codes = torch.randint(512, (1, 8, 70))  # beyond the attention's window of 50
    wanted, _ = MimiStreamingDecoder(whole[1].audio_tokenizer)(codes)
    found = np.concatenate(list(speaker.decode(codes[0].T.numpy())))
    np.testing.assert_allclose(found, wanted[0].clamp(-1, 1).numpy(), atol=TOLERANCE)


def test_it_speaks_with_onnxruntime_alone(exported, speaker, tmp_path):
    program = """
import runpy, sys
for name in ("torch", "transformers", "minimind_o_hf", "onnx", "onnxscript", "safetensors", "jinja2"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", program, exported[0] / "onnx_runner.py", QUESTION, "--voice", "rms"]
    done = subprocess.run([*command, "--out", "said.flac"], cwd=tmp_path, check=True, capture_output=True, text=True)
    text, waveform = speaker.speak(QUESTION, "rms")
    assert done.stdout == f"{text}\n"
    samples, rate = soundfile.read(tmp_path / "said.flac")
    assert rate == 24000
    np.testing.assert_allclose(samples, waveform, atol=2 / 32768)
    mark = read_mark(tmp_path / "said.flac")
    assert (mark["ai_generated"], mark["model"], mark["voice"]) == (True, "nano", "rms")
    assert [file.name for file in tmp_path.iterdir()] == ["said.flac"]


def test_a_seed_repeats_a_sampled_answer(speaker):
    speaker.settings.update(do_sample=True, temperature=1.5, audio_temperature=1.0, max_new_tokens=24)
    ids = speaker.prompt_ids(QUESTION)
    (first, again), other = (
        [split(speaker.generate(ids, seed=1)) for _ in range(2)],
        split(speaker.generate(ids, seed=2)),
    )
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])
    assert first[0] != other[0] or not np.array_equal(first[1], other[1])


@pytest.mark.parametrize(
    ("top_k", "top_p", "penalty"), [(0, 1.0, 1.0), (5, 1.0, 1.3), (0, 0.6, 1.0), (50, 0.9, 0.8), (0, 0.0, 1.0)]
)
def test_text_scores_are_processed_as_by_transformers(top_k, top_p, penalty):
    scores, ids = torch.randn(1, 100) * 3, torch.tensor([[3, 14, 15, 3]])
    settings = {"repetition_penalty": penalty, "suppress_tokens": [7], "temperature": 0.7}
    settings |= {"do_sample": True, "top_k": top_k, "top_p": top_p}
    processors = [RepetitionPenaltyLogitsProcessor(penalty), SuppressTokensLogitsProcessor([7])]
    processors += [TemperatureLogitsWarper(0.7)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    wanted = LogitsProcessorList([*processors, TopPLogitsWarper(top_p)])(ids, scores)
    found = process_text_scores(scores[0].numpy(), ids[0].tolist(), settings)
    np.testing.assert_allclose(found, wanted[0].numpy(), rtol=1e-6)


def test_code_scores_are_penalised_as_by_torch():
    scores = torch.randn(1, 8, 40)
    history = list(np.random.default_rng(0).integers(3, size=(5, 8)))
    settings = {"audio_repetition_penalty": 1.3, "audio_repetition_window": 3, "do_sample": False}
    wanted = penalize_repetition(scores, torch.from_numpy(np.stack(history[-3:], axis=1))[None], 1.3)
    np.testing.assert_allclose(process_code_scores(scores[0].numpy(), history, settings), wanted[0], rtol=1e-6)
    assert np.array_equal(process_code_scores(scores[0].numpy(), [], settings), scores[0].numpy())
    drawn = process_code_scores(
        scores[0].numpy(), [], settings | {"do_sample": True, "audio_top_k": 4, "audio_temperature": 0.5}
    )
    assert (np.isfinite(drawn).sum(axis=-1) == 4).all()
    np.testing.assert_allclose(drawn.max(axis=-1), scores[0].amax(dim=-1) / 0.5)


def test_bad_input_says_what_to_do(exported, speaker, tmp_path, capsys):
    with pytest.raises(ValueError, match="There is no voice 'nobody': there are awb, rms, slt"):
        speaker.speak("Hi", "nobody")
    with pytest.raises(ValueError, match="The question is empty"):
        speaker.speak("  ")
    with pytest.raises(ValueError, match=r"placeholders \['<\|audio_pad\|>'\], and this runner takes text only"):
        speaker.speak("<|audio_pad|>")
    with pytest.raises(FileNotFoundError, match="make one with `minimind-o export onnx`"):
        OnnxSpeaker(tmp_path)
    with pytest.raises(OSError, match=r"the name must end in \.wav"):
        speaker.save(np.zeros(10, np.float32), tmp_path / "said.txt")
    assert list(tmp_path.iterdir()) == []
    runner = runpy.run_path(str(exported[0] / "onnx_runner.py"))
    assert runner["main"](["Hi", "--voice", "nobody", "--out", str(tmp_path / "said.wav")]) == 1
    assert capsys.readouterr().err.startswith("onnx_runner: error: There is no voice")


def test_an_answer_without_speech_is_a_short_silence(speaker, tmp_path):
    speaker.settings["max_new_tokens"] = 3
    text, waveform = speaker.speak(QUESTION)
    assert text
    assert waveform.shape == (0,)
    speaker.save(waveform, tmp_path / "said.wav")
    assert soundfile.info(tmp_path / "said.wav").frames == 1920


def test_experts_as_a_graph(tiny_model, tmp_path):
    model = tiny_model(True, num_hidden_layers=1, num_talker_hidden_layers=1, num_experts=5, num_experts_per_tok=2)
    input_ids = torch.randint(17, 320, (1, 12))
    with torch.no_grad():
        wanted = model(input_ids=input_ids).logits
        with _exportable_experts(model):
            torch.testing.assert_close(model(input_ids=input_ids).logits, wanted, atol=1e-5, rtol=0)
            graph = _model_graph(model)
            _write_graph(graph, tmp_path / "model.onnx")
    # Against the experts one by one.
    model.set_experts_implementation("eager")
    assert _difference(graph, tmp_path / "model.onnx") <= TOLERANCE


def test_a_graph_that_differs_is_noticed(tiny_model, tmp_path):
    graph = dict(_graphs(tiny_model(), None))["vision_encoder.onnx"]
    _write_graph(graph, tmp_path / "vision_encoder.onnx")
    assert _difference(graph, tmp_path / "vision_encoder.onnx") <= TOLERANCE
    with torch.no_grad():
        graph.module.projector.mlp[3].bias[0] += 0.01
    assert _difference(graph, tmp_path / "vision_encoder.onnx") > TOLERANCE


def test_the_runner_is_the_packages_own(exported):
    package = Path(sys.modules["minimind_o_hf.onnx_runner"].__file__)
    assert (exported[0] / "onnx_runner.py").read_bytes() == package.read_bytes()
