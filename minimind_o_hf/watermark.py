"""An inaudible watermark in generated sound: unlike the mark in a file's metadata it stays when the file is converted.

The network and its weights are those of Resemble AI's Perth (MIT licence, https://github.com/resemble-ai/Perth), which
changes magnitudes below 2 kHz where the speech itself hides it. Perth marks whole recordings, resampled to 32 kHz.
Here it works at the rate of the sound, so that nothing is resampled, and on 80 ms at a time with the 150 ms before it,
so that streams can be marked.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch

from .modeling.streaming_minimind_o import MiniMindOStreamEvent
from .processing.audio_minimind_o import AudioSource, load_audio

THRESHOLD = 0.5
"""Sound of this score or more has the watermark."""

CODEC_RATE = 24000  # Hz
DETECTOR_RATE = 32000  # Hz
NUM_BINS = 128  # of 15.625 Hz
BLOCK = 8  # frames that the network marks together; every 10 ms one, so 80 ms
HISTORY = 15  # frames before a block that it sees: five convolutions, three frames each
FLOOR, RANGE = -180.0, 195.0  # dB; magnitudes are scaled so that 0 and 1 are FLOOR and FLOOR + RANGE

_Waveform = TypeVar("_Waveform", np.ndarray, torch.Tensor)
_WEIGHTS = Path("pretrained", "implicit", "perth_net_250000.pth.tar")


def _library() -> Path | None:
    """The installed library's folder with its network and weights, or None."""
    spec = importlib.util.find_spec("perth")
    folders = [Path(folder, "perth_net") for folder in (spec and spec.submodule_search_locations) or []]
    return next((folder for folder in folders if (folder / _WEIGHTS).is_file()), None)


def is_watermark_available() -> bool:
    """Whether the optional library of the watermark is installed."""
    return _library() is not None


