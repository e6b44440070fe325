"""Batches: estimated lengths, the order they are grouped in, and packed rows that equal padded ones."""

import numpy as np
import pytest
import torch

from minimind_o_hf import MiniMindOForConditionalGeneration
from minimind_o_hf.data import EpochSampler, MiniMindODataCollator, MiniMindODataset, Sample, SampleSettings
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments


@pytest.fixture(scope="module")
def model(nano):
    return MiniMindOForConditionalGeneration.from_pretrained(nano)


@pytest.fixture
def dataset(mixed_parquet, processor, config):
    return MiniMindODataset(mixed_parquet, processor, config, SampleSettings.deterministic(512))


def test_estimated_lengths_are_close(mixed_parquet, processor, config):
    settings = SampleSettings.deterministic(512, cut_dialogue=True)
    dataset = MiniMindODataset(mixed_parquet, processor, config, settings, seed=3)
    seen = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        real = np.array([len(dataset[index].input_ids) for index in range(len(dataset))])
        estimated = dataset.lengths()
        assert np.abs(estimated - real).max() <= 16
        assert np.corrcoef(estimated, real)[0, 1] > 0.97
        seen.append(estimated)
    # Dialogues are cut elsewhere in another epoch.
    assert not np.array_equal(*seen)
    assert np.array_equal(dataset.lengths(), seen[1])


def test_estimates_stop_at_the_limit_and_survive_bad_rows(tmp_path, mixed_parquet, processor, config):
    dataset = MiniMindODataset(mixed_parquet, processor, config, SampleSettings.deterministic(40))
    assert dataset.lengths().max() == 40
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = {"conversations": ["no json", "[]", '[{"role": "user"}]', '[{"role": "assistant", "content": "Yes."}]']}
    pq.write_table(pa.table(bad), tmp_path / "bad.parquet")
    lengths = MiniMindODataset(tmp_path / "bad.parquet", processor, config).lengths()
    assert lengths[:3].tolist() == [0, 0, 0]
    assert lengths[3] > 0


class Lengths:
    """A dataset of given lengths."""

    def __init__(self, lengths):
        self.values, self.epoch = np.asarray(lengths), 0

    def __len__(self):
        return len(self.values)

    def lengths(self):
        return self.values

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_groups_are_alike_whole_and_reproducible():
    lengths = np.random.default_rng(0).integers(1, 500, size=1003)
    dataset = Lengths(lengths)
    sampler = EpochSampler(dataset, seed=1, group_size=8)
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    groups = lengths[order[:1000]].reshape(-1, 8)
    # Sorted among 400 samples, neighbours are within a few per cent of the range; unsorted ones are not.
    assert np.mean(groups.max(axis=1) - groups.min(axis=1)) < 15
    assert np.mean(np.ptp(lengths[:1000].reshape(-1, 8), axis=1)) > 300
    assert groups[0].max() == groups.max()  # a shortage of memory shows at once
    assert list(EpochSampler(dataset, seed=1, group_size=8)) == order
    assert list(EpochSampler(dataset, seed=2, group_size=8)) != order
    sampler.set_epoch(5)
    assert dataset.epoch == 5
    again = list(sampler)
    assert again != order
    assert sorted(again) == sorted(order)


def test_an_order_without_groups_and_of_few_samples():
    assert sorted(EpochSampler(Lengths(range(10)), seed=0)) == list(range(10))
    assert list(EpochSampler(Lengths(range(10)), seed=0)) != list(range(10))
    assert sorted(EpochSampler(Lengths([3, 1]), seed=0, group_size=8)) == [0, 1]
    assert list(EpochSampler(Lengths([]), seed=0, group_size=8)) == []
    with pytest.raises(ValueError, match="group_size"):
        EpochSampler(Lengths([1]), seed=0, group_size=0)


def test_the_trainer_orders_by_seed_epoch_and_length(tmp_path, model, dataset, processor, config):
    def order(**settings):
        arguments = MiniMindOTrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=4, **settings
        )
        collator = MiniMindODataCollator(processor, config)
        trainer = MiniMindOTrainer(model, arguments, train_dataset=dataset, data_collator=collator)
        return list(trainer._get_train_sampler())

    lengths = dataset.lengths()
    grouped, shuffled = order(seed=1), order(seed=1, train_sampling_strategy="random")

    def spread(order):
        return np.ptp(lengths[order].reshape(-1, 4), axis=1).mean()

    assert spread(grouped) < spread(shuffled)
    assert order(seed=1) == grouped
    assert order(seed=1, data_seed=2) != grouped


