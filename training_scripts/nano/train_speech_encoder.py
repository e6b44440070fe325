"""Trains the nano speech encoder: a small `FunAsrNanoEncoder` that reads spoken questions, by CTC.

    python training_scripts/nano/train_speech_encoder.py WORK            (about 75 minutes on one core)
    python training_scripts/nano/train_speech_encoder.py WORK --quick
    python training_scripts/nano/train_speech_encoder.py WORK --steps 6000 --start COPY.pt

The last line goes on from a copy of WORK/speech_encoder/training.pt.

The encoder has 16.7 frames a second and flite speaks up to 22 letters: so frames are not taken for letters. Two linear
heads are trained with it: one on its middle layer spells pieces of words, the one on its last layer gives the nano
tokenizer's own tokens, which is what the language model has to know of a question.

WORK/speech_encoder/model is what `FunAsrNanoEncoder.from_pretrained` loads, in float16, with the feature extractor,
which holds the normalisation measured on the corpus. `heads.safetensors` beside it is for evaluation alone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from listening import error_rates, normalise
from make_speech import HELD_OUT_VOICE, RATE, VOICES
from minimind_o_hf.processing import MiniMindOFeatureExtractor
from safetensors.torch import save_file
from stages import new_plot, read_lines, run_stage, save_plot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from training import encoder_arguments, load_start, steps_and_start, train
from transformers import AutoTokenizer, FunAsrNanoEncoderConfig
from transformers.models.fun_asr_nano import FunAsrNanoEncoder

from minimind_o_hf.data import FeatureMasking, SpeechAugmentation
from minimind_o_hf.files import new_directory, new_file

VERSION = 2
BATCH = 24
PIECES = 160  # of the middle head
MIDDLE = 3  # layers below it
QUESTIONS = 0.75  # of the batches; the others are of answers
AUGMENTED = 0.5  # of the batches: with augmentation alone CTC takes much longer to find its first words
NEIGHBOURS = 16  # batches of about one length, from which one is drawn


def encoder_config() -> FunAsrNanoEncoderConfig:
    """Width 144, five layers: 1.23 M parameters."""
    return FunAsrNanoEncoderConfig(
        hidden_size=144,
        num_attention_heads=4,
        intermediate_size=432,
        num_hidden_layers=5,
        num_timestamp_prediction_layers=0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )


def read(path: Path) -> np.ndarray:
    """`(num_samples,)` at 16 kHz."""
    return soundfile.read(path, dtype="float32")[0]


def measure_features(waveforms: Sequence[np.ndarray]) -> MiniMindOFeatureExtractor:
    """A feature extractor whose features have mean 0 and deviation 1 over the waveforms."""
    # Dither keeps digital silence from being -16, far away from everything else.
    plain = MiniMindOFeatureExtractor(dither=1.0)
    frames = torch.cat([plain(waveform, sampling_rate=RATE).input_features[0] for waveform in waveforms])
    scale = 1 / frames.std(0).clamp(min=1e-3)
    return MiniMindOFeatureExtractor(dither=1.0, cmvn_shift=(-frames.mean(0)).tolist(), cmvn_scale=scale.tolist())


def learn_pieces(texts: Sequence[str], size: int) -> Tokenizer:
    """Pieces of lower-case words, letters among them."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace()
    pieces.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    pieces.train_from_iterator([normalise(text) for text in texts], trainer)
    return pieces


