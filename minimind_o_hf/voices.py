"""Voices as things to make, keep and share: one in a file of its own, or many in a library."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import MimiModel

from .files import new_file
from .processing import MiniMindOProcessor, load_audio
from .processing.audio_minimind_o import AudioSource, read_bytes
from .processing.voices_minimind_o import PARTS, check_voice, check_voice_name, voice_tensors, weights_id
from .recordings import prepare_recording

if TYPE_CHECKING:
    from .data.building import SpeakerEncoder

NOTES = (
    *("name", "language", "description", "licence", "consent"),
    *("source_hash", "codec", "speaker_encoder", "created"),
)
# One key in a file's header: safetensors writes several in any order, and the same voice should give the same bytes.
VOICE_KEY = "minimind_o_voice"
LIBRARY_KEY = "minimind_o_voices"
MAX_FRAMES = 300  # of reference codes: 24 s
EMBEDDING_SIZE = 192
MIN_STATEMENT = 8  # characters: "yes" states nothing
LOCK_SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Voice(Mapping[str, Any]):
    """
    A voice, and what is known of it. It is passed wherever the processor takes a voice.

    Args:
        ref_codes (`torch.LongTensor` of shape `(8, num_frames)`, *optional*):
            Codes of a recording of the voice, 12.5 frames/s.
        spk_emb (`torch.FloatTensor` of shape `(192,)`, *optional*):
            Its speaker embedding. One of the two at least is needed.
        name (`str`, *optional*):
            Printable, without '.', '/' and '\\'.
        language, description, licence (`str`, *optional*):
            For people.
        consent (`str`, *optional*):
            Who agreed to what.
        source_hash (`str`, *optional*):
            SHA-256 of the recording, or of the file that the voice was imported from.
        codec, speaker_encoder (`str`, *optional*):
            What made the codes and the embedding: a `weights_id`, which the processor compares, or a name.
        created (`str`, *optional*):
            Date and time, ISO 8601.

    Raises:
        ValueError: A part of a wrong shape, dtype or range, neither of the two, or notes that are no strings.

    Example:

    ```python
    >>> from minimind_o_hf import Voice

    >>> voice = Voice.from_audio("me.wav", consent="My own voice, for my own use.", processor=processor, name="me")
    >>> voice.save("me.safetensors")
    >>> inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, voice=voice)
    ```
    """

    ref_codes: torch.Tensor | None = None
    spk_emb: torch.Tensor | None = None
    name: str = ""
    language: str = ""
    description: str = ""
    licence: str = ""
    consent: str = ""
    source_hash: str = ""
    codec: str = ""
    speaker_encoder: str = ""
    created: str = ""

    def __post_init__(self):
        for name, note in self.notes.items():
            if not isinstance(note, str):
                raise ValueError(f"`{name}` of a voice must be a string, got {note!r}")
        if self.name:
            check_voice_name(self.name)
        for part, tensor in check_voice(self).items():
            # A copy: a voice does not change with what it was made of.
            object.__setattr__(self, part, tensor.clone())

    # ---------------------------------------------------------------- a mapping, as the processor reads it

    def _mapping(self) -> dict[str, Any]:
        tensors = {part: getattr(self, part) for part in PARTS if getattr(self, part) is not None}
        return tensors | {key: getattr(self, key) for key in ("name", "codec") if getattr(self, key)}

    def __getitem__(self, key: str) -> Any:
        return self._mapping()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping())

    def __len__(self) -> int:
        return len(self._mapping())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Voice):
            return NotImplemented
        own, others = self._mapping(), other._mapping()
        return (
            self.notes == other.notes
            and own.keys() == others.keys()
            and all(torch.equal(own[part], others[part]) for part in PARTS if part in own)
        )

    @property
    def notes(self) -> dict[str, str]:
        """What is known of it: everything but the tensors."""
        return {name: getattr(self, name) for name in NOTES}

    # ---------------------------------------------------------------- making

    @classmethod
    def from_audio(
        cls,
        audio: AudioSource,
        consent: str | None = None,
        *,
        processor: MiniMindOProcessor | None = None,
        codec: MimiModel | None = None,
        speaker_encoder: "str | os.PathLike | SpeakerEncoder | None" = None,
        speed: float = 1.5,
        sampling_rate: float | None = None,
        **notes: Any,
    ) -> "Voice":
        """
        Clones the voice of a recording.

        The recording is sped up at the same pitch, checked, and encoded: its first 24 s to codes, all of it to an
        embedding.

        Args:
            audio (`str`, `os.PathLike`, `bytes`, `np.ndarray`, `torch.Tensor` or `list[float]`):
                What `load_audio` reads: a file, a URL, its bytes, or samples, mono or not, at any rate.
            consent (`str`):
                Who the speaker is and that they agree: without this statement there is no voice.
            processor ([`MiniMindOProcessor`], *optional*), codec ([`MimiModel`], *optional*):
                What makes the codes; without, the voice has an embedding alone.
            speaker_encoder (`str`, `os.PathLike` or [`SpeakerEncoder`], *optional*):
                CAM++, which makes the embedding; without, the voice has codes alone.
            speed (`float`, *optional*, defaults to 1.5):
                From 0.5 to 3; 1 leaves the recording as it is.
            sampling_rate (`float`, *optional*):
                Rate in Hz of samples passed as an array; the codec's (24 kHz) where omitted.
            notes (`str`, *optional*):
                `name`, `language`, `description` and `licence` of the voice.

        Raises:
            ValueError: No statement, nothing to encode with, or a recording under 1.8 s or over 300 s after the
                speed-up, too quiet, too noisy, clipped or not finite.
            OSError: The recording cannot be read.
        """
        consent = _checked_statement(consent, "consent")
        if codec is None and processor is not None:
            codec = processor.audio_tokenizer
        if codec is None and speaker_encoder is None:
            raise ValueError(
                "a voice is made of codes, of an embedding, or of both: pass a `processor` with its codec, a "
                "`codec`, or a `speaker_encoder`"
            )
        if made := notes.keys() & {"source_hash", "codec", "speaker_encoder", "created", *PARTS}:
            raise ValueError(f"{sorted(made)} of a cloned voice come from the recording: leave them out")
        rate = 24000 if codec is None else codec.config.sampling_rate
        waveform, digest = _read_recording(audio, sampling_rate, rate)
        waveform = prepare_recording(waveform, rate, speed)
        # Not at the top: it brings what training data is read with.
        from .data.building import SpeakerEncoder, encode_speech

        parts: dict[str, Any] = {}
        if codec is not None:
            begin = waveform[: MAX_FRAMES * round(rate / codec.config.frame_rate)]
            (codes,) = encode_speech(codec, [begin], 8 if processor is None else processor.num_codebooks)
            parts |= {"ref_codes": torch.from_numpy(codes), "codec": weights_id(codec)}
        if speaker_encoder is not None:
            if not isinstance(speaker_encoder, SpeakerEncoder):
                speaker_encoder = SpeakerEncoder(os.fspath(speaker_encoder), EMBEDDING_SIZE)
            parts |= {"spk_emb": speaker_encoder(waveform, rate), "speaker_encoder": weights_id(speaker_encoder.model)}
        return cls(**parts, **notes, consent=consent, source_hash=digest, created=_now())

    def blend(self, other: "Voice", weight: float = 0.5, name: str = "", keep_codes: bool = False) -> "Voice":
        """
        A voice between two: their embeddings, added with weights.

        The sum of two embeddings that point apart is shorter than either, and the model has seen none so short. So it
        is stretched to the weighted mean of their norms.

        Args:
            other ([`Voice`]): The other voice.
            weight (`float`, *optional*, defaults to 0.5): Its share, from 0 to 1.
            name (`str`, *optional*): Name of the new voice.
            keep_codes (`bool`, *optional*, defaults to `False`):
                Whether it keeps the reference codes of the heavier one (of this one, where both weigh the same). They
                pull it towards that voice; codes of two voices cannot be mixed.

        Raises:
            ValueError: A voice without an embedding, embeddings of different encoders or of opposite directions, or a
                weight out of range.
        """
        if not 0 <= weight <= 1:
            raise ValueError(f"`weight` must be from 0 to 1, got {weight}")
        names = f"{self.name or 'the first voice'!r} and {other.name or 'the second voice'!r}"
        if self.spk_emb is None or other.spk_emb is None:
            raise ValueError(f"both {names} need a speaker embedding to be blended: codes cannot be mixed")
        if self.speaker_encoder and other.speaker_encoder and self.speaker_encoder != other.speaker_encoder:
            raise ValueError(
                f"the embeddings of {names} come from different speaker encoders, {self.speaker_encoder} and "
                f"{other.speaker_encoder}: clone one of them again"
            )
        mixed = torch.lerp(self.spk_emb, other.spk_emb, weight)
        norm = (1 - weight) * self.spk_emb.norm() + weight * other.spk_emb.norm()
        if mixed.norm() < 1e-3 * norm:
            raise ValueError(f"the embeddings of {names} point in opposite directions: nothing lies between them")
        heavier = other if weight > 0.5 else self
        shares = [(self, 1 - weight), (other, weight)]

        def both(note: str) -> str:
            values = [(getattr(voice, note) or "not stated", voice.name or "unnamed") for voice, _ in shares]
            same = values[0][0] == values[1][0]
            return getattr(self, note) if same else "; ".join(f"{who}: {value}" for value, who in values)

        return Voice(
            ref_codes=heavier.ref_codes if keep_codes else None,
            spk_emb=mixed * (norm / mixed.norm()),
            name=name,
            language=both("language"),
            description="blend: " + ", ".join(f"{share:.0%} {voice.name or 'unnamed'}" for voice, share in shares),
            licence=both("licence"),
            consent=both("consent"),
            codec=heavier.codec if keep_codes else "",
            speaker_encoder=self.speaker_encoder or other.speaker_encoder,
            created=_now(),
        )

    # ---------------------------------------------------------------- hearing

    def to_audio(self, processor: MiniMindOProcessor) -> torch.Tensor:
        """
        The reference codes as sound.

        Args:
            processor ([`MiniMindOProcessor`]): With its codec.

        Returns:
            `torch.FloatTensor` of shape `(1920 * num_frames,)`: a waveform in [-1, 1] at 24 kHz.

        Raises:
            ValueError: The voice has no codes, they are another codec's, or the processor has none.
        """
        codes = check_voice(
            self,
            processor.num_codebooks,
            processor.audio_codebook_size,
            processor.speaker_embedding_size,
            codec=processor.audio_tokenizer,
        ).get("ref_codes")
        if codes is None:
            raise ValueError(f"voice {self.name!r} has an embedding alone, and no codes to be heard")
        return processor.decode_audio(codes[None])[0]

    def play(self, processor: MiniMindOProcessor) -> None:
        """Plays the reference codes through the loudspeaker, with `sounddevice`; `OSError` where it cannot."""
        waveform = self.to_audio(processor).numpy()
        codec: Any = processor.audio_tokenizer
        try:
            import sounddevice  # pyright: ignore[reportMissingImports]
        except (ImportError, OSError) as error:
            raise OSError(
                f"playing needs `pip install sounddevice` and PortAudio ({error}); or write a file (`--out FILE.wav`)"
            ) from error
        try:
            sounddevice.play(waveform, codec.config.sampling_rate, blocking=True)
        except sounddevice.PortAudioError as error:
            raise OSError(f"there is nothing to play on ({error}): write a file (`--out FILE.wav`)") from error

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike, overwrite: bool = False) -> None:
        """
        Writes the voice to one safetensors file, all or nothing.

        Raises:
            FileExistsError: `path` is there already, and `overwrite` was not passed.
        """
        tensors = {part: self[part].contiguous() for part in PARTS if part in self}
        _write_file(Path(path), tensors, {VOICE_KEY: _to_json(self.notes)}, overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Voice":
        """
        Reads what `save` wrote.

        Raises:
            OSError: `path` is missing, truncated, or no safetensors file.
            ValueError: It holds something else than one voice.
        """
        tensors, metadata = _read_file(path)
        if LIBRARY_KEY in metadata or any(key not in PARTS for key in tensors):
            raise ValueError(f"{path} holds several voices: open it with `VoiceLibrary`")
        if not tensors:
            raise ValueError(f"{path} holds no voice")
        return _voice_of_file(tensors, _from_json(metadata.get(VOICE_KEY), path), path)


class VoiceLibrary:
    """
    Many voices in one safetensors file, which several processes may change at once.

    The tensors are named as in a checkpoint's `voices.safetensors`, so that either is read as the other. Whoever
    changes the file holds a lock (`.NAME.lock` beside it), reads it, and writes it whole.

    Args:
        path (`str` or `os.PathLike`, *optional*):
            The file, made when the first voice is added; [`default_library`] where omitted.

    Example:

    ```python
    >>> from minimind_o_hf import VoiceLibrary

    >>> library = VoiceLibrary("voices.safetensors")
    >>> library.add(voice, "me")
    >>> library.names()
    ['me']
    ```
    """

    def __init__(self, path: str | os.PathLike | None = None):
        # Resolved: a link and its target must have the same lock.
        self.path = (default_library() if path is None else Path(path)).expanduser().resolve()

    def voices(self) -> dict[str, Voice]:
        """
        All voices by their names, in alphabetical order; none where there is no file yet.

        Raises:
            OSError: The file is truncated, or no safetensors file.
            ValueError: It holds something else than voices.
        """
        if not self.path.exists():
            return {}
        tensors, metadata = _read_file(self.path)
        if VOICE_KEY in metadata or any(key in PARTS for key in tensors):
            raise ValueError(f"{self.path} holds a single voice: read it with `Voice.load`, or import it")
        notes = _from_json(metadata.get(LIBRARY_KEY), self.path)
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        return {name: _voice_of_file(parts[name], notes.get(name, {}), self.path, name) for name in sorted(parts)}

    def names(self) -> list[str]:
        """Names of the voices, in alphabetical order."""
        return list(self.voices())

    def __contains__(self, name: object) -> bool:
        return name in self.voices()

    def get(self, name: str) -> Voice:
        """The voice of a name; `ValueError` where there is none."""
        return self._find(self.voices(), name)

    def add(self, voice: Voice, name: str | None = None, overwrite: bool = False) -> None:
        """
        Adds a voice.

        Args:
            voice ([`Voice`]): The voice.
            name (`str`, *optional*): Its name here; its own where omitted.
            overwrite (`bool`, *optional*, defaults to `False`): Replace a voice of that name.

        Raises:
            ValueError: No name, or one that cannot be, or is taken; the voice states no consent.
            OSError: The library cannot be read or written, or another process held it for 30 s.
        """
        self._add([dataclasses.replace(voice, name=check_voice_name(name or voice.name))], overwrite)

    def _add(self, added: list[Voice], overwrite: bool) -> None:
        for voice in added:
            _checked_statement(voice.consent, "consent")
        with self._changing() as voices:
            if (taken := [voice.name for voice in added if voice.name in voices]) and not overwrite:
                raise ValueError(
                    f"{self.path} has {', '.join(map(repr, taken))} already: give another name, or overwrite it "
                    "explicitly"
                )
            voices |= {voice.name: voice for voice in added}

    def remove(self, name: str) -> None:
        """Removes a voice; `ValueError` where there is none."""
        with self._changing() as voices:
            self._find(voices, name)
            del voices[name]

    def rename(self, old: str, new: str) -> None:
        """Renames a voice; `ValueError` where there is none, or the new name is taken."""
        check_voice_name(new)
        with self._changing() as voices:
            voice = self._find(voices, old)
            if new in voices:
                raise ValueError(f"{self.path} has {new!r} already: remove it first, or give another name")
            del voices[old]
            voices[new] = dataclasses.replace(voice, name=new)

    def blend(self, a: str, b: str, weight: float, name: str, keep_codes: bool = False) -> Voice:
        """Adds and returns [`Voice.blend`] of two voices; `weight` is the share of `b`."""
        check_voice_name(name)
        voices = self.voices()
        blend = self._find(voices, a).blend(self._find(voices, b), weight, name, keep_codes)
        self.add(blend)
        return blend

    def push_to_hub(self, repo_id: str, private: bool = False, update: bool = False) -> str:
        """
        Publishes the library, with a card that tells each voice's licence and consent, in one commit.

        Args:
            repo_id (`str`): OWNER/NAME on the Hub.
            private, update (`bool`, *optional*, default to `False`): As [`publishing.publish`].

        Returns:
            `str`: The commit's URL.

        Raises:
            ValueError: There are no voices, the name is none, or something else fills the repository.
            OSError: The Hub refuses or cannot be reached.
        """
        from .publishing import publish_voices

        return publish_voices(self, repo_id, private, update)

    def import_file(
        self,
        path: str | os.PathLike,
        licence: str | None = None,
        consent: str | None = None,
        language: str = "",
        name: str | None = None,
        overwrite: bool = False,
    ) -> list[str]:
        """
        Takes in the voices of a file, all or none: an original dictionary (`.pt`), another library, or a single voice.

        Args:
            path (`str` or `os.PathLike`):
                The file. Nothing in it is unpickled but tensors.
            licence, consent (`str`, *optional*):
                Under what licence and with whose consent the voices are used. They are needed where the file does not
                say so itself, which originals never do.
            language (`str`, *optional*):
                Language of the voices that do not state theirs.
            name (`str`, *optional*):
                Another name, for a file of one voice.
            overwrite (`bool`, *optional*, defaults to `False`):
                Replace voices of these names.

        Returns:
            `list[str]`: The names, in alphabetical order.

        Raises:
            ValueError: No licence or consent, a file of something else, names that are taken.
            OSError: The file is missing, truncated or damaged.
        """
        path = Path(path).expanduser()
        voices = _read_voices(path)
        if name is not None:
            if len(voices) != 1:
                raise ValueError(f"{path} holds {len(voices)} voices, which cannot all be named {name!r}")
            voices = [dataclasses.replace(voices[0], name=check_voice_name(name))]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        added = []
        for voice in voices:
            given = {
                "name": check_voice_name(voice.name),
                "licence": voice.licence or _checked_statement(licence, "licence", least=2),
                "consent": voice.consent or _checked_statement(consent, "consent"),
                "language": voice.language or language,
                "source_hash": voice.source_hash or digest,
                "created": voice.created or _now(),
            }
            added.append(dataclasses.replace(voice, **given))
        self._add(added, overwrite)
        return sorted(voice.name for voice in added)

    def export(self, name: str, path: str | os.PathLike, overwrite: bool = False) -> None:
        """Writes one voice to a file of its own, as [`Voice.save`]."""
        self.get(name).save(path, overwrite)

    def _find(self, voices: Mapping[str, Voice], name: str) -> Voice:
        if name not in voices:
            raise ValueError(f"there is no voice {name!r}: {self.path} has {', '.join(voices) or 'none'}")
        return voices[name]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[dict[str, Voice]]:
        """The voices, to be changed; written when the block ends without an exception."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            with filelock.FileLock(lock, timeout=LOCK_SECONDS):
                voices = self.voices()
                yield voices
                notes = {name: voice.notes for name, voice in sorted(voices.items())}
                _write_file(self.path, voice_tensors(voices), {LIBRARY_KEY: _to_json(notes)}, overwrite=True)
        except filelock.Timeout as error:
            raise OSError(
                f"another process has been writing {self.path} for {LOCK_SECONDS:.0f} s: try again when it is done"
            ) from error


