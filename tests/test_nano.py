"""The nano model that the package carries, from end to end. How well it speaks and hears, docs/nano.md says."""

import base64
import importlib
import io
import json
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import soundfile
import torch
from minimind_o_hf.processing.voices_minimind_o import load_voices
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    MimiModel,
    SiglipVisionModel,
)
from transformers.models.fun_asr_nano import FunAsrNanoEncoder

from minimind_o_hf import VoiceLibrary, default_checkpoint, read_mark
from minimind_o_hf.adapters import lora_config
from minimind_o_hf.cli import main
from minimind_o_hf.evaluation.suites import load_suite
from minimind_o_hf.packaged import held_out_voices_of, speaker_encoder_of

QUESTION = Path(__file__).parent / "data" / "flite_where_does_a_pig_live.flac"
VOICES = ["awb", "rms", "slt"]
PATH = default_checkpoint()


@pytest.fixture(scope="module")
def model():
    return AutoModelForMultimodalLM.from_pretrained(PATH).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(PATH)


@pytest.fixture(scope="module")
def ask(model, processor):
    """Asks one or several questions (content of user turns) and returns the answers."""

    def ask(*contents, voice="slt", **settings):
        chats = [[{"role": "user", "content": content}] for content in contents]
        inputs = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, voice=voice
        )
        return processor.decode(model.generate(**inputs, **settings))

    return ask


def test_the_checkpoint_is_complete_and_small():
    files = [path for path in PATH.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24e6
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md", ".png"}
    assert AutoModel.from_pretrained(PATH / "speaker_encoder").config.embedding_size == 192
    assert AutoFeatureExtractor.from_pretrained(PATH / "speaker_encoder").sampling_rate == 16000


def test_weights_are_float32_in_memory(model, processor):
    assert model.dtype == torch.float32
    assert processor.audio_tokenizer.dtype == torch.float32


def test_the_voices_say_who_agreed_and_under_which_licence():
    voices = VoiceLibrary(PATH / "voices.safetensors").voices()
    assert sorted(voices) == VOICES
    for voice in voices.values():
        assert "flite" in voice.consent
        assert "free use" in voice.licence
        assert voice.codec.startswith("mimi:")
        assert voice.speaker_encoder


def test_a_voice_that_it_was_not_trained_with_is_beside_them():
    (voice,) = VoiceLibrary(held_out_voices_of(None)).voices().values()
    assert voice.name == "kal16"
    assert speaker_encoder_of(None) == str(PATH / "speaker_encoder")


def test_other_checkpoints_have_neither_by_default(tmp_path):
    assert held_out_voices_of(str(tmp_path)) is None
    assert speaker_encoder_of("owner/name") is None


def test_the_weights_carry_their_provenance():
    origin = json.loads((PATH / "provenance.json").read_text(encoding="utf-8"))
    assert origin["recipe version"] == "2"
    assert origin["licence"] == "Apache-2.0"
    assert {"corpus", "speech", "codec", "lm", "t2a", "a2a", "i2t"} <= set(origin["stages"])
    for stage in origin["stages"].values():
        assert re.fullmatch("[0-9a-f]{64}", stage["digest"])
        assert stage["figures"]


def test_typed_questions_are_answered_aloud(ask):
    expected = {
        "Where does a pig live?": "The pig lives on a farm.",
        "What is six plus eight?": "Six plus eight is fourteen.",
        "The ball is under the table. Where is the ball?": "The ball is under the table.",
    }
    answers = ask(*expected)
    assert [answer.text for answer in answers] == list(expected.values())
    assert all(1 < len(answer.audio) / 24000 < 4 for answer in answers)


def test_a_spoken_question_is_answered_aloud(ask):
    (answer,) = ask([{"type": "audio", "path": str(QUESTION)}])
    assert answer.text.endswith(".")
    assert len(answer.audio) > 24000


def test_pictures_are_described(ask):
    asked = [question for question in load_suite("nano").questions if question.image]
    pictures = [base64.b64decode(question.image.partition(",")[2]) for question in asked[:10]]
    contents = [
        [{"type": "image", "image": Image.open(io.BytesIO(picture))}, {"type": "text", "text": question.text}]
        for question, picture in zip(asked, pictures, strict=False)
    ]
    answers = ask(*contents, generation_mode="text")
    right = [answer.text in question.answers for question, answer in zip(asked, answers, strict=False)]
    assert sum(right) >= 3  # by guessing, one at most
    (spoken,) = ask(contents[0], voice="rms")
    assert spoken.text == answers[0].text
    assert len(spoken.audio) > 12000


def test_rows_of_a_batch_answer_as_they_do_alone_each_in_its_voice(ask):
    contents = ["Where does a pig live?", "What is six plus eight?", [{"type": "audio", "path": str(QUESTION)}]]
    together = ask(*contents, voice=VOICES)
    for content, voice, answer in zip(contents, VOICES, together, strict=True):
        (alone,) = ask(content, voice=voice)
        assert alone.text == answer.text
        torch.testing.assert_close(alone.audio, answer.audio, rtol=0, atol=1e-4)


def test_a_stream_is_the_answer_at_once(model, processor, ask):
    chat = [{"role": "user", "content": "Where does a pig live?"}]
    (offline,) = ask(chat[0]["content"])
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice="slt"
    )
    events = list(model.stream(processor, **inputs))
    assert "".join(event.text for event in events) == offline.text
    sound = torch.cat([event.audio for event in events if event.audio is not None])
    assert len([event for event in events if event.audio is not None]) > 1
    torch.testing.assert_close(sound, offline.audio, rtol=0, atol=1e-4)


