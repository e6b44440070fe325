"""One evaluation from its questions to its report; what was interrupted goes on."""

import contextlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from minimind_o_hf.data.building import SpeakerEncoder
from minimind_o_hf.data.sources import Conversations, SourceSettings
from minimind_o_hf.processing.voices_minimind_o import weights_id
from minimind_o_hf.voices import Voice, VoiceLibrary

from .answering import Planned, answer_suite, machine, measure_speed, plan_answers
from .journal import Journal
from .listening import Recogniser, cosines_to, likeness, sound_files, transcribe_all
from .metrics import count_errors
from .reports import write_report
from .scoring import (
    Figures,
    accuracy_figures,
    duration_figures,
    error_figures,
    prediction_figures,
    score_answers,
    speech_figures,
    speed_figures,
    voice_figures,
)
from .speaking import is_installed
from .suites import ASKED, Question, Suite
from .teaching import Recording, data_samples, predict, record_answers, speech_samples, text_samples

SPEED_QUESTIONS = 4  # the first of them to warm up


@dataclass(frozen=True)
class EvaluationSettings:
    """
    What an evaluation of a checkpoint consists of.

    Args:
        recogniser ([`Recogniser`]), recogniser_name (`str`): Who transcribes, and its name in the report.
        speaker_encoder (`str`, *optional*): CAM++; without, voices are not compared.
        voices (`Path`, *optional*): A library of voices that the model was not trained with.
        recordings (`Path`, *optional*): A folder of real recordings, `VOICE/*.wav`: what voices can be like at most.
        data (`Path`, *optional*): A parquet file of held-out training data, for perplexity and codebook accuracy; by
            default they are of the suite's typed questions, and of the TTS's answers where it has one.
        asked (list of `str`): Which questions are asked: "typed", "spoken", "picture".
        limit (`int`, *optional*): Most questions of each.
        batch_size (`int`, defaults to 16): Rows answered together.
    """

    recogniser: Recogniser
    recogniser_name: str
    speaker_encoder: str | None = None
    voices: Path | None = None
    recordings: Path | None = None
    data: Path | None = None
    asked: Sequence[str] = ASKED
    limit: int | None = None
    batch_size: int = 16


def evaluate_checkpoint(
    model: Any,
    processor: Any,
    suite: Suite,
    folder: Path,
    settings: EvaluationSettings,
    name: str = "",
    report: Callable[[str], None] = lambda line: None,
) -> Figures:
    """
    Asks a checkpoint a suite's questions, listens to the answers, and writes a report.

    Args:
        model, processor: The checkpoint, in evaluation mode, with a codec.
        suite ([`Suite`]): The questions.
        folder (`Path`): Gets the answers, what was heard, and the report; an interrupted evaluation goes on in it.
        settings ([`EvaluationSettings`]): How.
        name (`str`): What the report calls the checkpoint.
        report (callable): Told what is being done.

    Returns:
        `dict[str, dict[str, Estimate]]`: Figures by name, and by what they are of.

    Raises:
        ValueError: A checkpoint without codec, a folder of another evaluation, a voice or TTS that is missing.
        OSError: Another process is evaluating in this folder; files that cannot be read or written.
    """
    if processor.audio_tokenizer is None:
        raise ValueError("This checkpoint has no codec, so its answers cannot be heard: attach one (`convert`).")
    seen = sorted(processor.voices)
    unseen = _add_voices(processor, settings.voices)
    # The suite itself stays whole: answers to a part of it are gone on with when more is asked.
    planned = plan_answers(suite, choose(suite, settings.asked, settings.limit), seen, unseen)
    if not planned:
        raise ValueError(f"The suite {suite.name!r} has no {' or '.join(settings.asked)} questions.")
    with _alone_in(folder):
        answers = answer_suite(model, processor, suite, folder, planned, settings.batch_size, report)
        rows = [answers.rows[row.id] for row in planned]
        recordings, unrecorded = [], "the suite has no TTS"
        if suite.tts is not None and not is_installed(suite.tts):
            unrecorded = f"the program of {suite.tts!r} is not installed"
            report(f"nothing is recorded to compare with: {unrecorded}")
        elif suite.tts is not None:
            report("recording the expected answers")
            recordings = record_answers(processor, suite, planned, folder)
            unrecorded = "the TTS has none of the voices"
        rows, heard = _listen(rows, recordings, folder, settings, report)
        rows = score_answers(rows, suite.language, suite.buckets)
        figures = speech_figures(rows, suite.apart)
        figures |= _recording_figures(recordings, heard, planned, suite)
        seconds = {(item.text, item.voice): item.codes.shape[1] * 0.08 for item in recordings}
        figures |= duration_figures(rows, seconds, suite.language)
        figures |= accuracy_figures(rows, suite.apart)
        if settings.speaker_encoder is not None:
            report("comparing voices")
            rows, of_voices = _compare(rows, recordings, processor, (seen, unseen), folder, settings)
            figures |= of_voices
        report("predicting the expected answers")
        figures |= _predictions(model, processor, suite, planned, recordings, settings)
        report("measuring the speed")
        chosen = [row for row in planned if row.question.asked == "typed"] or planned
        figures |= speed_figures(measure_speed(model, processor, suite, chosen[:SPEED_QUESTIONS], folder))
        about = {
            "name": name or "a checkpoint",
            "weights": weights_id(model),
            "suite": f"{suite.name} ({suite.digest})",
            "questions": len({row.question.id for row in planned}),
            "answers": len(rows),
            "recogniser": settings.recogniser_name,
            "speaker encoder": settings.speaker_encoder,
            "recordings to compare with": len(recordings) or f"none: {unrecorded}",
            "voices": ", ".join(seen) or None,
            "voices not trained with": ", ".join(unseen) or None,
            "words of short, mid answers": f"up to {suite.buckets[0]}, up to {suite.buckets[1]}",
            "dtype": str(model.dtype),
            "speed measured on": machine(model.device),
        }
        write_report(folder, about, figures, rows)
    return figures


