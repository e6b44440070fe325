"""Trains the nano speech encoder: a small `FunAsrNanoEncoder` that reads spoken questions, by CTC.

    python training_scripts/nano/train_speech_encoder.py WORK            (about 75 minutes on one core)
    python training_scripts/nano/train_speech_encoder.py WORK --quick
    python training_scripts/nano/train_speech_encoder.py WORK --steps 6000 --start COPY.pt

The last line goes on from a copy of WORK/speech_encoder/training.pt.

The encoder has 16.7 frames a second and flite speaks up to 22 letters: so frames are not taken for letters. Two linear
heads are trained with it: one on its middle layer spells pieces of words, the one on its last layer gives the nano
tokenizer's own tokens, which is what the language model has to know of a question, and where its speech projector
starts from (`train_model.py`).

Features are prepared once, in WORK/speech_encoder, where they take about 3 GB until the stage is done: those of every
question and phrase and of some answers, and again, augmented, those of some questions. Made anew at each step they
would take twice as long as the step itself.

WORK/speech_encoder/model is what `FunAsrNanoEncoder.from_pretrained` loads, in float16, with the feature extractor,
which holds the normalisation measured on the corpus. `heads.safetensors` has the heads.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from listening import error_rates, normalise
from make_speech import HELD_OUT_VOICE, PROCESSES, RATE, VOICES
from minimind_o_hf.processing import MiniMindOFeatureExtractor
from optimizers import MuonAndAdamW
from safetensors.torch import save_file
from stages import new_plot, read_lines, run_stage, save_plot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional
from training import encoder_arguments, load_start, steps_and_start, train
from transformers import AutoModel, AutoTokenizer, FunAsrNanoEncoderConfig
from transformers.models.fun_asr_nano import FunAsrNanoEncoder

from minimind_o_hf.data import FeatureMasking, SpeechAugmentation
from minimind_o_hf.files import new_directory, new_file

VERSION = 3
BATCH = 32
PIECES = 160  # of the middle head
MIDDLE = 3  # layers below it
# Of the batches, by what they are of. With augmented speech alone CTC takes much longer to find its first words.
SHARES = {"questions": 0.42, "phrases": 0.4, "augmented": 0.12, "answers": 0.06}
# One in so many recordings: there are more than enough answers, and augmented copies take room.
EVERY = {"answers": 3, "augmented": 3}
NEIGHBOURS = 16  # batches of about one length, from which one is drawn
FRAMES = 4  # lengths are padded to a multiple


def encoder_config() -> FunAsrNanoEncoderConfig:
    """Width 144, seven layers: 1.65 M parameters."""
    return FunAsrNanoEncoderConfig(
        hidden_size=144,
        num_attention_heads=4,
        intermediate_size=432,
        num_hidden_layers=7,
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


class Features:
    """
    Features of recordings, made once and kept in a file, in half precision.

    Args:
        path (`Path`): A `.npy` file, with the lengths beside it; it is made unless it is there.
        recordings (list of `Path`): What they are of.
        augmented (`bool`): Whether each recording is augmented first.
        seed (`int`): Of the augmentation.
        pool ([`~concurrent.futures.Executor`]): Of processes that [`open_extractor`] has prepared.
    """

    def __init__(self, path: Path, recordings: Sequence[Path], augmented: bool, seed: int, pool: Executor):
        beside = path.with_suffix(".lengths.npy")
        if not beside.is_file():
            jobs = [(recording, [seed, number] if augmented else None) for number, recording in enumerate(recordings)]
            found = list(pool.map(features_of, jobs, chunksize=64))
            # The lengths last: with them all is complete.
            for target, values in ((path, np.concatenate(found)), (beside, np.array([len(one) for one in found]))):
                with new_file(target) as temporary, temporary.open("wb") as file:
                    np.save(file, values)
        self.path, self.frames, self.lengths = path, np.load(path, mmap_mode="r"), np.load(beside)
        if len(self.lengths) != len(recordings):
            raise ValueError(f"{path} is of {len(self.lengths)} recordings, not of {len(recordings)}: remove it.")
        self.starts = np.cumsum(self.lengths) - self.lengths

    def __getitem__(self, index: int) -> torch.Tensor:
        start = self.starts[index]
        return torch.from_numpy(np.asarray(self.frames[start : start + self.lengths[index]], dtype=np.float32))


_extractor: Any = None  # of a process that prepares features


def open_extractor(folder: Path) -> None:
    """Prepares a process for [`features_of`]."""
    global _extractor
    torch.set_num_threads(1)
    _extractor = MiniMindOFeatureExtractor.from_pretrained(folder)


def features_of(job: tuple[Path, list[int] | None]) -> np.ndarray:
    """`(num_frames, 560)` of a recording; augmented where it comes with a seed."""
    path, seed = job
    waveform = read(path)
    if seed is not None:
        waveform = SpeechAugmentation(speed=0.3)(waveform, RATE, np.random.default_rng(seed))
    return _extractor(waveform, sampling_rate=RATE).input_features[0].half().numpy()


class Clips:
    """
    Recordings of one sort, with what they say.

    Args:
        rows (list of `dict`): With `text`, from short to long but for what augmentation changes.
        features ([`Features`]): Theirs.
        pieces ([`~tokenizers.Tokenizer`]), tokenizer: Of the two heads.
    """

    def __init__(self, rows: Sequence[dict], features: Features, pieces: Tokenizer, tokenizer: Any):
        self.rows, self.features = rows, features
        texts = [row["text"] for row in rows]
        self.targets = {
            "pieces": [found.ids for found in pieces.encode_batch([normalise(text) for text in texts])],
            "tokens": tokenizer(texts, add_special_tokens=False).input_ids,
        }

    def batch(self, chosen: Sequence[int], random: np.random.Generator | None = None) -> tuple:
        """Features and their mask, targets of both heads; parts are masked out where `random` is given."""
        found = [self.features[index] for index in chosen]
        if random is not None:
            found = [FeatureMasking()(features, random) for features in found]
        frames = -(-max(map(len, found)) // FRAMES) * FRAMES
        features = torch.stack([functional.pad(one, (0, 0, 0, frames - len(one))) for one in found])
        mask = torch.stack([(torch.arange(frames) < len(one)).long() for one in found])
        return features, mask, {name: [ids[index] for index in chosen] for name, ids in self.targets.items()}

    def draw(self, random: np.random.Generator) -> tuple:
        """A batch of neighbours."""
        count = len(self.rows)
        size = min(count, BATCH * NEIGHBOURS)
        # The window may stand over an end, so that the shortest and the longest are not hardly ever drawn.
        start = min(max(0, int(random.integers(-size // 2, count - size // 2 + 1))), count - size)
        return self.batch((random.choice(size, min(BATCH, size), replace=False) + start).tolist(), random)


class SpeechTraining:
    """
    The encoder, its heads and what they hear.

    Args:
        folder (`Path`): The stage's.
        work (`Path`): Of all stages.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, work: Path, settings: dict):
        self.folder, self.work, self.settings = folder, work, settings
        rows = {name: read_recorded(work, name) for name in ("questions", "answers", "phrases")}
        chosen = {name: choose_training(found) for name, found in rows.items()}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(work / "tokenizer" / "model")
        self.pieces = learn_pieces([row["text"] for found in chosen.values() for row in found], PIECES)
        self.make_extractor([row for found in chosen.values() for row in found])
        chosen["augmented"] = chosen["questions"]
        kept = {name: found[:: EVERY.get(name, 1)] for name, found in chosen.items()}
        evaluation = [row for row in rows["questions"] if row["split"] == "eval"]
        kept["evaluation"] = sorted(evaluation, key=lambda row: row["seconds"])
        with ProcessPoolExecutor(PROCESSES, get_context("spawn"), open_extractor, (folder / "features",)) as pool:
            self.clips = {name: self.prepare(name, found, pool) for name, found in kept.items()}
        self.evaluation = self.clips.pop("evaluation")
        torch.manual_seed(settings["seed"])
        self.encoder: Any = AutoModel.from_config(encoder_config(), attn_implementation="eager")
        sizes = self.pieces.get_vocab_size(), len(self.tokenizer)
        self.heads = Heads(self.encoder.config.hidden_size, *sizes)
        self.network = nn.ModuleDict({"encoder": self.encoder, "heads": self.heads})
        known = [index for index, row in enumerate(self.evaluation.rows) if row["voice"] in VOICES]
        known = known[:: max(1, len(known) // settings["held out"])]
        self.held_out = [self.evaluation.batch(known[at : at + BATCH]) for at in range(0, len(known), BATCH)]

    def make_extractor(self, rows: Sequence[dict]) -> None:
        path = self.folder / "features"
        if not path.is_dir():
            measured = rows[:: self.settings["measured every"]]
            extractor = measure_features([read(self.work / row["path"]) for row in measured])
            with new_directory(path) as temporary:
                extractor.save_pretrained(temporary)

    def prepare(self, name: str, rows: list[dict], pool: Executor) -> Clips:
        """Recordings with their features, which are kept in the stage's folder."""
        path, paths = self.folder / f"{name}.npy", [self.work / row["path"] for row in rows]
        features = Features(path, paths, name == "augmented", self.settings["seed"], pool)
        return Clips(rows, features, self.pieces, self.tokenizer)

    def scores(self, features: torch.Tensor, mask: torch.Tensor, fast: bool = True) -> dict[str, torch.Tensor]:
        # With eager attention a step in bfloat16 takes 0.6 of the time of one in float32.
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            found = self.encoder(features, input_features_mask=mask, output_hidden_states=True)
            scores = self.heads(found.hidden_states[MIDDLE], found.last_hidden_state)
        return {name: values.float() for name, values in scores.items()}

    def loss_of(self, batch: tuple) -> torch.Tensor:
        features, mask, targets = batch
        scores = self.scores(features, mask)
        losses = [ctc_loss(scores[name], mask.sum(1), targets[name]) for name in ("pieces", "tokens")]
        return 0.5 * losses[0] + losses[1]

    def loss_at(self, step: int) -> torch.Tensor:
        random = np.random.default_rng([self.settings["seed"], step])
        name = random.choice(list(SHARES), p=list(SHARES.values()))
        return self.loss_of(self.clips[name].draw(random))

    @torch.no_grad()
    def check(self) -> float:
        return float(np.mean([self.loss_of(batch).item() for batch in self.held_out]))

    def train(self) -> list[dict]:
        steps, rate = self.settings["steps"], self.settings["rate"]
        return train("training", self.folder, self.network, self.loss_at, self.check, steps, rate, self.optimizer)

    def optimizer(self, network: nn.Module, rate: float) -> torch.optim.Optimizer:
        """Muon for the matrices of the encoder."""
        matrices = [parameter for parameter in self.encoder.parameters() if parameter.dim() == 2]
        known = set(matrices)
        others = [parameter for parameter in network.parameters() if parameter not in known]
        groups = [
            [{"params": chosen, "lr": rate, "weight_decay": decay}]
            for chosen, decay in ((matrices, 1e-2), (others, 1e-3))
        ]
        return MuonAndAdamW(*groups, (0.9, 0.99))

    def remove_features(self) -> None:
        """They are large, and can be made again."""
        for path in self.folder.glob("*.npy"):
            path.unlink()

    def save(self) -> None:
        with new_directory(self.folder / "model", overwrite=True) as temporary:
            saved = FunAsrNanoEncoder(self.encoder.config)
            saved.load_state_dict(self.encoder.state_dict())
            saved.half().save_pretrained(temporary)
            MiniMindOFeatureExtractor.from_pretrained(self.folder / "features").save_pretrained(temporary)
        with new_file(self.folder / "heads.safetensors") as temporary:
            save_file(self.heads.state_dict(), temporary)
        with new_file(self.folder / "pieces.json") as temporary:
            self.pieces.save(str(temporary))

    @torch.no_grad()
    def judge(self) -> dict:
        """Character and word error rates of both heads on held-out questions, by voice, as the saved encoder hears."""
        self.encoder = FunAsrNanoEncoder.from_pretrained(
            self.folder / "model", dtype=torch.float32, attn_implementation="eager"
        )
        decode = {"pieces": self.pieces.decode, "tokens": self.tokenizer.decode}
        figures: dict[str, dict] = {}
        for voice in (*VOICES, HELD_OUT_VOICE):
            rows = self.evaluation.rows
            chosen = [index for index, row in enumerate(rows) if row["voice"] == voice]
            chosen = chosen[:: max(1, len(chosen) // self.settings["judged"])]
            heard: dict[str, list[str]] = {name: [] for name in decode}
            for at in range(0, len(chosen), BATCH):
                features, mask, _ = self.evaluation.batch(chosen[at : at + BATCH])
                for name, scores in self.scores(features, mask, fast=False).items():
                    for row, length in zip(scores, mask.sum(1).tolist(), strict=True):
                        heard[name].append(normalise(decode[name](greedy(row[:length]))))
            texts = [rows[index]["text"] for index in chosen]
            figures[voice] = {name: error_rates(texts, found) for name, found in heard.items()}
            right = [normalise(text) == found for text, found in zip(texts, heard["tokens"], strict=True)]
            figures[voice]["whole questions right"] = round(float(np.mean(right)), 3)
        return figures


def read_recorded(work: Path, name: str) -> list[dict]:
    """The recordings of a sort; `path` is from `work`."""
    folder = "phrases" if name == "phrases" else "speech"
    rows = read_lines(work / folder / f"{name}.jsonl")
    return [{**row, "path": f"{folder}/{row['path']}"} for row in rows]


def choose_training(rows: Sequence[dict]) -> list[dict]:
    """Training recordings, from short to long."""
    return sorted((row for row in rows if row["split"] == "train"), key=lambda row: (row["seconds"], row["path"]))


def plot(history: Sequence[dict], errors: dict[str, dict], path: Path) -> None:
    figure, (losses, bars) = new_plot(1, 2)
    losses.plot([row["step"] for row in history], [row["train"] for row in history], label="training")
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
    options = encoder_arguments(__doc__, 16_000, 4).parse_args(arguments)
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
        training.remove_features()
        plot(history, errors, folder / "figures.png")
        return {
            "parameters": sum(parameter.numel() for parameter in training.encoder.parameters()),
            "clips": {name: len(clips.rows) for name, clips in training.clips.items()},
            "training": history[-1],
            "errors": errors,
        }

    inputs = [options.work / name for name in ("speech", "phrases", "tokenizer")]
    run_stage(options.work / "speech_encoder", inputs, settings, make)


if __name__ == "__main__":
    sys.exit(main())
