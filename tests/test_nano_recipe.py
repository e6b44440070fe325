"""The nano recipe: what its corpus holds, how recordings are trimmed, and the pieces of the codec's training."""

import copy
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from minimind_o_hf.modeling import MimiStreamingDecoder
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForMultimodalLM, AutoProcessor, MimiModel

from minimind_o_hf import default_checkpoint
from minimind_o_hf.data import MiniMindODataCollator, MiniMindODataset
from minimind_o_hf.trainer import MiniMindOTrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_scripts" / "nano"))
stages, words, make_corpus, make_speech, train_codec, build_data, train_model, optimizers, finish_model, nano = (
    importlib.import_module(name)
    for name in (
        *("stages", "corpus_words", "make_corpus", "make_speech", "train_codec", "build_data", "train_model"),
        *("optimizers", "finish_model", "nano"),
    )
)
flite, train_vision_encoder = importlib.import_module("flite"), importlib.import_module("train_vision_encoder")
tune_decoder = importlib.import_module("tune_decoder")
training_loop, make_phrases = importlib.import_module("training"), importlib.import_module("make_phrases")
needs_flite = pytest.mark.skipif(not flite.is_installed(), reason="flite is not installed")


# The frame of the stages


def counted(folder, text="made"):
    """A stage's `make`, which counts how often it was called."""

    def make(given):
        calls.append(given)
        (given / "file.txt").write_text(text)
        return {"answer": 42}

    calls: list[Path] = []
    return make, calls


def test_a_finished_stage_is_reused_until_its_settings_change(tmp_path):
    folder = tmp_path / "a"
    make, calls = counted(folder)
    assert stages.run_stage(folder, [], {"seed": 0}, make)
    assert not stages.run_stage(folder, [], {"seed": 0}, make)
    assert calls == [folder]
    assert json.loads((folder / "figures.json").read_text()) == {"answer": 42}
    (folder / "old.txt").touch()
    assert stages.run_stage(folder, [], {"seed": 1}, make)
    assert not (folder / "old.txt").exists()