def evaluate_recordings(
    source: Path,
    folder: Path,
    recogniser: Recogniser,
    recogniser_name: str,
    language: str = "en",
    buckets: tuple[int, int] = (15, 30),
) -> Figures:
    """
    Scores another model's answers: recordings with their texts.

    Args:
        source (`Path`): A folder of recordings with `.txt` files of the same names, or with a `metadata.csv`, `.tsv`
            or `.jsonl`; see [`Conversations`].
        folder (`Path`): Gets what was heard, and the report.
        recogniser, recogniser_name: As in [`EvaluationSettings`].
        language, buckets: As in [`Suite`].

    Returns:
        `dict[str, dict[str, Estimate]]`: As [`evaluate_checkpoint`]: CER, WER and repetition.

    Raises:
        ValueError: Records without text.
        OSError: Files that are missing or cannot be read.
    """
    rows, files = [], {}
    for item in Conversations(source, SourceSettings(language=language)):
        path = Path(str(item.answers[-1]))
        files[path.name] = path
        question = {"id": path.name, "asked": "typed", "kind": "", "held_out": "", "answers": [], "contains": []}
        rows.append({"id": path.name, "question": question, "text": item.messages[-1]["content"], "audio": str(path)})
    with _alone_in(folder):
        heard = transcribe_all(files, recogniser, Journal(folder / "heard.jsonl", {"recogniser": recogniser_name}))
        rows = [{**row, "transcript": heard[row["id"]]} for row in rows]
        rows = score_answers(rows, language, buckets)
        figures = speech_figures(rows, ())
        about = {"name": source.name, "recordings": len(rows), "recogniser": recogniser_name}
        write_report(folder, about, figures, rows)
    return figures


def choose(suite: Suite, asked: Sequence[str], limit: int | None) -> list[Question]:
    """The questions that are asked, at most so many of each way of asking."""
    chosen = []
    for way in ASKED:
        some = [question for question in suite.questions if question.asked == way and way in asked]
        if limit is not None and len(some) > limit:
            # From everywhere, and the same ones each time: suites are in the order of their topics.
            drawn = sorted(some, key=lambda question: zlib.crc32(question.id.encode()))[:limit]
            some = [question for question in some if question in drawn]
        chosen += some
    return chosen


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(folder / ".lock", timeout=0):
            yield
    except filelock.Timeout as error:
        raise OSError(f"another process is evaluating in {folder}: wait for it, or give another folder") from error


def _add_voices(processor: Any, path: Path | None) -> list[str]:
    """Adds voices that the checkpoint lacks; their names."""
    if path is None:
        return []
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of voices {path}.")
    try:
        voices: dict[str, Voice] = VoiceLibrary(path).voices()
    except ValueError:  # a single voice
        voice = Voice.load(path)
        voices = {voice.name or path.stem: voice}
    new = {name: voice for name, voice in voices.items() if name not in processor.voices}
    for name, voice in new.items():
        processor.add_voice(name, voice)
    return sorted(new)