@functools.cache
def _networks() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The network that marks, and the one that detects."""
    folder = _library()
    if folder is None:
        raise ValueError('The watermark needs a library: pip install "minimind_o_hf[watermark]"')
    # Under a name of its own, without the packages above it: those import pkg_resources, which setuptools 82 removed,
    # and librosa. The networks need torch alone.
    package = ModuleType("_minimind_o_perth")
    package.__path__ = [str(folder / "perth_net_implicit")]
    sys.modules[package.__name__] = package
    state = torch.load(folder / _WEIGHTS, map_location="cpu", weights_only=True)["model"]
    networks = []
    for name in ("encoder", "decoder"):
        module: Any = importlib.import_module(f"{package.__name__}.model.{name}")
        network = getattr(module, name.title())(hidden=256, subband=NUM_BINS)
        prefix = f"{name}."
        network.load_state_dict({key[len(prefix) :]: state[key] for key in state if key.startswith(prefix)})
        networks.append(network.eval().requires_grad_(False))
    return networks[0], networks[1]


def _magnitudes(spectrum: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """Magnitudes as the networks know them, of spectra taken at any rate."""
    # A window of 64 ms has fewer samples, and so a smaller sum, at lower rates.
    magnitudes = spectrum.abs() * (DETECTOR_RATE / sampling_rate)
    return (20 * torch.log10(magnitudes.clamp_min(10 ** (FLOOR / 20))) - FLOOR) / RANGE


def _check_samples(samples: np.ndarray | torch.Tensor) -> torch.Tensor:
    """Floating-point samples as a float32 tensor on the CPU."""
    tensor = torch.as_tensor(samples).detach().cpu()
    if tensor.ndim != 1 or not tensor.is_floating_point():
        raise ValueError(
            f"A waveform has floating-point samples and the shape (num_samples,), got {tensor.dtype} and "
            f"{tuple(tensor.shape)}: mix channels to one, and turn integers into floats in [-1, 1]."
        )
    if not tensor.isfinite().all():
        raise ValueError(f"{int((~tensor.isfinite()).sum())} of {len(tensor)} samples are NaN or infinite.")
    return tensor.float()


class WatermarkStream:
    """
    Marks a stream of sound. What comes out is 54 ms of sound behind what went in, does not depend on how the stream
    was cut into chunks, and has no seams: the change is built of overlapping windows. A frame of the codec (80 ms)
    in gives 80 ms out, except for the first (26 ms).

    Args:
        sampling_rate (`int`, *optional*, defaults to 24000):
            Rate in Hz: a multiple of 500, at least 8000.

    Raises:
        `ValueError`: the library is not installed, or a rate it cannot work at.
    """

    def __init__(self, sampling_rate: int = CODEC_RATE):
        if sampling_rate < 8000 or sampling_rate % 500:
            raise ValueError(
                f"Sound is marked at rates of at least 8000 Hz that are a multiple of 500 Hz, got {sampling_rate}: "
                "mark it at the codec's 24000 Hz and resample it then."
            )
        self.sampling_rate = sampling_rate
        self._network = _networks()[0]
        self._hop = sampling_rate // 100
        self._window = torch.hann_window(sampling_rate * 64 // 1000)
        self._lag = len(self._window) - self._hop
        # Overlapping squared windows of this kind sum to the same everywhere.
        self._gain = self._window.square().sum() / self._hop
        self._reset()

    def _reset(self) -> None:
        self._waiting = torch.zeros(self._lag)  # samples from the next block's first on
        self._history = torch.zeros(NUM_BINS, 0)
        self._change = torch.zeros(self._lag)  # what earlier blocks add to the next samples
        self._skip = self._lag  # samples still to come out that lie before the stream's start

    @torch.no_grad()
    def push(self, samples: np.ndarray | torch.Tensor) -> torch.Tensor:
        """
        Takes in samples and gives out those that are marked by now.

        Args:
            samples (`torch.Tensor` or `np.ndarray` of shape `(num_samples,)`): Floats in [-1, 1]; none are allowed.

        Returns:
            `torch.Tensor` of shape `(num_samples,)`: float32 in [-1, 1]; the next of the marked sound, possibly none.

        Raises:
            `ValueError`: integers, more than one channel, NaN or infinite samples; the stream stays as it was.
        """
        waiting = torch.cat([self._waiting, _check_samples(samples)])
        size = BLOCK * self._hop
        num_blocks = max(0, (len(waiting) - self._lag) // size)
        marked = [self._mark(waiting[index * size : (index + 1) * size + self._lag]) for index in range(num_blocks)]
        self._waiting = waiting[num_blocks * size :].clone()
        result = torch.cat([waiting[:0], *marked])
        skipped = min(self._skip, len(result))
        self._skip -= skipped
        return result[skipped:]

    def flush(self) -> torch.Tensor:
        """Ends the stream: gives out the rest, as `push` does. The next samples begin a new one."""
        remaining = len(self._waiting) - self._skip
        rest = self.push(torch.zeros(self._lag + BLOCK * self._hop))[:remaining]
        self._reset()
        return rest

    def mark_event(self, event: MiniMindOStreamEvent) -> MiniMindOStreamEvent:
        """The next event of an answer with marked sound; the last one has the rest."""
        pieces = [] if event.audio is None else [self.push(event.audio)]
        pieces += [self.flush()] if event.is_last else []
        sound = torch.cat(pieces) if pieces else None
        return replace(event, audio=sound if sound is not None and len(sound) else None)

    def _mark(self, samples: torch.Tensor) -> torch.Tensor:
        """The next block of samples `(8 * hop,)`, given it and the samples its last frame reaches into."""
        size, width = BLOCK * self._hop, len(self._window)
        spectrum = torch.fft.rfft(samples.unfold(0, width, self._hop) * self._window).mT[:NUM_BINS]
        seen = torch.cat([self._history, _magnitudes(spectrum, self.sampling_rate)], dim=1)
        self._history = seen[:, -HISTORY:]
        marked, _ = self._network(seen[None])
        decibels = RANGE * (marked[0] - seen)[:, -BLOCK:]
        changes = torch.fft.irfft((spectrum * (10 ** (decibels / 20) - 1)).mT, n=width) * self._window / self._gain
        change = torch.nn.functional.fold(changes.mT[None], (1, len(samples)), (1, width), stride=self._hop).flatten()
        change[: self._lag] += self._change
        self._change = change[size:]
        return (samples[:size] + change[:size]).clamp(-1, 1)


class Watermark:
    """
    Puts an inaudible watermark into sound, and finds it. On nine spoken sentences the change is 14 to 17 dB below the
    speech, at the same frequencies (wideband PESQ 4.35 on average, at least 4.15; 4.64 is no difference).

    It survives, on spoken sentences, WAV of 16 or 8 bits, OGG, Opus and MP3 at libsndfile's usual quality, resampling
    to 8 kHz and back, other volumes, noise 30 dB below the speech, silence around it, and cuts down to half a second.
    More noise can hide it; another speed removes it, and so does whoever wants to: that it is not found says nothing.
    Nor is it a proof where it is found: pure tones, and some clips of half a second or less, are taken for marked.

    Raises:
        `ValueError`: the library is not installed (`pip install "minimind_o_hf[watermark]"`).
    """

    def __init__(self):
        self._network = _networks()[1]

    def apply(self, waveform: _Waveform, sampling_rate: int = CODEC_RATE) -> _Waveform:
        """
        Marks a whole waveform; the sound is that of [`WatermarkStream`].

        Args:
            waveform (`torch.Tensor` or `np.ndarray` of shape `(num_samples,)`): Floats in [-1, 1].
            sampling_rate (`int`, *optional*, defaults to 24000): In Hz: a multiple of 500, at least 8000.

        Returns:
            Of the waveform's kind and shape: float32 in [-1, 1], on the CPU.

        Raises:
            `ValueError`: integers, more than one channel, NaN or infinite samples, or another rate.
        """
        stream = WatermarkStream(sampling_rate)
        marked: Any = torch.cat([stream.push(waveform), stream.flush()])
        return marked if isinstance(waveform, torch.Tensor) else marked.numpy()

    def apply_to_stream(self, events: Iterator[MiniMindOStreamEvent]) -> Iterator[MiniMindOStreamEvent]:
        """
        Marks what `model.stream` yields, each row of a batch by itself.

        Args:
            events (iterator of [`MiniMindOStreamEvent`]): With sound in float32.

        Yields:
            [`MiniMindOStreamEvent`]: The same events with marked sound, 54 ms behind; the last of a row has its rest.
        """
        rows: dict[int, WatermarkStream] = {}
        try:
            for event in events:
                yield rows.setdefault(event.row, WatermarkStream()).mark_event(event)
        finally:
            # Whoever reads no further ends the answer, as without the watermark.
            if isinstance(events, Generator):
                events.close()

    @torch.no_grad()
    def detect(self, source: AudioSource, sampling_rate: int | None = None) -> float:
        """
        How sure it is that a sound, or some ten seconds of it, has the watermark.

        Args:
            source: A file or samples, as [`load_audio`] takes them.
            sampling_rate (`int`, *optional*, defaults to 24000): Rate in Hz of samples.

        Returns:
            `float`: 0 to 1; from `THRESHOLD` (0.5) on it has the watermark. 0 for silence.

        Raises:
            `OSError`, `ValueError`: as [`load_audio`].
        """
        samples = torch.from_numpy(load_audio(source, sampling_rate or CODEC_RATE, DETECTOR_RATE))
        window = torch.hann_window(DETECTOR_RATE * 64 // 1000)
        # The network's answer is a mean over time: a marked sentence would get lost among minutes of other sound.
        length = 10 * DETECTOR_RATE
        starts = range(0, max(1, len(samples) - length // 2), length // 2)
        scores = []
        for start in starts:
            piece = samples[start : start + length]
            # The networks need some frames. They ignore silent ones.
            piece = torch.nn.functional.pad(piece, (0, max(0, length // 20 - len(piece))))
            spectrum = torch.stft(
                piece, len(window), DETECTOR_RATE // 100, window=window, pad_mode="constant", return_complex=True
            )
            scores.append(self._network(_magnitudes(spectrum, DETECTOR_RATE)[None]).nan_to_num(0.0).clamp(0, 1).item())
        return max(scores)


__all__ = ["THRESHOLD", "Watermark", "WatermarkStream", "is_watermark_available"]
