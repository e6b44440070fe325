"""Building: every kind of source becomes the same rows, interrupted builds go on, what is wrong is named."""

import csv
import io
import json
import shlex
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from PIL import Image

from minimind_o_hf import CamPlusPlusConfig, CamPlusPlusFeatureExtractor, CamPlusPlusModel, load_audio
from minimind_o_hf.cli import main
from minimind_o_hf.data import MiniMindODataset, SampleSettings, building
from minimind_o_hf.data.building import BuildSettings, build_data, encode_speech

TEXTS = ["One apple.", "Two, or three?", "Four."]
SECONDS = [0.5, 0.9, 0.3]


def write_sine(path, seconds, frequency=200, rate=16000):
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate), rate)
    return path


@pytest.fixture
def recordings(tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for index, (text, seconds) in enumerate(zip(TEXTS, SECONDS, strict=True)):
        write_sine(folder / f"{index}.wav", seconds, 200 + 150 * index)
        (folder / f"{index}.txt").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def build(tmp_path, processor, config):
    """Builds; returns the rows and the report."""

    def run(source, name="out.parquet", **settings):
        report = build_data(source, tmp_path / name, processor, config, BuildSettings(**settings))
        return pq.read_table(tmp_path / name).to_pylist(), report

    return run


def expected_codes(path, processor):
    """A recording's codes, by itself."""
    wave = torch.from_numpy(load_audio(path, target_rate=24000))
    wave = torch.nn.functional.pad(wave, (0, -len(wave) % 1920))
    with torch.no_grad():
        return processor.audio_tokenizer.encode(wave[None, None], num_quantizers=8).audio_codes[0].T.flatten().tolist()


def test_a_folder_of_recordings(build, recordings, processor, config, tmp_path):
    rows, report = build(recordings)
    assert list(rows[0]) == ["conversations", "answer_audios", "ref_audios"]
    codes = [expected_codes(recordings / f"{index}.wav", processor) for index in range(3)]
    assert [row["answer_audios"] for row in rows] == [[row] for row in codes]
    assert [json.loads(row["conversations"]) for row in rows] == [
        [{"role": "user", "content": f"Read this aloud: {text}"}, {"role": "assistant", "content": text}]
        for text in TEXTS
    ]
    # The longest recording of another row: a row's own would teach to copy.
    assert [row["ref_audios"] for row in rows] == [codes[1], codes[0], codes[1]]
    assert (report.rows, report.errors, report.flags) == (3, [], [])
    assert report.lengths["answer_frames"] == [7, 12, 4]
    dataset = MiniMindODataset(tmp_path / "out.parquet", processor, config, SampleSettings.deterministic())
    assert (dataset[1].audio_labels[0] != -100).sum() == 12 + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet", "recordings"]


def test_codes_do_not_depend_on_the_batch(processor, monkeypatch):
    random = np.random.default_rng(0)
    waves = [random.standard_normal(size).astype(np.float32) * 0.1 for size in (1, 1920, 24000, 1921, 40000)]
    waves.append(np.zeros(0, np.float32))
    together = encode_speech(processor.audio_tokenizer, waves, 8)
    monkeypatch.setattr(building, "BATCH_SECONDS", 0)
    alone = encode_speech(processor.audio_tokenizer, waves, 8)
    assert [codes.shape for codes in together] == [(8, n) for n in (1, 1, 13, 2, 21, 0)]
    assert all(np.array_equal(a, b) for a, b in zip(together, alone, strict=True))


def stored(records, features):
    """A set with Audio features, made of what they store: encoding them would need torchcodec."""
    return datasets.Dataset(pa.Table.from_pylist(records, features.arrow_schema))


def write_table(path, delimiter, columns=("file", "sentence")):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows([f"{index}.wav", text] for index, text in enumerate(TEXTS))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "metadata", "mapped", "disk", "split", "parquet"])
def test_other_layouts_give_the_same_rows(build, recordings, kind):
    settings = {}
    expected, _ = build(recordings, "expected.parquet")
    for text in recordings.glob("*.txt"):
        text.unlink()
    if kind in ("csv", "tsv"):
        source = write_table(recordings / f"list.{kind}", "," if kind == "csv" else "\t")
    elif kind == "metadata":
        write_table(recordings / "metadata.csv", ",")
        source = recordings
    elif kind == "mapped":
        source = write_table(recordings / "list.csv", ",", ("clip", "said"))
        settings = {"audio_column": "clip", "text_column": "said"}
    elif kind in ("jsonl", "json"):
        records = [{"audio": str(recordings / f"{i}.wav"), "transcript": text} for i, text in enumerate(TEXTS)]
        source = recordings / f"list.{kind}"
        lines = "\n\n".join(json.dumps(record) for record in records)
        source.write_text(json.dumps(records) if kind == "json" else lines, encoding="utf-8")
    else:
        sounds = [{"bytes": (recordings / f"{i}.wav").read_bytes(), "path": None} for i in range(3)]
        features = datasets.Features({"sound": datasets.Audio(), "text": datasets.Value("string")})
        rows = stored([{"sound": sound, "text": text} for sound, text in zip(sounds, TEXTS, strict=True)], features)
        source, settings = recordings / "set", {"audio_column": "sound"}
        if kind == "parquet":
            source = recordings / "set.parquet"
            rows.to_parquet(source)
        elif kind == "disk":
            rows.save_to_disk(source)
        else:
            datasets.DatasetDict({"test": rows}).save_to_disk(source)
            with pytest.raises(ValueError, match=r"no split 'train', but \['test'\]"):
                build(source, **settings)
            settings["split"] = "test"
    assert build(source, **settings)[0] == expected


