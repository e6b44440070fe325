"""Trains the nano speaker encoder: a small `CamPlusPlusModel` that tells voices apart.

    python training_scripts/nano/train_speaker_encoder.py WORK            (about 10 minutes on one core)
    python training_scripts/nano/train_speaker_encoder.py WORK --quick
    python training_scripts/nano/train_speaker_encoder.py WORK --steps 3000 --start COPY.pt

The last line goes on from a copy of WORK/speaker_encoder/training.pt.

Three voices are not much to learn from: each is also played faster and slower, which shifts its pitch and formants,
and every voice at every speed counts as a speaker of its own. What is learnt is to classify 27 such speakers, with an
additive margin between them. The held-out voice is not among them.

WORK/speaker_encoder/model is what `CamPlusPlusModel.from_pretrained` loads, in float16, with its feature extractor;
voices.safetensors holds an embedding of each voice.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from make_speech import HELD_OUT_VOICE, RATE, VOICES
from minimind_o_hf.modeling import CamPlusPlusConfig, CamPlusPlusModel
from minimind_o_hf.processing import CamPlusPlusFeatureExtractor
from safetensors.torch import save_file
from stages import new_plot, read_lines, run_stage, save_plot
from torch import nn
from torch.nn import functional
from training import encoder_arguments, load_start, steps_and_start, train

from minimind_o_hf.data.augmentation import SpeechAugmentation, change_speed
from minimind_o_hf.files import new_directory, new_file

VERSION = 1
# The speed of each pseudo-speaker of a voice, about a semitone and a third apart.
FACTORS = (0.75, 0.8, 0.86, 0.93, 1.0, 1.08, 1.16, 1.25, 1.35)
SPEAKERS = tuple((voice, factor) for voice in VOICES for factor in FACTORS)
BATCH = 32
CROP = 1.4  # seconds
MARGIN = 0.2  # of the cosine
SCALE = 20.0
NORM = 13.0  # of embeddings: the released voices' are 11 to 15 long
REFERENCES = 20  # recordings that a voice's embedding is the mean of


def encoder_config() -> CamPlusPlusConfig:
    """CAM++ with a quarter to a half of the channels and a third of the layers: 0.58 M parameters."""
    return CamPlusPlusConfig(
        front_end_channels=8,
        tdnn_channels=64,
        block_layers=[6, 8, 6],
        block_dilations=[1, 2, 2],
        growth_rate=24,
        bottleneck_channels=64,
    )


def augmentation() -> SpeechAugmentation:
    """Without what changes the voice, and never silent: a recording's silence is not digital."""
    return SpeechAugmentation(speed=0.0, dropout=0.1, white_noise=0.5, pink_noise=0.4)


def read(path: Path) -> np.ndarray:
    """`(num_samples,)` at 16 kHz."""
    return soundfile.read(path, dtype="float32")[0]


def pseudo_speaker(waveform: np.ndarray, factor: float) -> np.ndarray:
    """The same words in another voice: pitch, formants and speed `factor` times as high."""
    return change_speed(torch.from_numpy(waveform), factor).numpy()


def crop(waveform: np.ndarray, samples: int, random: np.random.Generator) -> np.ndarray:
    """So many samples from anywhere; a shorter recording is repeated."""
    if len(waveform) < samples:
        return np.resize(waveform, samples)
    start = int(random.integers(len(waveform) - samples + 1))
    return waveform[start : start + samples]


