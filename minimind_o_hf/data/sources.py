"""What training data is built from: folders, tables, `datasets`, chats and plain text, all as conversations."""

import csv
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

RECORDINGS = (".wav", ".flac", ".ogg", ".mp3")
AUDIO_COLUMNS = ("audio", "file", "path", "wav", "audio_path", "audio_file", "audio_filepath", "file_name")
TEXT_COLUMNS = ("text", "transcript", "transcription", "sentence", "normalized_text")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "spk", "client_id")
PROMPTS = {"en": "Read this aloud: {text}", "zh": "请朗读：{text}"}
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt")
AUDIO_MARK, IMAGE_MARK = "<audio>", "<image>"


def reading_prompt(text: str, language: str = "en", prompt: str | None = None) -> str:
    """What asks for a text to be read aloud: `prompt` with its field `{text}` filled, or the language's default."""
    prompt = prompt or PROMPTS.get(language)
    if prompt is None:
        raise ValueError(f"there is no prompt in the language {language!r}: give one with a field {{text}}")
    return prompt.replace("{text}", text)


@dataclass(frozen=True)
class Speak:
    """A text that a command-line TTS is to speak."""

    text: str


@dataclass
class Conversation:
    """
    One row before anything of it is decoded.

    Args:
        where (`str`): Names it in messages, such as `metadata.csv:3`.
        messages (`list[dict]`): `role` and `content`, `<image>` marking pictures.
        questions (`list`): For each user turn, its recording: a path, a file's bytes, [`Speak`] or `None`.
        answers (`list`): The same for each assistant turn.
        images (`list`): Paths or bytes, in the order of their marks.
        speaker (`str`): Whose voice the answers have.
    """

    where: str
    messages: list[dict[str, Any]]
    questions: list[str | bytes | Speak | None] = field(default_factory=list)
    answers: list[str | bytes | Speak | None] = field(default_factory=list)
    images: list[str | bytes] = field(default_factory=list)
    speaker: str = ""


@dataclass(frozen=True)
class SourceSettings:
    """
    How records become conversations.

    Args:
        audio_column, text_column, speaker_column (`str`, *optional*): Columns; the usual names are found without.
        prompt (`str`, *optional*): The user's turn before a recording or a spoken sentence, with a field `{text}`.
        language (`str`, defaults to `"en"`): Of the prompt where none is given: "en" or "zh". Fills `{language}` in
            `tts` too.
        tts (`str`, *optional*): A command that speaks `{text}` into the audio file `{out}`.
        text_questions (`bool`, defaults to `False`): Whether the TTS speaks answers alone.
        split (`str`, defaults to `"train"`), subset (`str`, *optional*): What is read of a `datasets` set.
    """

    audio_column: str | None = None
    text_column: str | None = None
    speaker_column: str | None = None
    prompt: str | None = None
    language: str = "en"
    tts: str | None = None
    text_questions: bool = False
    split: str = "train"
    subset: str | None = None

    def __post_init__(self):
        if self.prompt is not None and "{text}" not in self.prompt:
            raise ValueError(f"`prompt` must have a field {{text}} for what is to be said, got {self.prompt!r}.")
        if self.tts is not None and not ("{text}" in self.tts and "{out}" in self.tts):
            raise ValueError(f"`tts` must have the fields {{text}} and {{out}}, got {self.tts!r}.")


