"""What a recogniser makes of speech: pocketsphinx with the model in its package, which knows nothing of the corpus.

It needs `pip install pocketsphinx jiwer`.
"""

import functools
import re
from collections.abc import Sequence

import jiwer
import numpy as np
import torch
import torchaudio

from minimind_o_hf.evaluation.listening import RATE, PocketSphinx

recogniser = functools.cache(PocketSphinx)


def normalise(text: str) -> str:
    """Lower case, letters alone."""
    return " ".join(re.sub(r"[^a-z' ]", " ", text.lower()).split())


def transcribe(waveform: np.ndarray, rate: int) -> str:
    """
    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): Float samples.
        rate (`int`): Their rate in Hz.

    Returns:
        `str`: Words in lower case; empty where none is found.
    """
    resampled = torchaudio.functional.resample(torch.from_numpy(waveform), rate, RATE)
    return normalise(recogniser()(resampled.numpy()))


def error_rates(texts: Sequence[str], heard: Sequence[str]) -> dict[str, float]:
    """Character and word error rate over all sentences together."""
    wanted = [normalise(text) for text in texts]
    return {"cer": round(jiwer.cer(wanted, list(heard)), 4), "wer": round(jiwer.wer(wanted, list(heard)), 4)}