def test_what_is_evaluated_is_neither_masked_nor_packed(tmp_path, model, dataset, processor, config):
    """Figures equal those of every sample by itself."""
    arguments = MiniMindOTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=5, disable_tqdm=True
    )
    collator = MiniMindODataCollator(processor, config, packing=True, pack_length=300)
    trainer = MiniMindOTrainer(model, arguments, train_dataset=dataset, data_collator=collator)
    metrics = trainer.evaluate(dataset)
    assert trainer.data_collator is collator
    sums, counts = {"text": 0.0, "audio": torch.zeros(8)}, {"text": 0, "audio": torch.zeros(8)}
    alone = MiniMindODataCollator(processor, config, feature_masking=None)
    for index in range(len(dataset)):
        batch = alone([dataset[index]])
        with torch.no_grad():
            output = model.eval()(**batch)
        tokens, codes = (batch["labels"] != -100).sum(), (batch["audio_labels"] != -100).sum(dim=(0, 2))
        sums["text"] += output.text_loss * tokens
        sums["audio"] += output.codebook_losses * codes
        counts["text"] += tokens
        counts["audio"] += codes
    text, audio = sums["text"] / counts["text"], (sums["audio"] / counts["audio"]).mean()
    assert metrics["eval_text_loss"] == pytest.approx(float(text), abs=1e-4)
    assert metrics["eval_audio_loss"] == pytest.approx(float(audio), abs=1e-4)
    assert metrics["eval_loss"] == pytest.approx(float(text + audio), abs=1e-4)


LOSSES = ("loss", "text_loss", "audio_loss", "codebook_losses")


@pytest.mark.parametrize("pack_length", [None, 150, 1])
def test_packed_is_padded(model, dataset, processor, config, pack_length):
    samples = [dataset[index] for index in range(12)]
    padded = MiniMindODataCollator(processor, config, feature_masking=None)(samples)
    collator = MiniMindODataCollator(
        processor, config, feature_masking=None, packing=True, pack_length=pack_length, pad_to_multiple_of=8
    )
    packed = collator(samples)
    assert "attention_mask" not in packed
    assert packed["input_ids"].shape[1] % 8 == 0
    assert (packed["position_ids"] == 0).sum() >= 12
    rows = {None: 1, 1: 12}.get(pack_length, len(packed["input_ids"]))
    assert len(packed["input_ids"]) == rows <= 12
    with torch.no_grad():
        expected, found = model(**padded), model(**packed)
    for name in LOSSES:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    # Every sample's scores, wherever it lies: samples see neither each other nor the padding.
    order = [samples[0].row_id + index for index in range(12)]
    if pack_length is None:
        start = 0
        for row, index in enumerate(order):
            length = len(samples[row].input_ids)
            scores = found.audio_logits[0, :, start : start + length]
            torch.testing.assert_close(scores, expected.audio_logits[row, :, :length], rtol=0, atol=1e-4)
            start += length
            assert samples[row].row_id == index


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_gradients(model, dataset, processor, config, implementation):
    samples = [dataset[index] for index in range(6)]
    model.set_attn_implementation(implementation)
    model.train()
    gradients = []
    for packing in (False, True):
        collator = MiniMindODataCollator(processor, config, feature_masking=None, packing=packing)
        model.zero_grad()
        model(**collator(samples)).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    model.eval()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def make_sample(length, labelled_from=0):
    ids = torch.arange(length)
    codes = torch.ones((8, length), dtype=torch.long)
    return Sample(ids, ids.clone(), codes, codes.clone(), None, [], [])


def test_packing_fills_rows_with_the_longest_first(processor, config):
    collator = MiniMindODataCollator(processor, config, packing=True, pack_length=10)
    batch = collator([make_sample(length) for length in (3, 6, 4, 12, 7)])
    assert batch["input_ids"].shape == (3, 12)
    assert batch["position_ids"][0].tolist() == list(range(12))
    assert batch["position_ids"][1].tolist() == [*range(7), *range(3), 0, 1]
    assert batch["position_ids"][2].tolist() == [*range(6), *range(4), 0, 1]
    assert batch["input_ids"][1].tolist() == [*range(7), *range(3), 0, 0]
    assert batch["audio_codes"][1, 0, 10:].tolist() == [config.audio_pad_token] * 2
    # No first position is predicted from the sample before.
    assert batch["labels"][1].tolist() == [-100, 1, 2, 3, 4, 5, 6, -100, 1, 2, -100, -100]
    assert batch["audio_labels"][1, 5].tolist() == [-100, 1, 1, 1, 1, 1, 1, -100, 1, 1, -100, -100]


def test_bad_packing_is_refused(tmp_path, tiny_model, processor, config):
    with pytest.raises(ValueError, match="set `packing`"):
        MiniMindODataCollator(processor, config, pack_length=64)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MiniMindODataCollator(processor, config, packing=True, pack_length=0)
    model = tiny_model(audio_config=None, vision_config=None)
    model.config._attn_implementation = "flash_attention_2"
    arguments = MiniMindOTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    collator = MiniMindODataCollator(processor, config, packing=True, pack_length=64)
    with pytest.raises(ValueError, match="single row"):
        MiniMindOTrainer(model, arguments, train_dataset=[], data_collator=collator)


def test_workers_that_live_on_hear_of_the_epoch(mixed_parquet, processor, config):
    dataset = MiniMindODataset(mixed_parquet, processor, config, SampleSettings(augmentation=None))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, sampler=[3, 7, 11]
    )
    first = [sample.input_ids.tolist() for sample in loader]
    dataset.set_epoch(4)
    later = [sample.input_ids.tolist() for sample in loader]
    assert later == [dataset[index].input_ids.tolist() for index in (3, 7, 11)]
    assert first != later