def test_a_stage_is_run_again_when_an_earlier_one_has_changed(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    make, calls = counted(second)
    for seed, wanted in ((0, 1), (0, 1), (1, 2)):
        stages.run_stage(first, [], {"seed": seed}, lambda folder: {})
        stages.run_stage(second, [first], {}, make)
        assert len(calls) == wanted


def test_a_stage_is_reused_when_an_earlier_one_was_made_again_with_the_same_output(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    make, calls = counted(second)
    for seed, text, wanted in ((0, "x", 1), (1, "x", 1), (1, "y", 1), (2, "y", 2)):
        earlier, _ = counted(first, text)
        stages.run_stage(first, [], {"seed": seed}, earlier, ["file.txt"])
        stages.run_stage(second, [first], {}, make)
        assert len(calls) == wanted


def test_an_interrupted_stage_goes_on_from_its_files(tmp_path):
    folder = tmp_path / "a"

    def interrupted(given):
        (given / "half.txt").write_text("kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run_stage(folder, [], {}, interrupted)
    assert not (folder / "done.json").exists()
    assert stages.run_stage(folder, [], {}, lambda given: {"found": (given / "half.txt").read_text()})
    assert stages.read_json(folder / "figures.json") == {"found": "kept"}


def test_a_stage_neither_starts_before_its_inputs_nor_empties_what_is_not_its_own(tmp_path):
    with pytest.raises(ValueError, match="Not finished yet: corpus"):
        stages.open_stage(tmp_path / "speech", [tmp_path / "corpus"], {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="holds no stage"):
        stages.open_stage(tmp_path / "mine", [], {})
    assert (tmp_path / "mine" / "thesis.txt").exists()


# The corpus


@pytest.fixture(scope="module")
def corpus():
    return make_corpus.make_conversations(seed=0, size=700)


@pytest.fixture(scope="module")
def split(corpus):
    return {name: [row for row in corpus if row["split"] == name] for name in ("train", "eval")}


def asked(row):
    return row["question"], json.dumps(row["scene"])


def test_the_corpus_is_as_large_as_it_says(corpus, split):
    closed = [row for row in split["train"] if row["kind"] != "repeat"]
    assert len(closed) >= 30_000
    assert len({(*asked(row), row["answer"]) for row in corpus}) == len(corpus)
    assert len({word for row in closed for word in make_corpus.words_of(row["answer"])}) >= 400
    repeated = [row["answer"] for row in split["train"] if row["kind"] == "repeat"]
    assert len({word for answer in repeated for word in make_corpus.words_of(answer)}) >= 1_000


def test_answers_are_short_plain_sentences(corpus):
    for row in corpus:
        assert re.fullmatch(r"[A-Z][A-Za-z' ,?]*[.?]( [A-Z][a-z ]*\.)?", row["answer"]), row
        assert 2 <= len(make_corpus.words_of(row["answer"])) <= 12
        assert re.fullmatch(r"[A-Z][A-Za-z',.?: ]*[.?]", row["question"]), row


def test_what_is_evaluated_was_not_trained_on(split):
    questions = {asked(row) for row in split["train"]}
    answers = {row["answer"] for row in split["train"]}
    scenes = {json.dumps(row["scene"]) for row in split["train"]}
    wordings = {row["question"] for row in split["train"]}
    held = Counter(row["held"] for row in split["eval"])
    assert min(held[name] for name in ("answer", "paraphrase", "question", "scene")) >= 100
    for row in split["eval"]:
        assert asked(row) not in questions
        assert (row["answer"] in answers) == (row["held"] != "answer") or row["held"] == "scene"
        assert (json.dumps(row["scene"]) in scenes) == (row["held"] != "scene")
        assert row["question"] not in wordings or row["held"] == "scene"
    assert all(row["held"] is None for row in split["train"])


def test_what_is_evaluated_is_made_of_words_from_training(split):
    spoken = {word for row in split["train"] for word in make_corpus.words_of(row["answer"])}
    known = spoken | {word for row in split["train"] for word in make_corpus.words_of(row["question"])}
    for row in split["eval"]:
        assert spoken.issuperset(make_corpus.words_of(row["answer"]))
        assert known.issuperset(make_corpus.words_of(row["question"]))


def test_sums_are_right(corpus):
    signs = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    found = Counter()
    for row in corpus:
        if match := re.fullmatch(r"(\w+) (plus|minus|times) (\w+) is (\w+)\.", row["answer"]):
            a, b, c = (words.NUMBERS.index(match[index].lower()) for index in (1, 3, 4))
            assert signs[match[2]](a, b) == c, row
            found[match[2]] += 1
        if row["kind"] == "problems":
            a, b = (
                words.NUMBERS.index(word) for word in make_corpus.words_of(row["question"]) if word in words.NUMBERS
            )
            less = re.search("lose|lost|give away|gave away", row["question"])
            assert words.NUMBERS[a - b if less else a + b] in row["answer"].split(), row
    assert found["plus"] > 1_000
    assert found["minus"] > 1_000


def test_answers_about_pictures_fit_their_scenes(corpus):
    for row in corpus:
        if row["kind"] != "picture":
            continue
        scene, answer = row["scene"], row["answer"].lower().rstrip(".")
        names = [(shown["colour"], shown["shape"], shown["where"]) for shown in scene]
        said = answer.split()
        if said[0] == "no,":
            assert said[-1] not in {shape for _, shape, _ in names}
            continue
        # Whatever is named is there, with its own colour and place.
        named = [name for name in names if name[1] in said or f"{name[1]}s" in said]
        assert named, row
        for colour in set(words.SHAPE_COLOURS) & set(said):
            assert any(name[0] == colour for name in named), row
        for where, place in words.POSITIONS.items():
            if answer.endswith(place):
                assert any(name[2] == where and name[0] in said for name in named), row
        if len(scene) > 1 and said[:2] == ["there", "are"]:
            assert words.NUMBERS[len(scene)] == said[2]


def test_days_follow_each_other(corpus):
    found = 0
    for row in corpus:
        if match := re.fullmatch(r"(\w+day) comes (after|before) (\w+day)\.", row["answer"]):
            step = words.DAYS.index(match[1]) - words.DAYS.index(match[3])
            assert step % 7 == (1 if match[2] == "after" else 6)
            found += 1
    assert found >= 14


def test_wordings_for_training_alone_are_added_to_the_rest(monkeypatch):
    corpus = make_corpus.make_conversations(0, 20)
    monkeypatch.setattr(make_corpus, "more_ways", lambda sort, **fields: ())
    rest = make_corpus.make_conversations(0, 20)
    added = corpus[len(rest) :]
    assert corpus[: len(rest)] == rest
    assert {row["split"] for row in added} == {"train"}
    assert not {row["answer"] for row in added} & {row["answer"] for row in rest if row["held"] == "answer"}
    assert not {row["question"] for row in added} & {row["question"] for row in rest}
    assert "Tell me the month after May." in {row["question"] for row in added}


def test_the_same_seed_gives_the_same_corpus():
    first, again, other = (make_corpus.make_conversations(seed, 10) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_script_writes_corpus_figures_and_plot(tmp_path, capsys):
    make_corpus.main([str(tmp_path), "--quick"])
    rows = stages.read_lines(tmp_path / "corpus" / "conversations.jsonl")
    figures = stages.read_json(tmp_path / "corpus" / "figures.json")
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert sum(figures[name]["train conversations"] for name in figures) == sum(r["split"] == "train" for r in rows)
    assert (tmp_path / "corpus" / "figures.png").read_bytes()[:4] == b"\x89PNG"
    make_corpus.main([str(tmp_path), "--quick"])
    assert capsys.readouterr().err.splitlines() == ["corpus: running", "corpus: unchanged, reused"]


# Speech


def test_recordings_are_trimmed_to_whole_frames_of_one_loudness():
    tone = 0.5 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)  # 12.5 frames
    trimmed = make_speech.trim(np.pad(tone, (3000, 5000)).astype(np.float32))
    assert trimmed.dtype == np.float32
    assert len(trimmed) == (1 + 13 + 1) * 1280
    assert not trimmed[:1280].any()
    assert not trimmed[1280 + 16000 + 10 :].any()
    assert np.sqrt(np.mean(trimmed[1280 : 1280 + 16000] ** 2)) == pytest.approx(0.08, rel=0.01)


def test_a_silent_recording_is_refused():
    with pytest.raises(ValueError, match="silent"):
        make_speech.trim(np.zeros(16000, np.float32))


def test_the_unseen_voice_and_the_held_out_sentences_are_only_evaluated(corpus):
    for plan in (make_speech.plan_answers, make_speech.plan_questions):
        train, evaluation = plan(corpus, 50)
        assert {row["voice"] for row in train} == set(make_speech.VOICES)
        assert Counter(row["voice"] for row in evaluation) == dict.fromkeys(("slt", "rms", "awb", "kal16"), 50)
        assert {row["text"] for row in train}.isdisjoint(row["text"] for row in evaluation)
        shares = Counter(row["voice"] for row in train[:3000])
        assert max(shares.values()) < 1.2 * min(shares.values())


def test_answers_are_spoken_in_one_voice_before_any_is_in_a_second_one(corpus):
    train, _ = make_speech.plan_answers(corpus, 0)
    distinct = len({row["text"] for row in train})
    assert len({row["text"] for row in train[:distinct]}) == distinct
    assert len({(row["text"], row["voice"]) for row in train}) == len(train) == len(make_speech.VOICES) * distinct


def test_phrases_have_the_words_of_questions_in_another_order():
    questions = ["Repeat after me: Where is my shoe?", "I have a map. Where is it?", "Do you like London?"]
    avoided = ["You like."]
    phrases = make_phrases.make_phrases(questions, 300, 0, avoided)
    assert len(set(phrases)) == 300
    assert phrases == make_phrases.make_phrases(questions, 300, 0, avoided)
    assert phrases != make_phrases.make_phrases(questions, 300, 1, avoided)
    words = re.findall(r"\w+", " ".join(questions))
    counts = Counter(word for phrase in phrases[1::2] for word in re.findall(r"\w+", phrase.lower()))
    assert set(counts) == {word.lower() for word in words}
    assert max(counts.values()) < 2.5 * min(counts.values())
    inside = {word for phrase in phrases for word in re.findall(r"\w+", phrase)[1:]}
    assert {word for word in inside if word[0].isupper()} == {"I", "London"}
    short = make_phrases.make_phrases(["Red and blue."], 20, 0)
    assert "Red and blue." not in short
    every = make_phrases.make_phrases(["Red and blue."], 20, 0, [text.lower() for text in short])
    assert not set(short) & set(every)


def test_phrases_are_spoken_in_turn_and_say_nothing_that_is_held_out(corpus):
    rows = make_phrases.plan_phrases(corpus, 400)
    assert [row["voice"] for row in rows[:4]] == ["slt", "rms", "awb", "slt"]
    assert {row["split"] for row in rows} == {"train"}
    said = {" ".join(re.findall(r"[a-z']+", row["text"].lower())) for row in rows}
    assert not said & {" ".join(re.findall(r"[a-z']+", row["question"].lower())) for row in corpus}


@needs_flite
def test_flite_speaks_and_finished_recordings_are_kept(tmp_path):
    rows = [{"text": "The red circle is on the left.", "voice": voice} for voice in ("slt", "kal16")]
    spoken = make_speech.speak_rows(rows, tmp_path / "answers", float("inf"))
    for row in spoken:
        path = tmp_path / row["path"]
        assert soundfile.info(path).samplerate == 16000
        assert soundfile.info(path).frames == row["seconds"] * 16000
        assert 1 < row["seconds"] < 4
        assert row["seconds"] / 0.08 == pytest.approx(round(row["seconds"] / 0.08))
    path.write_bytes((tmp_path / spoken[0]["path"]).read_bytes())
    assert make_speech.speak_rows(rows, tmp_path / "answers", float("inf"))[1]["seconds"] == spoken[0]["seconds"]


@pytest.mark.skipif(not shutil.which("flite"), reason="the program flite is not installed")
@pytest.mark.parametrize("voice", [*make_speech.VOICES, make_speech.HELD_OUT_VOICE])
def test_the_library_says_what_the_program_says(voice, tmp_path):
    text = "Tom likes fish. What does Tom like?"
    subprocess.run(["flite", "-voice", voice, "-t", text, "-o", tmp_path / "said.wav"], check=True)
    for _ in range(2):  # the noise of consonants starts anew
        assert np.array_equal(flite.speak_text(text, voice), soundfile.read(tmp_path / "said.wav", dtype="float32")[0])


@needs_flite
@pytest.mark.parametrize("voice", make_speech.VOICES)
def test_words_of_answers_begin_with_a_frame(voice):
    text = "No, the tiger cannot fly."
    spoken = flite.speak_stretched(text, voice, flite.stretches_on_grid(text, voice))
    begins = np.array([begin for begin, _ in spoken.words] + [spoken.words[-1][1]])
    frames = (begins - begins[0]) / 0.08
    assert len(spoken.words) == 5
    assert np.abs(frames - frames.round()).max() < 0.1  # flite's own frames are 5 ms
    waveform = flite.speak_on_grid(text, voice)
    assert waveform.dtype == np.float32
    assert len(waveform) == (frames[-1].round() + 2) * 1280
    assert not waveform[:960].any()
    assert not waveform[-960:].any()
    assert 0.02 < np.sqrt(np.mean(waveform**2)) < 0.2


@needs_flite
@pytest.mark.parametrize(
    ("text", "voice", "error"),
    [
        ("", "slt", "nothing to say"),
        ("Yes - no.", "slt", "put it in words"),
        ("Yes.\0No.", "slt", "NUL"),
        ("Yes.", "nobody", "no voice 'nobody'"),
    ],
)
def test_what_cannot_be_said_is_refused(text, voice, error):
    with pytest.raises(ValueError, match=error):
        flite.speak_on_grid(text, voice)


@needs_flite
def test_answers_are_spoken_and_encoded_in_processes_of_their_own(tmp_path):
    texts = ("The cat can swim.", "No, a goat is an animal.", "Two.")
    rows = [{"text": text, "voice": voice} for text in texts for voice in ("slt", "rms", "awb")]
    spoken = make_speech.speak_rows(rows, tmp_path / "answers", float("inf"), on_grid=True)
    assert [(row["text"], row["voice"]) for row in spoken] == [(row["text"], row["voice"]) for row in rows]
    codec = default_checkpoint() / "audio_tokenizer"
    codes = build_data.encode(codec, tmp_path, spoken)
    model = MimiModel.from_pretrained(codec, dtype=torch.float32)
    for row in spoken:
        found = codes[row["text"], row["voice"]]
        assert found.shape == (8, round(row["seconds"] / 0.08))
        alone = build_data.encode_speech(model, [train_codec.read_waveform(tmp_path / row["path"])], 8)[0]
        assert (found == alone).mean() > 0.98  # another ELU, and other batches


@needs_flite
def test_a_row_that_cannot_be_said_stops_the_stage(tmp_path):
    rows = [{"text": text, "voice": "slt"} for text in ("Yes.", "Yes - no.")]
    with pytest.raises(ValueError, match="put it in words"):
        make_speech.speak_rows(rows, tmp_path / "answers", float("inf"), on_grid=True)


# The codec


def test_the_features_hold_nothing_that_comes_later():
    waveform = torch.randn(1, 3 * 1920, generator=torch.Generator().manual_seed(0))
    changed = waveform.clone()
    changed[:, 1920:] = 0
    first, second = train_codec.log_mel(waveform), train_codec.log_mel(changed)
    assert first.shape == (1, 12, 64)
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4], second[:, 4])
    assert train_codec.patches(waveform)[0, 1].tolist() == first[0, 4:8].flatten().tolist()


def test_silence_is_the_floor_of_the_features():
    assert train_codec.log_mel(torch.zeros(1, 1920)).unique().tolist() == pytest.approx([np.log(0.01)])


def test_principal_components_are_found_and_scaled():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5000, 2, generator=generator) * torch.tensor([6.0, 2.0])
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator))[0]
    vectors = hidden @ turn[:2] + 5
    pca = train_codec.fit_pca(vectors, 2)
    components = (vectors - pca["mean"]) @ pca["basis"]
    assert pca["explained"][:2].tolist() == pytest.approx([0.9, 0.1], abs=0.01)
    assert components.square().mean().item() == pytest.approx(1, rel=1e-3)
    assert (components[:, 0].std() / components[:, 1].std()).item() == pytest.approx(3, rel=0.05)