def test_speakers_and_prompts(build, recordings):
    records = [
        {"audio": f"{index % 3}.wav", "text": TEXTS[index % 3], "speaker": "ab"[index > 2]} for index in range(4)
    ]
    source = recordings / "list.jsonl"
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    rows, _ = build(source, prompt="{text}? Say {text}", limit=4)
    assert json.loads(rows[0]["conversations"])[0]["content"] == "One apple.? Say One apple."
    assert rows[0]["ref_audios"] == rows[1]["answer_audios"][0]
    # The only recording of its speaker has no other for a reference.
    assert rows[3]["ref_audios"] is None
    rows, _ = build(source, "zh.parquet", language="zh", limit=2, reference=False)
    assert len(rows) == 2
    assert "ref_audios" not in rows[0]
    assert json.loads(rows[0]["conversations"])[0]["content"] == "请朗读：One apple."


def test_voice_of_the_checkpoint(build, recordings, processor):
    rows, _ = build(recordings, voice="alba")
    voice = processor.voices["alba"]
    assert all(row["ref_audios"] == voice["ref_codes"].T.flatten().tolist() for row in rows)
    assert all(row["spk_emb"] == pytest.approx(voice["spk_emb"].tolist()) for row in rows)
    rows, _ = build(recordings, "bare.parquet", voice="alba", reference=False)
    assert list(rows[0]) == ["conversations", "answer_audios", "spk_emb"]


def test_chats_with_recordings_and_pictures(build, recordings, processor):
    Image.new("RGB", (8, 8), "red").save(recordings / "red.png")
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "<audio><image>What is it?"},
                {"role": "assistant", "content": "<audio>Red."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
            "audios": ["0.wav", "1.wav"],
            "images": ["red.png"],
        },
        # Without marks, files belong to the first user turn.
        {
            "messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oh."}],
            "audios": ["2.wav"],
        },
        {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Oh."}]},
    ]
    source = recordings / "chats.jsonl"
    source.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    rows, report = build(source)
    assert [turn["content"] for turn in json.loads(rows[0]["conversations"])] == [
        "Be brief.",
        "<image>What is it?",
        "Red.",
        "Sure?",
        "Yes.",
    ]
    sounds = [(recordings / f"{index}.wav").read_bytes() for index in range(3)]
    assert [row["question_audios"] for row in rows] == [[sounds[0], None], [sounds[2]], []]
    assert [row["image_bytes"] for row in rows] == [[(recordings / "red.png").read_bytes()], [], []]
    assert [row["answer_audios"] for row in rows] == [[expected_codes(recordings / "1.wav", processor), []], [], []]
    assert report.flags == ["chats.jsonl:1: answer 1 has no speech"]
    # The same from `datasets`, whose columns are undecoded features.
    audio, image = datasets.List(datasets.Audio()), datasets.List(datasets.Image())
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    records = [
        {
            "messages": chat["messages"],
            "audios": [{"path": str(recordings / name)} for name in chat.get("audios", [])],
            "images": [{"path": str(recordings / name)} for name in chat.get("images", [])],
        }
        for chat in chats
    ]
    features = datasets.Features({"messages": datasets.List(turn), "audios": audio, "images": image})
    stored(records, features).save_to_disk(recordings / "set")
    assert build(recordings / "set", "again.parquet")[0] == rows