def default_library() -> Path:
    """The user's own library: `voices.safetensors` in `$MINIMIND_O_CACHE`, or else in `~/.local/share/minimind_o_hf`,
    as voices cannot be made anew when a cache is cleared."""
    folder = os.environ.get("MINIMIND_O_CACHE") or Path.home() / ".local" / "share" / "minimind_o_hf"
    return Path(folder).expanduser() / "voices.safetensors"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _checked_statement(statement: str | None, kind: str, least: int = MIN_STATEMENT) -> str:
    if not isinstance(statement, str) or len(statement.strip()) < least:
        example = "I am the speaker and agree to it." if kind == "consent" else "CC-BY-4.0"
        raise ValueError(
            f"a voice needs a statement of {kind}: pass `{kind}` with at least {least} characters, such as "
            f'"{example}"; got {statement!r}'
        )
    return statement.strip()


def _read_recording(audio: AudioSource, sampling_rate: float | None, rate: int) -> tuple[np.ndarray, str]:
    """A mono waveform at `rate` Hz, and the hash of what it was read from."""
    if not isinstance(audio, (str, os.PathLike, bytes, bytearray, memoryview)):
        waveform = load_audio(audio, sampling_rate, rate)
        samples = audio.detach().cpu().float().numpy() if isinstance(audio, torch.Tensor) else np.asarray(audio)
        return waveform, hashlib.sha256(np.ascontiguousarray(samples).tobytes()).hexdigest()
    data = read_bytes(os.fspath(audio)) if isinstance(audio, (str, os.PathLike)) else bytes(audio)
    try:
        waveform = load_audio(data, target_rate=rate)
    except (ValueError, OSError) as error:
        if not isinstance(audio, (str, os.PathLike)):
            raise
        raise type(error)(f"{os.fspath(audio):.200}: {error}") from error
    return waveform, hashlib.sha256(data).hexdigest()


