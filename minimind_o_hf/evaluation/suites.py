"""Suites of questions: data in a YAML or JSON file, which every checkpoint is asked."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from .normalising import LANGUAGES

ASKED = ("typed", "spoken", "picture")
EMBEDDED = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Question:
    """
    One question.

    Args:
        id (`str`): Its name in the suite.
        kind (`str`): Topic; figures are given for each.
        text (`str`): What is typed; may be missing beside speech.
        audio (`str`, *optional*): Recording of the question: a path (relative to the suite's file) or URL.
        say (`str`, *optional*): In place of a recording: what the suite's TTS is to ask.
        asker (`str`, *optional*): The TTS voice that asks; by default each in turn.
        image (`str`, *optional*): A picture: a path or URL, `data:` URLs too.
        answers (list of `str`): Accepted answers, the expected one first.
        contains (list of `str`): Words that together are enough for an answer; "cat|kitten" accepts either.
        held_out (`str`): In what way it is new to a trained model, if figures are to be told apart by it.
    """

    id: str
    kind: str = ""
    text: str = ""
    audio: str | None = None
    say: str | None = None
    asker: str | None = None
    image: str | None = None
    answers: tuple[str, ...] = ()
    contains: tuple[str, ...] = ()
    held_out: str = ""

    def __post_init__(self):
        if not (self.text or self.audio or self.say):
            raise ValueError(f"Question {self.id!r} asks nothing: give it a `text`, an `audio` or what to `say`.")
        if self.audio and self.say:
            raise ValueError(f"Question {self.id!r} has an `audio` and something to `say`: give one of them.")
        for name in ("answers", "contains"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"`{name}` of question {self.id!r} must be a list, got {value!r}.")
            object.__setattr__(self, name, tuple(value))

    @property
    def asked(self) -> str:
        """`"picture"`, `"spoken"` or `"typed"`."""
        return "picture" if self.image else "spoken" if self.audio or self.say else "typed"


@dataclass(frozen=True)
class Suite:
    """
    Questions, and how they are asked.

    Args:
        name (`str`): For reports.
        questions (list of [`Question`]): With different ids.
        language (`str`, defaults to `"en"`): "en" or "zh": how texts are compared.
        seeds (list of `int`, defaults to `[0]`): Each question is answered once for each.
        voice_questions (`int`, defaults to 20): So many typed questions are answered in every voice; all others in one
            voice of the checkpoint each, in turn.
        buckets (pair of `int`, defaults to `(15, 30)`): Most words of a short and of a mid answer.
        apart (list of `str`): Kinds that the figures of speech and accuracy give apart, and not among all.
        max_new_tokens (`int`, defaults to 512): Steps after which an answer is cut off.
        generation (`dict`): Other settings of `generate`.
        system (`str`): A system prompt.
        tts (`str`, *optional*): Command that speaks `{text}` into `{out}` in the voice `{voice}`: asks the questions
            that have something to `say`, and makes the recordings that answers are compared with.
        tts_voices (list of `str`): The voices it has.
    """

    name: str
    questions: tuple[Question, ...]
    language: str = "en"
    seeds: tuple[int, ...] = (0,)
    voice_questions: int = 20
    buckets: tuple[int, int] = (15, 30)
    apart: tuple[str, ...] = ()
    max_new_tokens: int = 512
    generation: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    tts: str | None = None
    tts_voices: tuple[str, ...] = ()

    def __post_init__(self):
        ids = [question.id for question in self.questions]
        if not ids:
            raise ValueError(f"The suite {self.name!r} has no questions.")
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise ValueError(
                f"The suite {self.name!r} has several questions {', '.join(twice)}: give each its own id."
            )
        if self.language not in LANGUAGES:
            raise ValueError(f"`language` must be one of {', '.join(LANGUAGES)}, got {self.language!r}.")
        if len(self.buckets) != 2 or self.buckets[0] >= self.buckets[1]:
            raise ValueError(f"`buckets` must be two rising numbers of words, got {self.buckets}.")
        if (self.tts is None) != (not self.tts_voices):
            raise ValueError(f"`tts` and `tts_voices` go together, got {self.tts!r} and {self.tts_voices}.")
        if self.tts is None and (says := [question.id for question in self.questions if question.say]):
            raise ValueError(f"The suite {self.name!r} has no `tts` to ask {says[0]} with.")

    @property
    def digest(self) -> str:
        """Changes with everything that answers depend on."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def find_file(source: str | Path, embedded: Path, suffix: str, missing: str) -> Path:
    """
    A file, or one of the package's by its name.

    Args:
        source (`str` or `Path`): A path or a name.
        embedded (`Path`), suffix (`str`): Where the package's files are, and what their names end in.
        missing (`str`): The error's message, with two `{}`: for `source`, and for the names that there are.

    Raises:
        FileNotFoundError: There is neither.
    """
    path = Path(source)
    if not path.is_file() and path.name == str(source) and (embedded / f"{source}{suffix}").is_file():
        path = embedded / f"{source}{suffix}"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in embedded.glob(f"*{suffix}")))
        raise FileNotFoundError(missing.format(source, known))
    return path


def load_suite(source: str | Path) -> Suite:
    """
    Reads a suite.

    Args:
        source (`str` or `Path`): A YAML or JSON file, or the name of one in the package ("nano").

    Returns:
        [`Suite`]: Its paths are absolute, or relative to the current folder where `source` is.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds something else.
    """
    path = find_file(source, EMBEDDED, ".json", "There is no suite {}: give a YAML or JSON file, or one of: {}.")
    values = read_mapping(path, Suite)
    rows = values.get("questions")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise ValueError(f"{path}: `questions` must be a list of mappings with an `id`.")
    for row in rows:
        check_keys(row, Question, f"{path}: question {row['id']!r}")
        for name in ("audio", "image"):
            if row.get(name) and not str(row[name]).startswith(("http://", "https://", "data:")):
                row[name] = str(path.parent / row[name])
    values["questions"] = tuple(Question(**{**row, "id": str(row["id"])}) for row in rows)
    for name in ("seeds", "buckets", "apart", "tts_voices"):
        if name in values:
            values[name] = tuple(values[name])
    return Suite(**{"name": path.stem, **values})


def read_mapping(path: Path, kind: type) -> dict[str, Any]:
    """What a YAML or JSON file holds: a mapping of fields of a dataclass."""
    try:
        text = path.read_text(encoding="utf-8")
        # YAML's reader takes JSON too, but a hundred times as long.
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, got a {type(values).__name__}.")
    check_keys(values, kind, str(path))
    return values


def check_keys(values: dict, kind: type, where: str) -> None:
    """Refuses misspelt settings."""
    known = [item.name for item in fields(kind)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: there is no setting {', '.join(unknown)}; there are {', '.join(known)}.")


__all__ = ["ASKED", "Question", "Suite", "check_keys", "find_file", "load_suite", "read_mapping"]
