"""What is counted and estimated: metrics by hand, suites, journals, figures, tables, recognisers."""

import importlib
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

import minimind_o_hf.evaluation as evaluation
from minimind_o_hf.cli import _parser
from minimind_o_hf.evaluation import (
    Estimate,
    Question,
    Suite,
    count_errors,
    count_repeated,
    estimate,
    is_right,
    load_recogniser,
    load_suite,
    load_table,
    make_table,
    normalise,
)
from minimind_o_hf.evaluation.answering import plan_answers
from minimind_o_hf.evaluation.journal import Journal
from minimind_o_hf.evaluation.listening import cosines_to
from minimind_o_hf.evaluation.metrics import bucket_of, mean, perplexity
from minimind_o_hf.evaluation.reports import figure_table, read_figures, write_report
from minimind_o_hf.evaluation.running import choose
from minimind_o_hf.evaluation.scoring import (
    accuracy_figures,
    duration_figures,
    prediction_figures,
    score_answers,
    speech_figures,
    speed_figures,
    voice_figures,
)
from minimind_o_hf.evaluation.speaking import trim
from minimind_o_hf.evaluation.tables import TableRow

# --- Texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World!", "hello world"),
        ("It\u2019s 'fine' \u2013 isn't it?", "it's fine isn't it"),
        ("7 21 305 1,250 1000000", "seven twenty one three hundred five one thousand two hundred fifty one million"),
        ("3.14 007", "three point one four zero zero seven"),
        ("50% of R&D in 2B", "fifty percent of r and d in 2b"),
        ("\uff26\uff55\uff4c\uff4c \uff57\uff49\uff44\uff54\uff48", "full width"),
        ("  snake_case\n\tdash-ed ", "snake case dash ed"),
        ("...", ""),
    ],
)
def test_english_is_normalised(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("你好，世界！", "你好世界"),
        ("我 有 3 只猫", "我有三只猫"),
        ("10 12 20 101 110 2005 10000 30100", "十十二二十一百零一一百一十二千零五一万三万零一百"),
        ("1998年", "一九九八年"),
        ("50%", "百分之五十"),
        ("3.14", "三点一四"),
        ("我喜欢 New York 的 pizza", "我喜欢new york的pizza"),
    ],
)
def test_chinese_is_normalised(text, expected):
    assert normalise(text, "zh") == expected


def test_unknown_language_is_refused():
    with pytest.raises(ValueError, match="'fr'"):
        normalise("bonjour", "fr")


# --- Metrics


def test_errors_by_hand():
    # "the cat sat": a substitution of a letter (sat -> sit), and "down" with its space is missing.
    errors = count_errors("The cat sat down.", "the cat sit")
    assert vars(errors) == {"char_errors": 1 + 5, "chars": 16, "word_errors": 2, "words": 4}
    assert vars(count_errors("你好世界", "你好时间了", "zh")) == {
        "char_errors": 3,
        "chars": 4,
        "word_errors": 3,
        "words": 4,
    }
    assert vars(count_errors("", "uh")) == {"char_errors": 2, "chars": 0, "word_errors": 1, "words": 0}
    assert vars(count_errors("five", "")) == {"char_errors": 4, "chars": 4, "word_errors": 1, "words": 1}
    assert count_errors("It is 5.", "it is five").char_errors == 0


def test_accepted_answers():
    assert is_right("It is BLUE!", ["It is blue."])
    assert is_right("It is 5.", ["No.", "It is five."])
    assert not is_right("It is blue and red.", ["It is blue."])
    assert is_right("I see a kitten on a desk.", [], ["cat|kitten", "desk"])
    assert not is_right("A category on a desk.", [], ["cat|kitten", "desk"])
    assert is_right("一只橙色的猫。", [], ["猫"], "zh")


def test_repetition():
    assert count_repeated("one two three four") == (0, 2)
    # one two three, two three one, three one two, one two three again
    assert count_repeated("One two three, one two three!") == (1, 4)
    assert count_repeated("go go go go go") == (2, 3)
    assert count_repeated("hi") == (0, 0)


def test_buckets():
    assert [bucket_of("word " * count, (15, 30)) for count in (0, 15, 16, 30, 31)] == [
        "short",
        "short",
        "mid",
        "mid",
        "long",
    ]
    assert bucket_of("你好世界", (3, 5), "zh") == "mid"