TTS = """
import sys
import numpy as np, soundfile
text, out = sys.argv[1:3]
if "bad" in text:
    sys.exit("cannot say " + text)
if "mute" not in text:
    soundfile.write(out, 0.2 * np.sin(np.arange(len(text) * 2000) * 0.07), 22050)
"""


@pytest.fixture
def tts(tmp_path):
    script = tmp_path / "speak it.py"
    script.write_text(TTS, encoding="utf-8")
    return f"{sys.executable} {shlex.quote(str(script))} {{text}} {{out}}"


def test_text_alone_through_a_tts(build, tmp_path, tts):
    source = tmp_path / "lines.txt"
    source.write_text("-Say $(this) {out}.\n\nHow?\tSo; and so.\n", encoding="utf-8")
    rows, report = build(source, tts=tts, workers=2)
    assert [json.loads(row["conversations"])[1]["content"] for row in rows] == ["-Say $(this) {out}.", "So; and so."]
    assert rows[0]["question_audios"] == []
    question = soundfile.info(io.BytesIO(rows[1]["question_audios"][0]))
    assert (question.frames, question.samplerate) == (len("How?") * 2000, 22050)
    frames = [-(-len(text) * 2000 * 24000 // 22050 // 1920) for text in ("-Say $(this) {out}.", "So; and so.")]
    assert report.lengths["answer_frames"] == pytest.approx(frames, abs=1)
    rows, _ = build(source, "answers.parquet", tts=tts, text_questions=True)
    assert "question_audios" not in rows[0]
    source = tmp_path / "lines.csv"
    source.write_text("text\nOnly text.\n", encoding="utf-8")
    assert len(build(source, "table.parquet", tts=tts)[0][0]["answer_audios"][0]) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("this is bad", r"lines.txt:2: the TTS failed \(exit status 1\).*cannot say this is bad"),
        ("mute", "lines.txt:2: the TTS wrote no {out}"),
    ],
)
def test_a_failing_tts_names_the_line(build, tmp_path, tts, line, message):
    source = tmp_path / "lines.txt"
    source.write_text(f"Fine.\n{line}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        build(source, tts=tts)
    assert not (tmp_path / "out.parquet").exists()


def test_an_interrupted_build_goes_on(build, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_ROWS", 1)
    expected, _ = build(recordings, "expected.parquet")
    encoded, encode = [], building.encode_speech

    def interrupted(codec, waveforms, num_codebooks):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(waveforms[0]))
        return encode(codec, waveforms, num_codebooks)

    monkeypatch.setattr(building, "encode_speech", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(recordings)
    parts = tmp_path / "out.parquet.parts"
    assert sorted(path.name for path in parts.iterdir()) == ["part-00000.parquet", "part-00001.parquet"]
    assert not (tmp_path / "out.parquet").exists()
    # A part that was cut is made anew, and one whose recording has changed.
    cut = parts / "part-00000.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    encoded.clear()
    monkeypatch.setattr(building, "encode_speech", lambda *inputs: encoded.append(inputs) or encode(*inputs))
    assert build(recordings)[0] == expected
    assert len(encoded) == 2
    assert not parts.exists()


def test_only_what_changed_is_built_again(build, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "PART_ROWS", 1)
    good = (recordings / "2.wav").read_bytes()
    expected, _ = build(recordings, "expected.parquet")
    (recordings / "2.wav").write_bytes(b"noise")
    with pytest.raises(ValueError, match=r"^2.wav: .*2.wav: .*no readable audio"):
        build(recordings)
    rows, report = build(recordings, "rest.parquet", skip_errors=True)
    assert [len(rows), len(report.errors)] == [2, 1]
    assert "2.wav" in report.errors[0]
    encoded, encode = [], building.encode_speech
    monkeypatch.setattr(building, "encode_speech", lambda *inputs: encoded.append(inputs) or encode(*inputs))
    (recordings / "2.wav").write_bytes(good)
    assert build(recordings)[0] == expected
    assert len(encoded) == 1


def test_workers_change_nothing(build, recordings):
    assert build(recordings)[0] == build(recordings, "again.parquet", workers=2)[0]


def test_empty_and_long_answers_are_flagged_and_kept(build, recordings):
    (recordings / "0.txt").write_text("", encoding="utf-8")
    soundfile.write(recordings / "1.wav", np.zeros(0), 16000)
    write_sine(recordings / "2.wav", 6)
    rows, report = build(recordings, max_length=64)
    assert len(rows) == 3
    assert rows[1]["answer_audios"] == [[]]
    assert [flag.split(" at ")[0] for flag in report.flags] == [
        "0.wav: answer 0 is empty",
        "1.wav: answer 0 has no speech",
        "2.wav: answer 0 ends",
    ]


def test_rows_that_cannot_be_trained_on_stop_the_build(build, recordings, tmp_path):
    (recordings / "1.txt").write_text("Say <|audio_pad|>.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1.wav: .*writes placeholders itself"):
        build(recordings)
    assert not (tmp_path / "out.parquet").exists()
    rows, report = build(recordings, skip_errors=True)
    assert [len(rows), len(report.errors)] == [2, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.csv", "audio,words\n0.wav,Hi\n", r"list.csv:2: no text column.*'words'.*--text-column"),
        ("list.csv", "sound,text\n0.wav,Hi\n", r"no audio column.*--audio-column"),
        ("list.csv", "audio,text\nmissing.wav,Hi\n", r"list.csv:2: .*missing.wav"),
        ("list.csv", "audio,text\n,Hi\n", r"list.csv:2: a file must be a path"),
        ("list.csv", "audio,text\n", "no records"),
        ("list.jsonl", '{"audio": "0.wav", "text": "Hi"}\n{', r"list.jsonl:2 is no JSON"),
        ("list.jsonl", "[1]", r"list.jsonl:1: a record must be an object"),
        ("list.jsonl", '{"messages": [1]}', r"list.jsonl:1: `messages` must be"),
        ("list.jsonl", '{"messages": [{"role": "user", "content": ["x"]}]}', "must have a `role` and a text"),
        ("list.jsonl", '{"messages": [{"role": "user", "content": "<audio>"}]}', "1 <audio> stand.*lists 0"),
        (
            "list.jsonl",
            '{"messages": [{"role": "user", "content": "<audio><audio>"}], "audios": ["0.wav", "0.wav"]}',
            "at most one <audio>",
        ),
        ("list.jsonl", '{"messages": [{"role": "user", "content": "Hi"}]}', "list.jsonl:1: .*no assistant turn"),
        (
            "list.jsonl",
            '{"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "Hi"}],'
            ' "images": ["0.wav"]}',
            "list.jsonl:1: .*no readable picture",
        ),
        ("list.txt", "Hello.\n", r"list.txt:1: .*--tts"),
        ("list.doc", "Hello.\n", r"list.doc is of no known kind"),
        ("list.parquet", "Hello.\n", "(?i)parquet"),
    ],
)
def test_bad_sources(build, recordings, name, content, message):
    (recordings / name).write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, datasets.exceptions.DatasetGenerationError), match=message):
        build(recordings / name)


