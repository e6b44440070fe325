"""The README cannot rot: its Python runs, its commands parse, its links exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from minimind_o_hf import MiniMindOForConditionalGeneration, read_mark
from minimind_o_hf.adapters import get_peft_model, lora_config
from minimind_o_hf.cli import _parser
from minimind_o_hf.presets import init_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_leads_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    assert README.index(first[0]) < README.index("## ")


def test_python_runs_as_written(tmp_path, monkeypatch, capsys):
    for name, source in (
        ("question.flac", "flite_where_does_a_pig_live.flac"),
        ("picture.png", "two_blue_circles.png"),
    ):
        (tmp_path / name).write_bytes((ROOT / "tests" / "data" / source).read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = init_checkpoint("nano", tmp_path / "checkpoint") / "generation_config.json"
    # Untrained, it would never stop.
    settings.write_text(json.dumps(json.loads(settings.read_text(encoding="utf-8")) | {"max_new_tokens": 8}))
    for name in ("my-voice", "another-voice"):
        model = MiniMindOForConditionalGeneration.from_pretrained(tmp_path / "checkpoint")
        get_peft_model(model, lora_config("talker", rank=2)).save_pretrained(str(tmp_path / name))
    snippets = blocks("python")
    assert len(snippets) == 9
    exec(compile("\n".join(snippets), "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "answer.wav").stat().st_size > 44
    assert soundfile.info(tmp_path / "stream.wav").samplerate == 24000
    assert read_mark(tmp_path / "stream.wav")["model"] == "nano"
    assert soundfile.info(tmp_path / "marked.wav").duration > 0
    assert (tmp_path / "conversation.safetensors").exists()
    assert "frames of 80 ms" in capsys.readouterr().out


def commands() -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines() + re.findall(r"`(minimind-o [^`]+)`", README.replace("\n", " "))
    return [line.split("#")[0].strip() for line in lines if line.startswith("minimind-o") and " " in line]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    arguments = shlex.split(command)[1:]
    if arguments in (["convert"], ["data", "build"], ["data", "check"], ["data", "show"]):
        # Named in a sentence: the sub-command exists.
        arguments.append("--help")
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            _parser().parse_args(arguments)
        assert stop.value.code == 0
    else:
        assert _parser().parse_args(arguments).command == arguments[0]


def tone(path: Path, pitch: float) -> None:
    samples = 0.2 * np.sin(2 * np.pi * pitch * np.arange(16000) / 16000)
    soundfile.write(path, samples.astype(np.float32), 16000)


def test_a_voice_is_trained_as_written(tmp_path):
    """The commands as they stand, in a shell, from 20 recordings to a WAV."""
    commands = next(block for block in blocks("sh") if "--adapter my-voice" in block)
    init_checkpoint("nano", tmp_path / "checkpoint")
    (tmp_path / "recordings").mkdir()
    for number in range(20):
        tone(tmp_path / "recordings" / f"{number}.wav", 200 + 20 * number)
        (tmp_path / "recordings" / f"{number}.txt").write_text(f"This is number {number}.", encoding="utf-8")
    (tmp_path / "training_scripts").symlink_to(ROOT / "training_scripts")
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-euc", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    samples, rate = soundfile.read(tmp_path / "hello.wav")
    assert rate == 24000
    assert len(samples) >= 1920
    assert (tmp_path / "my-voice" / "adapter_model.safetensors").stat().st_size < 2**20
    assert (tmp_path / "my-voice" / "training_curves.png").stat().st_size > 10_000
    assert (tmp_path / "voice.png").exists()
    state = json.loads((tmp_path / "my-voice" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry["audio_loss"] for entry in state["log_history"] if "audio_loss" in entry]
    # A Talker of random weights: LoRA can do little for it, but it does learn.
    assert losses[-1] < 0.97 * losses[0]


def test_scripts_and_recipes_that_are_named_exist():
    for path in re.findall(r"training_scripts/[\w/.]+\.(?:py|sh|yaml)", README):
        assert (ROOT / path).is_file(), path


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