class Heads(nn.Module):
    """
    Scores of each frame, the last one of each for "nothing new".

    Args:
        width (`int`): Of a frame.
        pieces (`int`), tokens (`int`): Sizes of the vocabularies.
    """

    def __init__(self, width: int, pieces: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pieces = nn.Linear(width, pieces + 1)
        self.tokens = nn.Linear(width, tokens + 1)

    def forward(self, middle: torch.Tensor, last: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pieces": self.pieces(self.norm(middle)), "tokens": self.tokens(last)}


def ctc_loss(scores: torch.Tensor, lengths: torch.Tensor, targets: Sequence[Sequence[int]]) -> torch.Tensor:
    """
    Mean CTC loss of a target.

    Args:
        scores (`torch.FloatTensor` of shape `(batch_size, num_frames, size + 1)`): Blank is last.
        lengths (`torch.LongTensor` of shape `(batch_size,)`): Real frames.
        targets (list of list of `int`): What each row says.
    """
    return functional.ctc_loss(
        scores.log_softmax(-1).transpose(0, 1),
        torch.tensor([index for target in targets for index in target]),
        lengths,
        torch.tensor([len(target) for target in targets]),
        blank=scores.shape[-1] - 1,
        zero_infinity=True,
    )


def greedy(scores: torch.Tensor) -> list[int]:
    """What `(num_frames, size + 1)` scores say: the best of each frame, without repetitions and blanks."""
    best = torch.unique_consecutive(scores.argmax(-1)).tolist()
    return [index for index in best if index != scores.shape[-1] - 1]


class SpeechTraining:
    """
    The encoder, its heads and what they hear.

    Args:
        folder (`Path`): The stage's.
        work (`Path`): Of all stages.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, work: Path, settings: dict):
        self.folder, self.speech, self.settings = folder, work / "speech", settings
        rows = {name: read_lines(self.speech / f"{name}.jsonl") for name in ("questions", "answers")}
        self.rows = {name: choose_training(found) for name, found in rows.items()}
        self.evaluation = [row for row in rows["questions"] if row["split"] == "eval"]
        self.tokenizer: Any = AutoTokenizer.from_pretrained(work / "tokenizer" / "model")
        self.pieces = learn_pieces([row["text"] for found in self.rows.values() for row in found], PIECES)
        self.extractor = self.load_extractor()
        torch.manual_seed(settings["seed"])
        self.encoder: Any = FunAsrNanoEncoder(encoder_config())
        sizes = self.pieces.get_vocab_size(), len(self.tokenizer)
        self.heads = Heads(self.encoder.config.hidden_size, *sizes)
        self.network = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        chosen = [row for row in self.evaluation if row["voice"] in VOICES][: settings["held out"]]
        self.held_out = [self.batch(chosen[at : at + BATCH]) for at in range(0, len(chosen), BATCH)]
        self.augmentation, self.masking = SpeechAugmentation(speed=0.3), FeatureMasking()

    def load_extractor(self) -> MiniMindOFeatureExtractor:
        path = self.folder / "features"
        if not path.is_dir():
            measured = [row for found in self.rows.values() for row in found[:: self.settings["measured every"]]]
            extractor = measure_features([read(self.speech / row["path"]) for row in measured])
            with new_directory(path) as temporary:
                extractor.save_pretrained(temporary)
        return MiniMindOFeatureExtractor.from_pretrained(path)

    def batch(self, rows: Sequence[dict], random: np.random.Generator | None = None) -> tuple:
        """Features and their mask, targets of both heads; augmented where `random` is given."""
        waveforms = [read(self.speech / row["path"]) for row in rows]
        if random is not None:
            waveforms = [self.augmentation(waveform, RATE, random) for waveform in waveforms]
        inputs = self.extractor(waveforms, sampling_rate=RATE)
        features, mask = inputs.input_features, inputs.input_features_mask
        if random is not None:
            for row, length in zip(features, mask.sum(1).tolist(), strict=True):
                row[:length] = self.masking(row[:length], random)
        pieces = [self.pieces.encode(normalise(row["text"])).ids for row in rows]
        tokens = self.tokenizer([row["text"] for row in rows], add_special_tokens=False).input_ids
        return features, mask, {"pieces": pieces, "tokens": tokens}

    def scores(self, features: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.encoder(features, input_features_mask=mask, output_hidden_states=True)
        return self.heads(found.hidden_states[MIDDLE], found.last_hidden_state)

    def loss_of(self, batch: tuple) -> torch.Tensor:
        features, mask, targets = batch
        scores = self.scores(features, mask)
        losses = [ctc_loss(scores[name], mask.sum(1), targets[name]) for name in ("pieces", "tokens")]
        return 0.5 * losses[0] + losses[1]

    def loss_at(self, step: int) -> torch.Tensor:
        random = np.random.default_rng([self.settings["seed"], step])
        rows = self.rows["questions" if random.random() < QUESTIONS else "answers"]
        size = min(len(rows), BATCH * NEIGHBOURS)
        start = int(random.integers(len(rows) - size + 1))
        chosen = random.choice(size, min(BATCH, size), replace=False) + start
        augmented = random.random() < AUGMENTED
        return self.loss_of(self.batch([rows[index] for index in chosen], random if augmented else None))

    @torch.no_grad()
    def check(self) -> float:
        return float(np.mean([self.loss_of(batch).item() for batch in self.held_out]))

    def train(self) -> list[dict]:
        steps, rate = self.settings["steps"], self.settings["rate"]
        return train("training", self.folder, self.network, self.loss_at, self.check, steps, rate)

    def save(self) -> None:
        with new_directory(self.folder / "model", overwrite=True) as temporary:
            saved = FunAsrNanoEncoder(self.encoder.config)
            saved.load_state_dict(self.encoder.state_dict())
            saved.half().save_pretrained(temporary)
            self.extractor.save_pretrained(temporary)
        with new_file(self.folder / "heads.safetensors") as temporary:
            save_file(self.heads.state_dict(), temporary)
        with new_file(self.folder / "pieces.json") as temporary:
            self.pieces.save(str(temporary))

    @torch.no_grad()
    def judge(self) -> dict:
        """Character and word error rates of both heads on held-out questions, by voice, as the saved encoder hears."""
        self.encoder = FunAsrNanoEncoder.from_pretrained(self.folder / "model", dtype=torch.float32)
        decode = {"pieces": self.pieces.decode, "tokens": self.tokenizer.decode}
        figures: dict[str, dict] = {}
        for voice in (*VOICES, HELD_OUT_VOICE):
            rows = [row for row in self.evaluation if row["voice"] == voice][: self.settings["judged"]]
            heard: dict[str, list[str]] = {name: [] for name in decode}
            for at in range(0, len(rows), BATCH):
                features, mask, _ = self.batch(rows[at : at + BATCH])
                for name, scores in self.scores(features, mask).items():
                    for row, length in zip(scores, mask.sum(1).tolist(), strict=True):
                        heard[name].append(normalise(decode[name](greedy(row[:length]))))
            texts = [row["text"] for row in rows]
            figures[voice] = {name: error_rates(texts, found) for name, found in heard.items()}
            right = [normalise(text) == found for text, found in zip(texts, heard["tokens"], strict=True)]
            figures[voice]["whole questions right"] = round(float(np.mean(right)), 3)
        return figures


def choose_training(rows: Sequence[dict]) -> list[dict]:
    """Training recordings, from short to long."""
    return sorted((row for row in rows if row["split"] == "train"), key=lambda row: (row["seconds"], row["path"]))


def plot(history: Sequence[dict], errors: dict[str, dict], path: Path) -> None:
    figure, (losses, bars) = new_plot(1, 2)
    losses.plot([row["step"] for row in history], [row["train"] for row in history], label="training, augmented")
    losses.plot([row["step"] for row in history], [row["held out"] for row in history], label="held-out questions")
    losses.set(xlabel="step", ylabel="CTC loss", yscale="log")
    losses.legend()
    for shift, name in ((-0.2, "pieces"), (0.2, "tokens")):
        rates = [errors[voice][name]["cer"] for voice in errors]
        bars.bar([place + shift for place in range(len(errors))], rates, 0.4, label=f"read by its {name}")
    bars.set_xticks(range(len(errors)), list(errors))
    bars.set(ylabel="character error rate, held-out questions")
    bars.legend()
    save_plot(figure, path)


def main(arguments: list[str] | None = None) -> None:
    """Trains the encoder and has it judged."""
    options = encoder_arguments(__doc__, 9000, 4).parse_args(arguments)
    settings = {
        "version": VERSION,
        "seed": 0,
        **steps_and_start(options),
        "rate": 1.5e-3,
        "held out": 24 if options.quick else 192,
        "measured every": 5 if options.quick else 20,
        "judged": 4 if options.quick else 240,
    }

    def make(folder: Path) -> dict:
        training = SpeechTraining(folder, options.work, settings)
        load_start(training.network, options.start)
        history = training.train()
        training.save()
        errors = training.judge()
        plot(history, errors, folder / "figures.png")
        return {
            "parameters": sum(parameter.numel() for parameter in training.encoder.parameters()),
            "clips": {name: len(rows) for name, rows in training.rows.items()},
            "training": history[-1],
            "errors": errors,
        }

    inputs = [options.work / name for name in ("speech", "tokenizer")]
    run_stage(options.work / "speech_encoder", inputs, settings, make)


if __name__ == "__main__":
    sys.exit(main())
