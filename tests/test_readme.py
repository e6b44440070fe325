"""The README cannot rot: its Python runs, its commands parse, its links exist."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from minimind_o_hf.cli import _parser
from minimind_o_hf.presets import init_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_leads_with_the_two_commands():
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    assert README.index(first[0]) < README.index("## ")


def test_python_runs_as_written(tmp_path, monkeypatch, capsys):
    init_checkpoint("nano", tmp_path / "nano")
    recording = ROOT / "tests" / "data" / "espeak_why_is_the_sky_blue.flac"
    (tmp_path / "question.flac").write_bytes(recording.read_bytes())
    Image.new("RGB", (320, 200), "orange").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) == 5
    exec(compile("\n".join(snippets), "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "answer.wav").stat().st_size > 44
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


def test_links_exist():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make ([a-z]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