class MarginClassifier(nn.Module):
    """
    Additive-margin softmax: a speaker's cosine must be `MARGIN` above the others' (https://arxiv.org/abs/1801.05599).

    Args:
        width (`int`): Of an embedding.
        speakers (`int`): How many.
    """

    def __init__(self, width: int, speakers: int):
        super().__init__()
        self.speakers = nn.Parameter(torch.randn(speakers, width))

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of `(batch_size, width)` embeddings whose speakers are `labels`, `(batch_size,)`."""
        cosines = functional.normalize(embeddings) @ functional.normalize(self.speakers).T
        margins = MARGIN * functional.one_hot(labels, len(self.speakers))
        return functional.cross_entropy(SCALE * (cosines - margins), labels)


def equal_error_rate(scores: np.ndarray, same: np.ndarray) -> float:
    """
    Where as many pairs of one speaker are refused as pairs of two are accepted.

    Args:
        scores (`np.ndarray` of shape `(num_pairs,)`): How alike the two are.
        same (`np.ndarray` of shape `(num_pairs,)`): Whether they are of one speaker.
    """
    order = np.argsort(scores)
    refused = np.cumsum(same[order]) / same.sum()
    accepted = 1 - np.cumsum(~same[order]) / (~same).sum()
    best = np.argmin(np.abs(refused - accepted))
    return float((refused[best] + accepted[best]) / 2)


def compare(embeddings: dict[str, torch.Tensor], references: dict[str, torch.Tensor]) -> dict[str, float]:
    """
    How well voices are told apart.

    Args:
        embeddings (`dict`): Of recordings, `(num_recordings, 192)`, by voice.
        references (`dict`): Of each voice, `(192,)`.

    Returns:
        `dict`: The equal error rate over all pairs of recordings, and the share whose own voice is the nearest.
    """
    directions = functional.normalize(torch.cat(list(embeddings.values())))
    labels = torch.cat([torch.full((len(own),), index) for index, own in enumerate(embeddings.values())])
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    scores = (directions @ directions.T)[first, second]
    nearest = (directions @ functional.normalize(torch.stack([references[voice] for voice in embeddings])).T).argmax(1)
    same = labels[first] == labels[second]
    return {
        "equal error rate": round(equal_error_rate(scores.numpy(), same.numpy()), 4),
        "nearest voice right": round((nearest == labels).float().mean().item(), 4),
        "cosine, one voice": round(scores[same].mean().item(), 3),
        "cosine, two voices": round(scores[~same].mean().item(), 3),
    }


class SpeakerTraining:
    """
    The encoder and what it hears.

    Args:
        folder (`Path`): The stage's.
        speech (`Path`): The speech stage's folder.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, speech: Path, settings: dict):
        self.folder, self.speech, self.settings = folder, speech, settings
        rows = read_lines(speech / "answers.jsonl")
        self.train_rows = {
            voice: [row for row in rows if row["voice"] == voice and row["split"] == "train"] for voice in VOICES
        }
        self.eval_rows = {
            voice: [row for row in rows if row["voice"] == voice and row["split"] == "eval"][: settings["judged"]]
            for voice in (*VOICES, HELD_OUT_VOICE)
        }
        self.extractor = CamPlusPlusFeatureExtractor()
        self.augmentation = augmentation()
        torch.manual_seed(settings["seed"])
        self.encoder: Any = CamPlusPlusModel(encoder_config())
        self.classifier = MarginClassifier(self.encoder.config.embedding_size, len(SPEAKERS))
        self.network = nn.ModuleDict({"encoder": self.encoder, "classifier": self.classifier})
        self.held_out = [self.batch(self.eval_rows, np.random.default_rng(number)) for number in range(4)]

    def batch(self, rows: dict[str, list[dict]], random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of recordings of random pseudo-speakers, and who they are."""
        # With each of them once in every batch, the batch's statistics told who was who, and batch norms used that.
        labels = random.integers(len(SPEAKERS), size=BATCH)
        clips = []
        for voice, factor in (SPEAKERS[label] for label in labels):
            row = rows[voice][random.integers(len(rows[voice]))]
            # Only what is needed is resampled: most of the time goes there.
            part = crop(read(self.speech / row["path"]), math.ceil(CROP * RATE * factor) + 1, random)
            clip = pseudo_speaker(part, factor)[: int(CROP * RATE)]
            clips.append(self.augmentation(clip, RATE, random))
        features = self.extractor(clips, sampling_rate=RATE).input_features
        return features, torch.from_numpy(labels)

    def loss_at(self, step: int) -> torch.Tensor:
        self.network.train()
        features, labels = self.batch(self.train_rows, np.random.default_rng([self.settings["seed"], step]))
        return self.classifier(self.encoder(features).embeddings, labels)

    @torch.no_grad()
    def check(self) -> float:
        self.network.eval()
        losses = [self.classifier(self.encoder(features).embeddings, labels) for features, labels in self.held_out]
        return torch.stack(losses).mean().item()

    def train(self) -> list[dict]:
        steps, rate = self.settings["steps"], self.settings["rate"]
        return train("training", self.folder, self.network, self.loss_at, self.check, steps, rate)

    @torch.no_grad()
    def scale(self) -> None:
        """Makes embeddings of whole recordings of the trained voices `NORM` long on the average."""
        self.network.eval()
        rows = [row for voice in VOICES for row in self.train_rows[voice][-REFERENCES:]]
        length = self.embed(rows).norm(dim=1).mean()
        self.encoder.projection_norm.running_var *= (length / NORM) ** 2

    def save(self) -> None:
        self.scale()
        with new_directory(self.folder / "model", overwrite=True) as temporary:
            saved = CamPlusPlusModel(self.encoder.config)
            saved.load_state_dict(self.encoder.state_dict())
            saved.half().save_pretrained(temporary)
            self.extractor.save_pretrained(temporary)
        self.encoder = CamPlusPlusModel.from_pretrained(self.folder / "model", dtype=torch.float32)

    @torch.no_grad()
    def embed(self, rows: Sequence[dict], factor: float = 1.0) -> torch.Tensor:
        """`(num_recordings, 192)`, of whole recordings."""
        found = []
        for row in rows:
            clip = pseudo_speaker(read(self.speech / row["path"]), factor)
            found.append(self.encoder(**self.extractor(clip, sampling_rate=RATE)).embeddings[0])
        return torch.stack(found)

    def make_voices(self) -> dict[str, torch.Tensor]:
        """The embedding of each voice: a mean direction, as long as its recordings' embeddings are on the average."""
        voices = {}
        for voice in (*VOICES, HELD_OUT_VOICE):
            # The held-out voice has recordings of evaluation alone: its last ones, which are not judged.
            rows = self.train_rows[voice] if voice in VOICES else self.reserved(voice)
            found = self.embed(rows[:REFERENCES])
            voices[voice] = functional.normalize(found.mean(0), dim=0) * found.norm(dim=1).mean()
        with new_file(self.folder / "voices.safetensors") as temporary:
            save_file(voices, temporary)
        return voices

    def reserved(self, voice: str) -> list[dict]:
        judged = {row["text"] for row in self.eval_rows[voice]}
        rows = read_lines(self.speech / "answers.jsonl") + read_lines(self.speech / "questions.jsonl")
        return [row for row in rows if row["voice"] == voice and row["text"] not in judged]

    def judge(self, voices: dict[str, torch.Tensor]) -> dict:
        """How well held-out sentences tell who speaks: trained voices, all four, and trained ones at other speeds."""
        embeddings = {voice: self.embed(rows) for voice, rows in self.eval_rows.items()}
        norms = torch.cat(list(embeddings.values())).norm(dim=1)
        unheard = {
            f"{voice} {factor}": self.embed(self.eval_rows[voice], factor) for voice in VOICES for factor in (0.9, 1.2)
        }
        middles = {name: functional.normalize(found).mean(0) for name, found in unheard.items()}
        return {
            "trained voices": compare({voice: embeddings[voice] for voice in VOICES}, voices),
            "with the held-out voice": compare(embeddings, voices),
            "at speeds that are not trained on": compare(unheard, middles),
            "norms": [round(value, 2) for value in torch.quantile(norms, torch.tensor([0.05, 0.5, 0.95])).tolist()],
        }


def plot(history: Sequence[dict], voices: dict[str, torch.Tensor], path: Path) -> None:
    figure, (losses, cosines) = new_plot(1, 2)
    losses.plot([row["step"] for row in history], [row["train"] for row in history], label="training")
    losses.plot([row["step"] for row in history], [row["held out"] for row in history], label="held-out sentences")
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    losses.legend()
    directions = functional.normalize(torch.stack(list(voices.values())))
    image = cosines.imshow((directions @ directions.T).numpy(), vmin=-1, vmax=1, cmap="coolwarm")
    cosines.set_xticks(range(len(voices)), list(voices))
    cosines.set_yticks(range(len(voices)), list(voices))
    cosines.set_title("cosine of the voices")
    figure.colorbar(image)
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Trains the encoder and has it judged."""
    options = encoder_arguments(__doc__, 1000, 3).parse_args(arguments)
    settings = {
        "version": VERSION,
        "seed": 0,
        **steps_and_start(options),
        "rate": 2e-3,
        "judged": 3 if options.quick else 60,
    }
    speech = options.work / "speech"

    def make(folder: Path) -> dict:
        training = SpeakerTraining(folder, speech, settings)
        load_start(training.network, options.start)
        history = training.train()
        training.save()
        voices = training.make_voices()
        plot(history, voices, folder / "figures.png")
        return {
            "parameters": sum(parameter.numel() for parameter in training.encoder.parameters()),
            "speakers": len(SPEAKERS),
            "training": history[-1],
            **training.judge(voices),
        }

    run_stage(options.work / "speaker_encoder", [speech], settings, make)


if __name__ == "__main__":
    sys.exit(main())
