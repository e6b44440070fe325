"""Goes on with the codec's decoder, on the codes that it will be given: those that the Talker predicts.

    python training_scripts/nano/tune_decoder.py WORK            (about 30 minutes on one core)
    python training_scripts/nano/tune_decoder.py WORK --quick

A decoder that has only heard an encoder's codes makes the most of a wrong one. So it also learns from codes that the
Talker predicts from the true ones before them, which are in step with the recording (as vocoders learn from the
spectra that a text-to-speech model predicts, Shen et al. 2018, https://arxiv.org/abs/1712.05884). Encoder and
codebooks stay as they are, so that codes mean what they did.

WORK/decoder/model is the finished codec.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from listening import error_rates, transcribe
from make_speech import name_of
from minimind_o_hf.processing.voices_minimind_o import load_voices
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from stages import new_plot, read_json, read_lines, run_stage, save_plot, stage_arguments, write_json
from train_codec import BATCH, CODEBOOKS, CROP, FRAME, RATE, Speech, make_fast, read_waveform, save_codec, sound_loss
from train_model import AS_WRITTEN
from training import train
from transformers import AutoModelForMultimodalLM, AutoProcessor, MimiModel

from minimind_o_hf.data import MiniMindODataCollator, MiniMindODataset
from minimind_o_hf.files import new_file

VERSION = 1
# Of the batches, by where their codes are from; plain speech is what a user's own recordings are.
SHARES = {"encoder": 0.4, "talker": 0.4, "plain": 0.2}
FEWER_CODES = 0.15  # of the batches: the last codebooks say little, and are often wrong
SOURCES = ("encoder", "talker")
AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """
    A recorded answer in codes.

    Args:
        path (`str`): Of its recording, from the speech stage's folder.
        encoder (`np.ndarray` of shape `(8, num_frames)`): Its codes.
        talker (`np.ndarray` of shape `(8, num_frames)`): What the Talker takes each of them for.
    """

    path: str
    encoder: np.ndarray
    talker: np.ndarray


def choose_answers(data: Path, split: str, count: int) -> list[tuple[int, str]]:
    """Rows of WORK/data whose answers differ in text or voice, and the path of each one's recording."""
    columns = parquet.read_table(data / f"t2a_{split}.parquet", columns=["conversations", "spk_emb"]).to_pydict()
    voices = load_voices(data / "voices.safetensors")
    chosen: dict[str, int] = {}
    for index, (turns, embedding) in enumerate(zip(columns["conversations"], columns["spk_emb"], strict=True)):
        text = json.loads(turns)[-1]["content"]
        voice = min(voices, key=lambda name: float((voices[name]["spk_emb"] - torch.tensor(embedding)).abs().sum()))
        chosen.setdefault(f"answers/{voice}/{name_of(text)}.flac", index)
        if len(chosen) == count:
            break
    return [(index, path) for path, index in chosen.items()]


@torch.no_grad()
def predict_codes(model: Any, processor: Any, data: Path, split: str, count: int) -> list[Answer]:
    """
    Answers, with the codes that the Talker predicts from the true ones before them.

    Args:
        model, processor: Thinker and Talker.
        data (`Path`): The stage of that name.
        split (`str`), count (`int`): Which answers, and how many at most.
    """
    rows = MiniMindODataset([str(data / f"t2a_{split}.parquet")], processor, model.config, AS_WRITTEN, 0)
    collate = MiniMindODataCollator(processor, model.config, feature_masking=None, pad_to_multiple_of=8)
    size = model.config.audio_codebook_size
    found = []
    chosen = choose_answers(data, split, count)
    for start in range(0, len(chosen), AT_ONCE):
        part = chosen[start : start + AT_ONCE]
        batch = collate([rows[index] for index, _ in part])
        batch.pop("labels")
        labels = batch.pop("audio_labels")[:, :, 1:]
        predicted = model(**batch).audio_logits[:, :, :-1, :size].argmax(-1)
        for (_, path), true, codes in zip(part, labels, predicted, strict=True):
            speech = (true >= 0) & (true < size)  # of each codebook, a position later than of the one before
            if len(set(speech.sum(1).tolist())) == 1:  # otherwise the row was too long, and its end is missing
                shape = (CODEBOOKS, -1)
                found.append(Answer(path, true[speech].reshape(shape).numpy(), codes[speech].reshape(shape).numpy()))
    return found


def load_answers(work: Path, folder: Path, split: str, count: int) -> list[Answer]:
    """The answers of [`predict_codes`], which are kept in the stage's folder."""
    path, names = folder / f"{split}.safetensors", folder / f"{split}.json"
    if not names.is_file():
        source = work / "talker" / "model"
        model: Any = AutoModelForMultimodalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        answers = predict_codes(model.eval(), AutoProcessor.from_pretrained(source), work / "data", split, count)
        both = {
            name: torch.from_numpy(np.concatenate([getattr(answer, name) for answer in answers], axis=1)).short()
            for name in SOURCES
        }
        with new_file(path) as temporary:
            save_file(both, temporary)
        # The names last: with them all is complete.
        write_json(names, {answer.path: answer.encoder.shape[1] for answer in answers})
    lengths, codes = read_json(names), load_file(path)
    parts = [[part.long().numpy() for part in codes[name].split(list(lengths.values()), dim=1)] for name in SOURCES]
    return [Answer(*one) for one in zip(lengths, *parts, strict=True)]


