"""What is counted of one answer, and what is estimated of many."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np

from .normalising import normalise, words_of

RESAMPLES = 1000
BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Errors:
    """
    What a transcript has wrong.

    Args:
        char_errors, word_errors (`int`): Substitutions, deletions and insertions.
        chars, words (`int`): Length of the text; characters count spaces.
    """

    char_errors: int
    chars: int
    word_errors: int
    words: int


def count_errors(text: str, heard: str, language: str = "en") -> Errors:
    """
    Compares a transcript with the text that was to be spoken, both normalised.

    Args:
        text, heard (`str`): The text, the transcript.
        language (`str`, defaults to `"en"`): "en" or "zh", where words are ideographs.
    """
    wanted, found = normalise(text, language), normalise(heard, language)
    words, found_words = (" ".join(words_of(value, language)) for value in (wanted, found))
    if not wanted:  # which jiwer does not take
        return Errors(len(found), 0, len(found_words.split()), 0)
    of_chars, of_words = jiwer.process_characters(wanted, found), jiwer.process_words(words, found_words)
    return Errors(_edits(of_chars), len(wanted), _edits(of_words), len(words.split()))


def _edits(compared: jiwer.WordOutput | jiwer.CharacterOutput) -> int:
    return compared.substitutions + compared.deletions + compared.insertions


def is_right(text: str, answers: Sequence[str], contains: Sequence[str] = (), language: str = "en") -> bool:
    """
    Whether an answer is one of the accepted ones, normalised, or holds all of some words.

    Args:
        text (`str`): The answer.
        answers (list of `str`): Accepted answers.
        contains (list of `str`): Words or phrases that together are enough; "cat|kitten" accepts either.
        language (`str`, defaults to `"en"`): See [`normalise`].
    """
    given = normalise(text, language)
    if given in {normalise(answer, language) for answer in answers}:
        return True
    space = "" if language == "zh" else " "
    given = f"{space}{given}{space}"
    return bool(contains) and all(
        any(f"{space}{normalise(option, language)}{space}" in given for option in wanted.split("|"))
        for wanted in contains
    )


def count_repeated(text: str, language: str = "en", size: int = 3) -> tuple[int, int]:
    """
    How many of a text's n-grams occurred in it before (seq-rep-n, Welleck et al. 2019, arXiv:1908.04319).

    Args:
        text (`str`): Any text.
        language (`str`, defaults to `"en"`): See [`normalise`].
        size (`int`, defaults to 3): Words of an n-gram.

    Returns:
        `tuple[int, int]`: Repeated n-grams, all n-grams.
    """
    words = words_of(normalise(text, language), language)
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return len(grams) - len(set(grams)), len(grams)


def bucket_of(text: str, limits: tuple[int, int], language: str = "en") -> str:
    """`"short"`, `"mid"` or `"long"`: a text of at most the first limit's words, of the second's, or of more."""
    count = len(words_of(normalise(text, language), language))
    return "short" if count <= limits[0] else "mid" if count <= limits[1] else "long"


@dataclass(frozen=True)
class Estimate:
    """
    A figure with its uncertainty.

    Args:
        value (`float`): The figure.
        low, high (`float`): Ends of its 95 % bootstrap interval.
        count (`int`): How many rows it is made of.
    """

    value: float
    low: float
    high: float
    count: int


def estimate(
    rows: Iterable[tuple[str, float, float]], transform: Callable[[float], float] | None = None
) -> Estimate | None:
    """
    The sum of numerators by the sum of denominators, and how far it would move with other questions.

    The bootstrap (Efron 1979) draws 1,000 times as many groups as there are, with the same seed each time. Rows of one
    group stay together: the answers to one question in several voices are not independent.

    Args:
        rows (iterable of `tuple`): Group, numerator, denominator of each row.
        transform (callable, *optional*): A monotonic function of the ratio, such as `math.exp`.

    Returns:
        [`Estimate`]; None where the denominators add up to 0.
    """
    sums: dict[str, np.ndarray] = {}
    count = 0
    for group, numerator, denominator in rows:
        sums[group] = sums.get(group, np.zeros(2)) + (numerator, denominator)
        count += 1
    if not sums:
        return None
    values = np.stack([sums[group] for group in sorted(sums)])
    numerator, denominator = values.sum(axis=0)
    if denominator == 0:
        return None
    random = np.random.default_rng(BOOTSTRAP_SEED)
    drawn = values[random.integers(len(values), size=(RESAMPLES, len(values)))].sum(axis=1)
    ratios = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(ratios[:, 0] / ratios[:, 1], [2.5, 97.5])
    change = transform or float
    value, low, high = (round(change(float(x)), 5) for x in (numerator / denominator, low, high))
    return Estimate(value, low, high, count)


def mean(rows: Iterable[tuple[str, float]]) -> Estimate | None:
    """As [`estimate`], of one number a row."""
    return estimate((group, value, 1) for group, value in rows)


def perplexity(rows: Iterable[tuple[str, float, float]]) -> Estimate | None:
    """As [`estimate`], of summed negative log-likelihoods (nats) and numbers of tokens."""
    return estimate(rows, math.exp)


__all__ = [
    "Errors",
    "Estimate",
    "bucket_of",
    "count_errors",
    "count_repeated",
    "estimate",
    "is_right",
    "mean",
    "perplexity",
]
