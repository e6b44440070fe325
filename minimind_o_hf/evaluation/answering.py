"""Asking a checkpoint a suite's questions."""

import json
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minimind_o_hf.chat import content
from minimind_o_hf.files import new_file
from minimind_o_hf.processing.voices_minimind_o import weights_id

from .journal import Journal
from .speaking import spoken
from .suites import Question, Suite


@dataclass(frozen=True)
class Planned:
    """
    A question in a voice.

    Args:
        id (`str`): Of the row.
        question ([`Question`]): The question.
        voice (`str`, *optional*): The voice of the answer.
        asker (`str`, *optional*): The TTS voice that asks.
        seed (`int`): Of everything that is drawn.
    """

    id: str
    question: Question
    voice: str | None
    asker: str | None
    seed: int


def plan_answers(
    suite: Suite, questions: Sequence[Question], seen: Sequence[str], unseen: Sequence[str]
) -> list[Planned]:
    """
    Who answers what, in the suite's order: the same for every checkpoint with the same voices.

    Args:
        suite ([`Suite`]): Its seeds, and the voices that ask.
        questions (list of [`Question`]): Those of its questions that are asked.
        seen, unseen (list of `str`): Voices of the checkpoint, and others. Unseen ones answer the first
            `voice_questions` typed questions only.
    """
    planned, in_turn = [], 0
    typed = [question.id for question in questions if question.asked == "typed"][: suite.voice_questions]
    for number, question in enumerate(questions):
        if question.id in typed and (seen or unseen):
            voices: list[Any] = [*seen, *unseen]
        else:
            voices = [seen[in_turn % len(seen)] if seen else None]
            in_turn += 1
        asker = question.asker or suite.tts_voices[number % len(suite.tts_voices)] if question.say else None
        for voice in voices:
            for seed in suite.seeds:
                name = f"{question.id} {voice or 'none'} {seed}"
                planned.append(Planned(name, question, voice, asker, zlib.crc32(name.encode())))
    return planned


def answer_suite(
    model: Any,
    processor: Any,
    suite: Suite,
    folder: Path,
    planned: Sequence[Planned],
    batch_size: int = 16,
    report: Callable[[str], None] = lambda line: None,
) -> Journal:
    """
    Answers what is planned, in batches, each row in its voice and with its seed. What was answered before, and not
    finished, goes on.

    Args:
        model, processor: A checkpoint; the processor has all voices, and a codec.
        suite ([`Suite`]): Its settings of generation.
        folder (`Path`): Gets `answers.jsonl`, and each answer's sound in `answers/`.
        planned (list of [`Planned`]): See [`plan_answers`].
        batch_size (`int`, defaults to 16): Rows that are answered together.
        report (callable): Told how far it is.

    Returns:
        [`Journal`]: Rows with `text`, `frames`, `complete`, `audio` (a path in `folder`, or None) and what was asked.

    Raises:
        ValueError: The folder holds answers of another checkpoint, codec, suite or dtype.
    """
    made_with = {
        "checkpoint": weights_id(model),
        "codec": weights_id(processor.audio_tokenizer),
        "suite": suite.digest,
        "dtype": str(model.dtype),
    }
    journal = Journal(folder / "answers.jsonl", made_with)
    todo = [row for row in planned if row.id not in journal]
    # Rows of one batch wait for the longest: neighbours are asked alike and are about as long.
    todo.sort(key=lambda row: (row.question.asked, len(row.question.say or row.question.text)))
    for start in range(0, len(todo), batch_size):
        batch = todo[start : start + batch_size]
        for row, answer in zip(batch, _answer(model, processor, suite, folder, batch), strict=True):
            journal.add(_record(row, answer, processor, folder))
        report(f"answered {len(planned) - len(todo) + start + len(batch)} of {len(planned)}")
    return journal


def chat_of(suite: Suite, row: Planned, folder: Path) -> list[dict]:
    """The conversation that asks a question."""
    question = row.question
    audio = [question.audio] if question.audio else []
    if question.say and suite.tts and row.asker:
        audio = [str(spoken(suite.tts, question.say, row.asker, folder / "spoken"))]
    said = content(question.text or None, audio, [question.image] if question.image else [])
    system = [{"role": "system", "content": suite.system}] if suite.system else []
    return [*system, {"role": "user", "content": said}]


def prepare(processor: Any, suite: Suite, batch: Sequence[Planned], folder: Path, device: Any) -> dict[str, Any]:
    """A batch's inputs of `generate`, its settings among them."""
    inputs = processor.apply_chat_template(
        [chat_of(suite, row, folder) for row in batch],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        voice=[row.voice for row in batch],
    )
    settings = {"max_new_tokens": suite.max_new_tokens, **suite.generation}
    return {**inputs.to(device), **settings, "seeds": [row.seed for row in batch]}


def _answer(model, processor, suite: Suite, folder: Path, batch: Sequence[Planned]) -> Iterable[tuple]:
    outputs = model.generate(**prepare(processor, suite, batch, folder, model.device), return_dict_in_generate=True)
    answers = processor.decode(outputs)
    return zip(answers, outputs.audio_codes_mask.sum(dim=1).tolist(), outputs.is_complete.tolist(), strict=True)


def _record(row: Planned, answered: tuple, processor: Any, folder: Path) -> dict:
    answer, frames, complete = answered
    path = None
    if frames:
        path = f"answers/{zlib.crc32(row.id.encode()):08x}.flac"
        (folder / "answers").mkdir(exist_ok=True)
        processor.save_audio(answer.audio, folder / path, voice=row.voice)
    asked = {**asdict(row.question), "asked": row.question.asked}
    if str(asked["image"]).startswith("data:"):
        asked["image"] = "data:"  # the suite has it
    return {
        "id": row.id,
        "question": asked,
        "voice": row.voice,
        "text": answer.text,
        "frames": frames,
        "seconds": frames * 0.08,
        "complete": complete,
        "audio": path,
    }


def measure_speed(model: Any, processor: Any, suite: Suite, planned: Sequence[Planned], folder: Path) -> list[dict]:
    """
    Answers questions one at a time and streamed.

    Args:
        model, processor, suite, folder: As for [`answer_suite`].
        planned (list of [`Planned`]): The first one is to warm up, and does not count.

    Returns:
        `list[dict]`: With `id`, `first_sound` (`float`, seconds until the first sound; None where there was none),
        `seconds` (`float`, until the end) and `spoken` (`float`, seconds of speech).
    """
    measured = []
    for row in planned:
        inputs = prepare(processor, suite, [row], folder, model.device)
        begin, first, samples = time.perf_counter(), None, 0
        for event in model.stream(processor, **inputs):
            if event.audio is not None:
                first = time.perf_counter() - begin if first is None else first
                samples += len(event.audio)
        seconds = time.perf_counter() - begin
        rate = processor.audio_tokenizer.config.sampling_rate
        measured.append({"id": row.id, "first_sound": first, "seconds": seconds, "spoken": samples / rate})
    return measured[1:]


def machine(device: torch.device) -> str:
    """What the speed was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def write_json(path: Path, value: Mapping) -> None:
    """Writes JSON, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


__all__ = ["Planned", "answer_suite", "machine", "measure_speed", "plan_answers", "prepare", "write_json"]