def test_kmeans_finds_separate_clusters_and_fills_empty_ones():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = centres.repeat(25, 1)
    found = train_codec.kmeans(vectors, 4, 20, generator)
    assert sorted(found.tolist()) == sorted(centres.tolist())


def test_each_codebook_is_fitted_to_what_the_others_leave():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2000, 4, generator=generator)
    codebooks = train_codec.residual_kmeans(vectors, 3, 16, 10, generator)
    left, errors = vectors, []
    for codebook in codebooks:
        left = left - codebook[train_codec.nearest(left, codebook)]
        errors.append(left.square().sum(1).mean().item())
    assert errors[2] < errors[1] < errors[0] < 4 * 0.5


@pytest.fixture(scope="module")
def latents():
    """`(600, 66)`: like principal components, of falling size."""
    sizes = 4 * 0.93 ** torch.arange(66)
    return torch.randn(600, 66, generator=torch.Generator().manual_seed(0)) * sizes


@pytest.fixture(scope="module")
def codebooks(latents):
    return train_codec.fit_codebooks(latents, rounds=3, seed=0)


@pytest.fixture(scope="module")
def codec(codebooks):
    codec = train_codec.build_codec(0)
    train_codec.store_codebooks(codec, codebooks)
    return codec.eval()


def test_codes_of_the_codec_are_the_nearest_codewords(codec, codebooks, latents):
    assert codebooks.shape == (8, 512, 64)
    assert not codebooks[0, :, 2:].any()
    padded = torch.nn.functional.pad(latents, (0, 62)).T[None]
    codes = codec.quantizer.encode(padded)[:, 0]
    assert torch.equal(codes[0], torch.cdist(latents[:, :2], codebooks[0, :, :2]).argmin(1))
    left = latents[:, 2:]
    for codebook, found in zip(codebooks[1:], codes[1:], strict=True):
        chosen = torch.cdist(left, codebook).argmin(1)
        assert torch.equal(found, chosen)
        left = left - codebook[chosen]
    decoded = codec.quantizer.decode(codes[None].transpose(0, 1).transpose(0, 1))[0].T
    wanted = torch.cat([codebooks[0, codes[0], :2], sum(codebooks[n, codes[n]] for n in range(1, 8))], dim=1)
    torch.testing.assert_close(decoded[:, :66], wanted)
    assert not decoded[:, 66:].any()