def _to_json(value: Mapping) -> str:
    return json.dumps(value, ensure_ascii=False)


def _from_json(text: str | None, path: str | os.PathLike) -> dict[str, Any]:
    try:
        notes = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what {path} says of its voices is no JSON: {error}") from error
    if not isinstance(notes, dict):
        raise ValueError(f"what {path} says of its voices must be a JSON object, got {notes!r:.80}")
    return notes


def _voice_of_file(parts: Mapping[str, Any], notes: Any, path: str | os.PathLike, name: str | None = None) -> Voice:
    """A voice from what a file holds of it; errors name the file. Notes of later versions are left out."""
    if not isinstance(notes, dict):
        raise ValueError(f"what {path} says of the voice {name!r} must be a JSON object, got {notes!r:.80}")
    known = {key: notes[key] for key in NOTES if key in notes}
    try:
        if name is not None:
            known["name"] = check_voice_name(name)
        return Voice(**parts, **known)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_file(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file of voices. A foreign file's tensors are not read."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if foreign := [name for name in names if name.rpartition(".")[2] not in PARTS]:
                raise ValueError(
                    f"{path} is no file of voices: it holds {len(foreign)} other tensors, among them {foreign[:3]}"
                )
            # Copies: the file may be replaced while these are in use.
            return {name: file.get_tensor(name).clone() for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise OSError(f"{path} is truncated, damaged, or no safetensors file: {error}") from error


def _read_voices(path: Path) -> list[Voice]:
    """The voices of a safetensors file or of an original dictionary."""
    if path.suffix == ".safetensors":
        tensors, metadata = _read_file(path)
        if VOICE_KEY in metadata or any(key in PARTS for key in tensors):
            return [Voice.load(path)]
        return list(VoiceLibrary(path).voices().values())
    from .convert import read_tensors

    voices = read_tensors(path)
    if not voices:
        raise ValueError(f"{path} holds no voice")
    for name, parts in voices.items():
        if not isinstance(parts, dict) or not set(parts) <= set(PARTS):
            found = sorted(map(str, parts)) if isinstance(parts, dict) else type(parts).__name__
            raise ValueError(f"{path} is no dictionary of voices: {name!r} holds {found}, not {list(PARTS)}")
    return [_voice_of_file(parts, {}, path, name) for name, parts in voices.items()]


def _write_file(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], overwrite: bool) -> None:
    path = path.expanduser()

    def check_free() -> None:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: give another name, or overwrite it explicitly")

    check_free()
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        check_free()  # another process may have made it meanwhile


__all__ = ["Voice", "VoiceLibrary", "default_library"]