def test_estimate_is_the_ratio_of_sums_with_the_same_interval_each_time():
    rows = [(f"q{number}", number % 3, 10) for number in range(30)]
    first = estimate(rows)
    assert first.value == 0.1
    assert first.count == 30
    assert 0.05 < first.low < 0.1 < first.high < 0.15
    assert estimate(reversed(rows)) == first
    assert estimate([("a", 1, 4), ("b", 1, 4)]) == Estimate(0.25, 0.25, 0.25, 2)
    assert estimate([]) is None
    assert estimate([("a", 1, 0)]) is None


def test_answers_to_one_question_are_drawn_together():
    alone = mean([(f"{number}", number % 2) for number in range(40)])
    together = mean([(f"{number % 4}", number % 2) for number in range(40)])
    assert alone.value == together.value == 0.5
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_perplexity():
    assert perplexity([("a", 4 * math.log(8), 4), ("b", 2 * math.log(8), 2)]) == Estimate(8.0, 8.0, 8.0, 2)


def test_metric_of_the_evaluate_library(tmp_path, monkeypatch):
    import evaluate

    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = evaluate.load(evaluation.__path__[0] + "/speech_consistency.py", cache_dir=str(tmp_path))
    found = metric.compute(predictions=["the cat sat", "yes"], references=["The cat sits.", "Yes!"])
    assert found == {"cer": 2 / 15, "wer": 1 / 4}


# --- Suites


def question(name, **changes):
    return Question(name, **{"text": "What?", "answers": ("That.",), **changes})


