"""Outputs of the frozen encoders, computed once and memory-mapped: what they would compute again in every epoch."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from minimind_o_hf.files import new_file
from minimind_o_hf.modeling import MiniMindOForConditionalGeneration
from minimind_o_hf.processing import MiniMindOProcessor, load_audio
from minimind_o_hf.processing.image_minimind_o import load_image

from .rows import ROW_PAGES, MappedFiles, MappedRows

# One pass of an encoder: clips of 60 ms frames, padding included, or pictures.
BATCH_FRAMES = 4096
BATCH_PICTURES = 32
# What an interruption may cost, and how much is held in memory.
PART_BYTES = 64 * 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SCHEMA = pa.schema([("key", pa.binary(16)), ("rows", pa.int32()), ("states", pa.large_binary())])


def _key(data: bytes) -> bytes:
    """What an encoded clip or picture is known by: its content, whatever file and row it stands in."""
    return hashlib.blake2b(data, digest_size=16).digest()


class FeatureCache:
    """
    Reads the outputs of the frozen encoders from the memory-mapped files that [`cache_features`] wrote.

    Args:
        directory (`str` or `os.PathLike`): What [`cache_features`] returned as `directory`.

    Raises:
        ValueError: There is no cache there, or a file of it is damaged.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        try:
            settings = json.loads((self.directory / "cache.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.directory} holds no cached features ({error}): make them first.") from error
        self.dtype = DTYPES[settings["dtype"]]
        self._open()

    def _open(self):
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._places: dict[str, dict[bytes, int]] = {}
        self._mapped: dict[str, MappedFiles] = {}
        for kind in ("speech", "pictures"):
            parts = sorted(self.directory.glob(f"{kind}-*.arrow"))
            try:
                self._mapped[kind] = MappedFiles(parts)
            except (OSError, ValueError) as error:
                raise ValueError(f"The features in {self.directory} cannot be read: {error}") from error
            tables = list(map(_read_part, parts, self._mapped[kind].buffers))
            table = pa.concat_tables(tables or [SCHEMA.empty_table()])
            self._columns[kind] = table.column("states")
            self._places[kind] = {
                key: place
                for place, key in enumerate(key for part in tables for key in part.column("key").to_pylist())
            }
            self._columns[f"{kind}_rows"] = table.column("rows")

    def __getstate__(self) -> dict[str, Any]:
        # Loader workers that are spawned map the files themselves.
        return {"directory": self.directory, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Clips and pictures together."""
        return sum(len(places) for places in self._places.values())

    def _get(self, kind: str, data: bytes) -> torch.Tensor:
        place = self._places[kind].get(_key(data))
        if place is None:
            raise ValueError(
                f"{self.directory} has no features of a {len(data)} byte input ({kind}): the data has changed since "
                "they were cached. Run the caching again."
            )
        states = np.frombuffer(self._columns[kind][place].as_buffer(), dtype=np.uint8).copy()
        self._mapped[kind].count(len(states) + ROW_PAGES)
        return torch.from_numpy(states).view(self.dtype).view(self._columns[f"{kind}_rows"][place].as_py(), -1)

    def speech(self, recording: bytes) -> torch.Tensor:
        """
        The speech encoder's output for an encoded recording, `(num_frames, audio_hidden_size)`.

        Raises:
            ValueError: It is not in the cache.
        """
        return self._get("speech", recording)

    def picture(self, image: bytes) -> torch.Tensor:
        """
        The vision encoder's output for an encoded picture, `(image_token_len, image_hidden_size)`.

        Raises:
            ValueError: It is not in the cache.
        """
        return self._get("pictures", image)


def _read_part(part: Path, buffer: pa.Buffer) -> pa.Table:
    try:
        return pa.ipc.open_file(buffer).read_all()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{part} is damaged ({error}): remove it and cache the features again.") from error


def add_weights(digest: Any, model: torch.nn.Module | None) -> None:
    """Adds all weights of a model to a `hashlib` digest, byte for byte; nothing without one."""
    for name, tensor in sorted(model.state_dict().items()) if model is not None else ():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _fingerprint(model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor, dtype: str) -> str:
    """Changes with the encoders' weights and with what prepares their inputs."""
    digest = hashlib.sha256(dtype.encode())
    digest.update(processor.feature_extractor.to_json_string().encode())
    digest.update(processor.image_processor.to_json_string().encode())
    for tower in (model.audio_tower, model.vision_tower):
        add_weights(digest, tower)
    return digest.hexdigest()[:16]


def _inputs(rows: Iterable[Mapping[str, Any]], rank: int, world_size: int) -> Iterator[tuple[str, int, bytes]]:
    """Each recording of a question, and each first picture: its kind, its row and its encoded content."""
    for index, row in enumerate(rows):
        if index % world_size != rank:
            continue
        for recording in row.get("question_audios") or ():
            if recording:
                yield "speech", index, recording
        images = row.get("image_bytes") or ()
        image = images if isinstance(images, bytes) else next((image for image in images if image), None)
        if image:
            yield "pictures", index, image


class _Writer:
    """Collects one kind's inputs into batches for the encoder, and its outputs into parts."""

    def __init__(self, kind: str, directory: Path, rank: int, known: set[bytes], dtype: torch.dtype):
        self.kind, self.directory, self.rank, self.known, self.dtype = kind, directory, rank, known, dtype
        self.keys: list[bytes] = []
        self.inputs: list[Any] = []
        self.states: list[tuple[bytes, int, bytes]] = []

    def add(self, data: bytes, prepare: Callable[[bytes], Any]) -> None:
        key = _key(data)
        if key not in self.known:
            self.inputs.append(prepare(data))
            self.keys.append(key)
            self.known.add(key)

    def encode(self, encode: Callable[[list[Any]], list[torch.Tensor]]) -> None:
        if not self.inputs:
            return
        for key, states in zip(self.keys, encode(self.inputs), strict=True):
            content = states.to("cpu", self.dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self.states.append((key, len(states), content))
        self.keys, self.inputs = [], []
        if sum(len(content) for _, _, content in self.states) >= PART_BYTES:
            self.write()

    def write(self) -> None:
        if not self.states:
            return
        # Named by content: another process, or another run, never takes the same name for other features.
        name = hashlib.sha256(b"".join(key for key, _, _ in self.states)).hexdigest()[:16]
        table = pa.Table.from_arrays([pa.array(column) for column in zip(*self.states, strict=True)], schema=SCHEMA)
        with (
            new_file(self.directory / f"{self.kind}-{self.rank}-{name}.arrow") as temporary,
            pa.ipc.new_file(str(temporary), SCHEMA) as file,
        ):
            file.write_table(table, max_chunksize=1024)
        self.states = []


@torch.no_grad()
def cache_features(
    rows: Iterable[Mapping[str, Any]],
    model: MiniMindOForConditionalGeneration,
    processor: MiniMindOProcessor,
    directory: str | os.PathLike,
    dtype: str = "float32",
    rank: int = 0,
    world_size: int = 1,
) -> FeatureCache:
    """
    Runs the frozen encoders over all recordings of questions and all first pictures, and keeps what they return.

    Inputs are known by their content, and the folder by the encoders' weights: what is there already is not computed
    again, an interrupted run goes on, and other weights never read these features. Speech is taken as it is,
    without augmentation.

    Args:
        rows (iterable of `Mapping`):
            Rows of the original's schema, such as `MiniMindODataset.rows`; `question_audios` and `image_bytes` are
            read.
        model ([`MiniMindOForConditionalGeneration`]): With its encoders, on the device they are to run on.
        processor ([`MiniMindOProcessor`]): What prepares their inputs.
        directory (`str` or `os.PathLike`): Where the cache's folder is made.
        dtype (`str`, defaults to `"float32"`): `float32`, exact, or `bfloat16`, half the size.
        rank (`int`, defaults to 0), world_size (`int`, defaults to 1):
            The share of one of several processes. Each returns a cache of what is there when it ends; open it again,
            with [`FeatureCache`], when all have ended.

    Raises:
        ValueError: An input that cannot be decoded, with its row; an encoder that is needed and not there.
    """
    if dtype not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if isinstance(rows, (datasets.Dataset, MappedRows)):
        # Codes as Python lists would take longer to read than clips.
        names = [name for name in ("question_audios", "image_bytes") if name in rows.column_names]
        rows = rows.select_columns(names) if names else ()
    folder = Path(directory).expanduser() / _fingerprint(model, processor, dtype)
    with new_file(folder / "cache.json") as temporary:
        temporary.write_text(json.dumps({"dtype": dtype}), encoding="utf-8")
    present = FeatureCache(folder)
    was_training = model.training
    model.eval()

    def load(recording: bytes) -> np.ndarray:
        return load_audio(recording, target_rate=processor.feature_extractor.sampling_rate)

    def hear(clips: list[np.ndarray]) -> list[torch.Tensor]:
        outputs = processor.feature_extractor(clips, return_tensors="pt")
        mask = outputs["input_features_mask"]
        states = model.get_audio_features(outputs["input_features"].to(model.device), mask.to(model.device))
        return [row[:frames] for row, frames in zip(states, mask.sum(dim=1).tolist(), strict=True)]

    def look(pictures: list[Any]) -> list[torch.Tensor]:
        values = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return list(model.get_image_features(values.to(model.device)))

    speech, pictures = (
        _Writer(kind, folder, rank, set(present._places[kind]), DTYPES[dtype]) for kind in ("speech", "pictures")
    )
    try:
        for kind, index, data in tqdm(
            _inputs(rows, rank, world_size), unit="input", desc="Encoding", disable=None if rank == 0 else True
        ):
            try:
                if kind == "speech":
                    speech.add(data, load)
                else:
                    pictures.add(data, load_image)
            except (ValueError, OSError) as error:
                raise ValueError(f"Row {index} cannot be trained on: {error}") from error
            longest = max((processor.feature_extractor.num_frames(len(clip)) for clip in speech.inputs), default=0)
            if longest * len(speech.inputs) >= BATCH_FRAMES:
                speech.encode(hear)
            if len(pictures.inputs) >= BATCH_PICTURES:
                pictures.encode(look)
        speech.encode(hear)
        pictures.encode(look)
    finally:
        # What was computed is kept, whatever stopped the rest.
        speech.write()
        pictures.write()
        model.train(was_training)
    return FeatureCache(folder)


__all__ = ["FeatureCache", "add_weights", "cache_features"]