def test_bad_folders_and_settings(build, recordings, tmp_path, tts):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no recordings"):
        build(tmp_path / "empty")
    (recordings / "1.txt").unlink()
    with pytest.raises(ValueError, match="1 of 3 recordings .* 1.wav"):
        build(recordings)
    with pytest.raises(ValueError, match="no voice 'nobody'.*alba"):
        build(recordings, voice="nobody")
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        build(recordings, tts="no-such-program {text} {out}")
    with pytest.raises(ValueError, match="text.*out"):
        BuildSettings(tts="espeak-ng {text}")
    with pytest.raises(ValueError, match="field {text}"):
        BuildSettings(prompt="Say it")
    with pytest.raises(ValueError, match="`limit` must be at least 1"):
        BuildSettings(limit=0)
    (recordings / "1.txt").write_text("Two.", encoding="utf-8")
    with pytest.raises(ValueError, match="language 'tlh'"):
        build(recordings, language="tlh")
    build(recordings)
    with pytest.raises(FileExistsError, match="overwrite"):
        build(recordings)
    assert len(build(recordings, overwrite=True, limit=1)[0]) == 1


def test_command_line(nano, recordings, tmp_path, capsys):
    out, model = tmp_path / "data.parquet", ["--model", str(nano)]
    assert main(["data", "build", str(recordings), str(out), "--workers", "0", "--voice", "alba", *model]) == 0
    assert "3 rows, 3 spoken answers" in capsys.readouterr().out
    assert main(["data", "build", str(recordings), str(out), *model]) == 1
    assert "exists" in capsys.readouterr().err
    plot = tmp_path / "plot.png"
    assert main(["data", "check", str(out), "--workers", "0", "--plot", str(plot), *model]) == 0
    assert "0 errors" in capsys.readouterr().out
    assert Image.open(plot).width > 1000
    assert main(["data", "show", str(out), "1", "--out", str(tmp_path / "shown"), *model]) == 0
    assert "Two, or three?" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "shown").iterdir()} == {"sample.png", "answer.wav", "reference.wav"}