class DecoderTraining:
    """
    The decoder and what it learns from.

    Args:
        folder (`Path`): The stage's.
        work (`Path`): Of all stages.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, work: Path, settings: dict):
        self.folder, self.speech, self.settings = folder, work / "speech", settings
        self.codec: Any = MimiModel.from_pretrained(work / "codec" / "model", dtype=torch.float32)
        make_fast(self.codec)
        self.codec.requires_grad_(False)
        self.codec.decoder.requires_grad_(True)
        answers = load_answers(work, folder, "train", settings["answers"])
        self.answers = [answer for answer in answers if answer.encoder.shape[1] >= CROP]
        self.sounds = [read_waveform(self.speech / answer.path).astype(np.float16) for answer in self.answers]
        questions = [row for row in read_lines(self.speech / "questions.jsonl") if row["split"] == "train"]
        self.plain = Speech(questions[:: max(1, len(questions) // settings["plain"])], self.speech)
        texts = {
            row["path"]: row["text"] for row in read_lines(self.speech / "answers.jsonl") if row["kind"] != "repeat"
        }
        evaluation = load_answers(work, folder, "eval", settings["evaluated"])
        self.judged = [(answer, texts[answer.path]) for answer in evaluation if answer.path in texts]
        self.held_out = [
            (torch.from_numpy(read_waveform(self.speech / answer.path))[None], answer)
            for answer, _ in self.judged[: settings["held out"]]
        ]

    def decoded(self, codes: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            latents = self.codec.quantizer.decode(codes)
        with torch.autocast("cpu", torch.bfloat16):
            return self.codec.decoder(latents).audio_values[:, 0].float()

    def draw(self, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Recordings `(8, num_samples)` and their codes, from one of the three sources."""
        source = random.choice(list(SHARES), p=list(SHARES.values()))
        if source == "plain":
            waveforms = self.plain.crops(BATCH, random)
            with torch.no_grad():
                return waveforms, self.codec.encode(waveforms[:, None]).audio_codes
        waveforms, codes = [], []
        for index in random.integers(len(self.answers), size=BATCH):
            chosen = getattr(self.answers[index], source)
            last = chosen.shape[1] - CROP
            start = int(random.integers(last + 1)) if random.random() < 0.8 else 0
            waveform = self.sounds[index][start * FRAME : (start + CROP) * FRAME]
            waveforms.append(np.pad(waveform, (0, CROP * FRAME - len(waveform))).astype(np.float32))
            codes.append(chosen[:, start : start + CROP])
        return torch.from_numpy(np.stack(waveforms)), torch.from_numpy(np.stack(codes))

    def loss_at(self, step: int) -> torch.Tensor:
        random = np.random.default_rng([self.settings["seed"], step])
        waveforms, codes = self.draw(random)
        if random.random() < FEWER_CODES:
            codes = codes[:, : int(random.integers(CODEBOOKS // 2, CODEBOOKS))]
        return sound_loss(self.decoded(codes), waveforms)

    @torch.no_grad()
    def check(self) -> float:
        """Mean of encoder's and Talker's codes."""
        losses = []
        for waveform, answer in self.held_out:
            for source in SOURCES:
                made = self.decoded(torch.from_numpy(getattr(answer, source))[None])
                length = min(made.shape[1], waveform.shape[1])
                losses.append(sound_loss(made[:, :length], waveform[:, :length]).item())
        return float(np.mean(losses))

    def train(self) -> list[dict]:
        steps, rate = self.settings["steps"], self.settings["rate"]
        return train("training", self.folder, self.codec.decoder, self.loss_at, self.check, steps, rate)

    @torch.no_grad()
    def judge(self, codec_folder: Path) -> dict:
        """A recogniser's error rates on held-out answers, by where their codes are from."""
        codec: Any = MimiModel.from_pretrained(codec_folder, dtype=torch.float32)
        texts = [text for _, text in self.judged]
        figures = {}
        for source in SOURCES:
            codes = [torch.from_numpy(getattr(answer, source))[None] for answer, _ in self.judged]
            sounds = [codec.decode(one).audio_values[0, 0].numpy() for one in codes]
            figures[source] = error_rates(texts, [transcribe(sound, RATE) for sound in sounds])
        return figures


def plot(history: list[dict], errors: dict[str, dict], path: Path) -> None:
    figure, (losses, bars) = new_plot(1, 2)
    for name in ("train", "held out"):
        losses.plot([row["step"] for row in history], [row[name] for row in history], label=name)
    losses.set(xlabel="step", ylabel="spectral distance")
    losses.legend()
    for shift, (name, found) in zip((-0.2, 0.2), errors.items(), strict=True):
        places = np.arange(len(found)) + shift
        bars.bar(places, [rates["cer"] for rates in found.values()], 0.4, label=name)
    bars.set_xticks(range(len(SOURCES)), [f"{source}'s codes" for source in SOURCES])
    bars.set(ylabel="character error rate of held-out answers")
    bars.legend()
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Trains the decoder and has it judged."""
    options = stage_arguments(__doc__).parse_args(arguments)
    settings = {
        "version": VERSION,
        "seed": 0,
        "answers": 24 if options.quick else 6000,
        "plain": 24 if options.quick else 1500,
        "steps": 4 if options.quick else 6000,
        "rate": 7e-4,
        "evaluated": 6 if options.quick else 90,
        "held out": 3 if options.quick else 45,
    }
    work = options.work

    def make(folder: Path) -> dict:
        training = DecoderTraining(folder, work, settings)
        history = training.train()
        save_codec(training.codec, folder / "model")
        errors = {name: training.judge(work / name / "model") for name in ("codec", "decoder")}
        plot(history, errors, folder / "figures.png")
        return {"answers": len(training.answers), "training": history[-1], "errors": errors}

    run_stage(work / "decoder", [work / name for name in ("speech", "codec", "data", "talker")], settings, make)


if __name__ == "__main__":
    sys.exit(main())
