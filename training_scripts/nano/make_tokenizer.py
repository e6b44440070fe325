"""Makes the nano tokenizer: byte-level BPE like the presets' own, its merges learnt from the corpus.

    python training_scripts/nano/make_tokenizer.py WORK            (seconds)
    python training_scripts/nano/make_tokenizer.py WORK --quick

Special ids and byte symbols are those of every MiniMind-O tokenizer. The merges make the corpus's frequent words one
token each, so that sequences are short and a word is always read and written in the same way. WORK/tokenizer/model is
what `AutoTokenizer.from_pretrained` loads.
"""

import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stages import new_plot, read_lines, run_stage, save_plot, stage_arguments
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minimind_o_hf.files import new_directory
from minimind_o_hf.presets import build_tokenizer

VERSION = 2
VOCAB_SIZE = 1280
# What the chat template adds to every conversation.
ROLES = "system user assistant"


def learn_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """
    The presets' tokenizer with other merges. Save it and load it again before use: until then it takes the added
    tokens for special ones.

    Args:
        texts (list of `str`): What the merges are learnt from.
        vocab_size (`int`): Entries, at least the 292 of special ids and bytes.
    """
    tokenizer = build_tokenizer()
    flags = {token.content: token.special for _, token in sorted(tokenizer.added_tokens_decoder.items())}
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(flags),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.backend_tokenizer.train_from_iterator(texts, trainer)
    # The trainer makes every token it is given special.
    added = [AddedToken(token, special=special, normalized=False) for token, special in flags.items()]
    tokenizer.backend_tokenizer.add_tokens(added)
    return tokenizer


def count_words(texts: Sequence[str]) -> Counter:
    """How often each word occurs, as the tokenizer meets it: after a space, or at the beginning with its capital."""
    return Counter(word for text in texts for word in re.findall(r"(?:^| )[A-Za-z]+", text))


def share_of_whole_words(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> float:
    """How many of the words are one token."""
    return sum(len(tokenizer.tokenize(word)) == 1 for word in words) / len(words)


def main(arguments: list[str] | None = None) -> None:
    """Learns the tokenizer and measures it on what it has not seen."""
    options = stage_arguments(__doc__).parse_args(arguments)
    settings = {"version": VERSION, "vocabulary": 400 if options.quick else VOCAB_SIZE}
    corpus = options.work / "corpus"

    def make(folder: Path) -> dict:
        rows = read_lines(corpus / "conversations.jsonl")
        texts = {
            split: [text for row in rows if row["split"] == split for text in (row["question"], row["answer"])]
            for split in ("train", "eval")
        }
        with new_directory(folder / "model", overwrite=True) as temporary:
            learn_tokenizer([ROLES, *texts["train"]], settings["vocabulary"]).save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        by_frequency = [word for word, _ in count_words(texts["train"]).most_common()]
        tops = [top for top in (100, 200, 500, 1000) if top <= len(by_frequency)]
        whole = {f"top {top}": round(share_of_whole_words(tokenizer, by_frequency[:top]), 3) for top in tops}
        lengths = [len(tokenizer(text).input_ids) for text in texts["eval"]]
        words = sum(len(re.findall(r"[A-Za-z']+", text)) for text in texts["eval"])
        figure, (spread,) = new_plot()
        spread.hist(lengths, bins=range(max(lengths) + 2))
        spread.set(xlabel="tokens of a held-out question or answer", ylabel="texts")
        save_plot(figure, folder / "figures.png")
        return {
            "vocabulary": len(tokenizer),
            "tokens a word, punctuation included": round(sum(lengths) / words, 3),
            "longest text": max(lengths),
            "words that are one token": whole,
        }

    run_stage(
        options.work / "tokenizer", [corpus], settings, make, ["model/tokenizer.json", "model/tokenizer_config.json"]
    )


if __name__ == "__main__":
    sys.exit(main())
