"""What a voice is cloned from: a recording, sped up at the same pitch and checked."""

import math

import numpy as np

MIN_SECONDS = 1.8
MAX_SECONDS = 300.0
MIN_RMS = 0.008
MAX_NOISE = 0.45
MAX_PEAK = 0.995
SPEEDS = (0.5, 3.0)


def change_speed(waveform: np.ndarray, sampling_rate: int, speed: float) -> np.ndarray:
    """
    Speech spoken `speed` times as fast, at the same pitch.

    Windows of 40 ms of the recording overlap by half. Each is taken up to 10 ms from its due place, where it best goes
    on from the window before it, so that periods stay whole (WSOLA, Verhelst and Roelands 1993). Unlike a phase
    vocoder it leaves the phases of a voice's harmonics together, and it never gives a larger peak.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): Float samples.
        sampling_rate (`int`): Their rate in Hz.
        speed (`float`): From 0.5 to 3; 1 returns the waveform as it is.

    Returns:
        `np.ndarray` of shape `(round(num_samples / speed),)` and dtype float32.

    Raises:
        ValueError: The speed is out of its range.
    """
    _check_speed(speed)
    if speed == 1:
        return waveform.astype(np.float32, copy=False)
    hop, reach = round(0.02 * sampling_rate), round(0.01 * sampling_rate)
    length = round(len(waveform) / speed)
    count = math.ceil(length / hop) + 1
    due = np.round(np.arange(count) * hop * speed).astype(int)
    # `due[k]` is where the search of window k begins; unmoved, it stands `reach` later and centred at `due[k]` of the
    # recording, which silence surrounds.
    padding = (reach + hop, max(0, int(due[-1]) + 2 * reach + 3 * hop - len(waveform)))
    source = np.pad(waveform.astype(np.float64), padding)
    energy = np.concatenate([[0.0], np.cumsum(source**2)])
    window = 0.5 - 0.5 * np.cos(np.pi * np.arange(2 * hop) / hop)
    output = np.zeros((count + 1) * hop)
    start = reach
    for index in range(count):
        if index:
            wanted = source[start + hop : start + 3 * hop]
            start = due[index] + _best_match(source, energy, wanted, due[index], reach)
        output[index * hop : (index + 2) * hop] += window * source[start : start + 2 * hop]
    return output[hop : hop + length].astype(np.float32)


def _best_match(source: np.ndarray, energy: np.ndarray, wanted: np.ndarray, begin: int, reach: int) -> int:
    """The offset from `begin`, 0 to `2 * reach`, at which the source is most like `wanted`; `reach` in silence."""
    size = len(wanted)
    region = source[begin : begin + size + 2 * reach]
    # A circle as long as the region is long enough: only offsets that do not wrap are read.
    spectrum = np.fft.rfft(region) * np.fft.rfft(wanted, len(region)).conj()
    likeness = np.fft.irfft(spectrum, len(region))[: 2 * reach + 1]
    energies = energy[begin + size : begin + size + 2 * reach + 1] - energy[begin : begin + 2 * reach + 1]
    floor = 1e-9 * size  # an RMS of 3e-5
    if np.square(wanted).sum() <= floor or energies.max() <= floor:
        return reach
    return int(np.argmax(likeness / np.sqrt(np.maximum(energies, floor))))


def prepare_recording(waveform: np.ndarray, sampling_rate: int, speed: float) -> np.ndarray:
    """
    Speeds a recording up, and refuses one that would make a bad voice: short, quiet, noisy or clipped.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): Float samples.
        sampling_rate (`int`): Their rate in Hz.
        speed (`float`): As for [`change_speed`].

    Returns:
        `np.ndarray` of shape `(round(num_samples / speed),)` and dtype float32.

    Raises:
        ValueError: After the speed-up it lasts under 1.8 s or over 300 s; of the RMS of its frames (50 ms every
            25 ms), the 95th percentile is under 0.008, or the 20th more than 0.45 of the 95th; a sample exceeds 0.995;
            some are not finite; or the speed is out of its range.
    """
    _check_speed(speed)
    if not np.isfinite(waveform).all():
        raise ValueError("the recording has samples that are NaN or infinite: export it again")
    _check_length(round(len(waveform) / speed) / sampling_rate, speed)
    waveform = change_speed(waveform, sampling_rate, speed)
    _check_levels(waveform, sampling_rate)
    return waveform


def without_quiet_edges(
    waveform: np.ndarray, sampling_rate: int, threshold: float = 0.01, margin: float = 0.08
) -> np.ndarray:
    """
    Speech without the silence before and after it. Models that were trained on recordings without it, as nano was,
    hear a question better so.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): The speech.
        sampling_rate (`int`): In Hz.
        threshold (`float`, defaults to 0.01): Level of what counts as silence, as a share of the loudest 10 ms.
        margin (`float`, defaults to 0.08): What is kept of it on each side, in seconds.

    Returns:
        `np.ndarray`: A view; all of it where nothing is louder than the rest.
    """
    size = max(1, sampling_rate // 100)
    blocks = waveform[: len(waveform) // size * size].reshape(-1, size)
    levels = np.sqrt(np.mean(np.square(blocks, dtype=np.float64), axis=1))
    loud = np.flatnonzero(levels > threshold * levels.max()) if len(levels) else levels
    if not len(loud):
        return waveform
    kept = int(margin * sampling_rate)
    return waveform[max(0, loud[0] * size - kept) : (loud[-1] + 1) * size + kept]


def _check_speed(speed: float) -> None:
    if not SPEEDS[0] <= speed <= SPEEDS[1]:
        raise ValueError(f"`speed` must be from {SPEEDS[0]} to {SPEEDS[1]}, got {speed}: 1 leaves it as recorded")


def _check_length(seconds: float, speed: float) -> None:
    after = "" if speed == 1 else f" after the speed-up by {speed:g}"
    if seconds < MIN_SECONDS:
        raise ValueError(
            f"the recording lasts {seconds:.3f} s{after}, and {MIN_SECONDS} s is the least: record at least "
            f"{MIN_SECONDS * speed:.1f} s of speech"
        )
    if seconds > MAX_SECONDS:
        raise ValueError(
            f"the recording lasts {seconds:.0f} s{after}, and {MAX_SECONDS:.0f} s is the most: cut out half a minute "
            "of clear speech"
        )


def _check_levels(waveform: np.ndarray, sampling_rate: int) -> None:
    size, hop = round(0.05 * sampling_rate), round(0.025 * sampling_rate)
    frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]
    rms = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=1))
    quiet, loud = np.percentile(rms, [20, 95])
    if loud < MIN_RMS:
        raise ValueError(
            f"the recording is too quiet: the RMS of its loud frames (95th percentile) is {loud:.4g}, and {MIN_RMS} "
            "is the least: speak closer to the microphone, or raise its level"
        )
    if quiet > MAX_NOISE * loud:
        raise ValueError(
            f"the recording is too noisy: its quiet frames (20th percentile) have {quiet / loud:.4g} of the RMS of "
            f"its loud ones (95th percentile), and {MAX_NOISE} is the most: record in a quiet room, without music, "
            "and pause between sentences"
        )
    peak = np.abs(waveform).max()
    if peak > MAX_PEAK:
        raise ValueError(
            f"the recording is clipped: its peak is {peak:.4g}, and {MAX_PEAK} is the most: record again at a lower "
            "level"
        )


__all__ = ["change_speed", "prepare_recording", "without_quiet_edges"]
