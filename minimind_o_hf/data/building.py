"""Building training data: from recordings, chats or text to a parquet file of the original's schema.

Rows are finished in parts of 64, each kept beside the file that is being made: an interrupted build goes on where it
stopped, and a part is made anew only where its records, or what they are made with, have changed.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
from pyarrow import parquet
from tqdm import tqdm
from transformers import MimiModel, PreTrainedModel

from minimind_o_hf.files import new_file
from minimind_o_hf.modeling import CamPlusPlusModel, MiniMindOConfig
from minimind_o_hf.processing import CamPlusPlusFeatureExtractor, MiniMindOProcessor, load_audio
from minimind_o_hf.processing.image_minimind_o import load_image

from .checking import DataReport, check_row, in_workers
from .features import add_weights
from .sources import Conversation, Conversations, SourceSettings, Speak

PART_ROWS = 64
# Encoded at once, padding included: the codec's first layers take about 7 MB for a second of sound.
BATCH_SECONDS = 40
# Longer recordings are no reference voice: 24 s.
REFERENCE_FRAMES = 300
TTS_SECONDS = 300  # what one sentence may take

# `_where`, `_speaker` and `_embedding` stay in the parts.
SCHEMA = pa.schema(
    [
        ("conversations", pa.string()),
        ("question_audios", pa.list_(pa.binary())),
        ("answer_audios", pa.list_(pa.list_(pa.int64()))),
        ("image_bytes", pa.list_(pa.binary())),
        ("ref_audios", pa.list_(pa.int64())),
        ("spk_emb", pa.list_(pa.float32())),
        ("_where", pa.string()),
        ("_speaker", pa.string()),
        ("_embedding", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class BuildSettings(SourceSettings):
    """
    How data is built: besides [`SourceSettings`],

    Args:
        voice (`str`, *optional*): Voice of the checkpoint whose codes and embedding every spoken row gets. Without,
            a row's reference is its speaker's longest recording under 300 frames (24 s) from another row.
        reference (`bool`, defaults to `True`): Whether rows have reference codes.
        speaker_encoder (`str`, *optional*):
            CAM++ (directory or Hub id), which makes every spoken row's speaker embedding of its reference's recording,
            or of its own where there is none.
        max_length (`int`, defaults to 512): Answers that end beyond this position are flagged.
        limit (`int`, *optional*): Take the first so many records.
        workers (`int`, defaults to 0): Processes that decode and speak, beside this one.
        device (`str`, defaults to `"cpu"`): Where the codec runs.
        skip_errors (`bool`, defaults to `False`): Leave out records with errors, and list them, instead of stopping.
        overwrite (`bool`, defaults to `False`): Replace a file that is there.
    """

    voice: str | None = None
    reference: bool = True
    speaker_encoder: str | None = None
    max_length: int = 512
    limit: int | None = None
    workers: int = 0
    device: str = "cpu"
    skip_errors: bool = False
    overwrite: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.voice is not None and self.speaker_encoder is not None:
            raise ValueError("A `voice` brings its own embedding: leave out `voice` or `speaker_encoder`.")
        for name, least in (("max_length", 2), ("limit", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


@dataclass
class _Prepared:
    """A conversation with its files read and its answers decoded; `error` says why that failed."""

    where: str
    speaker: str
    messages: list[dict]
    questions: list[bytes | None]
    answers: list[np.ndarray]
    images: list[bytes]
    error: str | None = None


class _Preparing(torch.utils.data.Dataset):
    """What runs in the workers: conversations read, spoken and decoded, by index."""

    def __init__(self, conversations: Sequence[Conversation], settings: BuildSettings, rates: tuple[int, int]):
        self.conversations, self.settings = conversations, settings
        self.question_rate, self.answer_rate = rates

    def __getitem__(self, index: int) -> _Prepared:
        where = f"record {index}"
        try:
            conversation = self.conversations[index]
            where = conversation.where
            return self._prepare(conversation)
        except (ValueError, OSError) as error:
            message = str(error)
            message = (
                message if message.startswith(f"{where}:") or where == f"record {index}" else f"{where}: {message}"
            )
            return _Prepared(where, "", [], [], [], [], error=message)

    def _prepare(self, conversation: Conversation) -> _Prepared:
        questions = [self._read(source) for source in conversation.questions]
        for source, data in zip(conversation.questions, questions, strict=True):
            if data is not None:
                self._decode(source, data, self.question_rate)
        answers = []
        for source in conversation.answers:
            data = self._read(source)
            if data is None or _is_empty_sound(data):
                answers.append(np.zeros(0, np.float32))
            else:
                answers.append(self._decode(source, data, self.answer_rate))
        images = [data for source in conversation.images if (data := self._read(source))]
        for data in images:
            load_image(data)
        return _Prepared(
            *(conversation.where, conversation.speaker, conversation.messages),
            # Empty lists where nothing is spoken, as in rows without the column.
            questions if any(questions) else [],
            answers if any(len(answer) for answer in answers) or any(conversation.answers) else [],
            images,
        )

    def _read(self, source: str | bytes | Speak | None) -> bytes | None:
        if isinstance(source, Speak):
            return speak(self.settings.tts or "", source.text, self.settings.language)
        return Path(source).read_bytes() if isinstance(source, str) else source

    def _decode(self, source: str | bytes | Speak | None, data: bytes, rate: int) -> np.ndarray:
        try:
            return load_audio(data, target_rate=rate)
        except (ValueError, OSError) as error:
            raise ValueError(f"{source}: {error}" if isinstance(source, str) else str(error)) from error


def _is_empty_sound(data: bytes) -> bool:
    """Whether it is a whole audio file of no samples, which is an answer without speech."""
    try:
        return soundfile.info(io.BytesIO(data)).frames == 0
    except soundfile.SoundFileError:
        return False


def speak(command: str, text: str, language: str = "en") -> bytes:
    """
    Runs a command-line TTS, without a shell.

    Args:
        command (`str`): With the fields `{text}`, `{out}` (a WAV file that it is to write) and perhaps `{language}`.
        text (`str`): What to say.

    Returns:
        `bytes`: The file that the command wrote.

    Raises:
        ValueError: The command failed or wrote nothing, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "speech.wav"
        fields = {"text": text, "out": str(out), "language": language}
        # One pass: a text may hold "{out}" itself. And not `format`: a command may hold other braces.
        words = [re.sub(r"\{(text|out|language)\}", lambda m: fields[m[1]], word) for word in shlex.split(command)]
        try:
            done = subprocess.run(words, capture_output=True, timeout=TTS_SECONDS, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ValueError(f"the TTS could not speak {text!r:.60}: {error}") from error
        printed = (done.stderr or done.stdout).decode("utf-8", errors="replace").strip()[-300:]
        if done.returncode:
            raise ValueError(f"the TTS failed (exit status {done.returncode}) on {text!r:.60}: {printed}")
        if not out.is_file():
            raise ValueError(f"the TTS wrote no {{out}} for {text!r:.60}: {printed}")
        return out.read_bytes()


@torch.no_grad()
def encode_speech(codec: MimiModel, waveforms: Sequence[np.ndarray], num_codebooks: int) -> list[np.ndarray]:
    """
    Turns recordings into codes, several at once.

    Args:
        codec ([`MimiModel`]): The codec.
        waveforms (list of `np.ndarray` of shape `(num_samples,)`): Float32, at the codec's rate.
        num_codebooks (`int`): How many of its codebooks are kept.

    Returns:
        list of `np.ndarray` of shape `(num_codebooks, num_frames)`: a frame for each 80 ms begun.
    """
    frame = round(codec.config.sampling_rate / codec.config.frame_rate)
    frames = [-(-len(waveform) // frame) for waveform in waveforms]
    codes: list[np.ndarray] = [np.zeros((num_codebooks, 0), np.int64)] * len(waveforms)
    waiting = sorted((index for index, count in enumerate(frames) if count), key=lambda index: frames[index])
    while waiting:
        longest = frames[waiting[-1]]
        size = max(1, int(BATCH_SECONDS * codec.config.frame_rate) // longest)
        batch, waiting = waiting[-size:], waiting[:-size]
        # Silence up to whole frames: the codec is causal, so what follows a recording in the batch does not change it.
        padded = torch.zeros(len(batch), 1, longest * frame)
        for row, index in enumerate(batch):
            padded[row, 0, : len(waveforms[index])] = torch.from_numpy(waveforms[index])
        encoded: Any = codec.encode(padded.to(codec.device, codec.dtype), num_quantizers=num_codebooks)
        for row, index in enumerate(batch):
            codes[index] = encoded.audio_codes[row, :, : frames[index]].cpu().numpy()
    return codes


class SpeakerEncoder:
    """
    CAM++ and what prepares its input: a recording becomes a speaker embedding.

    Args:
        source (`str`): Directory or Hub id.
        size (`int`): What the model expects of an embedding.
        device (`str`, defaults to `"cpu"`): Where it runs.

    Raises:
        ValueError: Its embeddings have another size.
    """

    def __init__(self, source: str, size: int, device: str = "cpu"):
        self.extractor = CamPlusPlusFeatureExtractor.from_pretrained(source)
        self.model: Any = CamPlusPlusModel.from_pretrained(source).to(device)  # pyright: ignore[reportArgumentType]
        if self.model.config.embedding_size != size:
            raise ValueError(
                f"The speaker encoder {source} makes embeddings of {self.model.config.embedding_size} numbers, the "
                f"model takes {size}."
            )

    @torch.no_grad()
    def __call__(self, waveform: np.ndarray, rate: int) -> np.ndarray | None:
        """The embedding `(size,)` of a mono waveform at `rate` Hz; None where it is too short for one."""
        if len(waveform) * self.extractor.sampling_rate < self.extractor.min_samples * rate:
            return None
        inputs: Any = self.extractor(waveform, sampling_rate=rate)
        return self.model(**inputs.to(self.model.device)).embeddings[0].float().cpu().numpy()


def _fingerprint(model: PreTrainedModel | None) -> str:
    """Changes with the weights of the codec or the speaker encoder: what they make would be different."""
    digest = hashlib.sha256()
    add_weights(digest, model)
    return digest.hexdigest()


def _describe(source: str | bytes | Speak | None) -> Any:
    """What a file's content is known by: its size and time, so that resuming need not read it."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, Speak):
        return {"speak": source.text}
    if source is None or not Path(source).is_file():
        return source
    status = Path(source).stat()
    return [str(Path(source).resolve()), status.st_size, status.st_mtime_ns]


def _part_key(conversations: Sequence[Conversation], rows: range, made_with: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode())
    for index in rows:
        try:
            record = dict(vars(conversations[index]))
            for name in ("questions", "answers", "images"):
                record[name] = [_describe(source) for source in record[name]]
        except ValueError as error:
            record = {"error": str(error)}
        digest.update(json.dumps(record, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _metadata(part: Path, name: str) -> Any:
    """What a part says of itself: its `key`, its `columns` that hold something, its `errors`; None if unreadable."""
    try:
        return json.loads((parquet.read_schema(part).metadata or {})[name.encode()])
    except (pa.ArrowException, OSError, KeyError, ValueError):
        return None


def _write_part(
    part: Path, rows: list[_Prepared], processor: MiniMindOProcessor, key: str, encoder: SpeakerEncoder | None
) -> None:
    kept = [row for row in rows if row.error is None]
    waveforms = [waveform for row in kept for waveform in row.answers]
    codec = processor.audio_tokenizer
    if codec is None and any(len(waveform) for waveform in waveforms):
        raise ValueError("This checkpoint has no codec, which makes codes of the recordings: give another `--model`.")
    codes = iter(encode_speech(codec, waveforms, processor.num_codebooks) if codec is not None else ())

    def embedding(row: _Prepared) -> np.ndarray | None:
        longest = max(row.answers, key=len, default=None)
        if encoder is None or codec is None or longest is None:
            return None
        return encoder(longest, codec.config.sampling_rate)

    table = [
        {
            "conversations": json.dumps(row.messages, ensure_ascii=False),
            "question_audios": row.questions,
            # Frame-major.
            "answer_audios": [next(codes).T.flatten() for _ in row.answers],
            "image_bytes": row.images,
            "_where": row.where,
            "_speaker": row.speaker,
            "_embedding": embedding(row),
        }
        for row in kept
    ]
    metadata = {
        "key": key,
        "errors": [row.error for row in rows if row.error],
        "columns": sorted({name for row in table for name, value in row.items() if name[0] != "_" and value}),
    }
    schema = SCHEMA.with_metadata({name: json.dumps(value) for name, value in metadata.items()})
    with new_file(part) as temporary:
        parquet.write_table(pa.Table.from_pylist(table, schema), temporary)


def _find_references(
    parts: Sequence[Path], num_codebooks: int
) -> Callable[[str, str], tuple[list[int] | None, list[float] | None]]:
    """For a row's speaker, codes and embedding of the longest recording that may be a reference and is another
    row's."""
    longest: dict[str, list[tuple[int, str, list[int], list[float] | None]]] = {}
    names = ["_where", "_speaker", "_embedding", "answer_audios"]
    for part in parts:
        for row in parquet.read_table(part, columns=names).to_pylist():
            best = longest.setdefault(row["_speaker"], [])
            # A row's own answer as its reference would teach to copy, so the second best is kept too.
            codes = max(
                (codes for codes in row["answer_audios"] if 0 < len(codes) < REFERENCE_FRAMES * num_codebooks),
                **{"key": len, "default": None},
            )
            if codes is not None:
                best.append((len(codes), row["_where"], codes, row["_embedding"]))
                best.sort(key=lambda item: -item[0])
                del best[2:]
    return lambda speaker, where: next(
        ((codes, embedding) for _, at, codes, embedding in longest.get(speaker, []) if at != where), (None, None)
    )


def build_data(
    source: str | os.PathLike,
    out: str | os.PathLike,
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    settings: BuildSettings | None = None,
) -> DataReport:
    """
    Makes a parquet file of the original's schema; columns that would be empty are left out.

    Args:
        source (`str` or `os.PathLike`): See [`Conversations`].
        out (`str` or `os.PathLike`): The parquet file. Finished parts stand in `OUT.parts` until it is whole.
        processor ([`MiniMindOProcessor`]): With its codec.
        config ([`MiniMindOConfig`]): The model's.
        settings ([`BuildSettings`], *optional*): How.

    Returns:
        [`DataReport`]: What was built. Its flags name the empty and over-long answers (which are in the file), its
        errors the records left out with `skip_errors`.

    Raises:
        FileExistsError: `out` is there already.
        ValueError, OSError: A record that cannot be trained on, named; what was finished before it is kept.
    """
    settings = settings or BuildSettings()
    target = Path(out).expanduser()
    if target.exists() and not settings.overwrite:
        raise FileExistsError(f"{target} exists: give another name, or overwrite it explicitly.")
    if settings.voice is not None and settings.voice not in processor.voices:
        raise ValueError(
            f"There is no voice {settings.voice!r}: the checkpoint has {sorted(processor.voices) or 'none'}."
        )
    if settings.tts is not None and not shutil.which(shlex.split(settings.tts)[0]):
        raise FileNotFoundError(f"There is no program {shlex.split(settings.tts)[0]!r} to speak with.")
    conversations = Conversations(source, settings)
    codec = processor.audio_tokenizer
    if codec is not None:
        codec.to(settings.device)  # pyright: ignore[reportArgumentType]
    folder = target.with_name(f"{target.name}.parts")
    total = len(conversations) if settings.limit is None else min(settings.limit, len(conversations))
    encoder = None
    if settings.speaker_encoder is not None:
        encoder = SpeakerEncoder(settings.speaker_encoder, config.spk_emb_size, settings.device)
    parts = _build_parts(conversations, total, folder, processor, settings, encoder)
    report = _join_parts(parts, target, processor, config, settings)
    for part in folder.glob("*part-*.parquet*"):  # and what a killed process left
        part.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    return report


def _build_parts(
    conversations: Conversations,
    total: int,
    folder: Path,
    processor: MiniMindOProcessor,
    settings: BuildSettings,
    encoder: SpeakerEncoder | None,
) -> list[Path]:
    codec = processor.audio_tokenizer
    made_with = {"codec": _fingerprint(codec), "codebooks": processor.num_codebooks, "tts": settings.tts}
    made_with["language"] = settings.language
    made_with["speaker encoder"] = _fingerprint(encoder and encoder.model)
    rows = [range(start, min(start + PART_ROWS, total)) for start in range(0, total, PART_ROWS)]
    parts = [folder / f"part-{index:05d}.parquet" for index in range(len(rows))]
    keys = [_part_key(conversations, wanted, made_with) for wanted in rows]
    pending = [
        index for index, (part, key) in enumerate(zip(parts, keys, strict=True)) if _metadata(part, "key") != key
    ]
    answer_rate = 24000 if codec is None else codec.config.sampling_rate
    rates = (processor.feature_extractor.sampling_rate, answer_rate)
    order = [row for index in pending for row in rows[index]]
    prepared = in_workers(_Preparing(conversations, settings, rates), settings.workers, order)
    # `disable=None`: no bar where there is no terminal.
    with tqdm(total=total, initial=total - len(order), unit="row", desc="Building", disable=None) as bar:
        for index in pending:
            done = []
            for _ in rows[index]:
                done.append(next(prepared))
                if done[-1].error is not None and not settings.skip_errors:
                    raise ValueError(done[-1].error)
                bar.update()
            _write_part(parts[index], done, processor, keys[index], encoder)
    return parts


def _join_parts(
    parts: Sequence[Path],
    target: Path,
    processor: MiniMindOProcessor,
    config: MiniMindOConfig,
    settings: BuildSettings,
) -> DataReport:
    """Adds the voices to the finished rows, checks them and writes them to one file."""
    find = _find_references(parts, processor.num_codebooks) if settings.reference and not settings.voice else None
    voice = processor.voices[settings.voice] if settings.voice else {}
    codes, embedding = voice.get("ref_codes") if settings.reference else None, voice.get("spk_emb")
    report = DataReport()

    def finish(part: Path) -> list[dict]:
        rows = parquet.read_table(part).to_pylist()
        for row in rows:
            if any(row["answer_audios"]):
                row["spk_emb"] = row["_embedding"] if embedding is None else embedding.tolist()
                if find is not None:
                    row["ref_audios"], of_reference = find(row["_speaker"], row["_where"])
                    row["spk_emb"] = of_reference or row["spk_emb"]
                elif codes is not None:
                    row["ref_audios"] = codes.T.flatten().tolist()
        return rows

    def checked(rows: list[dict]) -> list[dict]:
        kept = []
        for row in rows:
            found = check_row(row, processor, config, settings.max_length, row["_where"])
            if found.errors and not settings.skip_errors:
                raise ValueError(f"{row['_where']}: {found.errors[0]}")
            if found.errors:
                report.errors += [f"{found.where}: {error}" for error in found.errors]
            else:
                report.add(found)
                kept.append(row)
        return kept

    names = {"conversations"}.union(*(_metadata(part, "columns") for part in parts))
    if "answer_audios" in names:
        has_embedding = embedding is not None or settings.speaker_encoder is not None
        voice_columns = {"ref_audios": find is not None or codes is not None, "spk_emb": has_embedding}
        names |= {name for name, present in voice_columns.items() if present}
    schema = pa.schema([column for column in SCHEMA if column.name in names])
    with new_file(target) as temporary:
        with parquet.ParquetWriter(temporary, schema) as writer:
            for part in tqdm(parts, unit="part", desc="Checking", disable=None):
                report.errors += _metadata(part, "errors")
                if rows := checked(finish(part)):
                    writer.write_table(pa.Table.from_pylist(rows, schema))
        if not report.rows:
            raise ValueError(f"No record is left: {'; '.join(report.errors[:3])}")
    return report


__all__ = ["BuildSettings", "SpeakerEncoder", "build_data", "encode_speech", "speak"]
