"""What training does to input speech, before the front-end and after it."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
import torchaudio


@dataclass(frozen=True)
class SpeechAugmentation:
    """
    The original's augmentations of a recording, each with its own probability (0 switches it off).

    Args:
        speed (`float`, defaults to 0.5): Speed, with its pitch, 0.7 to 1.6 times.
        white_noise (`float`, defaults to 0.3): White noise of standard deviation 0.001 to 0.01.
        volume (`float`, defaults to 0.3): Volume 0.8 to 1.2 times.
        dropout (`float`, defaults to 0.2): A quarter of a second of silence, in clips longer than a second.
        smoothing (`float`, defaults to 0.2): Moving average over 3, 5 or 7 samples.
        reverberation (`float`, defaults to 0.3): An exponentially decaying tail of 50 to 200 ms.
        pink_noise (`float`, defaults to 0.2): Pink noise of standard deviation 0.003 to 0.015.
    """

    speed: float = 0.5
    white_noise: float = 0.3
    volume: float = 0.3
    dropout: float = 0.2
    smoothing: float = 0.2
    reverberation: float = 0.3
    pink_noise: float = 0.2

    def __post_init__(self):
        for name, probability in vars(self).items():
            if not 0 <= probability <= 1:
                raise ValueError(f"`{name}` must be a probability from 0 to 1, got {probability}.")

    def __call__(self, waveform: np.ndarray, sampling_rate: int, random: np.random.Generator) -> np.ndarray:
        """
        Args:
            waveform (`np.ndarray` of shape `(num_samples,)`): Float32 samples.
            sampling_rate (`int`): Their rate in Hz.
            random (`np.random.Generator`): Where every choice comes from.

        Returns:
            `np.ndarray` of another length where the speed changed; float32.
        """
        wave = torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))
        if random.random() < self.speed:
            wave = change_speed(wave, random.uniform(0.7, 1.6))
        if random.random() < self.white_noise:
            wave = wave + random.uniform(0.001, 0.01) * _normal(len(wave), random)
        if random.random() < self.volume:
            wave = wave * random.uniform(0.8, 1.2)
        if random.random() < self.dropout and len(wave) > sampling_rate:
            size = sampling_rate // 4
            start = int(random.integers(len(wave) - size + 1))
            wave = torch.cat([wave[:start], wave.new_zeros(size), wave[start + size :]])
        if random.random() < self.smoothing:
            size = int(random.choice([3, 5, 7]))
            wave = torchaudio.functional.convolve(wave, torch.full((size,), 1 / size), mode="same")
        if random.random() < self.reverberation:
            wave = reverberate(wave, random.uniform(0.05, 0.2), sampling_rate, random)
        if random.random() < self.pink_noise:
            wave = wave + random.uniform(0.003, 0.015) * pink_noise(len(wave), random)
        return wave.float().numpy()


def _normal(size: int, random: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(size).astype(np.float32))


def change_speed(waveform: torch.Tensor, factor: float) -> torch.Tensor:
    """Plays `factor` times as fast by resampling, pitch included."""
    # In hundredths: torchaudio's kernel grows with the reduced fraction's terms.
    ratio = Fraction(round(100 * factor), 100)
    return torchaudio.functional.resample(waveform, ratio.numerator, ratio.denominator)


def reverberate(
    waveform: torch.Tensor, seconds: float, sampling_rate: int, random: np.random.Generator
) -> torch.Tensor:
    """The sound in a small room: itself plus noise that decays by 60 dB over `seconds`, as loud as before."""
    size = max(int(seconds * sampling_rate), 1)
    decay = torch.exp(-6.9 * torch.arange(size) / size)
    response = 0.1 * _normal(size, random) * decay
    response[0] = 1.0
    wet = torchaudio.functional.fftconvolve(waveform, response)[: len(waveform)]
    return wet * (waveform.norm() / wet.norm().clamp(min=1e-8))


def pink_noise(size: int, random: np.random.Generator) -> torch.Tensor:
    """Noise whose power falls by 3 dB an octave, of standard deviation 1."""
    spectrum = torch.fft.rfft(_normal(size, random))
    spectrum = spectrum / torch.arange(1, len(spectrum) + 1).sqrt()
    noise = torch.fft.irfft(spectrum, n=size)
    return noise / noise.std(correction=0).clamp(min=1e-8)


@dataclass(frozen=True)
class FeatureMasking:
    """
    Zeroes parts of the speech features (after CMVN), as the original does.

    Args:
        channels (`float`, defaults to 0.5): Probability of zeroing 1 to 64 neighbouring channels.
        frames (`float`, defaults to 0.5): Probability of zeroing 1 to 10 neighbouring frames.
    """

    channels: float = 0.5
    frames: float = 0.5

    def __post_init__(self):
        for name, probability in vars(self).items():
            if not 0 <= probability <= 1:
                raise ValueError(f"`{name}` must be a probability from 0 to 1, got {probability}.")

    def __call__(self, features: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(frames, channels)`): One clip's, without padding.
            random (`np.random.Generator`): Where every choice comes from.
        """
        features = features.clone()
        for probability, most, axis in ((self.channels, 64, 1), (self.frames, 10, 0)):
            use, size = random.random() < probability, int(random.integers(1, most + 1))
            # Never the whole clip.
            size = min(size, features.shape[axis] - 1)
            if use and size > 0:
                start = int(random.integers(features.shape[axis] - size + 1))
                features.narrow(axis, start, size).zero_()
        return features


__all__ = ["FeatureMasking", "SpeechAugmentation", "change_speed", "pink_noise", "reverberate"]