def test_more_codebooks_come_nearer(codec, latents):
    padded = torch.nn.functional.pad(latents, (0, 62)).T[None]
    codes = codec.quantizer.encode(padded).transpose(0, 1)
    errors = [(codec.quantizer.decode(codes[:, :n]) - padded).square().mean().item() for n in range(1, 9)]
    assert errors == sorted(errors, reverse=True)


def test_the_fast_elu_is_elu_with_its_gradient():
    inputs = torch.linspace(-8, 8, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(train_codec.FastElu(), inputs)
    torch.testing.assert_close(train_codec.FastElu()(inputs), nn.functional.elu(inputs))


def test_an_untrained_codec_starts_at_the_loudness_of_speech(codec):
    latents = torch.randn(4, 128, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loudness = codec.decoder(latents).audio_values.square().mean().sqrt().item()
        encoded = codec.encoder(torch.randn(2, 1, 12 * 1920) * 0.08).latents
    assert 0.02 < loudness < 0.5
    assert 0.1 < encoded.std().item() < 10


def synthetic_speech(folder, texts=24):
    """A speech stage without a voice: tones that glide."""
    rows = []
    for number in range(texts):
        time = np.arange(16000 * 2) / 16000
        tone = 0.1 * np.sin(2 * np.pi * (150 + 10 * number + 100 * time) * time)
        path = folder / "answers" / f"{number}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tone, 16000)
        name = {"path": f"answers/{number}.flac", "seconds": 2.0, "kind": "facts", "text": "Ice is frozen water."}
        rows.append({**name, "voice": ("slt", "kal16")[number % 2], "split": "eval" if number < 4 else "train"})
    stages.write_lines(folder / "answers.jsonl", rows)
    stages.write_json(folder / "done.json", {"digest": "0", "output": "0"})


SETTINGS = {
    "seed": 0,
    "bfloat16": True,
    "minutes": 1,
    "held out": 4,
    "rounds": 2,
    "encoder steps": 4,
    "encoder rate": 1e-3,
    "decoder steps": 4,
    "decoder rate": 1e-3,
    "refit": 4,
    "tuning steps": 2,
    "tuning rate": 1e-3,
}


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """All parts of the codec's training, a few steps each."""
    folder = tmp_path_factory.mktemp("codec")
    synthetic_speech(folder / "speech")
    training = train_codec.CodecTraining(folder, folder / "speech", SETTINGS)
    training.histories = {"encoder": training.train_encoder(), "decoder": training.train_decoder()}
    training.refit_codebooks()
    training.histories["tuned"] = training.tune_decoder()
    train_codec.save_codec(training.codec, training.folder / "model")
    return training


def test_the_saved_codec_encodes_and_decodes_and_streams(training):
    codec = MimiModel.from_pretrained(training.folder / "model", dtype=torch.float32)
    waveform = torch.from_numpy(training.speech.waveforms[0])[None, None]
    codes = codec.encode(waveform).audio_codes
    assert codes.shape == (1, 8, 25)
    offline = codec.decode(codes).audio_values[:, 0]
    assert offline.shape == (1, 48000)
    decoder = MimiStreamingDecoder(codec)
    pieces, state = [], None
    for part in codes.split([1, 4, 20], dim=2):
        sound, state = decoder(part, state)
        pieces.append(sound)
    torch.testing.assert_close(torch.cat(pieces, dim=1), offline, atol=1e-5, rtol=1e-4)


def test_the_saved_codebooks_are_those_fitted_to_the_encoder(training):
    codec = MimiModel.from_pretrained(training.folder / "model", dtype=torch.float32)
    stored = train_codec.load_file(training.folder / "codebooks.safetensors")["codebooks"]
    layers = [
        *codec.quantizer.semantic_residual_vector_quantizer.layers,
        *codec.quantizer.acoustic_residual_vector_quantizer.layers,
    ]
    torch.testing.assert_close(torch.stack([layer.codebook.embed for layer in layers]), stored, atol=5e-3, rtol=1e-3)


def test_a_finished_training_is_read_and_not_repeated(training, monkeypatch):
    again = train_codec.CodecTraining(training.folder, training.folder / "speech", SETTINGS)
    monkeypatch.setattr(again.speech, "crops", None)  # which a step needs
    assert again.train_encoder() == training.histories["encoder"]
    for name, value in training.codec.encoder.state_dict().items():
        assert torch.equal(again.codec.encoder.state_dict()[name], value), name


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "SAVE_SECONDS", -1)
    monkeypatch.setattr(training_loop, "CHECK_EVERY", 2)

    def run(folder, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        network = nn.Linear(3, 3)

        def loss_at(step):
            if step == stop:
                raise KeyboardInterrupt
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            return (network(inputs) - inputs).square().mean()

        def check():
            return (network(torch.ones(1, 3)) - 1).square().mean().item()

        history = training_loop.train("it", folder, network, loss_at, check, 8, 1e-2)
        return network.weight, [(row["step"], row["held out"]) for row in history]

    weights, history = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop=5)
    resumed, found = run(tmp_path / "parts")
    assert torch.equal(weights, resumed)
    assert found == history
    assert [step for step, _ in history] == [2, 4, 6, 8]


def test_the_best_weights_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(training_loop, "CHECK_EVERY", 1)
    network = nn.Linear(1, 1, bias=False)
    seen, losses = [], iter([3.0, 1.0, 2.0])

    def check():
        seen.append(network.weight.item())
        return next(losses)

    training_loop.train("it", tmp_path, network, lambda step: network.weight.sum(), check, 3, 0.1)
    assert network.weight.item() == seen[1] != seen[2]


# The data and the stages of the model


@pytest.fixture(scope="module")
def conversation():
    return {"id": 7, "question": "How many?", "answer": "Two.", "scene": [{"shape": "star"}], "split": "train"}


@pytest.fixture(scope="module")
def spoken_row(conversation):
    codes = {("Two.", "slt"): np.arange(16).reshape(8, 2), ("Two.", "kal16"): np.zeros((8, 2), int)}
    voice = {"ref_codes": torch.arange(24).view(8, 3), "spk_emb": torch.arange(4.0)}
    silent = {**conversation, "answer": "Nobody has said this."}
    (row,) = build_data.make_rows([conversation, silent], codes, {"slt": voice})
    return row


def test_answers_are_rows_of_codes_in_a_voice_that_has_said_them(spoken_row):
    assert spoken_row["answer_audios"] == [[row * 2 + frame for frame in range(2) for row in range(8)]]
    assert spoken_row["ref_audios"] == [row * 3 + frame for frame in range(3) for row in range(8)]
    assert spoken_row["spk_emb"] == [0, 1, 2, 3]
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    assert json.loads(spoken_row["conversations"]) == turns


def test_every_recording_is_learnt_from_and_voices_take_turns(conversation):
    codes = {(text, voice): np.zeros((8, 2), int) for text in ("One.", "Two.") for voice in ("awb", "rms", "slt")}
    voices = {
        name: {"ref_codes": torch.zeros(8, 3), "spk_emb": torch.tensor([float(index)])}
        for index, name in enumerate(("awb", "rms", "slt"))
    }
    asked = [{**conversation, "id": number, "answer": "One."} for number in range(6)]
    rows = build_data.make_rows([*asked, {**conversation, "id": 6}], codes, voices)
    assert [row["conversation"]["id"] for row in rows] == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert [row["again"] for row in rows] == [False] * 7 + [True] * 2
    assert Counter(row["spk_emb"][0] for row in rows[:6]) == {0.0: 2, 1.0: 2, 2.0: 2}
    assert {row["spk_emb"][0] for row in rows[6:]} == {0.0, 1.0, 2.0}


def test_questions_are_asked_aloud_and_pictures_shown(spoken_row, conversation, tmp_path):
    (tmp_path / "a").write_bytes(b"sound or picture")
    (row,) = build_data.ask_aloud([spoken_row], {"How many?": [tmp_path / "a"]})
    assert row["question_audios"] == [b"sound or picture"]
    assert build_data.ask_aloud([spoken_row], {}) == []
    pictures = [{"scene": conversation["scene"], "path": "a"}, {"scene": [], "path": "none"}]
    (row,) = build_data.show_pictures([spoken_row], pictures, tmp_path)
    assert row["image_bytes"] == [b"sound or picture"]
    assert json.loads(row["conversations"])[0]["content"] == "<image>\nHow many?"


def test_files_of_rows_hold_the_columns_of_the_schema_alone(spoken_row, tmp_path):
    assert build_data.write(tmp_path / "rows.parquet", [spoken_row]) == 1
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == ["conversations", "answer_audios", "ref_audios", "spk_emb"]


@pytest.fixture(scope="module")
def shipped():
    path = default_checkpoint()
    return AutoModelForMultimodalLM.from_pretrained(path), AutoProcessor.from_pretrained(path)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_talker_reads_a_share_of_its_own_codes(share, shipped):
    talker, stop = shipped[0].talker, shipped[0].config.audio_stop_token
    torch.manual_seed(0)
    codes = torch.randint(0, 512, (4, 8, 40))
    labels = torch.where(torch.arange(40) < 10, -100, codes)  # the first ten are a voice's
    labels[:, :, 30:] = codes[:, :, 30:] = stop
    read = {"bridge_hidden_state": torch.randn(4, 40, 192), "audio_codes": codes}
    _, options = train_model.read_own_codes(labels, share, 512, talker, (), read)
    mixed, known = options["audio_codes"], codes.clone()
    with torch.no_grad():
        predicted = talker.lm_head(talker(**read).last_hidden_state[:, :-1]).argmax(-1)
    own = (mixed[:, :, 1:] == predicted)[:, :, 9:29]
    assert torch.equal(mixed[:, :, :10], known[:, :, :10])
    assert torch.equal(mixed[:, :, 30:], known[:, :, 30:])
    assert torch.equal(read["audio_codes"], known)
    assert ((mixed == known)[:, :, 1:][:, :, 9:29] | own).all()
    assert own.float().mean() == pytest.approx(share, abs=0.15)
    # A position is replaced in all codebooks or in none, but for predictions that are no sound.
    replaced, sound = own & ~(mixed == known)[:, :, 10:30], (predicted < 512)[:, :, 9:29]
    assert torch.equal(replaced, replaced.any(1, keepdim=True) & sound & (predicted != known[:, :, 1:])[:, :, 9:29])


def test_own_codes_are_read_in_training_alone(tiny_model, tmp_path, monkeypatch):
    seen = []

    def read(labels, share, size, talker, arguments, options):
        seen.append((share, size, labels is batch["audio_labels"]))
        return arguments, options

    monkeypatch.setattr(train_model, "read_own_codes", read)
    model = tiny_model()
    codes = torch.randint(0, 20, (1, 8, 5))
    batch = {"input_ids": torch.arange(300, 305)[None], "audio_codes": codes, "audio_labels": codes}
    trainer = train_model.NanoTrainer(
        model, MiniMindOTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    )
    for share, training in ((0.0, True), (0.5, False), (0.5, True)):
        trainer.own_codes = share
        model.train(training)
        assert torch.isfinite(trainer.compute_loss(model, batch))
        assert not model.talker._forward_pre_hooks
    assert seen == [(0.5, model.config.audio_codebook_size, True)]


def test_predicted_codes_are_in_step_with_the_true_ones(shipped, tmp_path):
    model, processor = shipped
    generator = np.random.default_rng(0)
    texts = ("The pig lives on a farm.", "It is blue.")
    codes = {(text, "rms"): generator.integers(512, size=(8, 14 + number)) for number, text in enumerate(texts)}
    voices = {name: processor.voices[name] for name in ("rms", "slt")}
    asked = {"question": "What do you say?", "scene": None, "split": "train"}
    rows = build_data.make_rows([{**asked, "id": text, "answer": text} for text in texts], codes, voices)
    build_data.write(tmp_path / "t2a_train.parquet", rows)
    build_data.save_voices(voices, tmp_path / "voices.safetensors")
    found = {answer.path: answer for answer in tune_decoder.predict_codes(model, processor, tmp_path, "train", 9)}
    assert len(found) == 2
    settings = train_model.AS_WRITTEN
    dataset = MiniMindODataset([str(tmp_path / "t2a_train.parquet")], processor, model.config, settings, 0)
    for index in range(2):
        sample = dataset[index]
        batch = MiniMindODataCollator(processor, model.config, feature_masking=None)([sample])
        with torch.no_grad():
            scores = model(**batch).audio_logits[0].argmax(-1)
        text = json.loads(parquet.read_table(tmp_path / "t2a_train.parquet")["conversations"][index].as_py())[1][
            "content"
        ]
        answer = found[f"answers/rms/{make_speech.name_of(text)}.flac"]
        assert (answer.encoder == codes[text, "rms"]).all()
        for number in range(8):
            labels = batch["audio_labels"][0, number]
            first = int((labels >= 0).nonzero()[0])
            predicted = scores[number, first - 1 : first - 1 + answer.talker.shape[1]]
            assert (predicted[predicted < 512] == torch.from_numpy(answer.talker[number])[predicted < 512]).all()
    assert len(tune_decoder.predict_codes(model, processor, tmp_path, "train", 1)) == 1


def test_every_scene_but_those_held_out_is_looked_at(tmp_path, monkeypatch):
    drawn: list[str] = []

    def draw(scene, seed):
        drawn.append(json.dumps(scene))
        return Image.new("RGB", (128, 128))

    monkeypatch.setattr(build_data.draw_pictures, "draw_scene", draw)
    make_corpus.main([str(tmp_path), "--quick", "--seed", "3"])
    figures = build_data.build_scenes(tmp_path, tmp_path, every=5)
    train, held_out = set(drawn[: figures["train"]]), set(drawn[figures["train"] :])
    scenes = {split: {json.dumps(one) for one in found} for split, found in train_vision_encoder.all_scenes(3).items()}
    assert len(train) > 0.9 * len(scenes["train"])
    assert train <= scenes["train"]
    assert held_out <= scenes["eval"]
    own = stages.read_lines(tmp_path / "corpus" / "conversations.jsonl")
    assert not train & {json.dumps(row["scene"]) for row in own if row["held"] == "scene"}
    for split in ("train", "eval"):
        table = parquet.read_table(tmp_path / f"scenes_{split}.parquet").to_pylist()
        assert len(table) == figures[split]
        for row in table[:50]:
            question, answer = (turn["content"] for turn in json.loads(row["conversations"]))
            assert question.startswith("<image>\n")
            assert answer.endswith(".")
            assert Image.open(io.BytesIO(row["image_bytes"][0])).size == (128, 128)


def test_pictures_begin_as_words(shipped):
    model, processor = copy.deepcopy(shipped[0]), shipped[1]
    model.vision_proj.apply(lambda layer: layer.reset_parameters() if isinstance(layer, nn.Linear) else None)
    assert train_model.start_vision_projector(model, processor, 96, 0) < 0.5
    scene = [{"shape": "star", "colour": "green", "where": "top"}]
    pixels, labels = train_vision_encoder.draw_batch([scene], np.random.default_rng(1))
    with torch.no_grad():
        tokens = model.vision_proj(model.vision_tower(pixels).last_hidden_state)[labels["patch"][0] > 0]
    embeddings = model.get_input_embeddings().weight

    def likeness(*words):
        ids = [processor.tokenizer(f" {word}", add_special_tokens=False).input_ids[0] for word in words]
        return torch.cosine_similarity(tokens, embeddings[ids].sum(0)).mean()

    assert likeness("star", "green", "top") > 0.7
    for other in (("heart", "green", "top"), ("star", "red", "top"), ("star", "green", "bottom")):
        assert likeness(*other) < likeness("star", "green", "top") - 0.01


def test_every_step_comes_after_what_it_needs():
    names = list(nano.STEPS)
    for place, (name, step) in enumerate(nano.STEPS.items()):
        assert set(step.needs) <= set(names[:place]), name
        assert (Path(nano.__file__).with_name(f"{step.script}.py")).is_file()
    assert {step.arguments[0] for step in nano.STEPS.values() if step.script == "train_model"} == set(
        train_model.STAGES
    )


def test_a_step_that_fails_ends_the_recipe_and_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "STEPS", {"text": nano.Step("build_data", (), ("text",))})
    with pytest.raises(SystemExit, match="text failed: see .*text.log"):
        nano.main([str(tmp_path)])
    assert "Not finished yet: corpus" in (tmp_path / "logs" / "text.log").read_text()