def test_saved_and_loaded_it_says_the_same(model, processor, ask, tmp_path):
    (before,) = ask("What is six plus eight?")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = AutoModelForMultimodalLM.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "What is six plus eight?"}]
    inputs = again.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice="slt")
    (after,) = again.decode(loaded.generate(**inputs))
    assert after.text == before.text
    assert torch.equal(after.audio, before.audio)


def test_an_adapter_teaches_it_a_new_answer_and_comes_off(processor, tmp_path):
    torch.manual_seed(0)
    chat = [{"role": "user", "content": "Where does a pig live?"}]
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)
    answer = processor.tokenizer("The pig is six.", return_tensors="pt").input_ids
    end = torch.tensor([[processor.tokenizer.eos_token_id]])
    prompt = inputs["input_ids"]
    ids = torch.cat([prompt, answer, end], dim=1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100

    adapted = peft.get_peft_model(AutoModelForMultimodalLM.from_pretrained(PATH), lora_config("thinker", rank=8))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        loss = adapted(input_ids=ids, labels=labels, run_talker=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = peft.PeftModel.from_pretrained(AutoModelForMultimodalLM.from_pretrained(PATH), tmp_path / "adapter")
    fresh.eval()

    def say() -> str:
        return processor.decode(fresh.generate(**inputs, generation_mode="text"))[0].text

    assert say() == "The pig is six."
    with fresh.disable_adapter():
        assert say() == "The pig lives on a farm."


def test_the_demo_answers(tmp_path, capsys):
    reply = tmp_path / "reply.wav"
    assert main(["chat", "--text", "Where does a pig live?", "--voice", "rms", "--out", str(reply)]) == 0
    printed = capsys.readouterr()
    assert "The pig lives on a farm." in printed.out
    assert "nano, a toy" in printed.err
    assert read_mark(reply)
    assert 1 < soundfile.info(reply).duration < 4


def test_the_recipe_can_go_on_from_its_parts(model, processor, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "training_scripts" / "nano"))
    restore = importlib.import_module("restore")
    restore.restore(PATH, tmp_path)
    for stage, loaded, part in (
        ("speech_encoder", FunAsrNanoEncoder, model.audio_tower),
        ("vision_encoder", SiglipVisionModel, model.vision_tower),
        ("codec", MimiModel, processor.audio_tokenizer),
    ):
        weights = loaded.from_pretrained(tmp_path / stage / "model", dtype=torch.float32).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in part.state_dict().items()), stage
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "tokenizer" / "model").get_vocab() == processor.tokenizer.get_vocab()
    )
    assert sorted(load_file(tmp_path / "speaker_encoder" / "voices.safetensors")) == sorted([*VOICES, "kal16"])
    origin = json.loads((PATH / "provenance.json").read_text(encoding="utf-8"))["stages"]
    for stage in restore.PARTS:
        done = json.loads((tmp_path / stage / "done.json").read_text(encoding="utf-8"))
        assert done == {name: origin[stage][name] for name in ("digest", "output")}
    capsys.readouterr()
    restore.restore(PATH, tmp_path)
    assert capsys.readouterr().err.count(": kept") == len(restore.PARTS)
    # The voice that is never trained on: its recordings are made anew, its embedding is not.
    row = {"voice": "kal16", "seconds": 1, "path": "one.wav"}
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "answers.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    soundfile.write(tmp_path / "speech" / "one.wav", np.random.default_rng(0).normal(0, 0.1, 24_000), 24_000)
    voice = importlib.import_module("finish_model").held_out_voice(tmp_path, processor.audio_tokenizer)
    assert torch.equal(voice["spk_emb"], load_voices(held_out_voices_of(None))["kal16"]["spk_emb"])
    assert voice["ref_codes"].shape == (8, 13)
