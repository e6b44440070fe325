"""From rows to figures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from .metrics import Estimate, bucket_of, count_errors, count_repeated, estimate, is_right, mean, perplexity
from .suites import ASKED

Figures = dict[str, dict[str, Estimate]]
BUCKETS = ("short", "mid", "long")


def score_answers(rows: Sequence[dict], language: str, buckets: tuple[int, int]) -> list[dict]:
    """
    Adds to each answer what can be told from it alone.

    Args:
        rows (list of `dict`): Answers, with a `transcript` where there is sound.
        language, buckets: As in [`Suite`].

    Returns:
        `list[dict]`: The rows with `bucket`, `errors`, `repeated`, and `right`, None where no answer is known.
    """
    scored = []
    for row in rows:
        question = row["question"]
        known = question["answers"] or question["contains"]
        heard = row.get("transcript", "")
        scored.append(
            {
                **row,
                "bucket": bucket_of(row["text"], buckets, language),
                "errors": vars(count_errors(row["text"], heard, language)),
                "repeated": repetitions(row, language),
                "right": is_right(row["text"], question["answers"], question["contains"], language) if known else None,
            }
        )
    return scored


def repetitions(row: Mapping, language: str) -> dict[str, tuple[int, int]]:
    """Repeated and all 3-grams of a row's text, and of what was heard."""
    return {
        "text": count_repeated(row["text"], language),
        "speech": count_repeated(row.get("transcript", ""), language),
    }


def group(row: Mapping) -> str:
    """What the bootstrap keeps together: the answers to one question."""
    return row["question"]["id"]


def keep(figures: Figures, name: str, of: str, value: Estimate | None) -> None:
    """Adds a figure, if there is one."""
    if value is not None:
        figures.setdefault(name, {})[of] = value


def error_figures(figures: Figures, rows: Sequence[dict], of: str, suffix: str = "") -> None:
    """CER and WER of rows with `errors`."""
    for name, unit in (("CER", "char"), ("WER", "word")):
        parts = ((group(row), row["errors"][f"{unit}_errors"], row["errors"][f"{unit}s"]) for row in rows)
        keep(figures, name + suffix, of, estimate(parts))


def speech_figures(rows: Sequence[dict], apart: Sequence[str]) -> Figures:
    """
    How well speech says its text, from the rows of [`score_answers`].

    Typed questions alone count for the error rates by length, so that no other modality's mistakes mix in.
    """
    figures: Figures = {}
    typed = [row for row in rows if row["question"]["asked"] == "typed"]
    common = [row for row in typed if row["question"]["kind"] not in apart]
    for bucket in BUCKETS:
        error_figures(figures, [row for row in common if row["bucket"] == bucket], bucket)
    error_figures(figures, common, "all")
    for asked in ASKED[1:]:
        error_figures(figures, [row for row in rows if row["question"]["asked"] == asked], asked)
    for kind in apart:
        error_figures(figures, [row for row in typed if row["question"]["kind"] == kind], kind)
    for held_out, some in _by(common, "held_out"):
        error_figures(figures, some, f"new {held_out}")
    for name in ("text", "speech"):
        parts = ((group(row), *row["repeated"][name]) for row in rows)
        keep(figures, "repetition", name, estimate(parts))
    # Not over the kinds apart: they would ask for more than the model was made for.
    common = [row for row in rows if row["question"]["kind"] not in apart]
    if rows and "complete" in rows[0]:
        keep(figures, "cut off", "all", mean((group(row), not row["complete"]) for row in common))
        for kind in apart:
            some = [row for row in rows if row["question"]["kind"] == kind]
            keep(figures, "cut off", kind, mean((group(row), not row["complete"]) for row in some))
    return figures


def accuracy_figures(rows: Sequence[dict], apart: Sequence[str]) -> Figures:
    """Right answers by how was asked; of typed questions also by topic, and by what is new in them."""
    figures: Figures = {}
    known = [row for row in rows if row["right"] is not None]
    common = [row for row in known if row["question"]["kind"] not in apart]
    for asked in ASKED:
        some = [row for row in common if row["question"]["asked"] == asked]
        keep(figures, "accuracy", asked, mean((group(row), row["right"]) for row in some))
    for kind in apart:
        some = [row for row in known if row["question"]["kind"] == kind]
        keep(figures, "accuracy", kind, mean((group(row), row["right"]) for row in some))
    typed = [row for row in common if row["question"]["asked"] == "typed"]
    for held_out, some in _by(typed, "held_out"):
        keep(figures, "accuracy", f"new {held_out}", mean((group(row), row["right"]) for row in some))
    for kind, some in _by(typed, "kind"):
        keep(figures, "accuracy by topic", kind, mean((group(row), row["right"]) for row in some))
    return figures


