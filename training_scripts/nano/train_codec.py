"""Trains the nano codec: a `MimiModel` at toy size, in stages that do not collapse.

    python training_scripts/nano/train_codec.py WORK            (about 70 minutes on one core; see `--only` for two)
    python training_scripts/nano/train_codec.py WORK --quick

Trained from nothing as a whole, an encoder, a quantiser and a decoder with spectral losses learn to ignore each other.
So the latents come first, without a network:

    latents     log-mel patches of one 80 ms frame, through PCA; residual k-means on them gives the codebooks
    encoder     learns to give these latents from the waveform
    decoder     learns sound from these latents, and then from their quantised form
    tuned       the codebooks are fitted again, to what the encoder gives, and the decoder to these codes

Mimi quantises its latents in two halves beside each other, which are summed: here the "semantic" codebook sees the
first two principal components, that is loudness and tilt, and the 7 acoustic ones the next 64. That loses as little as
8 plain residual codebooks would (3.4 % against 3.3 % of the variance), and codes are ordered from coarse to fine.

WORK/codec/model is what `MimiModel.from_pretrained` loads, in float16. The other files let an interrupted training go
on. `--only encoder` and `--only decoder` train one of the two, which do not need each other, each in a process.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from listening import error_rates, transcribe
from make_speech import HELD_OUT_VOICE, VOICES
from safetensors.torch import load_file, save_file
from stages import new_plot, open_stage, read_lines, run_stage, save_plot, stage_arguments
from torch import nn
from torch.nn import functional
from training import train
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiResnetBlock

from minimind_o_hf.files import new_directory, new_file

VERSION = 1
ALL_VOICES = (*VOICES, HELD_OUT_VOICE)
RATE = 24000
FRAME = 1920  # samples; 12.5 frames a second
HOP = FRAME // 4
WINDOW = 720
MELS = 64
N_FFT = 1024
# Of a mean magnitude: what is quieter is silence.
MEL_FLOOR = 1e-2

SEMANTIC_SIZE = 2  # principal components of the first codebook
CODEBOOK_DIM = 64  # principal components of the others
LATENT_SIZE = SEMANTIC_SIZE + CODEBOOK_DIM
CODEBOOKS = 8
CODEBOOK_SIZE = 512

BATCH = 8
CROP = 12  # frames


def codec_config() -> MimiConfig:
    """Mimi's configuration at toy size: about 2.6 M parameters."""
    return MimiConfig(
        hidden_size=128,
        num_filters=16,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=CODEBOOK_DIM,
        vector_quantization_hidden_dimension=CODEBOOK_DIM,
        num_quantizers=CODEBOOKS,
        num_semantic_quantizers=1,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        sliding_window=50,
        upsample_groups=128,
        layer_scale_initial_scale=0.1,
    )