def test_steps_share_the_lanes_but_for_those_that_run_alone(tmp_path, monkeypatch):
    steps = {
        "a": nano.Step("x", alone=True),
        "b": nano.Step("x"),
        "c": nano.Step("x", ("a",)),
        "d": nano.Step("x", ("a",)),
        "e": nano.Step("x", ("a",)),
        "f": nano.Step("x", ("c",), alone=True),
    }
    monkeypatch.setattr(nano, "STEPS", steps)
    monkeypatch.setattr(nano, "start", lambda name, work, quick: name)
    waiting, running = list(steps), {}
    seen = []
    for finished in ([], ["a"], ["b"], ["c", "d"], ["e"]):
        for name in finished:
            del running[name]
        done = set(steps) - set(waiting) - set(running)
        nano.begin(waiting, running, done, tmp_path, True)
        seen.append(sorted(running))
    assert seen == [["a"], ["b", "c"], ["c", "d"], ["e"], ["f"]]


# Muon and AdamW


@pytest.fixture
def two_layers():
    torch.manual_seed(0)
    return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6)]), "embed": nn.Embedding(5, 6)})


def optimiser_of(network):
    matrices = [layer.weight for layer in network["layers"]]
    others = [network["embed"].weight, *(layer.bias for layer in network["layers"])]
    groups = (
        {"params": matrices, "lr": 0.02, "weight_decay": 0.0},
        {"params": others, "lr": 0.01, "weight_decay": 0.0},
    )
    return optimizers.MuonAndAdamW([groups[0]], [groups[1]], (0.9, 0.98))


