"""Samples: the reference row exactly, the specification's layout, and every random choice."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from minimind_o_hf.processing.processing_minimind_o import default_image_processor
from PIL import Image
from safetensors import safe_open
from transformers import AutoTokenizer

from minimind_o_hf import (
    MiniMindOConfig,
    MiniMindOFeatureExtractor,
    MiniMindOForConditionalGeneration,
    MiniMindOProcessor,
    revert_delay_pattern,
)
from minimind_o_hf.data import (
    FeatureMasking,
    MiniMindODataCollator,
    MiniMindODataset,
    MiniMindOIterableDataset,
    SampleSettings,
    SpeechAugmentation,
    build_sample,
    read_row,
    sample_generator,
)
from minimind_o_hf.presets import build_tokenizer


def test_files_of_different_columns_are_read_together(tmp_path, processor, config):
    chat = json.dumps([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}])
    pq.write_table(pa.table({"conversations": [chat]}), tmp_path / "1.parquet")
    spoken = {"conversations": [chat], "answer_audios": pa.array([[list(range(16))]], pa.list_(pa.list_(pa.int32())))}
    pq.write_table(pa.table(spoken), tmp_path / "2.parquet")
    large = {
        "conversations": pa.array([chat], pa.large_string()),
        "answer_audios": pa.array([[list(range(24))]], pa.large_list(pa.large_list(pa.int64()))),
        "spk_emb": pa.array([[1.0] * 192], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(large), tmp_path / "3.parquet")
    settings = SampleSettings.deterministic(128)
    for dataset in (
        MiniMindODataset(tmp_path / "*.parquet", processor, config, settings),
        MiniMindOIterableDataset(tmp_path / "*.parquet", processor, config, settings),
    ):
        stops = [int((sample.audio_labels == config.audio_stop_token).sum()) for sample in dataset]
        assert stops == [0, 8, 8]
    pq.write_table(pa.table({"conversations": [chat], "spk_emb": ["a voice"]}), tmp_path / "4.parquet")
    with pytest.raises(ValueError, match="cannot be read together"):
        MiniMindODataset(tmp_path / "*.parquet", processor, config, settings)


def make_processor(tokenizer):
    return MiniMindOProcessor(MiniMindOFeatureExtractor(), tokenizer, default_image_processor())


@pytest.fixture(scope="module")
def processor():
    return make_processor(build_tokenizer())


def test_reference_row(golden, shared_dir):
    tensors = golden.tensors("dataset_item")
    with safe_open(shared_dir / "golden" / "dataset_item.safetensors", "pt") as file:
        metadata = file.metadata()
    processor = make_processor(AutoTokenizer.from_pretrained(shared_dir / "tokenizer"))
    row = {
        "conversations": metadata["conversations"],
        "answer_audios": [tensors["answer_codes_0"].tolist(), tensors["answer_codes_1"].tolist()],
        "ref_audios": tensors["reference_codes"].tolist(),
        "spk_emb": tensors["spk_emb"].tolist(),
    }
    max_length = int(metadata["max_length"])
    for variant, reference in (("ref", True), ("noref", False)):
        settings = SampleSettings.deterministic(max_length, reference=reference)
        sample = build_sample(row, processor, MiniMindOConfig(), settings, sample_generator(0, 0, 0))
        length = len(sample.input_ids)
        # The reference is padded to a fixed length and shifted: inputs lose the last position, labels the first.
        inputs = torch.full((9, max_length), 2049)
        inputs[8] = 0
        inputs[:8, :length], inputs[8, :length] = sample.audio_codes, sample.input_ids
        labels, audio_labels = torch.full((max_length,), -100), torch.full((8, max_length), -100)
        labels[:length], audio_labels[:, :length] = sample.labels, sample.audio_labels
        assert torch.equal(inputs[:, :-1], tensors[f"{variant}.input_ids"])
        assert torch.equal(labels[1:], tensors[f"{variant}.text_labels"])
        assert torch.equal(audio_labels[:, 1:], tensors[f"{variant}.audio_labels"])
        assert torch.equal(sample.speaker_embedding, tensors["spk_emb"])


@pytest.fixture(scope="module")
def config():
    return MiniMindOConfig(vocab_size=len(build_tokenizer()))


def wav(seconds=0.5, rate=16000):
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(int(seconds * rate)) * 0.05), rate, format="WAV")
    return file.getvalue()


def picture(color="red"):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(file, "PNG")
    return file.getvalue()


def codes(frames, seed=0, size=2048):
    return np.random.default_rng(seed).integers(size, size=8 * frames).tolist()


def conversation(*turns):
    roles = ["user", "assistant"] * len(turns)
    return json.dumps([{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)])


def sample_of(row, processor, config, seed=0, **settings):
    settings.setdefault("max_length", 512)
    return build_sample(row, processor, config, SampleSettings.deterministic(**settings), sample_generator(seed, 0, 0))


def text_of(sample, processor):
    return processor.tokenizer.decode(sample.input_ids[: int((sample.input_ids != 0).sum())])


def test_labels_are_the_last_answer_and_its_end(processor, config):
    sample = sample_of({"conversations": conversation("One?", "Two.", "Three?", "Four.")}, processor, config)
    labelled = sample.input_ids[sample.labels != -100]
    assert processor.tokenizer.decode(labelled) == "Four.<|im_end|>\n"
    assert torch.equal(sample.labels[sample.labels != -100], labelled)
    assert (sample.audio_labels == -100).all()
    assert (sample.audio_codes == 2049).all()


def test_answer_codes_are_the_delayed_codes_of_the_turn_that_was_kept(processor, config):
    row = {
        "conversations": conversation("One?", "Two.", "Three?", "Four."),
        "answer_audios": [codes(3, seed=1), codes(20, seed=2)],
    }
    sample = sample_of(row, processor, config)
    start = int((sample.labels != -100).nonzero()[0]) + 1
    frames, mask = revert_delay_pattern(sample.audio_codes[None], torch.tensor([start]), 2048)
    assert mask.sum() == 20
    assert frames[0, :, :20].T.flatten().tolist() == codes(20, seed=2)
    # Speech outlasts its text: the text's positions are pad there, and nothing is cut off.
    assert len(sample.input_ids) == start + 8 + 20
    assert (sample.audio_labels == 2050).sum() == 8


def test_a_think_block_delays_the_speech_and_a_long_one_does_not(processor, config):
    def start(thoughts):
        row = {
            "conversations": json.dumps(
                [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yes.", "reasoning_content": thoughts},
                ]
            ),
            "answer_audios": [codes(2)],
        }
        sample = sample_of(row, processor, config)
        first_label = int((sample.labels != -100).nonzero()[0])
        first_code = int((sample.audio_labels[0] != -100).nonzero()[0])
        return first_label, first_code, sample

    first_label, first_code, sample = start("hm")
    before = sample.input_ids[first_label:first_code].tolist()
    assert before[-4:-1] == [26, 234, 234]
    first_label, first_code, _ = start("hm " * 80)
    assert first_code == first_label + 1


def test_voice(processor, config):
    row = {
        "conversations": conversation("Hello there, how are you today?", "Fine."),
        "answer_audios": [codes(2)],
        "ref_audios": codes(4, seed=3),
        "spk_emb": np.ones(192).tolist(),
    }
    sample = sample_of(row, processor, config)
    start = int((sample.labels != -100).nonzero()[0])
    assert sample.audio_codes[:, start - 4 : start].T.flatten().tolist() == codes(4, seed=3)
    assert (sample.audio_codes[:, start - 5] == 2051).all()
    assert (sample.audio_labels[:, :start] == -100).all()
    without = sample_of(row, processor, config, reference=False)
    assert (without.audio_codes[:, start - 1] == 2051).all()
    silent = sample_of({**row, "answer_audios": []}, processor, config)
    assert silent.speaker_embedding is None
    assert (silent.audio_codes == 2049).all()
    nobody = sample_of({**row, "spk_emb": None}, processor, config)
    assert (nobody.audio_codes != 2051).all()


@pytest.mark.parametrize(
    ("weights", "expected", "clips"),
    [
        ({"speech_only": 1.0, "speech_then_text": 0.0}, "{audio}", 1),
        ({"text_only": 1.0, "speech_then_text": 0.0}, "What?", 0),
        ({}, "{audio}\n\nWhat?", 1),
        ({"text_then_speech": 1.0, "speech_then_text": 0.0}, "What?\n\n{audio}", 1),
    ],
)
def test_speech_in_the_last_user_turn(processor, config, weights, expected, clips):
    row = {"conversations": conversation("Before?", "Yes.", "What?", "That."), "question_audios": [wav(), wav(0.7)]}
    sample = sample_of(row, processor, config, **weights)
    frames = processor.feature_extractor.num_frames(int(0.7 * 16000))
    turn = expected.format(audio="<|audio_pad|>" * frames)
    assert f"<|im_start|>user\n{turn}<|im_end|>" in text_of(sample, processor)
    assert [len(clip) for clip in sample.clips] == [11200] * clips
    assert "<|im_start|>user\nBefore?<|im_end|>" in text_of(sample, processor)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({"image_before": (1.0, 0.0), "image_after": (0.0, 0.0)}, "{image}\nWhat is it?"),
        ({"image_before": (0.0, 1.0), "image_after": (0.0, 0.0)}, "{image}\n\nWhat is it?"),
        ({"image_after": (1.0, 0.0)}, "What is it?\n{image}"),
        ({}, "What is it?\n\n{image}"),
    ],
)
def test_the_first_picture_alone(processor, config, place, expected):
    row = {
        "conversations": conversation("<image>\nWhat is it?", "A cat.", "And <image>this?", "A dog."),
        "image_bytes": [picture("red"), picture("blue")],
    }
    sample = sample_of(row, processor, config, **place)
    assert expected.format(image="<|image_pad|>" * 64) in text_of(sample, processor)
    assert "And this?" in text_of(sample, processor)
    assert sample.images == [picture("red")]


def test_speech_alone_drops_the_text_and_the_picture_in_it(processor, config):
    row = {
        "conversations": conversation("<image>What?", "A cat."),
        "question_audios": [wav()],
        "image_bytes": picture(),
    }
    sample = sample_of(row, processor, config, speech_only=1.0, speech_then_text=0.0)
    assert sample.images == []
    assert "What?" not in text_of(sample, processor)
    assert len(sample.clips) == 1


def test_dialogues_are_cut_after_any_turn_that_fits(processor, config):
    turns = [f"{word} {who}" for word in ("one", "two", "three") for who in ("asks", "answers")]
    row = read_row({"conversations": conversation(*turns)}, config)
    settings = SampleSettings(system_prompt=0, swap_text=0, drop_empty_think=1, max_length=512)
    ends = {
        text_of(build_sample(row, processor, config, settings, sample_generator(0, 0, index)), processor).split()[-2]
        for index in range(40)
    }
    assert ends == {"one", "two", "three"}
    short = sample_of(row, processor, config, max_length=130)
    assert "one answers" in text_of(short, processor)
    assert "three answers" not in text_of(short, processor)


def test_cut_sequences_keep_whole_placeholder_runs_and_no_stop(processor, config):
    row = {"conversations": conversation("Say it.", "Now."), "answer_audios": [codes(300)]}
    sample = sample_of(row, processor, config, max_length=128)
    assert len(sample.input_ids) == sample.audio_codes.shape[1] == sample.audio_labels.shape[1] == 128
    assert (sample.audio_labels != 2050).all()
    heard = {"conversations": conversation("", "Now."), "question_audios": [wav(10)]}
    sample = sample_of(heard, processor, config, max_length=64)
    assert 16 not in sample.input_ids.tolist()
    assert sample.clips == []


def test_choices_follow_from_seed_epoch_and_index(processor, config):
    row = {
        "conversations": conversation("Hello there", "Hi you.", "What?", "That."),
        "question_audios": [wav(), wav()],
        "answer_audios": [codes(4), codes(5)],
        "ref_audios": codes(4, seed=3),
        "spk_emb": np.ones(192).tolist(),
    }

    def build(*numbers):
        return build_sample(row, processor, config, SampleSettings(swap_codes=0.5), sample_generator(*numbers))

    first, again = build(1, 2, 3), build(1, 2, 3)
    assert torch.equal(first.input_ids, again.input_ids)
    assert torch.equal(first.audio_codes, again.audio_codes)
    assert all(np.array_equal(a, b) for a, b in zip(first.clips, again.clips, strict=True))
    others = [build(*numbers) for numbers in ((2, 2, 3), (1, 3, 3), (1, 2, 4))]
    assert any(
        other.audio_codes.shape != first.audio_codes.shape or not torch.equal(other.audio_codes, first.audio_codes)
        for other in others
    )


def test_scheduled_sampling_swaps_inputs_before_labels_alone(processor, config):
    row = {"conversations": conversation("Hello", "There it is, all of it."), "answer_audios": [codes(12)]}
    plain = sample_of(row, processor, config)
    swapped = sample_of(row, processor, config, swap_codes=1.0, swap_text=1.0)
    assert torch.equal(plain.labels, swapped.labels)
    assert torch.equal(plain.audio_labels, swapped.audio_labels)
    before_code = torch.zeros(len(plain.labels), dtype=torch.bool)
    before_code[:-1] = (plain.audio_labels[:, 1:] != -100).any(dim=0)
    changed = (plain.audio_codes != swapped.audio_codes).any(dim=0)
    assert torch.equal(changed, before_code)
    before_text = torch.zeros(len(plain.labels), dtype=torch.bool)
    before_text[:-1] = plain.labels[1:] != -100
    assert not (plain.input_ids != swapped.input_ids)[~before_text].any()
    assert not np.isin(swapped.input_ids, [12, 16]).any()
    assert swapped.audio_codes.max() < 2112


def test_shares_of_random_choices(processor, config):
    row = read_row({"conversations": conversation("Hello", "There.")}, config)
    settings = SampleSettings(swap_text=0)
    texts = [
        text_of(build_sample(row, processor, config, settings, sample_generator(0, 0, index)), processor)
        for index in range(600)
    ]
    assert np.mean(["<|im_start|>system" in text for text in texts]) == pytest.approx(0.2, abs=0.05)
    assert np.mean(["<think>" not in text for text in texts]) == pytest.approx(0.8, abs=0.05)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "conversations"),
        ({"conversations": "{nope"}, "no JSON"),
        ({"conversations": '["hello"]'}, "role"),
        ({"conversations": '[{"role": "user", "content": "x"}]'}, "no assistant turn"),
        (
            {"conversations": conversation("a", "b"), "answer_audios": [[1, 2, 3]]},
            r"answer_audios\[0\].*8 codes a frame",
        ),
        ({"conversations": conversation("a", "b"), "answer_audios": [[2048] * 8]}, "from 0 to 2047.*2048"),
        ({"conversations": conversation("a", "b"), "ref_audios": [-1] * 8}, "ref_audios.*-1"),
        ({"conversations": conversation("a", "b"), "spk_emb": [1.0] * 5}, "192"),
        ({"conversations": conversation("a <|audio_pad|>", "b")}, "writes placeholders itself"),
    ],
)
def test_bad_rows(processor, config, row, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        sample_of(row, processor, config)


def test_undecodable_recording(processor, config):
    row = {"conversations": conversation("a", "b"), "question_audios": [b"noise"]}
    with pytest.raises(OSError, match="cannot|not"):
        sample_of(row, processor, config)


@pytest.mark.parametrize(
    "name", ["speed", "white_noise", "volume", "dropout", "smoothing", "reverberation", "pink_noise"]
)
def test_each_augmentation(name):
    off = dict.fromkeys(vars(SpeechAugmentation()), 0.0)
    wave = soundfile.read(io.BytesIO(wav(1.5)))[0].astype(np.float32)
    assert np.array_equal(SpeechAugmentation(**off)(wave, 16000, np.random.default_rng(0)), wave)
    changed = SpeechAugmentation(**{**off, name: 1.0})(wave, 16000, np.random.default_rng(0))
    assert changed.dtype == np.float32
    assert np.isfinite(changed).all()
    if name == "speed":
        assert len(wave) / 1.61 <= len(changed) <= len(wave) / 0.69
    else:
        assert len(changed) == len(wave)
        assert not np.array_equal(changed, wave)
    if name == "dropout":
        assert (changed[(changed == 0) & (wave != 0)]).size >= 3900


def test_feature_masking():
    features = torch.ones(30, 560)
    masked = FeatureMasking(1.0, 1.0)(features, np.random.default_rng(0))
    assert (features == 1).all()
    zero_frames, zero_channels = (masked == 0).all(dim=1).sum(), (masked == 0).all(dim=0).sum()
    assert 1 <= zero_frames <= 10
    assert 1 <= zero_channels <= 64
    assert torch.equal(FeatureMasking(0.0, 0.0)(features, np.random.default_rng(0)), features)
    assert FeatureMasking(1.0, 1.0)(torch.ones(1, 560), np.random.default_rng(0)).any()


def test_collator_pads_and_masks_the_batch_alone(processor, config):
    rows = [
        {"conversations": conversation("Hi", "Yes."), "answer_audios": [codes(30)], "spk_emb": np.ones(192).tolist()},
        {"conversations": conversation("<image>Hi", "Yes."), "image_bytes": picture(), "question_audios": [wav(0.3)]},
        {"conversations": conversation("Hi", "No."), "question_audios": [wav(0.9)]},
    ]
    samples = [sample_of(row, processor, config) for row in rows]
    batch = MiniMindODataCollator(processor, config, pad_to_multiple_of=16, feature_masking=None)(samples)
    lengths = [len(sample.input_ids) for sample in samples]
    assert batch["input_ids"].shape[1] == -(-max(lengths) // 16) * 16
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    # The text of row 0 ends long before its speech: those positions are attended.
    assert (batch["attention_mask"][0][batch["audio_labels"][0].ne(-100).any(dim=0)] == 1).all()
    for index, length in enumerate(lengths):
        assert (batch["audio_codes"][index, :, length:] == 2049).all()
        assert (batch["labels"][index, length:] == -100).all()
        assert (batch["audio_labels"][index, :, length:] == -100).all()
    frames = [processor.feature_extractor.num_frames(len(clip)) for sample in samples for clip in sample.clips]
    assert batch["input_features_mask"].sum(dim=1).tolist() == frames
    assert batch["pixel_values"].shape == (1, 3, 256, 256)
    assert batch["speaker_embeddings"].ne(0).any(dim=1).tolist() == [True, False, False]
    masked = MiniMindODataCollator(processor, config, feature_masking=FeatureMasking(1.0, 1.0))(samples)
    assert not torch.equal(masked["input_features"], batch["input_features"])
    with pytest.raises(ValueError, match="at least one"):
        MiniMindODataCollator(processor, config)([])


def test_padding_does_not_change_a_sample(processor, tiny_config):
    config = tiny_config(vocab_size=len(processor.tokenizer), image_token_len=64, vision_config=None, spk_emb_size=192)
    model = MiniMindOForConditionalGeneration(config).eval()
    rows = [
        {"conversations": conversation("Hi", "Yes."), "answer_audios": [codes(n, size=32)], "spk_emb": [1.0] * 192}
        for n in (3, 25)
    ]
    samples = [sample_of(row, processor, config) for row in rows]
    collate = MiniMindODataCollator(processor, config)
    with torch.no_grad():
        together = model(**collate(samples))
        alone = model(**collate(samples[:1]))
    length = len(samples[0].input_ids)
    torch.testing.assert_close(together.logits[:1, :length], alone.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.audio_logits[:1, :, :length], alone.audio_logits, rtol=0, atol=1e-5)


@pytest.fixture
def files(tmp_path):
    """Two files, with and without the columns of speech, one with the 64-bit string type."""
    for part, (kind, start) in enumerate(((pa.string(), 0), (pa.large_string(), 6))):
        columns = {
            "conversations": pa.array([conversation("Hi", f"Number {start + i}.") for i in range(6)], kind),
            "answer_audios": pa.array([[codes(2, seed=start + i)] for i in range(6)]),
            "question_audios": pa.array([[wav(0.2)] for _ in range(6)], pa.list_(pa.binary())),
            "spk_emb": pa.array([[1.0] * 192] * 6, pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), tmp_path / f"part-{part}.parquet")
    return [tmp_path / "part-0.parquet", tmp_path / "part-1.parquet"]


def test_map_style_reading(files, processor, config):
    settings = SampleSettings.deterministic()
    dataset = MiniMindODataset(files, processor, config, settings)
    assert len(dataset) == 12
    assert "Number 7." in text_of(dataset[7], processor)
    assert len(MiniMindODataset(str(files[0].parent / "*.parquet"), processor, config, settings)) == 12
    with pytest.raises(FileNotFoundError, match="nothing"):
        MiniMindODataset("nothing.parquet", processor, config)


def test_epochs_differ_and_come_back(files, processor, config):
    dataset = MiniMindODataset(files, processor, config, SampleSettings(swap_codes=0.5), seed=5)
    first = dataset[3]
    dataset.set_epoch(1)
    second = dataset[3]
    dataset.set_epoch(0)
    assert torch.equal(dataset[3].audio_codes, first.audio_codes)
    assert first.audio_codes.shape != second.audio_codes.shape or not torch.equal(
        first.audio_codes, second.audio_codes
    )


@pytest.mark.parametrize("shuffle_buffer", [0, 8])
def test_streaming_gives_the_same_samples_once_over_all_ranks(files, processor, config, shuffle_buffer):
    settings = SampleSettings(swap_codes=0.5)
    dataset = MiniMindODataset(files, processor, config, settings, seed=1)
    expected = sorted(dataset[index].audio_codes.sum().item() for index in range(12))
    parts = [
        list(
            MiniMindOIterableDataset(
                files, processor, config, settings, seed=1, rank=rank, world_size=2, shuffle_buffer=shuffle_buffer
            )
        )
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [6, 6]
    assert sorted(sample.audio_codes.sum().item() for part in parts for sample in part) == expected


def test_a_bad_row_is_named(tmp_path, processor, config):
    pq.write_table(pa.table({"conversations": [conversation("a", "b"), "{"]}), tmp_path / "bad.parquet")
    dataset = MiniMindODataset(tmp_path / "bad.parquet", processor, config)
    assert len(dataset[0].input_ids) > 0
    with pytest.raises(ValueError, match="Row 1 cannot be trained on.*no JSON"):
        dataset[1]
