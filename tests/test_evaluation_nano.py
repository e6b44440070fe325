"""A whole evaluation of an untrained nano: questions, answers, what is heard, the report; interrupted and gone on."""

import base64
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minimind_o_hf import (
    CamPlusPlusConfig,
    CamPlusPlusFeatureExtractor,
    CamPlusPlusModel,
    MiniMindOForConditionalGeneration,
    MiniMindOProcessor,
    Voice,
    read_mark,
)
from minimind_o_hf.cli import main
from minimind_o_hf.evaluation import EvaluationSettings, count_errors, evaluate_checkpoint, load_recogniser, load_suite
from minimind_o_hf.evaluation.speaking import spoken

# A tone as long as the text, higher in another voice: quick, and no program that might be missing.
TONE = """
import sys, numpy, soundfile
voice, text, out = sys.argv[1:]
time = numpy.arange(1600 * len(text)) / 16000
soundfile.write(out, 0.3 * numpy.sin(2 * numpy.pi * (200 + 100 * (voice == "bruno")) * time), 16000)
"""
KNOWN = "the answer is nine"


def data_url(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "tone.py").write_text(TONE, encoding="utf-8")
    suite = {
        "name": "small",
        "voice_questions": 1,
        "buckets": [2, 100],
        "apart": ["repeat"],
        "max_new_tokens": 30,
        "tts": f"{sys.executable} {folder / 'tone.py'} {{voice}} {{text}} {{out}}",
        "tts_voices": ["alba", "bruno"],
        "questions": [
            {"id": "a", "kind": "sums", "text": "What is four and five?", "answers": ["It is nine."]},
            {"id": "b", "kind": "sums", "text": "What is two and two?", "answers": ["It is four."]},
            {"id": "c", "kind": "repeat", "text": "Say yes.", "answers": ["Yes."]},
            {"id": "d", "kind": "sums", "say": "What is it?", "answers": ["It is four."]},
            {"id": "e", "kind": "seen", "text": "What do you see?", "image": data_url("red"), "contains": ["red"]},
        ],
    }
    (folder / "small.json").write_text(json.dumps(suite), encoding="utf-8")
    return folder / "small.json"