class Conversations(Sequence):
    """
    The conversations of a source, made one by one as they are asked for.

    Args:
        source (`str` or `os.PathLike`): A folder of recordings with `.txt` files of the same names (or with a
            `metadata.csv`, `.tsv` or `.jsonl`), a `.csv`, `.tsv`, `.json`, `.jsonl`, `.parquet` or `.txt` file, a
            `datasets` set on disk, or the id of one on the Hub.
        settings ([`SourceSettings`]).

    Raises:
        ValueError: A source, or (when it is asked for) a record, that no conversation can be made of.
        OSError: A source that does not exist or cannot be read.
    """

    def __init__(self, source: str | os.PathLike, settings: SourceSettings):
        self.settings, path = settings, Path(source).expanduser()
        self.folder = path if path.is_dir() else path.parent
        self.name, self.records = path.name, []
        self.rows: Any = None
        if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
            self._use(datasets.load_from_disk(str(path)))
        elif path.is_dir():
            tables = [path / f"metadata{suffix}" for suffix in (".csv", ".tsv", ".jsonl")]
            table = next((table for table in tables if table.exists()), None)
            self.records = _read_table(table) if table else _read_recordings(path)
        elif path.suffix == ".parquet" and path.is_file():
            self._use(datasets.load_dataset("parquet", data_files=str(path), split="train"))
        elif path.is_file():
            self.records = _read_table(path)
        elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(source)) and path.suffix not in (*TABLES, ".parquet"):
            self.name = str(source)
            self._use(datasets.load_dataset(str(source), settings.subset, split=settings.split))
        else:
            raise FileNotFoundError(f"No such source: {source}.")
        if not len(self):
            raise ValueError(f"{source} holds no records.")

    def _use(self, rows: datasets.Dataset | datasets.DatasetDict) -> None:
        if isinstance(rows, datasets.DatasetDict):
            if self.settings.split not in rows:
                raise ValueError(f"{self.name} has no split {self.settings.split!r}, but {sorted(rows)}.")
            rows = rows[self.settings.split]
        # As Arrow holds them: Audio and Image features stay undecoded (decoding them needs torchcodec).
        self.rows = rows.with_format("arrow")

    def __len__(self) -> int:
        return len(self.records if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> Conversation:
        if self.rows is None:
            where, record = self.records[index]
        else:
            where, record = f"{self.name}[{index}]", self.rows[index : index + 1].to_pylist()[0]
        try:
            return self._conversation(where, record)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _conversation(self, where: str, record: Any) -> Conversation:
        if isinstance(record, str):
            return self._line(where, record)
        if not isinstance(record, Mapping):
            raise ValueError(f"a record must be an object with named fields, got {record!r:.80}")
        if record.get("messages") is not None:
            return self._chat(where, record)
        text = str(_column(record, self.settings.text_column, TEXT_COLUMNS, "text") or "").strip()
        # A TTS speaks what has no recording.
        needed = None if self.settings.tts else "audio"
        audio = _column(record, self.settings.audio_column, AUDIO_COLUMNS, needed)
        answer = _speak(text) if audio is None and needed is None else self._file(audio)
        return Conversation(where, self._said(text), [None], [answer], speaker=self._speaker(record))

    def _speaker(self, record: Mapping) -> str:
        speaker = _column(record, self.settings.speaker_column, SPEAKER_COLUMNS, None)
        return "" if speaker is None else str(speaker)

    def _said(self, text: str) -> list[dict]:
        return [
            {"role": "user", "content": reading_prompt(text, self.settings.language, self.settings.prompt)},
            {"role": "assistant", "content": text},
        ]

    def _line(self, where: str, line: str) -> Conversation:
        if self.settings.tts is None:
            raise ValueError("text alone needs a command that speaks it: `--tts`")
        question, *answers = (part.strip() for part in line.split("\t", 1))
        if not answers:
            return Conversation(where, self._said(question), [None], [_speak(question)])
        answer = answers[0]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        asked = None if self.settings.text_questions else _speak(question)
        return Conversation(where, messages, [asked], [_speak(answer)])

    def _chat(self, where: str, record: Mapping) -> Conversation:
        """A chat as ms-swift and LLaMA-Factory write it: marks in the contents, lists of files beside."""
        try:
            # `datasets` fills absent keys with None.
            messages = [
                {key: value for key, value in turn.items() if value is not None} for turn in record["messages"]
            ]
        except (AttributeError, TypeError):
            raise ValueError(f"`messages` must be a list of objects, got {record['messages']!r:.80}") from None
        for message in messages:
            message.setdefault("content", "")
            if not isinstance(message.get("role"), str) or not isinstance(message["content"], str):
                raise ValueError(f"a message must have a `role` and a text as `content`, got {message!r:.80}")
        clips, images = [[self._file(item) for item in record.get(name) or []] for name in ("audios", "images")]
        for name, mark, files in (("audios", AUDIO_MARK, clips), ("images", IMAGE_MARK, images)):
            found = sum(message["content"].count(mark) for message in messages)
            if found == 0 and files:
                # Without marks, files belong to the first user turn.
                first = next((message for message in messages if message["role"] == "user"), None)
                if first is not None:
                    first["content"], found = mark * len(files) + first["content"], len(files)
            if found != len(files):
                raise ValueError(f"{found} {mark} stand in `messages`, but `{name}` lists {len(files)} files")
        conversation = Conversation(where, messages, images=images, speaker=self._speaker(record))
        turns = {"user": conversation.questions, "assistant": conversation.answers}
        speak = {"user": self.settings.tts and not self.settings.text_questions, "assistant": self.settings.tts}
        waiting = iter(clips)
        for message in messages:
            role, marks = message["role"], message["content"].count(AUDIO_MARK)
            message["content"] = (
                message["content"].replace(AUDIO_MARK, "").strip("\n") if marks else message["content"]
            )
            if marks > 1 or (marks and role not in turns):
                raise ValueError(f"a turn of the user or the assistant has at most one {AUDIO_MARK}, {role}: {marks}")
            if role in turns:
                text = message["content"].replace(IMAGE_MARK, "")
                turns[role].append(next(waiting) if marks else _speak(text) if speak[role] else None)
        return conversation

    def _file(self, item: Any) -> str | bytes:
        """A path relative to the source's folder, or the bytes of an undecoded `datasets` feature."""
        if isinstance(item, Mapping):
            item = item.get("bytes") or item.get("path")
        if isinstance(item, bytes):
            return item
        if not isinstance(item, str) or not item:
            raise ValueError(f"a file must be a path, or hold bytes, got {item!r:.80}")
        return str(self.folder / Path(item).expanduser())


def _speak(text: str) -> Speak | None:
    return Speak(text.strip()) if text.strip() else None


def _column(record: Mapping, name: str | None, usual: Sequence[str], what: str | None) -> Any:
    """The value of a column, found by its usual names unless one is given; `what` is needed, `None` is not."""
    if name is not None:
        if name not in record:
            raise ValueError(f"there is no column {name!r}, but {sorted(map(str, record))}")
        return record[name]
    lower = {str(key).strip().lower(): key for key in record}
    found = next((lower[candidate] for candidate in usual if candidate in lower), None)
    if found is None and what is not None:
        raise ValueError(
            f"no {what} column: the columns are {sorted(map(str, record))}, name it with `--{what}-column`"
        )
    return None if found is None else record[found]


def _read_recordings(folder: Path) -> list[tuple[str, dict]]:
    recordings = sorted(path for path in folder.rglob("*") if path.suffix.lower() in RECORDINGS)
    if not recordings:
        raise ValueError(f"{folder} holds no recordings ({', '.join(RECORDINGS)}), and no metadata.csv or .jsonl.")
    silent = [str(path.relative_to(folder)) for path in recordings if not path.with_suffix(".txt").exists()]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(recordings)} recordings in {folder} have no .txt of the same name: "
            f"{', '.join(silent[:5])}{', …' if len(silent) > 5 else ''}"
        )
    names = [str(path.relative_to(folder)) for path in recordings]
    texts = [path.with_suffix(".txt").read_text(encoding="utf-8-sig") for path in recordings]
    return [(name, {"audio": name, "text": text}) for name, text in zip(names, texts, strict=True)]


def _read_table(path: Path) -> list[tuple[str, Any]]:
    """The records of a file, each with the file's name and its line."""
    if path.suffix not in TABLES:
        raise ValueError(f"{path} is of no known kind: {', '.join(TABLES)} or .parquet.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if path.suffix in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        try:
            rows: list[tuple[int, Any]] = [(table.line_num, row) for row in table]
        except csv.Error as error:
            raise ValueError(f"{path.name}:{table.line_num} cannot be read: {error}") from error
    elif path.suffix == ".json":
        parsed = _parse(text, path.name)
        rows = list(enumerate(parsed if isinstance(parsed, list) else [parsed]))
    else:
        # Not `splitlines`: a text may hold U+2028 and its like.
        lines = [(number, line.strip("\r ")) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        is_text = path.suffix == ".txt"
        rows = [(number, line if is_text else _parse(line, f"{path.name}:{number}")) for number, line in lines]
    return [(f"{path.name}:{number}", row) for number, row in rows]


def _parse(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


__all__ = ["Conversation", "Conversations", "SourceSettings", "Speak", "reading_prompt"]
