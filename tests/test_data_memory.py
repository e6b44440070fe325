"""Memory while an epoch is read: it does not grow with the files."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

NUM_ROWS = 2000
CLIP_SECONDS, CLIP_RATE = 1.3, 96_000  # in stereo: 500 kB that decode fast
LIMIT_MB = 600

# Reads one epoch, each sample built, while a thread looks at the memory of this process and of its workers.
CHILD = """
import json, os, sys, threading
import torch
from minimind_o_hf import MiniMindOConfig, MiniMindOFeatureExtractor, MiniMindOProcessor
from minimind_o_hf.data import MiniMindODataset, MiniMindOIterableDataset
from minimind_o_hf.presets import build_tokenizer
from minimind_o_hf.processing.processing_minimind_o import default_image_processor

path, mode, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
processor = MiniMindOProcessor(MiniMindOFeatureExtractor(), build_tokenizer(), default_image_processor())
config = MiniMindOConfig(vocab_size=len(processor.tokenizer))

def processes():
    tasks = f"/proc/{os.getpid()}/task"
    yield os.getpid()
    for task in os.listdir(tasks):
        with open(f"{tasks}/{task}/children", encoding="ascii") as file:
            yield from map(int, file.read().split())

def resident(process):
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        sizes = [int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS")]
    return sizes[0] if sizes else 0

start, peaks, done = resident(os.getpid()), {}, threading.Event()

def watch():
    while not done.wait(0.01):
        try:
            for process in processes():
                peaks[process] = max(peaks.get(process, 0), resident(process))
        except OSError:
            pass  # it has ended

watcher = threading.Thread(target=watch)
watcher.start()
try:
    if mode == "map":
        dataset = MiniMindODataset(path, processor, config)
    else:
        dataset = MiniMindOIterableDataset(path, processor, config, shuffle_buffer=1000 if mode == "shuffle" else 0)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=8, shuffle=mode == "map", num_workers=workers, collate_fn=list
    )
    rows = sorted(sample.row_id for batch in loader for sample in batch)
finally:
    done.set()
    watcher.join()
print(json.dumps({"growth": max(peaks.values()) - start, "processes": len(peaks), "rows": rows}))
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory):
    """A gigabyte: recordings of noise, in one row group, as writers make by default."""
    folder = tmp_path_factory.mktemp("large")
    random = np.random.default_rng(0)
    schema = pa.schema(
        {
            "conversations": pa.string(),
            "question_audios": pa.list_(pa.binary()),
            "answer_audios": pa.list_(pa.list_(pa.int64())),
            "ref_audios": pa.list_(pa.int64()),
            "spk_emb": pa.list_(pa.float32()),
        }
    )

    def row(index: int) -> dict:
        noise = random.integers(-9000, 9000, (int(CLIP_SECONDS * CLIP_RATE), 2), dtype=np.int16)
        soundfile.write(folder / "clip.wav", noise, CLIP_RATE)
        return {
            "conversations": json.dumps(
                [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Answer {index}."}]
            ),
            "question_audios": [(folder / "clip.wav").read_bytes()],
            "answer_audios": [random.integers(0, 2048, 8 * 20).tolist()],
            "ref_audios": random.integers(0, 2048, 8 * 10).tolist(),
            "spk_emb": random.normal(size=192).tolist(),
        }

    tables = [
        pa.Table.from_pylist([row(index) for index in range(start, start + 100)], schema)
        for start in range(0, NUM_ROWS, 100)
    ]
    pq.write_table(pa.concat_tables(tables), folder / "large.parquet")
    assert (folder / "large.parquet").stat().st_size > 0.95e9
    yield folder / "large.parquet"
    (folder / "large.parquet").unlink()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(("mode", "workers"), [("map", 0), ("map", 2), ("stream", 0), ("shuffle", 0)])
def test_a_gigabyte_is_read_in_little_memory(large_file, tmp_path, mode, workers):
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", CHILD, str(large_file), mode, str(workers)],
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert outcome.returncode == 0, outcome.stderr
    measured = json.loads(outcome.stdout.splitlines()[-1])
    assert measured["rows"] == list(range(NUM_ROWS))
    assert measured["processes"] >= 1 + workers
    assert measured["growth"] < LIMIT_MB