def test_suite_is_read_from_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "language: zh\nseeds: [0, 1]\nquestions:\n"
        "- {id: 1, text: 你好, answers: [你好]}\n- {id: b, text: 这是什么, image: cat.jpg, contains: [猫]}\n"
        "- {id: c, audio: c.wav}\n",
        encoding="utf-8",
    )
    suite = load_suite(path)
    assert (suite.name, suite.language, suite.seeds, suite.buckets) == ("mine", "zh", (0, 1), (15, 30))
    assert [(item.id, item.asked) for item in suite.questions] == [("1", "typed"), ("b", "picture"), ("c", "spoken")]
    assert suite.questions[1].image == str(tmp_path / "cat.jpg")
    assert suite.digest == load_suite(path).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("questions: []", "no questions"),
        ("questions: [{text: a}]", "with an `id`"),
        ("questions: [{id: a, txt: a}]", "no setting txt"),
        ("questions: [{id: a}]", "asks nothing"),
        ("questions: [{id: a, text: a, answers: yes sir}]", "must be a list"),
        ("questions: [{id: a, text: a}, {id: a, text: b}]", "several questions a"),
        ("{language: fr, questions: [{id: a, text: a}]}", "'fr'"),
        ("questions: [{id: a, say: a}]", "no `tts`"),
        ("{buckets: [9, 3], questions: [{id: a, text: a}]}", "rising"),
        ("- 1", "a list"),
        ("{", "cannot be read"),
    ],
)
def test_broken_suites_are_refused(tmp_path, text, message):
    (tmp_path / "suite.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_suite(tmp_path / "suite.yaml")


def test_missing_suite_names_those_of_the_package():
    with pytest.raises(FileNotFoundError, match="english, nano"):
        load_suite("missing")


def test_suite_nano_asks_what_training_never_held():
    suite = load_suite("nano")
    asked = [item.asked for item in suite.questions]
    assert [asked.count(name) for name in ("typed", "spoken", "picture")] == [260, 180, 100]
    assert all(len(item.answers) == 1 and item.held_out for item in suite.questions)
    assert {item.asker for item in suite.questions if item.say} == {"slt", "rms", "awb", "kal16"}
    assert all(item.kind == "asked by kal16" for item in suite.questions if item.asker == "kal16")
    assert suite.questions[-1].image.startswith("data:image/jpeg;base64,")


def test_suite_nano_is_what_its_script_makes_of_the_corpus(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "training_scripts" / "nano")
    make_corpus, make_suite = (importlib.import_module(name) for name in ("make_corpus", "make_suite"))
    made = make_suite.make_questions(make_corpus.make_conversations(seed=0, size=700))
    # Pictures may be compressed otherwise by another version of the library.
    asked = [{**vars(item), "image": ""} for item in load_suite("nano").questions]
    assert [{**vars(Question(**row)), "image": ""} for row in made] == asked


def test_the_same_questions_voices_and_seeds_for_all():
    suite = Suite("s", (question("a"), question("b"), question("c"), question("d")), voice_questions=1, seeds=(0, 1))
    planned = plan_answers(suite, suite.questions, ["x", "y"], ["new"])
    assert [row.id for row in planned] == [
        *("a x 0", "a x 1", "a y 0", "a y 1", "a new 0", "a new 1"),
        *("b x 0", "b x 1", "c y 0", "c y 1", "d x 0", "d x 1"),
    ]
    assert len({row.seed for row in planned}) == len(planned)
    assert planned == plan_answers(suite, suite.questions, ["x", "y"], ["new"])
    assert [row.voice for row in plan_answers(suite, suite.questions, [], [])] == [None] * 8


def test_a_limit_takes_the_same_questions_each_time():
    suite = Suite("s", tuple(question(str(number), kind=f"{number % 5}") for number in range(50)))
    chosen = choose(suite, ["typed"], 10)
    assert len(chosen) == 10
    assert chosen == choose(suite, ["typed", "spoken"], 10)
    assert choose(suite, ["typed"], None) == list(suite.questions)
    assert choose(suite, ["spoken"], None) == []


# --- Journals


def test_a_journal_goes_on_after_a_kill(tmp_path):
    path = tmp_path / "rows.jsonl"
    Journal(path, {"suite": "a"}).add({"id": "1", "text": "é"})
    with path.open("ab") as file:
        file.write(b'{"id": "2", "te')
    journal = Journal(path, {"suite": "a"})
    assert journal.rows == {"1": {"id": "1", "text": "é"}}
    journal.add({"id": "2"})
    assert list(Journal(path, {"suite": "a"}).rows) == ["1", "2"]
    with pytest.raises(ValueError, match="another suite"):
        Journal(path, {"suite": "b"})
    path.write_text("no\n", encoding="utf-8")
    with pytest.raises(ValueError, match="damaged"):
        Journal(path, {})


# --- Figures


def answer(name, text, transcript, voice="x", asked="typed", **changes):
    known = {"id": name, "asked": asked, "kind": "k", "held_out": "", "answers": ["Yes sir."], "contains": []}
    known |= {key: changes.pop(key) for key in list(changes) if key in known}
    return {
        "id": f"{name} {voice}",
        "question": known,
        "text": text,
        "transcript": transcript,
        "voice": voice,
        **changes,
    }


ROWS = [
    answer("1", "Yes sir.", "yes sir", seconds=1.2, complete=True, cosines={"x": 0.9, "y": 0.1}),
    answer("2", "No no no no.", "no", seconds=2.0, complete=False, cosines={"x": 0.2, "y": 0.4}),
    answer("3", "Say it.", "say eat", kind="repeat", seconds=1.0, complete=True, answers=["Say it."], cosines=None),
    answer("4", "Yes sir.", "yes", "y", "picture", seconds=1.0, complete=True, cosines={"x": 0.3, "y": 0.5}),
]


def values(figures):
    return {name: {of: value.value for of, value in found.items()} for name, found in figures.items()}


def test_speech_figures():
    rows = score_answers(ROWS, "en", (2, 3))
    found = values(speech_figures(rows, ["repeat"]))
    # typed: "yes sir" 0 of 7 characters, "no no no no" 9 of 11
    assert found["CER"] == {
        "short": 0.0,
        "long": round(9 / 11, 5),
        "all": 0.5,
        "picture": round(4 / 7, 5),
        "repeat": round(2 / 6, 5),
    }
    assert found["WER"]["all"] == 0.5
    assert found["repetition"] == {"text": 0.5}
    assert found["cut off"] == {"all": round(1 / 3, 5), "repeat": 0.0}


def test_accuracy_figures():
    rows = score_answers(ROWS, "en", (2, 3))
    assert [row["right"] for row in rows] == [True, False, True, True]
    assert values(accuracy_figures(rows, ["repeat"])) == {
        "accuracy": {"typed": 0.5, "picture": 1.0, "repeat": 1.0},
        "accuracy by topic": {"k": 0.5},
    }


def test_voice_figures():
    recorded = {"x": [{"x": 0.95, "y": 0.15}], "y": [{"x": 0.05, "y": 0.85}]}
    found = values(voice_figures(ROWS, ["x"], ["y"], recorded, {}))
    assert found["similarity"] == {"seen": 0.55, "unseen": 0.5, "x": 0.55, "y": 0.5}
    assert found["right voice nearest"] == {"seen": 0.5, "unseen": 1.0, "x": 0.5, "y": 1.0}
    assert found["similarity to other voices"] == {"seen": 0.25, "unseen": 0.3}
    assert found["similarity, ceiling"] == {"x": 0.95, "y": 0.85}
    assert found["similarity, floor"] == {"x": 0.05, "y": 0.15}
    alone = values(voice_figures(ROWS, ["x"], ["y"], {}, {"x": {"x": 1.0, "y": 0.2}, "y": {"x": 0.2, "y": 1.0}}))
    assert alone["similarity, floor"] == {"x": 0.2, "y": 0.2}
    assert "similarity, ceiling" not in alone


def test_duration_is_compared_where_the_text_is_the_same():
    assert values(duration_figures(ROWS, {("Yes sir.", "x"): 1.0}, "en")) == {"duration ratio": {"all": 1.2}}


def test_prediction_and_speed_figures():
    rows = [
        {"id": "a", "nll": 2 * math.log(3), "tokens": 2, "codes": [4, 4], "right": [4, 1]},
        {"id": "b", "nll": 0.0, "tokens": 0, "codes": [4, 4], "right": [2, 0]},
    ]
    assert values(prediction_figures(rows, 2)) == {
        "text perplexity": {"all": 3.0},
        "codebook accuracy": {"codebook 0": 0.75, "codebook 1": 0.125, "all": 0.4375},
    }
    speed = [
        {"id": "a", "first_sound": 0.2, "seconds": 1.0, "spoken": 4.0},
        {"id": "b", "first_sound": None, "seconds": 1.0, "spoken": 0.0},
    ]
    assert values(speed_figures(speed)) == {"first sound, seconds": {"all": 0.2}, "real-time factor": {"all": 0.5}}


def test_cosines():
    references = {"a": np.array([1.0, 0.0]), "b": np.array([3.0, 4.0])}
    assert cosines_to(np.array([2.0, 0.0]), references) == {"a": 1.0, "b": 0.6}


# --- Reports and tables


def figures():
    return {"CER": {"all": Estimate(0.25, 0.2, 0.3, 7)}, "similarity": {"seen": Estimate(0.6, 0.5, 0.7, 7)}}


def test_report_files(tmp_path):
    path = write_report(tmp_path, {"name": "mine", "suite": "s", "voices": None}, figures(), [{"id": "1"}])
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Evaluation of mine\n\n- suite: s\n\n| figure |")
    assert "| CER | all | 0.2500 | 0.2000 – 0.3000 | 7 |" in text
    assert "![errors](errors.png)" in text
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read_figures(report) == figures()
    assert report["rows"] == [{"id": "1"}]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["errors.png", "report.json", "report.md", "voices.png"]
    assert len(figure_table(figures())) == 4


def test_tables_of_the_package():
    assert [row.name for row in load_table("talker_sizes").rows][:2] == ["dense full", "dense 2/3"]
    for name in ("talker_sizes", "voices", "english_speech", "pictures"):
        table = load_table(name)
        load_suite(table.suite)
        assert table.rows
    with pytest.raises(FileNotFoundError, match="talker_sizes"):
        load_table("missing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layout: none", "`layout`"),
        ("{layout: pictures}", "name"),
        ("{layout: pictures, rows: [{name: a}]}", "one of them"),
        ("{layout: pictures, rows: [{name: a, wavs: b, checkpoint: c}]}", "one of them"),
        ("{layout: pictures, rows: [{name: a, wavs: b}, {name: a, wavs: b}]}", "of their own"),
        ("{layout: pictures, rows: [{name: a, wav: b}]}", "no setting wav"),
    ],
)
def test_broken_tables_are_refused(tmp_path, text, message):
    (tmp_path / "table.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path / "table.yaml")


def test_table_in_the_papers_layout(tmp_path):
    (tmp_path / "table.yaml").write_text(
        "title: T\nlayout: consistency\nrows: [{name: A 1, checkpoint: a}, {name: P, published: {all: 0.0897}}]",
        encoding="utf-8",
    )
    evaluated = []

    def evaluate(row: TableRow, folder):
        evaluated.append((row.checkpoint, folder.name))
        folder.mkdir(parents=True, exist_ok=True)
        write_report(folder, {"name": row.name}, figures(), [])

    path = make_table(load_table(tmp_path / "table.yaml"), tmp_path / "out", evaluate)
    assert evaluated == [("a", "a-1")]
    assert path.read_text(encoding="utf-8").splitlines()[:6] == [
        "# T",
        "",
        "| | short | mid | long | all |",
        "|---|---|---|---|---|",
        "| A 1 | – | – | – | 0.2500 (0.2000 – 0.3000) |",
        "| P | – | – | – | 0.0897 |",
    ]
    assert json.loads((tmp_path / "out" / "table.json").read_text(encoding="utf-8"))["cells"]["P"]["all"] == 0.0897


# --- Documentation


def test_commands_of_the_documentation_parse():
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    commands = re.findall(r"^minimind-o evaluate.*$", text, re.MULTILINE)
    assert len(commands) > 6
    for command in commands:
        options = _parser().parse_args(shlex.split(command, comments=True)[1:])
        if options.table and not options.table.endswith(".yaml"):
            load_table(options.table)


# --- Sound


def test_silence_around_speech_is_cut():
    tone = 0.3 * np.sin(np.arange(16000) * 0.2)
    padded = np.concatenate([np.zeros(9000), tone, np.zeros(5000)])
    cut = trim(padded)
    assert abs(len(cut) - (16000 + 2 * 1280)) <= 2
    assert not cut[:1280].any()
    assert not cut[-1280:].any()
    assert abs(np.sqrt(np.mean(cut[1280:-1280] ** 2)) - 0.08) < 1e-4
    assert len(trim(np.zeros(100))) == 0


def test_pocketsphinx_hears_the_same_each_time():
    recogniser = load_recogniser("pocketsphinx")
    noise = 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32)
    first = recogniser(noise)
    recogniser(np.zeros(8000, np.float32))
    assert recogniser(noise) == first


