"""Cached features: what the frozen encoders return, computed once."""

import io
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from minimind_o_hf import MiniMindOForConditionalGeneration
from minimind_o_hf.data import (
    FeatureCache,
    MiniMindODataCollator,
    MiniMindODataset,
    SampleSettings,
    cache_features,
)
from minimind_o_hf.data import features as features_module
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments

SETTINGS = SampleSettings.deterministic(512)


@pytest.fixture(scope="module")
def model(nano):
    return MiniMindOForConditionalGeneration.from_pretrained(nano)


@pytest.fixture(scope="module")
def rows(mixed_parquet):
    return pq.read_table(mixed_parquet).to_pylist()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, rows, model, processor):
    return cache_features(rows, model, processor, tmp_path_factory.mktemp("cache"))


def recordings(rows):
    return [item for row in rows for item in row["question_audios"] or [] if item]


def test_holds_what_the_encoders_return(cache, rows, model, processor):
    said = recordings(rows)
    pictures = [row["image_bytes"][0] for row in rows if row["image_bytes"]]
    # One recording is there twice, and encoded once.
    assert len(said) == 12
    assert len(cache) == 11 + len(pictures)
    for recording in said:
        clip, _ = soundfile.read(io.BytesIO(recording), dtype="float32")
        inputs = processor.feature_extractor([clip], return_tensors="pt")
        with torch.no_grad():
            expected = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])[0]
        torch.testing.assert_close(cache.speech(recording), expected, rtol=0, atol=1e-5)
    assert cache.picture(pictures[0]).shape == (64, 96)
    assert not torch.equal(cache.picture(pictures[0]), cache.picture(pictures[1]))


def test_training_on_them_is_the_same(cache, mixed_parquet, model, processor, config, tmp_path):
    collator = MiniMindODataCollator(processor, config, feature_masking=None)
    batches = []
    for features in (None, cache):
        dataset = MiniMindODataset(mixed_parquet, processor, config, SETTINGS, features=features)
        batches.append(collator([dataset[index] for index in range(12)]))
    plain, cached = batches
    assert {"input_features", "pixel_values"} <= plain.keys()
    assert {"audio_hidden_states", "image_hidden_states"} <= cached.keys()
    assert not {"input_features", "pixel_values"} & cached.keys()
    assert torch.equal(plain["input_ids"], cached["input_ids"])
    with torch.no_grad():
        expected, found = model(**plain), model(**cached)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)

    losses = []
    for features in (None, cache):
        trained = MiniMindOForConditionalGeneration.from_pretrained(model.name_or_path)
        dataset = MiniMindODataset(mixed_parquet, processor, config, SETTINGS, features=features)
        arguments = MiniMindOTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            max_steps=3,
            per_device_train_batch_size=8,
            disable_tqdm=True,
        )
        trainer = MiniMindOTrainer(trained, arguments, train_dataset=dataset, data_collator=collator)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_no_audio_is_decoded_with_a_cache(cache, mixed_parquet, processor, config, monkeypatch):
    dataset = MiniMindODataset(mixed_parquet, processor, config, SETTINGS, features=cache)

    def refuse(*args, **kwargs):
        raise AssertionError("decoded")

    monkeypatch.setattr("minimind_o_hf.data.samples.load_audio", refuse)
    assert sum(len(sample.clips) for sample in dataset) == 12


def test_bfloat16_is_half_the_size(tmp_path, cache, rows, model, processor):
    half = cache_features(rows, model, processor, tmp_path, dtype="bfloat16")
    recording = recordings(rows)[0]
    assert torch.equal(half.speech(recording), cache.speech(recording).to(torch.bfloat16))
    sizes = [sum(part.stat().st_size for part in item.directory.glob("speech-*")) for item in (half, cache)]
    assert sizes[0] < 0.7 * sizes[1]
    with pytest.raises(ValueError, match="float32, bfloat16"):
        cache_features(rows, model, processor, tmp_path, dtype="float16")


def test_is_made_once_goes_on_and_grows(tmp_path, rows, model, processor, monkeypatch):
    encoded = []
    original = model.get_audio_features
    monkeypatch.setattr(model, "get_audio_features", lambda *args: encoded.append(len(args[0])) or original(*args))
    monkeypatch.setattr(features_module, "BATCH_FRAMES", 1)
    monkeypatch.setattr(features_module, "PART_BYTES", 1)

    def interrupted():
        for index, row in enumerate(rows):
            if index == 9:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        cache_features(interrupted(), model, processor, tmp_path)
    before = sum(encoded)
    assert before == 3  # rows 1, 3, 5 and 7, two of which are the same
    assert not list(tmp_path.rglob("*.tmp"))
    cache = cache_features(rows, model, processor, tmp_path)
    assert sum(encoded) == 11
    assert cache_features(rows, model, processor, tmp_path).directory == cache.directory
    assert sum(encoded) == 11


def test_shares_of_two_processes(tmp_path, cache, rows, model, processor):
    parts = [cache_features(rows, model, processor, tmp_path, rank=rank, world_size=2) for rank in (0, 1)]
    both = FeatureCache(parts[0].directory)
    assert len(parts[0]) < len(both)
    for recording in recordings(rows):
        torch.testing.assert_close(both.speech(recording), cache.speech(recording), rtol=0, atol=1e-5)


def test_other_encoders_have_another_folder(tmp_path, nano, cache, rows, model, processor):
    other = MiniMindOForConditionalGeneration.from_pretrained(nano)
    with torch.no_grad():
        next(other.audio_tower.parameters()).add_(1.0)
    assert cache_features(rows[:2], other, processor, tmp_path).directory.name != cache.directory.name
    assert cache_features(rows[:2], model, processor, tmp_path).directory.name == cache.directory.name


def test_crosses_to_workers_by_its_path(cache, rows):
    recording = recordings(rows)[0]
    content = pickle.dumps(cache)
    assert len(content) < 1000
    assert torch.equal(pickle.loads(content).speech(recording), cache.speech(recording))


def test_features_can_be_written_to_without_changing_the_cache(cache, rows):
    recording = recordings(rows)[0]
    before = cache.speech(recording)
    cache.speech(recording).zero_()
    assert torch.equal(cache.speech(recording), before)


def test_bad_caches(tmp_path, rows, model, processor, cache, tiny_model):
    with pytest.raises(ValueError, match="make them first"):
        FeatureCache(tmp_path)
    with pytest.raises(ValueError, match="12 byte input .speech.: the data has changed"):
        cache.speech(b"another clip")
    with pytest.raises(ValueError, match="Row 1 cannot be trained on"):
        cache_features([rows[0], {"question_audios": [b"no sound"]}], model, processor, tmp_path)
    with pytest.raises(ValueError, match="Row 0 cannot be trained on"):
        cache_features([{"image_bytes": b"no picture"}], model, processor, tmp_path)
    deaf = tiny_model(audio_config=None, vision_config=None)
    with pytest.raises(ValueError, match="no speech encoder"):
        cache_features(rows, deaf, processor, tmp_path)
    made = cache_features(rows[:4], model, processor, tmp_path)
    part = next(made.directory.glob("speech-*.arrow"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged"):
        FeatureCache(made.directory)


def test_rows_without_inputs(tmp_path, model, processor):
    empty = cache_features([{"conversations": "[]"}], model, processor, tmp_path)
    assert len(empty) == 0
    assert model.training is False
    assert np.array_equal([path.name for path in empty.directory.iterdir()], ["cache.json"])
