"""Speaks phrases of the questions' words in an order that no question has, for the speech encoder.

    python training_scripts/nano/make_phrases.py WORK            (about 8 minutes on two cores)
    python training_scripts/nano/make_phrases.py WORK --quick

From questions alone the encoder learns which word comes next rather than how it sounds: in a wording that it had never
heard, "write cake and lemons on my list" became "Robert cake and lemons on my list". WORK/phrases gets phrases.jsonl
and the recordings, in the form of `make_speech.py`'s, in the trained voices in turn.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random

import flite
from make_speech import VOICES, count_figures, plot_lengths, speak_rows
from stages import read_lines, run_stage, stage_arguments, write_lines

VERSION = 1


def words_of(sentences: str) -> list[str]:
    """Its words; the first of each sentence in lower case, unless it is `I`."""
    found = re.findall(r"(?:^|([.:?!])\s+)?([A-Za-z']+)", sentences)
    return [
        word if word == "I" or (place and not stop) else f"{word[0].lower()}{word[1:]}"
        for place, (stop, word) in enumerate(found)
    ]


def make_phrases(questions: Sequence[str], count: int, seed: int, avoided: Collection[str] = ()) -> list[str]:
    """
    Phrases of the words of questions: in turn pieces of questions, and words each of which is as likely as any other.

    Args:
        questions (list of `str`): Their words.
        count (`int`): How many different phrases.
        seed (`int`): Of every choice.
        avoided (set of `str`): What no phrase may say, whatever its case and punctuation.
    """
    random = Random(seed)
    split = [words_of(question) for question in sorted(questions)]
    spellings: dict[str, Counter] = defaultdict(Counter)
    for words in split:
        for place, word in enumerate(words):
            # A name that stands first has lost its capital letter.
            spellings[word.lower()][word] += 1 if place else 1e-3
    spelling = {word: found.most_common(1)[0][0] for word, found in sorted(spellings.items())}
    every = list(spelling.values())
    known = {" ".join(words_of(text)).lower() for text in [*questions, *avoided]}
    phrases: dict[str, None] = {}
    while len(phrases) < count:
        if len(phrases) % 2:
            words = random.choices(every, k=random.randint(3, 8))
        else:
            words = []
            for _ in range(random.randint(2, 4)):
                question, length = random.choice(split), random.randint(1, 3)
                start = random.randrange(max(1, len(question) - length + 1))
                words += [spelling[word.lower()] for word in question[start : start + length]]
                words += random.choices(every, k=int(random.random() < 0.4))
        text = " ".join(words)
        if text.lower() not in known:
            phrases[f"{text[0].upper()}{text[1:]}."] = None
    return list(phrases)


def plan_phrases(conversations: Sequence[dict], count: int) -> list[dict]:
    """What is to be spoken, in the voices in turn."""
    questions = {row["question"] for row in conversations if row["split"] == "train"}
    held_out = {row["question"] for row in conversations if row["split"] == "eval"}
    return [
        {"text": text, "kind": "phrase", "split": "train", "voice": VOICES[number % len(VOICES)]}
        for number, text in enumerate(make_phrases(sorted(questions), count, 0, held_out))
    ]


def main(arguments: list[str] | None = None) -> None:
    """Speaks the phrases."""
    options = stage_arguments(__doc__).parse_args(arguments)
    if not flite.is_installed():
        sys.exit("There is no flite to speak with: install it (Debian, Ubuntu: apt install flite).")
    settings = {"version": VERSION, "phrases": 12 if options.quick else 15_000}
    corpus = options.work / "corpus"

    def make(folder: Path) -> dict:
        planned = plan_phrases(read_lines(corpus / "conversations.jsonl"), settings["phrases"])
        spoken = speak_rows(planned, folder / "phrases", float("inf"))
        write_lines(folder / "phrases.jsonl", spoken)
        plot_lengths({"phrases": spoken}, folder / "figures.png")
        return count_figures(spoken)

    run_stage(options.work / "phrases", [corpus], settings, make, ["phrases.jsonl"])


if __name__ == "__main__":
    sys.exit(main())