@pytest.fixture(scope="module")
def speaker_encoder(tmp_path_factory):
    """CAM++ at toy size, of random weights."""
    folder = tmp_path_factory.mktemp("campplus")
    torch.manual_seed(0)
    config = CamPlusPlusConfig(
        front_end_channels=4, tdnn_channels=16, block_layers=[2], block_dilations=[1], bottleneck_channels=8
    )
    CamPlusPlusModel(config).save_pretrained(folder)
    CamPlusPlusFeatureExtractor().save_pretrained(folder)
    return str(folder)


def test_speaker_embeddings(build, recordings, speaker_encoder, processor, config, tmp_path):
    def expected(index):
        extractor = CamPlusPlusFeatureExtractor.from_pretrained(speaker_encoder)
        wave = load_audio(recordings / f"{index}.wav", target_rate=24000)
        with torch.no_grad():
            inputs = extractor(wave, sampling_rate=24000)
            return CamPlusPlusModel.from_pretrained(speaker_encoder)(**inputs).embeddings[0]

    # The reference's, as the codes are; without references, each recording's own.
    for settings, sources in (({}, [1, 0, 1]), ({"reference": False}, [0, 1, 2])):
        name = f"{len(settings)}.parquet"
        rows, _ = build(recordings, name, speaker_encoder=speaker_encoder, **settings)
        assert ("ref_audios" in rows[0]) == (not settings)
        for row, index in zip(rows, sources, strict=True):
            np.testing.assert_allclose(row["spk_emb"], expected(index), rtol=0, atol=1e-4)
        sample = MiniMindODataset(tmp_path / name, processor, config, SampleSettings.deterministic())[0]
        assert (sample.audio_codes[0] == config.audio_spk_token).sum() == 1
        np.testing.assert_allclose(sample.speaker_embedding, expected(sources[0]), rtol=0, atol=1e-4)


def test_a_recording_too_short_for_an_embedding(build, recordings, speaker_encoder):
    write_sine(recordings / "3.wav", 0.01)
    (recordings / "3.txt").write_text("Oh.", encoding="utf-8")
    rows, _ = build(recordings, reference=False, speaker_encoder=speaker_encoder)
    assert [row["spk_emb"] is None for row in rows] == [False, False, False, True]


def test_bad_speaker_encoders(build, recordings, speaker_encoder, tmp_path):
    with pytest.raises(ValueError, match="leave out `voice` or `speaker_encoder`"):
        build(recordings, voice="alba", speaker_encoder=speaker_encoder)
    CamPlusPlusModel(CamPlusPlusConfig(block_layers=[1], block_dilations=[1], embedding_size=64)).save_pretrained(
        tmp_path / "other"
    )
    CamPlusPlusFeatureExtractor().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="embeddings of 64 numbers, the model takes 192"):
        build(recordings, speaker_encoder=str(tmp_path / "other"))
    assert not (tmp_path / "out.parquet").exists()
