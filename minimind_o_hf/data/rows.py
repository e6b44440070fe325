"""Rows of parquet files, in order or by index, in memory that does not grow with the files."""

import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features
from datasets.builder import Key
from datasets.packaged_modules.parquet.parquet import Parquet
from pyarrow import parquet

# What one step of reading a file decodes: some rows, as each may hold megabytes of sound and pictures.
BATCH_BYTES = 32 * 2**20
# What is read from a file at once.
BUFFER_BYTES = 2**20
# Pages read through a memory map count as the process's memory until they are given back: after so many.
MAP_BYTES = 128 * 2**20
# What the system maps beside a row's bytes: up to 64 KiB around each place that is read, one a buffer of a column.
ROW_PAGES = 2**20


class MappedFiles:
    """
    Memory-mapped files whose pages are given back from time to time.

    Args:
        paths (list of `str` or `os.PathLike`): The files; their buffers are in `buffers`.
    """

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self._maps, self._read = [], 0
        for path in paths:
            with open(path, "rb") as file:
                self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self.buffers = [pa.py_buffer(mapped) for mapped in self._maps]

    def count(self, size: int) -> None:
        """Says that so many bytes were read."""
        self._read += size
        if self._read > MAP_BYTES:
            self._read = 0
            # What is needed again comes from the system's cache of the file. Windows counts such pages otherwise.
            if hasattr(mmap, "MADV_DONTNEED"):
                for mapped in self._maps:
                    mapped.madvise(mmap.MADV_DONTNEED)


def open_parquet(path: str | os.PathLike) -> parquet.ParquetFile:
    """A parquet file to be read a little at a time."""
    # By default a whole row group is read at once, and what has been read is kept until the file is closed.
    return parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)


def read_metadata(path: str | os.PathLike) -> parquet.FileMetaData:
    """A file's metadata; `ValueError` with its name where it is no parquet file."""
    try:
        return parquet.read_metadata(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no readable parquet file: {error}") from error


def row_bytes(files: Sequence[parquet.FileMetaData]) -> int:
    """Mean size of a row, decompressed."""
    size = sum(file.row_group(group).total_byte_size for file in files for group in range(file.num_row_groups))
    return 1 + size // max(1, sum(file.num_rows for file in files))


def read_batches(path: str) -> Iterator[pa.RecordBatch]:
    """A parquet file from front to back, some rows at a time, whatever the size of its row groups."""
    with open_parquet(path) as file:
        # At least two: `datasets` would collect single rows until there are a thousand of them.
        batch_size = min(max(BATCH_BYTES // row_bytes([file.metadata]), 2), 1000)
        yield from file.iter_batches(batch_size=int(batch_size))


class _Parquet(Parquet):
    """What `load_dataset("parquet")` uses, which would hold a whole row group; the same cache, casts and locks."""

    def _generate_tables(self, files: list[str], row_groups_list: list) -> Iterator[tuple[Key, pa.Table]]:
        for part, path in enumerate(files):
            for number, batch in enumerate(read_batches(path)):
                table = pa.Table.from_batches([batch])
                for name, column in (self.info.features or {}).items():
                    if name not in table.column_names:
                        table = table.append_column(name, pa.nulls(len(table), column.pa_type))
                yield Key(part, number), self._cast_table(table)


def _common_features(paths: Sequence[str]) -> Features | None:
    """The columns of all files together; None where all have the same."""
    files = [read_metadata(path) for path in paths]
    if not sum(file.num_rows for file in files):
        raise ValueError(f"There are no rows in {', '.join(map(str, paths))}.")
    schemas = [file.schema.to_arrow_schema().remove_metadata() for file in files]
    if all(schema == schemas[0] for schema in schemas):
        return None
    try:
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))
    except pa.ArrowException as error:
        raise ValueError(f"{', '.join(map(str, paths))} cannot be read together: {error}") from error


class MappedRows(Sequence):
    """
    Rows by index, read through a memory map of the copy that `datasets` makes once in its cache.

    Args:
        paths (`list[str]`):
            Parquet files; they are one sequence of rows. A column that some of them lack is null in their rows.

    Raises:
        ValueError: Columns of the same name hold different things.
    """

    def __init__(self, paths: Sequence[str]):
        builder = _Parquet(data_files={"train": list(paths)}, features=_common_features(paths))
        builder.download_and_prepare()
        rows = builder.as_dataset("train")
        self.column_names: list[str] = rows.column_names
        self._files = [file["filename"] for file in rows.cache_files]
        self._open()

    def _open(self) -> None:
        self._mapped = MappedFiles(self._files)
        self._batches = [batch for buffer in self._mapped.buffers for batch in pa.ipc.open_stream(buffer)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers that are spawned map the files themselves.
        return {"column_names": self.column_names, "_files": self._files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def select_columns(self, names: Sequence[str]) -> "MappedRows":
        """The same rows with these columns alone; the others are not read."""
        selected = object.__new__(MappedRows)
        selected.__setstate__({"column_names": list(names), "_files": self._files})
        return selected

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def arrow(self, index: int) -> pa.RecordBatch:
        """One row as Arrow holds it, not copied: what is not looked at is not read."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"There is no row {index}: there are {len(self)}.")
        index %= len(self)
        place = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[place]
        row = batch.slice(index - int(self._ends[place]) + batch.num_rows, 1).select(self.column_names)
        self._mapped.count(row.nbytes + ROW_PAGES)
        return row

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One row as Python objects."""
        return self.arrow(index).to_pylist()[0]


__all__ = ["MappedFiles", "MappedRows", "open_parquet", "read_batches", "read_metadata", "row_bytes"]
