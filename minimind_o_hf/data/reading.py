"""Reading conversations from parquet files, map-style or streaming, as samples."""

import copy
import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node

from minimind_o_hf.modeling import MiniMindOConfig
from minimind_o_hf.processing import MiniMindOProcessor

from .features import FeatureCache
from .lengths import LengthEstimates
from .rows import MappedRows, read_batches, read_metadata, row_bytes
from .samples import Sample, SampleSettings, build_sample, sample_generator

# What the shuffle buffer of one process may hold.
SHUFFLE_BYTES = 128 * 2**20


def _paths(files: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    patterns = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    paths = [path for pattern in patterns for path in (sorted(glob.glob(str(pattern))) or [str(pattern)])]
    missing = [path for path in paths if not os.path.isfile(path)]
    if not paths or missing:
        raise FileNotFoundError(f"No such parquet file: {', '.join(missing) or files!r}.")
    return paths


def _numbered_rows(paths: list[str], offsets: list[int]) -> Iterator[dict]:
    """Rows with their index over all files: `datasets` counts anew in each process."""
    for path, offset in zip(paths, offsets, strict=True):
        index = offset
        for batch in read_batches(path):
            for row in range(batch.num_rows):
                # A copy: a slice would keep its whole batch in the shuffle buffer. As Arrow holds it: codes as Python
                # integers are several times as large.
                yield {"row": batch.take([row]), "index": index}
                index += 1


class MiniMindODataset(torch.utils.data.Dataset):
    """
    Conversations in parquet files as samples, by index. Rows stay on disk, memory-mapped ([`MappedRows`]).

    Args:
        files (`str`, `os.PathLike` or a list of them): Parquet files, or patterns of their names.
        processor ([`MiniMindOProcessor`]), config ([`MiniMindOConfig`]), settings ([`SampleSettings`]):
            See [`build_sample`].
        seed (`int`, defaults to 0): With the epoch and the index, what every random choice follows from.
        features ([`FeatureCache`], *optional*): The encoders' outputs, in place of clips and pictures.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        processor: MiniMindOProcessor,
        config: MiniMindOConfig,
        settings: SampleSettings | None = None,
        seed: int = 0,
        features: FeatureCache | None = None,
    ):
        self.rows = MappedRows(_paths(files))
        self.processor, self.config = processor, config
        self.settings = settings or SampleSettings()
        self.seed, self.features = seed, features
        # In shared memory: loader workers that live through several epochs hear of the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._estimates: LengthEstimates | None = None

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int):
        """Makes other random choices than in the epochs before; the same again after a restart."""
        self._epoch.fill_(epoch)

    def lengths(self) -> np.ndarray:
        """
        About how long each sample of the present epoch is, in positions, `(len(self),)`: what batches of similar
        lengths are made by. Texts are counted in characters and recordings by their headers; nothing is decoded.
        """
        if self._estimates is None:
            self._estimates = LengthEstimates(self.rows, self.processor, self.config)
        return self._estimates.of_epoch(self.settings, self.seed, self.epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        """Builds sample `index` of the present epoch; a row that cannot be used is a `ValueError` that names it."""
        return _build(self, self.rows[index], index, self.epoch)


class MiniMindOIterableDataset(torch.utils.data.IterableDataset):
    """
    The same, read from front to back: for files too many or too large to index. Each of `world_size` processes reads
    its own rows.

    Args:
        files, processor, config, settings, seed, features: As [`MiniMindODataset`].
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1):
            This process and how many there are. With [`MiniMindOTrainer`], leave them out: its loader gives each
            process its batches of what all of them read.
        shuffle_buffer (`int`, defaults to 0): Rows held back to be drawn from at random; 0 keeps the order. Fewer
            where rows are so large that they would take more than 128 MiB, in each process that reads.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        processor: MiniMindOProcessor,
        config: MiniMindOConfig,
        settings: SampleSettings | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 0,
        features: FeatureCache | None = None,
    ):
        paths = _paths(files)
        metadata = [read_metadata(path) for path in paths]
        sizes = [file.num_rows for file in metadata]
        offsets = [sum(sizes[:part]) for part in range(len(sizes))]
        # Lists are split over processes and loader workers; a row's number, and so its choices, does not depend on it.
        rows = IterableDataset.from_generator(_numbered_rows, gen_kwargs={"paths": paths, "offsets": offsets})
        if shuffle_buffer:
            fitting = max(1, SHUFFLE_BYTES // row_bytes(metadata))
            rows = rows.shuffle(seed=seed, buffer_size=min(shuffle_buffer, fitting))
        self.rows = split_dataset_by_node(rows, rank, world_size)
        self.processor, self.config = processor, config
        self.settings = settings or SampleSettings()
        self.seed, self.epoch, self.features = seed, 0, features
        # Whether samples are only built when the collator gets them: what another process trains on is then read, but
        # not decoded.
        self.is_lazy = False
        # Whether the epoch after the last row begins at once: for a trainer that counts steps, not epochs.
        self.repeats = False

    def set_epoch(self, epoch: int):
        """Makes other random choices, and another order, than in the epochs before; the same again after a restart."""
        self.epoch = epoch
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator["Sample | PendingSample"]:
        epoch = self.epoch
        while True:
            rows = copy.copy(self.rows)
            rows._epoch = torch.tensor(epoch)  # the one that `datasets` keeps is shared by all workers
            is_empty = True
            for row in rows:
                is_empty = False
                sample = PendingSample(self, row["row"], row["index"], epoch)
                yield sample if self.is_lazy else sample.build()
            if not self.repeats or is_empty:
                return
            epoch += 1


@dataclass
class PendingSample:
    """A row that has been read and not yet made a sample."""

    dataset: MiniMindOIterableDataset
    row: pa.RecordBatch
    index: int
    epoch: int

    def build(self) -> Sample:
        return _build(self.dataset, self.row.to_pylist()[0], self.index, self.epoch)


def _build(dataset: MiniMindODataset | MiniMindOIterableDataset, row: dict, index: int, epoch: int) -> Sample:
    random = sample_generator(dataset.seed, epoch, index)
    try:
        sample = build_sample(row, dataset.processor, dataset.config, dataset.settings, random, dataset.features)
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(f"Row {index} cannot be trained on: {error}") from error
    sample.row_id = index
    return sample


__all__ = ["MiniMindODataset", "MiniMindOIterableDataset", "PendingSample"]