def step_on(network, optimiser, steps):
    for number in range(steps):
        x = network["embed"](torch.tensor([number % 5, (number + 1) % 5]))
        loss = network["layers"][1](network["layers"][0](x)).square().sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_both_optimisers_step_as_they_do_alone(two_layers):
    twin = copy.deepcopy(two_layers)
    optimiser = optimiser_of(two_layers)
    step_on(two_layers, optimiser, 3)
    muon = torch.optim.Muon(
        [layer.weight for layer in twin["layers"]], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    others = [twin["embed"].weight, *(layer.bias for layer in twin["layers"])]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.98), weight_decay=0.0)
    both = SimpleNamespace(zero_grad=twin.zero_grad, step=lambda: (muon.step(), adamw.step()))
    step_on(twin, both, 3)
    for name, value in two_layers.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


def test_the_optimiser_goes_on_from_its_state_and_follows_a_schedule(two_layers):
    optimiser = optimiser_of(two_layers)
    step_on(two_layers, optimiser, 2)
    twin = copy.deepcopy(two_layers)
    other = optimiser_of(twin)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for both in (optimiser, other):
        for group in both.param_groups:
            group["lr"] *= 0.5
    step_on(two_layers, optimiser, 2)
    step_on(twin, other, 2)
    for name, value in two_layers.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert [group["lr"] for group in (*other.muon.param_groups, *other.adamw.param_groups)] == [0.01, 0.005]


