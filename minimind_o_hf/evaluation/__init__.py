"""Evaluation: the same questions for every checkpoint, recognisers that listen, figures with their uncertainty.

It needs `pip install "minimind_o_hf[evaluation]"`.
"""

from .listening import PipelineRecogniser, PocketSphinx, Recogniser, load_recogniser
from .metrics import Errors, Estimate, count_errors, count_repeated, estimate, is_right
from .normalising import normalise
from .running import EvaluationSettings, evaluate_checkpoint, evaluate_recordings
from .suites import Question, Suite, load_suite
from .tables import Table, TableRow, load_table, make_table

__all__ = [
    "Errors",
    "Estimate",
    "EvaluationSettings",
    "PipelineRecogniser",
    "PocketSphinx",
    "Question",
    "Recogniser",
    "Suite",
    "Table",
    "TableRow",
    "count_errors",
    "count_repeated",
    "estimate",
    "evaluate_checkpoint",
    "evaluate_recordings",
    "is_right",
    "load_recogniser",
    "load_suite",
    "load_table",
    "make_table",
    "normalise",
]