def _by(rows: Iterable[dict], field: str) -> list[tuple[str, list[dict]]]:
    """Rows by a field of their question, where it is set."""
    found = defaultdict(list)
    for row in rows:
        if row["question"][field]:
            found[row["question"][field]].append(row)
    return sorted(found.items())


def voice_figures(
    rows: Sequence[dict],
    seen: Sequence[str],
    unseen: Sequence[str],
    recorded: Mapping[str, Sequence[dict]],
    references: Mapping[str, Mapping[str, float]],
) -> Figures:
    """
    How much answers sound like their voices.

    Args:
        rows (list of `dict`): Answers with `voice` and `cosines` to each voice's reference.
        seen, unseen (list of `str`): Voices of the checkpoint, and others.
        recorded (mapping): Of each voice, the `cosines` of real recordings. They are the ceiling, and against other
            voices' references the floor.
        references (mapping): Cosines between the voices' references: the floor where nothing is recorded.
    """
    figures: Figures = {}
    rows = [row for row in rows if row.get("cosines") and row["voice"] in row["cosines"]]
    for label, voices in (("seen", seen), ("unseen", unseen)):
        some = [row for row in rows if row["voice"] in voices]
        keep(figures, "similarity", label, mean((group(row), row["cosines"][row["voice"]]) for row in some))
        nearest = [(group(row), max(row["cosines"], key=row["cosines"].__getitem__) == row["voice"]) for row in some]
        keep(figures, "right voice nearest", label, mean(nearest))
        other = [(group(row), _mean_of_others(row)) for row in some if len(row["cosines"]) > 1]
        keep(figures, "similarity to other voices", label, mean(other))
    for voice in (*seen, *unseen):
        some = [row for row in rows if row["voice"] == voice]
        keep(figures, "similarity", voice, mean((group(row), row["cosines"][voice]) for row in some))
        nearest = [(group(row), max(row["cosines"], key=row["cosines"].__getitem__) == voice) for row in some]
        keep(figures, "right voice nearest", voice, mean(nearest))
        own = [(str(n), item[voice]) for n, item in enumerate(recorded.get(voice, ())) if voice in item]
        keep(figures, "similarity, ceiling", voice, mean(own))
        others = [
            (f"{other} {number}", item[voice])
            for other, items in recorded.items()
            for number, item in enumerate(items)
            if other != voice and voice in item
        ]
        if not others:
            others = [(other, cosine) for other, cosine in references.get(voice, {}).items() if other != voice]
        keep(figures, "similarity, floor", voice, mean(others))
    return figures


def _mean_of_others(row: Mapping) -> float:
    others = [value for name, value in row["cosines"].items() if name != row["voice"]]
    return sum(others) / len(others)


def prediction_figures(rows: Sequence[dict], codebooks: int) -> Figures:
    """Perplexity and codebook accuracy, from the rows of [`predict`]."""
    figures: Figures = {}
    keep(figures, "text perplexity", "all", perplexity((row["id"], row["nll"], row["tokens"]) for row in rows))
    for index in range(codebooks):
        parts = ((row["id"], row["right"][index], row["codes"][index]) for row in rows)
        keep(figures, "codebook accuracy", f"codebook {index}", estimate(parts))
    parts = ((row["id"], sum(row["right"]), sum(row["codes"])) for row in rows)
    keep(figures, "codebook accuracy", "all", estimate(parts))
    return figures


def duration_figures(rows: Sequence[dict], recorded: Mapping[tuple[str, str], float], language: str) -> Figures:
    """Length of the speech by that of recordings (seconds by text and voice) of the same text in the same voice."""
    figures: Figures = {}
    same = [
        (group(row), row["seconds"], recorded[row["question"]["answers"][0], row["voice"]])
        for row in rows
        if row["question"]["answers"]
        and (row["question"]["answers"][0], row["voice"]) in recorded
        and is_right(row["text"], row["question"]["answers"][:1], (), language)
    ]
    keep(figures, "duration ratio", "all", estimate(same))
    return figures


def speed_figures(rows: Sequence[dict]) -> Figures:
    """First sound and real-time factor (time by length of the speech), from the rows of [`measure_speed`]."""
    figures: Figures = {}
    heard = [row for row in rows if row["first_sound"] is not None]
    keep(figures, "first sound, seconds", "all", mean((row["id"], row["first_sound"]) for row in heard))
    keep(figures, "real-time factor", "all", estimate((row["id"], row["seconds"], row["spoken"]) for row in rows))
    return figures


__all__ = [
    "Figures",
    "accuracy_figures",
    "duration_figures",
    "error_figures",
    "prediction_figures",
    "repetitions",
    "score_answers",
    "speech_figures",
    "speed_figures",
    "voice_figures",
]
