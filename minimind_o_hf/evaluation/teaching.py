"""What a model makes of right answers: recordings of them, and its predictions of their tokens and codes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from minimind_o_hf.data import MiniMindODataCollator, MiniMindODataset, SampleSettings
from minimind_o_hf.data.building import encode_speech
from minimind_o_hf.data.samples import Sample, build_sample, sample_generator
from minimind_o_hf.processing import load_audio

from .answering import Planned
from .speaking import spoken
from .suites import Suite

# As generation has it: a prompt holds an empty think block.
SETTINGS = replace(SampleSettings.deterministic(4096), drop_empty_think=0.0)


@dataclass(frozen=True)
class Recording:
    """
    An expected answer, spoken by the TTS.

    Args:
        id (`str`): That of the row whose answer was expected.
        text, voice (`str`): What is said, and by whom.
        path (`Path`): The recording.
        through_codec (`Path`): The same, encoded and decoded.
        codes (`np.ndarray` of shape `(num_codebooks, num_frames)`).
    """

    id: str
    text: str
    voice: str
    path: Path
    through_codec: Path
    codes: np.ndarray


def record_answers(processor: Any, suite: Suite, planned: Sequence[Planned], folder: Path) -> list[Recording]:
    """
    The expected answers to typed questions in the voices of their rows, as far as the TTS has them.

    Args:
        processor: With a codec.
        suite ([`Suite`]): With a TTS; without, there are no recordings.
        planned (list of [`Planned`]): The rows.
        folder (`Path`): Where recordings are kept.
    """
    recordings: dict[tuple, Recording] = {}
    codec = processor.audio_tokenizer
    for row in planned:
        question, voice = row.question, row.voice
        if suite.tts is None or voice not in suite.tts_voices or question.asked != "typed" or not question.answers:
            continue
        text = question.answers[0]
        if (text, voice) in recordings:
            continue
        path = spoken(suite.tts, text, voice, folder / "spoken")
        waveform = load_audio(path, None, codec.config.sampling_rate)
        (codes,) = encode_speech(codec, [waveform], processor.num_codebooks)
        decoded = path.with_name(f"{path.stem}-codec.flac")
        if not decoded.is_file():
            sound = processor.decode_audio(torch.from_numpy(codes)[None])[0]
            processor.save_audio(sound, decoded, voice=voice)
        recordings[text, voice] = Recording(row.id, text, voice, path, decoded, codes)
    return list(recordings.values())


def text_samples(model: Any, processor: Any, suite: Suite, planned: Sequence[Planned]) -> dict[str, Sample]:
    """Typed questions with their expected answers, once each, by the question's id."""
    questions = {row.question.id: row.question for row in planned if row.question.asked == "typed"}
    return {
        name: _sample(model, processor, suite, question.text, question.answers[0], {})
        for name, question in questions.items()
        if question.answers
    }


def speech_samples(
    model: Any, processor: Any, suite: Suite, planned: Sequence[Planned], recordings: Sequence[Recording]
) -> dict[str, Sample]:
    """The same with the codes of their recordings, by the row's id."""
    questions = {row.id: row.question for row in planned}
    samples = {}
    for recording in recordings:
        voice = processor.voices[recording.voice]
        columns: dict[str, Any] = {"answer_audios": [recording.codes.T.reshape(-1).tolist()]}
        if voice.get("ref_codes") is not None:
            columns["ref_audios"] = np.asarray(voice["ref_codes"]).T.reshape(-1).tolist()
        if voice.get("spk_emb") is not None:
            columns["spk_emb"] = np.asarray(voice["spk_emb"]).tolist()
        question = questions[recording.id]
        samples[recording.id] = _sample(model, processor, suite, question.text, recording.text, columns)
    return samples


def data_samples(model: Any, processor: Any, path: Path) -> dict[str, Sample]:
    """All rows of a parquet file of training data."""
    rows = MiniMindODataset([str(path)], processor, model.config, SETTINGS, 0)
    return {f"{path.name}:{index}": rows[index] for index in range(len(rows))}


def _sample(model: Any, processor: Any, suite: Suite, text: str, answer: str, columns: dict[str, Any]) -> Sample:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    system = [{"role": "system", "content": suite.system}] if suite.system else []
    row = {"conversations": json.dumps([*system, *turns]), **columns}
    return build_sample(row, processor, model.config, SETTINGS, sample_generator(0, 0, 0))


@torch.no_grad()
def predict(model: Any, processor: Any, samples: dict[str, Sample], batch_size: int = 16) -> list[dict]:
    """
    Predicts every token and code from the right ones before it.

    Args:
        model, processor: A checkpoint.
        samples (`dict[str, Sample]`): By id.
        batch_size (`int`, defaults to 16): How many at once.

    Returns:
        `list[dict]`: With `id`, the answer's `nll` (`float`, nats) and `tokens` (`int`), and for each codebook the
        number of `codes` and how many were `right`; the stop is one of them.
    """
    collate = MiniMindODataCollator(processor, model.config, feature_masking=None)
    ids, rows = sorted(samples, key=lambda name: len(samples[name].input_ids)), []
    for start in range(0, len(ids), batch_size):
        batch = collate([samples[name] for name in ids[start : start + batch_size]])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels, audio_labels = batch.pop("labels")[:, 1:], batch.pop("audio_labels")[..., 1:]
        speaks = bool((audio_labels != -100).any())
        outputs = model(**batch, run_talker=speaks)
        scores = outputs.logits[:, :-1].float().transpose(1, 2)
        losses = functional.cross_entropy(scores, labels, ignore_index=-100, reduction="none")
        is_code = audio_labels != -100
        right = is_code & (outputs.audio_logits[:, :, :-1].argmax(dim=-1) == audio_labels) if speaks else is_code
        rows += [
            {
                "id": name,
                "nll": losses[index].sum().item(),
                "tokens": int((labels[index] != -100).sum()),
                "codes": is_code[index].sum(dim=-1).tolist(),
                "right": right[index].sum(dim=-1).tolist(),
            }
            for index, name in enumerate(ids[start : start + batch_size])
        ]
    return rows


__all__ = [
    "Recording",
    "data_samples",
    "predict",
    "record_answers",
    "speech_samples",
    "text_samples",
]