def _listen(
    rows: list[dict],
    recordings: Sequence[Recording],
    folder: Path,
    settings: EvaluationSettings,
    report: Callable[[str], None],
) -> tuple[list[dict], dict[str, str]]:
    """The rows with transcripts; what was heard of recordings, by path."""
    files = {row["id"]: folder / row["audio"] for row in rows if row["audio"]}
    for item in recordings:
        files |= {str(path.relative_to(folder)): path for path in (item.path, item.through_codec)}
    report(f"transcribing {len(files)} recordings")
    # Answers of other weights, or to other questions, have not been heard yet.
    made_with = {"recogniser": settings.recogniser_name, "answers": _header(folder / "answers.jsonl")}
    heard = transcribe_all(files, settings.recogniser, Journal(folder / "heard.jsonl", made_with))
    return [{**row, "transcript": heard.get(row["id"], "")} for row in rows], heard


def _header(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.readline().strip()


def _recording_figures(
    recordings: Sequence[Recording], heard: dict[str, str], planned: Sequence[Planned], suite: Suite
) -> Figures:
    """What the recogniser makes of true recordings, and of the same through the codec: the least to be expected."""
    figures: Figures = {}
    questions = {row.id: row.question for row in planned}
    for suffix, field in ((" of recordings", "path"), (" of recordings through the codec", "through_codec")):
        rows = []
        for item in recordings:
            asked, path = questions[item.id], getattr(item, field)
            question = {"id": asked.id, "kind": asked.kind}
            transcript = heard[str(Path("spoken") / path.parent.name / path.name)]
            errors = vars(count_errors(item.text, transcript, suite.language))
            rows.append({"question": question, "errors": errors})
        error_figures(figures, [row for row in rows if row["question"]["kind"] not in suite.apart], "all", suffix)
        for kind in suite.apart:
            error_figures(figures, [row for row in rows if row["question"]["kind"] == kind], kind, suffix)
    return figures


def _compare(
    rows: list[dict],
    recordings: Sequence[Recording],
    processor: Any,
    voices: tuple[list[str], list[str]],
    folder: Path,
    settings: EvaluationSettings,
) -> tuple[list[dict], Figures]:
    """The rows with cosines, and the figures of voices."""
    encoder = SpeakerEncoder(str(settings.speaker_encoder), processor.speaker_embedding_size)
    references = {
        name: np.asarray(voice["spk_emb"])
        for name, voice in processor.voices.items()
        if voice.get("spk_emb") is not None
    }
    files = {row["id"]: folder / row["audio"] for row in rows if row["audio"]}
    real = {str(item.path): (item.voice, item.path) for item in recordings}
    for voice in references if settings.recordings else ():
        if (settings.recordings / voice).is_dir():
            real |= {str(path): (voice, path) for path in sound_files(settings.recordings / voice)}
    made_with = {
        "speaker encoder": weights_id(encoder.model),
        "voices": {name: cosines_to(value, references) for name, value in sorted(references.items())},
        "answers": _header(folder / "answers.jsonl"),
    }
    journal = Journal(folder / "likeness.jsonl", made_with)
    cosines = likeness(files | {name: path for name, (_, path) in real.items()}, encoder, references, journal)
    recorded = defaultdict(list)
    for name, (voice, _) in real.items():
        if name in cosines:
            recorded[voice].append(cosines[name])
    rows = [{**row, "cosines": cosines.get(row["id"])} for row in rows]
    return rows, voice_figures(rows, *voices, recorded, made_with["voices"])


def _predictions(
    model: Any,
    processor: Any,
    suite: Suite,
    planned: Sequence[Planned],
    recordings: Sequence[Recording],
    settings: EvaluationSettings,
) -> Figures:
    codebooks = model.config.num_codebooks
    if settings.data is not None:
        samples = data_samples(model, processor, settings.data)
        return prediction_figures(predict(model, processor, samples, settings.batch_size), codebooks)
    texts = predict(model, processor, text_samples(model, processor, suite, planned), settings.batch_size)
    spoken = speech_samples(model, processor, suite, planned, recordings)
    codes = prediction_figures(predict(model, processor, spoken, settings.batch_size), codebooks)
    # Each question once for the text, though its answer is recorded in several voices.
    return {**codes, **prediction_figures(texts, codebooks)}


__all__ = ["EvaluationSettings", "choose", "evaluate_checkpoint", "evaluate_recordings"]
