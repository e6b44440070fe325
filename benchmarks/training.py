"""What training costs: our batches against padding every sample to 512, the input pipeline, and cached features.

    python benchmarks/training.py              # float32 and bfloat16, 30 minutes on two cores
    python benchmarks/training.py --quick      # toy size, a minute

The model has the released size and random weights, a step is forward, backward and AdamW. The 500 samples are
conversations with spoken answers of log-normal lengths (median 8 s, a tenth under 4 s, a tenth over 17 s), built,
grouped and collated by the package. `padded to 512` is the original's way, all positions through the heads; a step of
it costs the same whatever a batch holds, so a few are timed. All figures of a table come from the same process, and
its `ratio` is against the first row.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
from transformers import FunAsrNanoEncoderConfig

from minimind_o_hf import MiniMindOConfig, MiniMindOForConditionalGeneration, MiniMindOProcessor
from minimind_o_hf.data import (
    EpochSampler,
    FeatureMasking,
    MiniMindODataCollator,
    MiniMindODataset,
    SampleSettings,
    SpeechAugmentation,
    cache_features,
)
from minimind_o_hf.packaged import default_checkpoint
from minimind_o_hf.presets import TOKENIZER_TEXT

MAX_LENGTH = 512
BATCH_SIZE = 4
PACK_SAMPLES = 8
FRAMES_PER_WORD = 5  # 150 words a minute


def write_data(path: Path, config: MiniMindOConfig, count: int, spoken_questions: bool = False) -> None:
    """Conversations of realistic mixed lengths, with random codes."""
    random = np.random.default_rng(0)
    words = TOKENIZER_TEXT.split()
    rows = []
    for _ in range(count):
        spoken = int(np.clip(random.lognormal(np.log(20), 0.6), 2, 90))
        asked = int(np.clip(random.lognormal(np.log(12), 0.5), 3, 60))
        frames = spoken * FRAMES_PER_WORD
        question, answer = (" ".join(random.choice(words, size)) for size in (asked, spoken))
        row = {
            "conversations": json.dumps(
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ),
            "answer_audios": [random.integers(config.audio_codebook_size, size=8 * frames).tolist()],
            "ref_audios": random.integers(config.audio_codebook_size, size=8 * 90).tolist(),
            "spk_emb": random.standard_normal(config.spk_emb_size).tolist(),
        }
        if spoken_questions:
            buffer = io.BytesIO()
            noise = 0.1 * random.standard_normal(int(16000 * asked * FRAMES_PER_WORD * 0.08))
            soundfile.write(buffer, noise, 16000, format="FLAC")
            row["question_audios"] = [buffer.getvalue()]
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


class PadTo:
    """Pads every sample to one length, as the original."""

    def __init__(self, collator: MiniMindODataCollator, length: int):
        self.collator = MiniMindODataCollator(
            collator.processor, collator.config, pad_to_multiple_of=length, feature_masking=None
        )

    def __call__(self, samples):
        return self.collator(samples)


class Stepper:
    """Forward, backward and optimiser of one batch, in seconds."""

    def __init__(self, model: MiniMindOForConditionalGeneration, dtype: torch.dtype):
        self.model = model.train()
        self.dtype = dtype
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def __call__(self, batch: dict[str, torch.Tensor], **options) -> float:
        device = self.model.device
        batch = {name: value.to(device) for name, value in batch.items()}
        self.synchronize()
        begin = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(**batch, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def batches(dataset: MiniMindODataset, order: list[int], size: int):
    for start in range(0, len(order) - size + 1, size):
        yield [dataset[index] for index in order[start : start + size]]


def measure_collation(step: Stepper, dataset: MiniMindODataset, collator: MiniMindODataCollator, few: int) -> None:
    """Samples a second of each way to make batches of the same samples."""
    shuffled = list(EpochSampler(dataset, seed=0))
    grouped = list(EpochSampler(dataset, seed=0, group_size=BATCH_SIZE))
    packer = MiniMindODataCollator(
        collator.processor, collator.config, feature_masking=None, packing=True, pack_length=MAX_LENGTH
    )
    everywhere = {"skip_logits": False, "return_predictions": False}
    labelled = {"return_predictions": True}
    ways = [
        ("padded to 512, heads everywhere", shuffled, PadTo(collator, MAX_LENGTH), BATCH_SIZE, everywhere, few),
        ("padded to 512, heads at labels", shuffled, PadTo(collator, MAX_LENGTH), BATCH_SIZE, labelled, few),
        ("padded to the longest, heads at labels", shuffled, collator, BATCH_SIZE, labelled, None),
        ("grouped by length, heads at labels", grouped, collator, BATCH_SIZE, labelled, None),
        ("packed into rows of 512, heads at labels", shuffled, packer, PACK_SAMPLES, labelled, None),
    ]
    print(
        f"\n{step.dtype}: {len(dataset)} samples, mean length {np.mean(dataset.lengths()):.0f}".replace("torch.", "")
    )
    print("| batches | samples/s | positions a sample | ratio |\n|---|---|---|---|")
    first = None
    for name, order, collate, size, options, limit in ways:
        times, positions, samples = [], 0, 0
        for index, items in enumerate(itertools.islice(batches(dataset, order, size), limit and limit + 1)):
            batch = collate(items)
            seconds = step(batch, **options)
            if index:  # the first one allocates
                times.append(seconds)
                positions += batch["input_ids"].numel()
                samples += size
        rate = samples / sum(times)
        first = first or rate
        print(f"| {name} | {rate:.2f} | {positions / samples:.0f} | {rate / first:.2f} × |", flush=True)


def measure_input(dataset: MiniMindODataset, collator: MiniMindODataCollator, name: str, seconds: float) -> None:
    """Samples a second that one core builds and collates."""
    order = list(EpochSampler(dataset, seed=0, group_size=BATCH_SIZE))
    begin, samples = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for items in batches(dataset, order[: 10 * BATCH_SIZE], BATCH_SIZE):
            collator(items)
            samples += BATCH_SIZE
    print(f"| {name} | {samples / (time.perf_counter() - begin):.0f} |", flush=True)


def measure_waiting(step: Stepper, dataset: MiniMindODataset, collator: MiniMindODataCollator, steps: int) -> None:
    """The share of the time of training steps in which no step runs, since its batch is not there yet."""
    for workers in (0, 1):
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=BATCH_SIZE,
            sampler=EpochSampler(dataset, seed=0, group_size=BATCH_SIZE),
            collate_fn=collator,
            num_workers=workers,
        )
        iterator = iter(loader)
        step(next(iterator))
        waited = computed = 0.0
        for _ in range(steps):
            begin = time.perf_counter()
            batch = next(iterator)
            waited += time.perf_counter() - begin
            computed += step(batch)
        print(f"| {workers} | {waited / (waited + computed):.2%} |", flush=True)


def measure_caching(step: Stepper, data: Path, collator: MiniMindODataCollator, few: int) -> None:
    """A step on speech input with the encoder, and with its outputs read from the cache."""
    processor, config = collator.processor, collator.config
    settings = SampleSettings.deterministic(MAX_LENGTH)
    plain = MiniMindODataset(data, processor, config, settings)
    begin = time.perf_counter()
    cache = cache_features(plain.rows, step.model, processor, data.parent / "cache")
    took = time.perf_counter() - begin
    cached = MiniMindODataset(data, processor, config, settings, features=cache)
    order = list(EpochSampler(plain, seed=0, group_size=BATCH_SIZE))
    times: dict[str, list[float]] = {"encoder in every step": [], "cached": []}
    for index in range(few + 1):
        for name, source in (("encoder in every step", plain), ("cached", cached)):
            begin = time.perf_counter()
            items = [source[row] for row in order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]]
            batch = collator(items)
            loading = time.perf_counter() - begin
            seconds = step(batch)
            if index:
                times[name].append(loading + seconds)
    print("| features | s a step | ratio |\n|---|---|---|")
    means = {name: statistics.mean(values) for name, values in times.items()}
    for name, value in means.items():
        print(f"| {name} | {value:.2f} | {means['encoder in every step'] / value:.2f} × |")
    size = sum(part.stat().st_size for part in cache.directory.iterdir()) / 2**20
    print(f"\nCached once: {len(cache)} clips in {took:.1f} s, {size:.1f} MiB.", flush=True)


def build(quick: bool, with_encoder: bool, device: str) -> MiniMindOForConditionalGeneration:
    torch.manual_seed(0)
    if quick:
        return MiniMindOForConditionalGeneration.from_pretrained(default_checkpoint()).to(device)
    config = MiniMindOConfig(audio_config=FunAsrNanoEncoderConfig() if with_encoder else None)
    return MiniMindOForConditionalGeneration(config).to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size, few steps")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--skip-collation", action="store_true", help="measure the rest alone")
    parser.add_argument("--few", type=int, default=6, help="steps of what costs the same every time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    samples, few = (60, 2) if options.quick else (options.samples, options.few)
    processor = MiniMindOProcessor.from_pretrained(default_checkpoint(), load_audio_tokenizer=False)
    print(f"device {options.device}, {torch.get_num_threads()} threads, batch {BATCH_SIZE}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for dtype in options.dtypes:
            model = build(options.quick, False, options.device)
            write_data(folder / "t2a.parquet", model.config, samples)
            settings = SampleSettings.deterministic(MAX_LENGTH, swap_codes=0.05, swap_text=0.05)
            dataset = MiniMindODataset(folder / "t2a.parquet", processor, model.config, settings)
            collator = MiniMindODataCollator(processor, model.config, feature_masking=None)
            step = Stepper(model, getattr(torch, dtype))
            if not options.skip_collation:
                measure_collation(step, dataset, collator, few)

        print("\nShare of the time spent waiting for data\n| loader workers | waiting |\n|---|---|")
        measure_waiting(step, dataset, collator, few * 2)

        model = build(options.quick, True, options.device)
        write_data(folder / "a2a.parquet", model.config, samples // 5, spoken_questions=True)
        spoken = MiniMindODataset(
            folder / "a2a.parquet",
            processor,
            model.config,
            SampleSettings(MAX_LENGTH, augmentation=SpeechAugmentation()),
        )
        print("\nInput pipeline, one core\n| samples | samples/s |\n|---|---|")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        seconds = 1 if options.quick else 8
        measure_input(dataset, collator, "text in, speech out", seconds)
        augmenting = MiniMindODataCollator(processor, model.config, feature_masking=FeatureMasking())
        measure_input(spoken, augmenting, "speech in (decoded, augmented, filter banks), speech out", seconds)
        torch.set_num_threads(threads)

        print("\nCached features, speech in, float32")
        measure_caching(Stepper(model, torch.float32), folder / "a2a.parquet", collator, few)


if __name__ == "__main__":
    main()