@pytest.fixture(scope="module")
def speaker_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("campplus")
    sizes = {"front_end_channels": 4, "tdnn_channels": 16, "block_layers": [2], "block_dilations": [1]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CamPlusPlusModel(CamPlusPlusConfig(**sizes, bottleneck_channels=8)).save_pretrained(folder)
    CamPlusPlusFeatureExtractor().save_pretrained(folder)
    return folder


class Hears:
    """A recogniser that always hears the same; it fails after so many recordings."""

    def __init__(self, fails_after=1000):
        self.fails_after, self.calls = fails_after, 0

    def __call__(self, waveform):
        assert waveform.dtype == np.float32
        self.calls += 1
        if self.calls > self.fails_after:
            raise KeyboardInterrupt
        return KNOWN


@pytest.fixture(scope="module")
def run(nano, suite_file, speaker_encoder, tmp_path_factory):
    """Evaluates nano: `run(folder, recogniser)`."""
    voices = tmp_path_factory.mktemp("voices") / "cleo.safetensors"
    generator = torch.Generator().manual_seed(3)
    Voice(spk_emb=torch.randn(192, generator=generator), name="cleo").save(voices)

    def make(folder, recogniser, suite=suite_file, **changes):
        model = MiniMindOForConditionalGeneration.from_pretrained(nano).eval()
        settings = EvaluationSettings(
            recogniser, "known", str(speaker_encoder), voices=voices, batch_size=2, **changes
        )
        processor = MiniMindOProcessor.from_pretrained(nano)
        return evaluate_checkpoint(model, processor, load_suite(suite), folder, settings, "nano")

    return make


@pytest.fixture(scope="module")
def done(run, tmp_path_factory):
    """A finished evaluation: its folder, its figures, how much was listened to."""
    folder, recogniser = tmp_path_factory.mktemp("done"), Hears()
    figures = run(folder, recogniser)
    return folder, figures, recogniser.calls


def test_every_question_is_answered_in_its_voices(done):
    folder, _, _ = done
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    assert [row["id"] for row in rows] == [
        *("a alba 0", "a bruno 0", "a cleo 0"),
        *("b alba 0", "c bruno 0", "d alba 0", "e bruno 0"),
    ]
    for row in rows:
        # nano never stops, and 30 steps complete 22 frames.
        assert (row["frames"], row["complete"], row["transcript"]) == (22, False, KNOWN)
        assert soundfile.info(folder / row["audio"]).duration == pytest.approx(22 * 0.08)
        assert read_mark(folder / row["audio"])["voice"] == row["voice"]
        assert row["errors"] == vars(count_errors(row["text"], KNOWN))
        assert set(row["cosines"]) == {"alba", "bruno", "cleo"}


def test_figures_are_those_of_the_rows(done):
    folder, figures, calls = done
    rows = json.loads((folder / "report.json").read_text(encoding="utf-8"))["rows"]
    typed = [row["errors"] for row in rows if row["question"]["id"] in "ab"]
    cer = sum(errors["char_errors"] for errors in typed) / sum(errors["chars"] for errors in typed)
    assert figures["CER"]["all"].value == pytest.approx(cer, abs=1e-5)
    assert figures["CER"]["all"].count == 4
    # Recordings of "It is nine." in two voices, of "It is four." and, apart, of "Yes."; each through the codec too.
    known = [count_errors(text, KNOWN) for text in ("It is nine.", "It is nine.", "It is four.")]
    expected = sum(errors.char_errors for errors in known) / sum(errors.chars for errors in known)
    for name in ("CER of recordings", "CER of recordings through the codec"):
        assert figures[name]["all"].value == pytest.approx(expected, abs=1e-5)
        assert figures[name]["repeat"].count == 1
    assert calls == 7 + 2 * 4
    assert figures["cut off"]["all"].value == 1
    assert {of: value.value for of, value in figures["accuracy"].items()} == {
        "typed": 0,
        "spoken": 0,
        "picture": 0,
        "repeat": 0,
    }
    mine = [row["cosines"]["cleo"] for row in rows if row["voice"] == "cleo"]
    assert figures["similarity"]["unseen"].value == pytest.approx(mine[0])
    assert {"alba", "bruno"} <= set(figures["similarity, ceiling"])
    assert "cleo" not in figures["similarity, ceiling"]
    assert figures["text perplexity"]["all"].value > 100
    assert figures["codebook accuracy"]["all"].count == 4
    assert figures["first sound, seconds"]["all"].value > 0
    assert figures["real-time factor"]["all"].value > 0
    assert "| CER of recordings | all |" in (folder / "report.md").read_text(encoding="utf-8")
    for name in ("errors", "answers", "voices", "codebooks"):
        assert Image.open(folder / f"{name}.png").width == 1000


def test_an_interrupted_evaluation_goes_on(run, done, tmp_path):
    folder, figures, calls = done
    lines = (folder / "answers.jsonl").read_bytes().splitlines(keepends=True)
    half = tmp_path / "half"
    half.mkdir()
    # Killed in the middle of a row: three of seven are there.
    (half / "answers.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    shutil.copytree(folder / "answers", half / "answers")
    with pytest.raises(KeyboardInterrupt):
        run(half, Hears(fails_after=5))
    again = Hears()
    found = run(half, again)
    assert again.calls == calls - 5
    same = [name for name in figures if name not in ("first sound, seconds", "real-time factor")]
    assert {name: found[name] for name in same} == {name: figures[name] for name in same}
    assert sorted((half / "answers.jsonl").read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_a_part_of_the_suite_comes_first(run, done, tmp_path):
    first, rest = Hears(), Hears()
    assert "spoken" not in run(tmp_path, first, asked=["typed"])["accuracy"]
    found = run(tmp_path, rest)
    # Of the seven answers, five are to typed questions; recordings belong to those.
    assert (first.calls, rest.calls) == (5 + 2 * 4, 2)
    assert found["accuracy"] == done[1]["accuracy"]
    assert found["CER"]["spoken"] == done[1]["CER"]["spoken"]


def test_answers_of_another_suite_are_not_gone_on_with(run, done, suite_file):
    changed = suite_file.with_name("changed.json")
    changed.write_text(suite_file.read_text(encoding="utf-8").replace('"Yes."', '"No."'), encoding="utf-8")
    with pytest.raises(ValueError, match="another suite"):
        run(done[0], Hears(), changed)


def test_a_suite_without_such_questions_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="no song questions"):
        run(tmp_path, Hears(), asked=["song"])


def test_teacher_forcing_reads_training_data(run, mixed_parquet, tmp_path):
    figures = run(tmp_path, Hears(), asked=["typed"], limit=1, data=mixed_parquet)
    assert figures["text perplexity"]["all"].count == 24
    assert figures["codebook accuracy"]["codebook 7"].count == 24


def test_command_evaluates_and_tables_checkpoints(nano, suite_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minimind_o_hf.evaluation.command.load_recogniser", lambda name, device: Hears())
    out = tmp_path / "out"
    options = ["--only", "typed", "--out", str(out)]
    assert main(["evaluate", str(nano), "--suite", str(suite_file), *options]) == 0
    assert "| CER | all |" in capsys.readouterr().out
    assert (out / "report.md").is_file()
    table = tmp_path / "table.yaml"
    table.write_text(
        f"layout: consistency\nsuite: {suite_file}\nrows:\n- {{name: mine, checkpoint: {nano}}}\n"
        "- {name: paper, published: {all: 0.09}}\n",
        encoding="utf-8",
    )
    assert main(["evaluate", "--table", str(table), "--only", "typed", "--out", str(tmp_path / "table")]) == 0
    printed = capsys.readouterr().out
    assert "| | short | mid | long | all |" in printed
    assert "| paper | – | – | – | 0.0900 |" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "sung"], "sung"),
        (["--wavs", "a", "--table", "b"], "one of them"),
        (["--suite", "missing"], "There is no suite missing"),
        (["--table", "missing"], "There is no table missing"),
        (["--wavs", "missing"], "missing"),
    ],
)
def test_command_says_what_is_wrong(nano, options, message, tmp_path, capsys):
    model = [] if {"--wavs", "--table"} & set(options) else [str(nano)]
    assert main(["evaluate", *model, *options, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


def test_without_the_tts_program_there_is_nothing_to_compare_with(run, suite_file, tmp_path):
    values = json.loads(suite_file.read_text(encoding="utf-8"))
    values["tts"] = "no-such-program {voice} {text} {out}"
    path = suite_file.with_name("missing.json")
    path.write_text(json.dumps(values), encoding="utf-8")
    figures = run(tmp_path, Hears(), path, asked=["typed"])
    assert "CER" in figures
    assert "CER of recordings" not in figures
    assert "compare with: none: the program" in (tmp_path / "report.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="install the program"):
        run(tmp_path, Hears(), path)


def test_a_missing_tts_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="install the program"):
        spoken("no-such-program {voice} {text} {out}", "hello", "x", tmp_path)


@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed")
def test_flites_speech_is_understood(tmp_path):
    suite = load_suite("nano")
    recogniser = load_recogniser("pocketsphinx")
    folder = tmp_path / "model"
    folder.mkdir()
    for number, text in enumerate(("Six plus eight is fourteen.", "November comes after October.")):
        path = spoken(suite.tts, text, "rms", tmp_path)
        shutil.copy(path, folder / f"{number}.flac")
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    assert spoken(suite.tts, text, "rms", tmp_path) == path
    from minimind_o_hf.evaluation import evaluate_recordings

    figures = evaluate_recordings(folder, tmp_path / "out", recogniser, "pocketsphinx")
    assert figures["CER"]["all"].value < 0.25
    assert Path(tmp_path / "out" / "report.md").is_file()
