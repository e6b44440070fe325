"""A metric of Hugging Face `evaluate`: how well transcripts of speech agree with the texts it was to say.

`evaluate.load` reads this file as it is, without a network; its folder's other metrics are plain functions.
"""

import datasets
import evaluate

from minimind_o_hf.evaluation.metrics import count_errors

_DESCRIPTION = "Character and word error rate of transcripts, over all texts together, after normalisation."
_CITATION = ""
_INPUTS = """
Args:
    predictions (list of `str`): Transcripts.
    references (list of `str`): The texts that were to be spoken.
    language (`str`, defaults to `"en"`): "en" or "zh", where words are ideographs.

Returns:
    `dict` with `cer` and `wer` (`float`).

Raises:
    ValueError: The texts are empty, or the language has no rules.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class SpeechConsistency(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        strings = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": strings, "references": strings}),
        )

    def _compute(self, *, predictions=None, references=None, language: str = "en", **kwargs) -> dict[str, float]:
        pairs = zip(references or (), predictions or (), strict=True)
        errors = [count_errors(text, heard, language) for text, heard in pairs]
        chars, words = sum(item.chars for item in errors), sum(item.words for item in errors)
        if not chars:
            raise ValueError("there is nothing to compare with: all references are empty")
        return {
            "cer": sum(item.char_errors for item in errors) / chars,
            "wer": sum(item.word_errors for item in errors) / words,
        }


__all__ = ["SpeechConsistency"]
