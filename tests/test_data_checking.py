"""Checking and showing: each kind of bad row is named, lengths are counted, a sample can be seen and heard."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from minimind_o_hf.cli import main
from minimind_o_hf.data import SampleSettings, build_sample, sample_generator
from minimind_o_hf.data.checking import DataReport, check_files, check_row
from minimind_o_hf.data.showing import _cells, draw_sample, show_sample


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    return json.dumps([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)])


def wav(seconds):
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(int(seconds * 16000)) * 0.05), 16000, format="WAV")
    return file.getvalue()


def picture():
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "PNG")
    return file.getvalue()


def codes(frames):
    return np.random.default_rng(frames).integers(512, size=8 * frames).tolist()


GOOD = {
    "conversations": chat("<image>Hi?", "Yes.", "Oh?", "No."),
    "question_audios": [wav(1.0), wav(0.5)],
    "answer_audios": [codes(5), codes(25)],
    "image_bytes": [picture()],
    "ref_audios": codes(4),
}


def test_a_good_row_is_measured(processor, config):
    report = check_row(GOOD, processor, config)
    assert (report.errors, report.flags, report.pictures) == ([], [], 1)
    assert report.lengths["answer_frames"] == [5, 25]
    assert report.lengths["answer_seconds"] == [0.4, 2.0]
    assert report.lengths["question_seconds"] == [1.0, 0.5]
    (positions,), (tokens,) = report.lengths["positions"], report.lengths["text_tokens"]
    row = {**GOOD, "answer_audios": []}
    text = build_sample(row, processor, config, SampleSettings.deterministic(4096), sample_generator(0, 0, 0))
    assert tokens == len(text.input_ids)
    answer = len(processor.tokenizer("No.<|im_end|>\n")["input_ids"])
    assert positions == tokens - answer + 1 + 25 + 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": "{"}, "no JSON"),
        ({"conversations": chat("", "", "", "").replace("user", "robot", 1), "question_audios": []}, "role 'robot'"),
        ({"conversations": chat("", "", "", [1])}, "no text as `content`"),
        ({"answer_audios": [codes(5), [1, 2, 3]]}, r"answer_audios\[1\].*8 codes a frame"),
        ({"answer_audios": [codes(5), [512] * 8]}, r"answer_audios\[1\].*from 0 to 511"),
        ({"answer_audios": [["x"] * 8]}, "x|literal|int"),
        ({"answer_audios": [[None] * 8]}, "None"),
        ({"answer_audios": [codes(1)] * 3}, "3 entries for 2 turns"),
        ({"question_audios": [wav(1)] * 3}, "3 entries for 2 turns"),
        ({"question_audios": [b"noise", None]}, r"question_audios\[0\].*no readable audio"),
        ({"question_audios": [wav(130), None]}, r"question_audios\[0\] has .* at most 2048"),
        ({"image_bytes": [picture(), b"noise"]}, r"image_bytes\[1\].*no readable picture"),
        (
            {"conversations": chat("<|image_pad|>", "No.")} | {"answer_audios": [], "question_audios": []},
            "placeholders",
        ),
        ({"spk_emb": [1.0]}, "192"),
    ],
)
def test_bad_rows(processor, config, change, message):
    report = check_row({**GOOD, **change}, processor, config)
    assert len(report.errors) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(report.errors[0])


def test_labels_beyond_the_limit(processor, config):
    assert check_row(GOOD, processor, config, max_length=200).flags == []
    row = {"conversations": chat("Hm?", "No."), "answer_audios": [codes(60)], "question_audios": [wav(2)]}
    report = check_row(row, processor, config, max_length=60)
    assert report.errors == []
    assert [flag.partition(" ends at")[0] for flag in report.flags] == ["answer 0"]
    report = check_row(row, processor, config, max_length=20)
    assert report.errors == ["no label stands within the first 20 positions: the prompt fills them"]


def test_empty_answers_are_flagged(processor, config):
    rows = [
        {"conversations": chat("Hm?", "")},
        {"conversations": chat("Hm?", "A", "Hm?", "B"), "answer_audios": [codes(1), []]},
        {"conversations": chat("<image>Hm?", "A")},
    ]
    reports = [check_row(row, processor, config) for row in rows]
    assert [report.errors for report in reports] == [[]] * 3
    assert [report.flags for report in reports] == [
        ["answer 0 is empty"],
        ["answer 1 has no speech"],
        ["1 <image> marks for 0 pictures"],
    ]


@pytest.fixture
def files(tmp_path):
    schema = pa.schema(
        [
            ("conversations", pa.large_string()),
            ("question_audios", pa.list_(pa.binary())),
            ("answer_audios", pa.list_(pa.list_(pa.int64()))),
            ("image_bytes", pa.list_(pa.binary())),
            ("ref_audios", pa.list_(pa.int64())),
        ]
    )
    bad = {**GOOD, "question_audios": [b"noise"]}
    for name, rows in (("a.parquet", [GOOD] * 5), ("b.parquet", [GOOD, GOOD, bad, {"conversations": chat("a", "")}])):
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / name, row_group_size=2)
    return [tmp_path / "a.parquet", tmp_path / "b.parquet"]


@pytest.mark.parametrize("workers", [0, 2])
def test_files(files, processor, config, workers):
    report = check_files(files, processor, config, workers=workers)
    assert report.rows == 9
    assert [error.partition(": ")[0] for error in report.errors] == [f"{files[1]}:2"]
    assert report.flags == [f"{files[1]}:3: answer 0 is empty"]
    table = str(report)
    assert "9 rows, 14 spoken answers (0.00 h), 14 spoken questions" in table
    assert table.splitlines()[-1].startswith(f"  {files[1]}:2: question_audios[0]")
    seconds = next(line for line in table.splitlines() if line.startswith("answer seconds"))
    assert seconds.split()[2:] == ["14", "0.4", "1.2", "2.0", "16.8"]


def test_files_that_are_none(tmp_path, files, processor, config):
    with pytest.raises(FileNotFoundError, match="missing.parquet"):
        check_files([tmp_path / "missing.parquet"], processor, config)
    (tmp_path / "text.parquet").write_text("not parquet, but long enough to be read", encoding="utf-8")
    with pytest.raises(ValueError, match="text.parquet is no readable parquet"):
        check_files([tmp_path / "text.parquet"], processor, config)
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="other.parquet has no column `conversations`"):
        check_files([tmp_path / "other.parquet"], processor, config)
    # A damaged page: the rows before it are checked all the same.
    data = bytearray(files[0].read_bytes())
    middle = pq.read_metadata(files[0]).row_group(2).column(0).data_page_offset
    data[middle : middle + 40] = b"\xff" * 40
    files[0].write_bytes(data)
    report = check_files(files[:1], processor, config)
    assert [error.partition(": ")[0] for error in report.errors] == [f"{files[0]}:4"]
    assert "unreadable" in report.errors[0]


def test_command_line(files, nano, tmp_path, capsys):
    model = ["--model", str(nano)]
    assert main(["data", "check", *map(str, files), "--workers", "0", *model]) == 1
    printed = capsys.readouterr()
    assert f"{files[1]}:2: question_audios[0]" in printed.out
    assert "minimind-o: error: 1 errors in 9 rows" in printed.err
    assert main(["data", "show", str(files[0]), "5", *model]) == 1
    assert "rows 0 to 4, not 5" in capsys.readouterr().err
    assert main(["data", "show", str(tmp_path / "missing.parquet"), "0", *model]) == 1
    assert "missing.parquet" in capsys.readouterr().err


def test_histograms(files, processor, config, tmp_path):
    report = check_files(files, processor, config)
    report.plot(tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").format == "PNG"
    DataReport().plot(tmp_path / "empty.png")
    assert np.asarray(Image.open(tmp_path / "plot.png")).std() > np.asarray(Image.open(tmp_path / "empty.png")).std()


def test_a_sample_is_shown(files, processor, config, tmp_path):
    text = show_sample(files[0], 3, processor, config, tmp_path / "shown")
    assert "<|im_start|>assistant\nNo.<|im_end|>" in text
    assert "<|audio_pad|>×8\n\nOh?" in text
    assert "<|image_pad|>×64" in text
    shown = {path.name for path in (tmp_path / "shown").iterdir()}
    assert shown == {"sample.png", "answer.wav", "question.wav", "reference.wav", "image.png"}
    answer, rate = soundfile.read(tmp_path / "shown" / "answer.wav")
    assert (len(answer), rate) == (25 * 1920, 24000)
    expected = processor.decode_audio(torch.tensor(codes(25)).view(-1, 8).T[None])[0]
    assert np.abs(answer - expected.numpy()).max() < 1e-4
    question = soundfile.info(tmp_path / "shown" / "question.wav")
    assert (question.frames, question.samplerate) == (8000, 16000)
    # As training draws it: other choices, the same again with the same seed.
    drawn = [show_sample(files[0], 3, processor, config, tmp_path / "shown", seed=seed) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2]
    assert len({text, *drawn}) == 3


def test_the_nine_rows(processor, config):
    row = {"conversations": chat("Hm?", "No $x."), "answer_audios": [codes(3)], "spk_emb": [1.0] * 192}
    sample = build_sample(row, processor, config, SampleSettings.deterministic(), sample_generator(0, 0, 0))
    rows = _cells(sample, config)
    assert len(rows) == 9
    start = int((sample.labels != -100).nonzero()[0])
    assert [kind for _, kind in rows[1][start - 1 : start + 6]] == ["speaker", "pad", *["label"] * 3, "stop", "pad"]
    assert [written for written, _ in rows[1][start + 1 : start + 4]] == [str(code) for code in codes(3)[::8]]
    assert {kind for _, kind in rows[0]} == {"pad", "input", "label"}
    figure = draw_sample(sample, processor, config, "title")
    # Two lines of positions; each cell is written on, and each token stands above its own.
    assert len(figure.axes) == -(-len(sample.input_ids) // 40)
    tokens = int((sample.input_ids != 0).sum())
    assert sum(len(axes.texts) for axes in figure.axes) == 9 * len(sample.input_ids) + tokens