def test_a_transformers_pipeline_listens(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "<unk>": 2, "a": 3}), encoding="utf-8")
    Wav2Vec2CTCTokenizer(
        str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<unk>", word_delimiter_token="|"
    ).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    config = Wav2Vec2Config(
        vocab_size=4,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(80, 4),
        conv_kernel=(80, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
    )
    model = Wav2Vec2ForCTC(config)
    with torch.no_grad():  # always "a"
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    model.save_pretrained(tmp_path)
    recogniser = load_recogniser(str(tmp_path))
    assert recogniser(np.zeros(16000, np.float32)) == "a"
    assert recogniser(np.zeros(31 * 16000, np.float32)) == "a"


@pytest.fixture
def recorded(tmp_path):
    """Another model's answers: recordings with their texts."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name, text in (("a", "Hello there."), ("b", "Five " * 20)):
        soundfile.write(folder / f"{name}.wav", np.full(16000, 0.1), 16000)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_folders_of_other_models_are_scored(recorded, tmp_path):
    heard = iter(["hello their", "five " * 10])
    found = evaluation.evaluate_recordings(recorded, tmp_path / "out", lambda waveform: next(heard), "mine")
    assert values(found)["CER"] == {
        "short": round(2 / 11, 5),
        "mid": round(50 / 99, 5),
        "all": round(52 / 110, 5),
    }
    # What was heard is kept.
    again = evaluation.evaluate_recordings(recorded, tmp_path / "out", lambda waveform: next(heard), "mine")
    assert again == found
    with pytest.raises(ValueError, match="another recogniser"):
        evaluation.evaluate_recordings(recorded, tmp_path / "out", lambda waveform: "", "yours")