@pytest.mark.parametrize(("mode", "wanted"), [("all", "MuonAndAdamW"), ("audio_proj", "AdamW")])
def test_layers_get_muon_and_a_projector_alone_adamw(mode, wanted, tiny_model, tmp_path):
    arguments = MiniMindOTrainingArguments(output_dir=str(tmp_path), mode=mode, report_to=[], use_cpu=True)
    trainer = optimizers.MuonTrainer(tiny_model(), arguments, train_dataset=[{}])
    optimiser = trainer.create_optimizer()
    assert type(optimiser).__name__ == wanted
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert sum(len(group["params"]) for group in optimiser.param_groups) == len(trained)


def test_half_precision_changes_floating_point_weights_alone(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.long)}, tmp_path / "model.safetensors")
    finish_model.halve(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert (tensors["a"].dtype, tensors["b"].dtype) == (torch.float16, torch.long)


@needs_flite
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_recipe_runs_quickly(tmp_path, capsys):
    nano.main([str(tmp_path), "--quick"])
    figures = stages.read_json(tmp_path / "codec" / "figures.json")
    assert set(figures["errors"]) == {"slt", "rms", "awb", "kal16", "repeat"}
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "nano" / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "nano" / "model")
    for part, stage in ((model.audio_tower, "speech_encoder"), (model.vision_tower, "vision_encoder")):
        trained = load_file(tmp_path / stage / "model" / "model.safetensors")
        assert all(torch.equal(value, trained[name].float()) for name, value in part.state_dict().items())
    assert sorted(processor.voices) == ["awb", "rms", "slt"]
    assert processor.audio_tokenizer.config.codebook_size == 512
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/done.json")}
    nano.main([str(tmp_path), "--quick"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/done.json")} == times