class FastElu(nn.Module):
    """ELU, exactly: PyTorch's own is not vectorised on CPUs and took 40 % of a training step."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            outputs = torch.maximum(inputs.clamp(max=0).exp_().sub_(1), inputs)
            ctx.save_for_backward(outputs)
            return outputs

        @staticmethod
        def backward(ctx, gradients):
            (outputs,) = ctx.saved_tensors
            return outputs.clamp(max=0).add_(1).mul_(gradients)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.Function.apply(inputs)


def make_fast(network: nn.Module) -> None:
    """Puts [`FastElu`] in the place of every ELU in a list of layers."""
    for layers in network.modules():
        if isinstance(layers, nn.ModuleList):
            for index, layer in enumerate(layers):
                if isinstance(layer, nn.ELU):
                    layers[index] = FastElu()


def build_codec(seed: int) -> MimiModel:
    """An untrained codec that starts at a sensible loudness (transformers' start is 50 times too loud)."""
    torch.manual_seed(seed)
    codec = MimiModel(codec_config())
    for layer in [*codec.encoder.modules(), *codec.decoder.modules()]:
        if isinstance(layer, (nn.Conv1d, nn.ConvTranspose1d)):
            start_convolution(layer)
    make_fast(codec)
    for layer in codec.modules():
        if isinstance(layer, MimiResnetBlock):
            layer.block[-1].conv.weight.data.mul_(0.4)
    codec.decoder.decoder_seanet.layers[-1].conv.weight.data.mul_(0.1)
    return codec


def start_convolution(layer: nn.Conv1d | nn.ConvTranspose1d) -> None:
    """Keeps the size of what passes through it and an ELU."""
    if layer.groups > 1:  # the upsampling: each frame twice
        nn.init.constant_(layer.weight, 0.5)
        return
    # A sample of a transposed convolution's output has only so many inputs.
    taps = layer.kernel_size[0] / (layer.stride[0] if isinstance(layer, nn.ConvTranspose1d) else 1)
    nn.init.normal_(layer.weight, std=1.25 / math.sqrt(layer.in_channels * taps))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def mel_filters() -> torch.Tensor:
    """`(N_FFT // 2 + 1, MELS)`: weights that sum to 1. flite's speech has nothing above 8 kHz."""
    filters = torchaudio.functional.melscale_fbanks(
        N_FFT // 2 + 1, 20.0, 8000.0, MELS, RATE, norm="slaney", mel_scale="slaney"
    )
    return filters / filters.sum(0).clamp(min=1e-8)


MEL_FILTERS = mel_filters()


def log_mel(waveforms: torch.Tensor) -> torch.Tensor:
    """
    Log-mel magnitudes that a causal network can know.

    Args:
        waveforms (`torch.FloatTensor` of shape `(batch_size, num_samples)`): At 24 kHz.

    Returns:
        `torch.FloatTensor` of shape `(batch_size, num_samples // 480, 64)`: hop h is of the 720 samples (30 ms) that
        end where it ends, so it holds nothing that comes later.
    """
    window = torch.hann_window(WINDOW, device=waveforms.device)
    windows = functional.pad(waveforms, (WINDOW - HOP, 0)).unfold(-1, WINDOW, HOP) * window
    magnitudes = torch.fft.rfft(windows, N_FFT).abs() @ MEL_FILTERS.to(waveforms.device)
    return magnitudes.clamp(min=MEL_FLOOR).log()


def patches(waveforms: torch.Tensor) -> torch.Tensor:
    """The 4 hops of each 80 ms frame as one vector: `(batch_size, num_frames, 256)`."""
    mels = log_mel(waveforms)
    frames = mels.shape[1] // 4
    return mels[:, : frames * 4].reshape(len(mels), frames, 4 * MELS)


def fit_pca(vectors: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """
    Principal components.

    Args:
        vectors (`torch.FloatTensor` of shape `(num_vectors, width)`): What to describe.
        size (`int`): How many components.

    Returns:
        `dict`: `mean` `(width,)`, `basis` `(width, size)`, scaled so that the components' mean square is 1, and
        `explained`, the share of the variance in each of all components.
    """
    mean = vectors.mean(0)
    variances, basis = torch.linalg.eigh(torch.cov((vectors - mean).T.double()))
    variances, basis = variances.flip(0), basis.flip(1)[:, :size]
    basis = basis / (variances[:size].sum() / size).sqrt()
    return {"mean": mean, "basis": basis.float().contiguous(), "explained": (variances / variances.sum()).float()}


def to_latents(waveforms: torch.Tensor, pca: dict[str, torch.Tensor], width: int) -> torch.Tensor:
    """`(batch_size, width, num_frames)`: the components, and zeros after them."""
    components = (patches(waveforms) - pca["mean"]) @ pca["basis"]
    return functional.pad(components, (0, width - components.shape[-1])).transpose(1, 2)


def nearest(vectors: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centre, `(num_vectors,)`."""
    return torch.cdist(vectors, centres).argmin(1)


def kmeans(vectors: torch.Tensor, size: int, rounds: int, generator: torch.Generator) -> torch.Tensor:
    """`(size, width)` centres of `(num_vectors, width)`; an empty cluster takes a random vector."""
    centres = vectors[torch.randperm(len(vectors), generator=generator)[:size]]
    centres = functional.pad(centres, (0, 0, 0, size - len(centres)))
    for _ in range(rounds):
        chosen = nearest(vectors, centres)
        counts = torch.bincount(chosen, minlength=size)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, chosen, vectors)
        random = vectors[torch.randint(len(vectors), (size,), generator=generator)]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), random)
    return centres


def residual_kmeans(
    vectors: torch.Tensor, count: int, size: int, rounds: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Codebooks, each fitted to what those before it leave of `(num_vectors, width)`."""
    codebooks, left = [], vectors
    for _ in range(count):
        codebooks.append(kmeans(left, size, rounds, generator))
        left = left - codebooks[-1][nearest(left, codebooks[-1])]
    return codebooks


def fit_codebooks(latents: torch.Tensor, rounds: int, seed: int) -> torch.Tensor:
    """The codec's codebooks, `(8, 512, 64)`, for latents `(num_vectors, LATENT_SIZE or more)`."""
    generator = torch.Generator().manual_seed(seed)
    first = kmeans(latents[:, :SEMANTIC_SIZE], CODEBOOK_SIZE, rounds, generator)
    others = latents[:, SEMANTIC_SIZE:LATENT_SIZE]
    acoustic = residual_kmeans(others, CODEBOOKS - 1, CODEBOOK_SIZE, rounds, generator)
    return torch.stack([functional.pad(first, (0, CODEBOOK_DIM - SEMANTIC_SIZE)), *acoustic])


@torch.no_grad()
def store_codebooks(codec: MimiModel, codebooks: torch.Tensor) -> None:
    """Makes the codec's own quantiser use the codebooks: `codec.encode` gives their indices."""
    halves = (
        (codec.quantizer.semantic_residual_vector_quantizer, 0, SEMANTIC_SIZE, codebooks[:1]),
        (codec.quantizer.acoustic_residual_vector_quantizer, SEMANTIC_SIZE, LATENT_SIZE, codebooks[1:]),
    )
    for half, begin, end, own in halves:
        picked = torch.zeros_like(half.input_proj.weight[..., 0])
        picked[: end - begin, begin:end] = torch.eye(end - begin)
        half.input_proj.weight.copy_(picked[..., None])
        half.output_proj.weight.copy_(picked.T[..., None])
        for layer, codebook in zip(half.layers, own, strict=True):
            layer.codebook.embed_sum.copy_(codebook)
            layer.codebook.cluster_usage.fill_(1)
            layer.codebook._embed = None  # what it divided before


def quantise(codec: MimiModel, latents: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Latents as their codes give them; of some rows only the first codes, so that the coarse ones carry most."""
    with torch.no_grad():
        codes = codec.quantizer.encode(latents).transpose(0, 1)
        whole = codec.quantizer.decode(codes)
        if generator.random() < 0.7:
            return whole
        kept = int(generator.integers(3, CODEBOOKS))
        row = int(generator.integers(len(latents)))
        whole[row] = codec.quantizer.decode(codes[row : row + 1, :kept])[0]
        return whole


def stft_loss(waveforms: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean over four window sizes of spectral convergence and of the distance of log magnitudes."""
    total = waveforms.new_zeros(())
    for size in (256, 512, 1024, 2048):
        window = torch.hann_window(size, device=waveforms.device)
        both = torch.stft(torch.cat([waveforms, targets]), size, size // 4, window=window, return_complex=True).abs()
        made, wanted = both.chunk(2)
        floor = 1e-3 * math.sqrt(size)
        logs = (made.clamp(min=floor).log() - wanted.clamp(min=floor).log()).abs().mean()
        total = total + torch.linalg.vector_norm(made - wanted) / torch.linalg.vector_norm(wanted) + logs
    return total / 4


def sound_loss(waveforms: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Spectral distance of `(batch_size, num_samples)`. The first frame counts, or recordings begin with a click."""
    made = waveforms.float()
    return stft_loss(made, targets) + (log_mel(made) - log_mel(targets)).abs().mean()


class Speech:
    """
    Recordings at 24 kHz, in memory, and random crops of them.

    Args:
        rows (list of `dict`): With `path` (under `folder`) and `seconds`.
        folder (`Path`): The speech stage's.
    """

    def __init__(self, rows: Sequence[dict], folder: Path):
        self.rows = list(rows)
        self.waveforms = [read_waveform(folder / row["path"]) for row in self.rows]
        length = CROP * FRAME
        self.long = [waveform for waveform in self.waveforms if len(waveform) > length]
        if not self.long:
            raise ValueError(f"None of {len(self.rows)} recordings is longer than {length / RATE} s.")

    def crops(self, count: int, generator: np.random.Generator) -> torch.Tensor:
        """`(count, CROP * FRAME)`; one in eight begins where its recording does."""
        chosen = []
        for _ in range(count):
            waveform = self.long[generator.integers(len(self.long))]
            start = int(generator.integers(len(waveform) - CROP * FRAME)) if generator.random() < 0.875 else 0
            chosen.append(waveform[start : start + CROP * FRAME])
        return torch.from_numpy(np.stack(chosen))


def read_waveform(path: Path) -> np.ndarray:
    """`(num_samples,)` at 24 kHz."""
    waveform, rate = soundfile.read(path, dtype="float32")
    return torchaudio.functional.resample(torch.from_numpy(waveform), rate, RATE).numpy()


def choose_training(rows: Sequence[dict], minutes: float) -> list[dict]:
    """So many minutes of training answers, of all kinds and voices alike."""
    chosen, seconds = [], 0.0
    for row in sorted(rows, key=lambda row: Path(row["path"]).stem):  # a hash of the text
        if row["split"] == "train" and seconds < minutes * 60:
            chosen.append(row)
            seconds += row["seconds"]
    return chosen


class CodecTraining:
    """The parts of the training, one after another.

    Args:
        folder (`Path`): The stage's.
        speech (`Path`): The speech stage's folder.
        settings (`dict`): See `main`.
    """

    def __init__(self, folder: Path, speech: Path, settings: dict):
        self.folder, self.settings = folder, settings
        rows = read_lines(speech / "answers.jsonl")
        self.speech = Speech(choose_training(rows, settings["minutes"]), speech)
        held = [row for row in rows if row["split"] == "eval" and row["voice"] in VOICES]
        self.held_out = Speech(held[: settings["held out"]], speech).crops(32, np.random.default_rng(0))
        self.codec = build_codec(settings["seed"])
        self.width = self.codec.config.hidden_size
        self.pca = self.fit_latents()

    def generator(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.settings["seed"], step])

    def fit_latents(self) -> dict[str, torch.Tensor]:
        """PCA and the first codebooks, once."""
        path = self.folder / "latents.safetensors"
        if not path.is_file():
            waveforms = self.speech.waveforms
            vectors = torch.cat([patches(torch.from_numpy(waveform)[None])[0] for waveform in waveforms])
            pca = fit_pca(vectors, LATENT_SIZE)
            latents = (vectors - pca["mean"]) @ pca["basis"]
            pca["codebooks"] = fit_codebooks(latents, self.settings["rounds"], self.settings["seed"])
            with new_file(path) as temporary:
                save_file(pca, temporary)
        pca = load_file(path)
        store_codebooks(self.codec, pca["codebooks"])
        return pca

    def latents(self, waveforms: torch.Tensor) -> torch.Tensor:
        return to_latents(waveforms, self.pca, self.width)

    def encoded(self, waveforms: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings["bfloat16"]):
            return self.codec.encoder(waveforms[:, None]).latents.float()

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings["bfloat16"]):
            return self.codec.decoder(latents).audio_values[:, 0]

    def train_encoder(self) -> list[dict]:
        """Mean squared error of the latents, whose mean square is about 1."""

        def loss_of(waveforms: torch.Tensor) -> torch.Tensor:
            errors = self.encoded(waveforms) - self.latents(waveforms)
            return errors.square().sum(1).mean() / LATENT_SIZE

        def check() -> float:
            with torch.no_grad():
                return loss_of(self.held_out).item()

        return train(
            "encoder",
            self.folder,
            self.codec.encoder,
            lambda step: loss_of(self.speech.crops(BATCH, self.generator(step))),
            check,
            self.settings["encoder steps"],
            self.settings["encoder rate"],
        )

    def train_decoder(self) -> list[dict]:
        """A third of the steps on the latents themselves, the rest on their quantised form."""
        steps = self.settings["decoder steps"]

        def loss_at(step: int) -> torch.Tensor:
            generator = self.generator(step)
            waveforms = self.speech.crops(BATCH, generator)
            latents = self.latents(waveforms)
            if step * 3 > steps:
                latents = quantise(self.codec, latents, generator)
            return sound_loss(self.decoded(latents), waveforms)

        def check() -> float:
            return self.check_decoder(self.latents(self.held_out))

        rate = self.settings["decoder rate"]
        return train("decoder", self.folder, self.codec.decoder, loss_at, check, steps, rate)

    @torch.no_grad()
    def check_decoder(self, latents: torch.Tensor) -> float:
        codes = self.codec.quantizer.encode(latents).transpose(0, 1)
        return sound_loss(self.decoded(self.codec.quantizer.decode(codes)), self.held_out).item()

    @torch.no_grad()
    def refit_codebooks(self) -> None:
        """Fits the codebooks to what the encoder gives of the recordings."""
        path = self.folder / "codebooks.safetensors"
        if not path.is_file():
            chosen = self.speech.waveforms[: self.settings["refit"]]
            found = [self.encoded(torch.from_numpy(waveform)[None])[0].T for waveform in chosen]
            codebooks = fit_codebooks(torch.cat(found), self.settings["rounds"], self.settings["seed"])
            with new_file(path) as temporary:
                save_file({"codebooks": codebooks}, temporary)
        store_codebooks(self.codec, load_file(path)["codebooks"])

    def tune_decoder(self) -> list[dict]:
        """The decoder on the codes of the finished encoder."""

        def loss_at(step: int) -> torch.Tensor:
            generator = self.generator(self.settings["decoder steps"] + step)
            waveforms = self.speech.crops(BATCH, generator)
            with torch.no_grad():
                latents = self.encoded(waveforms)
            return sound_loss(self.decoded(quantise(self.codec, latents, generator)), waveforms)

        def check() -> float:
            with torch.no_grad():
                return self.check_decoder(self.encoded(self.held_out))

        steps, rate = self.settings["tuning steps"], self.settings["tuning rate"]
        return train("tuned", self.folder, self.codec.decoder, loss_at, check, steps, rate)


def save_codec(codec: MimiModel, folder: Path) -> None:
    """Writes what `MimiModel.from_pretrained` loads, in float16, with PyTorch's own ELU."""
    with new_directory(folder, overwrite=True) as temporary:
        saved = MimiModel(codec.config)
        saved.load_state_dict(codec.state_dict())
        saved.half().save_pretrained(temporary)


@torch.no_grad()
def judge(training: CodecTraining, speech: Path, count: int) -> dict:
    """
    What a recogniser makes of held-out answers, in four stages from the recording to the finished codec.

    Args:
        training ([`CodecTraining`]): For the latents.
        speech (`Path`): The speech stage's folder.
        count (`int`): Sentences of each voice, and as many to repeat.

    Returns:
        `dict`: For the closed domain by voice, and for sentences to repeat in all trained voices: the recogniser's
        character and word error rates at each stage.
    """
    codec = MimiModel.from_pretrained(training.folder / "model", dtype=torch.float32)
    rows = [row for row in read_lines(speech / "answers.jsonl") if row["split"] == "eval"]
    figures: dict = {}
    groups = {
        voice: [row for row in rows if row["voice"] == voice and row["kind"] != "repeat"] for voice in ALL_VOICES
    }
    groups["repeat"] = [row for row in rows if row["kind"] == "repeat" and row["voice"] in VOICES]
    for name, group in groups.items():
        chosen = group[:count]
        texts = [row["text"] for row in chosen]
        heard: dict[str, list[str]] = {}
        for row in chosen:
            waveform = torch.from_numpy(read_waveform(speech / row["path"]))[None]
            latents = training.latents(waveform)
            codes = codec.encode(waveform[:, None]).audio_codes
            sounds = {
                "recording": waveform[0],
                "latents": codec.decoder(latents).audio_values[0, 0],
                "quantised": codec.decode(codec.quantizer.encode(latents).transpose(0, 1)).audio_values[0, 0],
                "codec": codec.decode(codes).audio_values[0, 0],
            }
            for stage, sound in sounds.items():
                heard.setdefault(stage, []).append(transcribe(sound.numpy(), RATE))
        figures[name] = {stage: error_rates(texts, found) for stage, found in heard.items()}
    return figures


@torch.no_grad()
def count_codes(codec: MimiModel, waveforms: Sequence[np.ndarray]) -> dict:
    """How evenly the codes of each codebook are used: perplexity, of 512."""
    codes = torch.cat([codec.encode(torch.from_numpy(w)[None, None]).audio_codes[0] for w in waveforms], dim=1)
    shares = torch.stack([torch.bincount(row, minlength=CODEBOOK_SIZE) / codes.shape[1] for row in codes])
    return {"perplexity": (-(shares * shares.clamp(min=1e-9).log()).sum(1)).exp().round(decimals=1).tolist()}


@torch.no_grad()
def plot(training: CodecTraining, histories: dict[str, list[dict]], speech: Path) -> None:
    """Losses, and the spectrograms of a held-out recording before and after the codec."""
    codec = MimiModel.from_pretrained(training.folder / "model", dtype=torch.float32)
    row = next(row for row in read_lines(speech / "answers.jsonl") if row["split"] == "eval")
    waveform = torch.from_numpy(read_waveform(speech / row["path"]))[None]
    decoded = codec.decode(codec.encode(waveform[:, None]).audio_codes).audio_values[:, 0]
    figure, axes = new_plot(2, 2, 12, 7)
    for axis, (name, history) in zip(axes, list(histories.items())[:2], strict=False):
        axis.plot([row["step"] for row in history], [row["held out"] for row in history])
        axis.set(title=f"{name}: held-out loss", xlabel="step", yscale="log")
    if "tuned" in histories:
        axes[1].plot([row["step"] for row in histories["tuned"]], [row["held out"] for row in histories["tuned"]])
    for axis, name, sound in ((axes[2], "recording", waveform), (axes[3], "through the codec", decoded)):
        axis.imshow(log_mel(sound)[0].T.numpy(), origin="lower", aspect="auto", vmin=math.log(MEL_FLOOR), vmax=3)
        axis.set(title=f"{name}: {row['text']}", xlabel="20 ms", ylabel="mel")
    save_plot(figure, training.folder / "figures.png")


def main(arguments: list[str] | None = None) -> None:
    """Trains the codec, stores it and has it judged."""
    parser = stage_arguments(__doc__)
    parser.add_argument("--only", choices=("encoder", "decoder"), help="train this part alone, and stop")
    options = parser.parse_args(arguments)
    settings = {
        "version": VERSION,
        "seed": 0,
        "bfloat16": True,  # a decoder's step took 0.16 s, and 0.29 s in float32
        "minutes": 150,
        "held out": 60,
        "rounds": 25,
        "encoder steps": 6000,
        "encoder rate": 1e-3,
        "decoder steps": 6000,
        "decoder rate": 1.2e-3,
        "refit": 2500,
        "tuning steps": 4000,
        "tuning rate": 5e-4,
        "judged": 24,
    }
    if options.quick:
        few = {"encoder steps": 20, "decoder steps": 20, "tuning steps": 10, "rounds": 2, "judged": 2, "held out": 16}
        settings |= few
    speech = options.work / "speech"

    def make(folder: Path) -> dict:
        training = CodecTraining(folder, speech, settings)
        histories = {"encoder": training.train_encoder(), "decoder": training.train_decoder()}
        training.refit_codebooks()
        histories["tuned"] = training.tune_decoder()
        save_codec(training.codec, folder / "model")
        plot(training, histories, speech)
        explained = training.pca["explained"]
        return {
            "parameters": sum(parameter.numel() for parameter in training.codec.parameters()),
            "variance of the latents": round(explained[:LATENT_SIZE].sum().item(), 4),
            "held out": {name: history[-1] for name, history in histories.items()},
            "codes": count_codes(training.codec, training.speech.waveforms[:200]),
            "errors": judge(training, speech, settings["judged"]),
        }

    folder = options.work / "codec"
    if not options.only:
        run_stage(folder, [speech], settings, make)
    elif open_stage(folder, [speech], settings):
        training = CodecTraining(folder, speech, settings)
        {"encoder": training.train_encoder, "decoder": training.train_decoder}[options.only]()


if __name__ == "__main__":
    sys.exit(main())
