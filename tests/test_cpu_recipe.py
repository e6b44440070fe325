"""The CPU-sized recipe: what its sources hold, and the whole script, with a TTS that only hums and few steps."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoModelForMultimodalLM

from minimind_o_hf import load_audio

SCRIPTS = Path(__file__).resolve().parent.parent / "training_scripts"
STAGES = {"1_t2a": "t2a", "2_a2a_projector": "a2a", "3_a2a": "a2a", "4_i2t_projector": "i2t", "5_i2t": "i2t"}

# Of the standard library alone: it is started some 240 times.
TTS = """
import array, math, sys, wave
text, out = sys.argv[1:3]
pitch = 100 + sum(text.encode()) % 400
with wave.open(out, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", None))
    samples = (int(8000 * math.sin(2 * math.pi * pitch * n / 16000)) for n in range(200 * len(text)))
    file.writeframes(array.array("h", samples).tobytes())
"""


@pytest.fixture(scope="module")
def tts(tmp_path_factory):
    script = tmp_path_factory.mktemp("tts") / "hum it.py"
    script.write_text(TTS, encoding="utf-8")
    return f"{sys.executable} -I -S {shlex.quote(str(script))} {{text}} {{out}}"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / "cpu" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maker():
    return load("make_cpu_data")


@pytest.fixture(scope="module")
def sources(maker, tts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu") / "sources"
    maker.main([str(folder), "--tts", tts])
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pictures_are_what_their_captions_say(maker, sources):
    captions = Counter()
    for row in read(sources / "i2t_train.jsonl") + read(sources / "i2t_eval.jsonl"):
        question, answer = (message["content"] for message in row["messages"])
        assert question.removeprefix("<image>") in maker.PICTURE_QUESTIONS
        _, colour, shape = answer.rstrip(".").split()
        pixels = np.asarray(Image.open(sources / row["images"][0]).convert("RGB"))
        drawn = (pixels != maker.GROUND).any(axis=-1)
        assert (pixels[drawn] == maker.COLOURS[colour]).all()
        # The share of its box that a shape fills, and of the box's upper half.
        rows, columns = np.nonzero(drawn)
        box = drawn[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        height, width = box.shape
        assert height == width >= maker.PICTURE_SIZE // 2
        filled = {"circle": (np.pi / 4, np.pi / 4), "square": (1, 1), "triangle": (1 / 2, 1 / 4)}[shape]
        assert (box.mean(), box[: height // 2].mean()) == pytest.approx(filled, abs=0.03)
        captions[answer] += 1
    assert set(captions.values()) == {maker.PICTURES + 1}
    assert len(captions) == len(maker.SHAPES) * len(maker.COLOURS)


def test_what_is_held_out_is_new_but_of_known_parts(maker, sources):
    lines = {
        split: (sources / f"t2a_{split}.txt").read_text(encoding="utf-8").splitlines() for split in ("train", "eval")
    }
    assert not set(lines["train"]) & set(lines["eval"])
    answers = {split: {line.split("\t")[1] for line in lines[split]} for split in lines}
    assert answers["train"] == answers["eval"]
    for wording in maker.WORDINGS:
        start = wording.split("{")[0]
        assert all(any(line.startswith(start) for line in lines[split]) for split in lines)
    pictures = {split: [row["images"][0] for row in read(sources / f"i2t_{split}.jsonl")] for split in lines}
    drawn = {split: {(sources / name).read_bytes() for name in pictures[split]} for split in pictures}
    assert not drawn["train"] & drawn["eval"]


def test_questions_are_spoken_and_not_written(sources, tts):
    for split in ("train", "eval"):
        lines = (sources / f"t2a_{split}.txt").read_text(encoding="utf-8").splitlines()
        rows = read(sources / f"a2a_{split}.jsonl")
        for line, row in zip(lines, rows, strict=True):
            question, answer = line.split("\t")
            assert row["messages"] == [
                {"role": "user", "content": "<audio>"},
                {"role": "assistant", "content": answer},
            ]
            wave = load_audio(sources / row["audios"][0], target_rate=16000)
            assert len(wave) == 200 * len(question)
            frequency = np.abs(np.fft.rfft(wave)).argmax() * 16000 / len(wave)
            assert frequency == pytest.approx(100 + sum(question.encode()) % 400, abs=3)


def test_the_same_seed_makes_the_same_files(maker, sources, tts, tmp_path):
    maker.main([str(tmp_path / "again"), "--tts", tts])
    names = sorted(path.relative_to(sources) for path in sources.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*.*"))
    assert all((sources / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_what_is_missing_is_said(maker, tts, tmp_path):
    with pytest.raises(SystemExit, match="no program 'no-such-tts'.*apt install espeak-ng"):
        maker.main([str(tmp_path / "data"), "--tts", "no-such-tts {text} {out}"])
    with pytest.raises(SystemExit, match="exit status"):
        maker.main([str(tmp_path / "data"), "--tts", f"{sys.executable} -c raise {{text}} {{out}}"])
    with pytest.raises(SystemExit, match="not empty"):
        maker.main([str(Path(__file__).parent), "--tts", tts])
    assert list(tmp_path.iterdir()) == []


def run(work, tts, extra):
    """The whole script, without a network; its output."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "TTS": tts, "EXTRA": extra, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPTS / "run_cpu.sh"), str(work)], capture_output=True, text=True, env=environment, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_script(tts, tmp_path):
    work = tmp_path / "a folder"
    output = run(work, tts, "--max_steps 2 --logging_steps 1 --report_to none")
    rows = {kind: pq.read_table(work / "data" / f"{kind}_train.parquet").to_pylist() for kind in ("t2a", "a2a", "i2t")}
    assert "question_audios" not in rows["t2a"][0]
    assert "answer_audios" not in rows["i2t"][0]
    # Both speak the same answers in the same order.
    for name in ("answer_audios", "ref_audios", "spk_emb"):
        assert [row[name] for row in rows["t2a"]] == [row[name] for row in rows["a2a"]]
    assert all(json.loads(row["conversations"])[0]["content"] == "" for row in rows["a2a"])
    assert all(len(row["image_bytes"]) == 1 for row in rows["i2t"])

    # Each stage starts from the one before: what its mode freezes stays as it was, and only that.
    trained = {"audio_proj": "2_a2a_projector", "vision_proj": "4_i2t_projector"}
    before = AutoModelForMultimodalLM.from_pretrained(work / "nano").state_dict()
    for stage, kind in STAGES.items():
        after = AutoModelForMultimodalLM.from_pretrained(work / "runs" / stage).state_dict()
        changed = {name for name in after if not after[name].equal(before[name])}
        assert changed
        for part, own in trained.items():
            if stage == own:
                assert {name.split(".")[0] for name in changed} == {part}
        assert not any("_tower." in name for name in changed)
        figures = json.loads((work / "runs" / stage / "eval_results.json").read_text(encoding="utf-8"))
        assert figures["eval_text_loss"] > 0
        assert ("eval_audio_loss" in figures) == (kind != "i2t")
        assert stage in output
        before = after
    assert all(load_audio(path, target_rate=24000).size for path in work.glob("reply*.wav"))
    assert len(list(work.glob("reply*.wav"))) == 3

    # Started again, it does what is not done, and no more.
    times = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    (work / "runs" / "5_i2t.done").unlink()
    (work / "reply.wav").unlink()
    run(work, tts, "--max_steps 3 --logging_steps 1 --report_to none")
    state = json.loads((work / "runs" / "5_i2t" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["global_step"] == 3
    assert (work / "reply.wav").exists()
    assert all(
        path.stat().st_mtime_ns == time
        for path, time in times.items()
        if "5_i2t" not in str(path) and not path.name.startswith("reply")
    )


def test_figures_are_shown(tmp_path, capsys):
    (tmp_path / "3_a2a").mkdir()
    history = [
        {"step": 0, "eval_text_loss": 2.5, "eval_audio_loss": 6, "eval_token_accuracy": 0, "eval_code_accuracy": 0.25},
        {"step": 5, "text_loss": 3, "audio_loss": 7},
        {"step": 9, "text_loss": 1, "audio_loss": 0.5},
    ]
    (tmp_path / "3_a2a" / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")
    after = {"eval_text_loss": 2, "train_runtime": 7.4}  # a held-out set without speech
    (tmp_path / "3_a2a" / "all_results.json").write_text(json.dumps(after), encoding="utf-8")
    load("show_figures").main([str(tmp_path / "3_a2a")])
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split("  ")[0] == "3_a2a"
    assert [part.strip() for part in line.replace("7 s", "").split("  ") if part.strip()][1:] == [
        "3.000 → 1.000",
        "7.000 → 0.500",
        "2.500 → 2.000",
        "6.000 → -",
        "0.000 → -",
        "0.250 → -",
    ]
