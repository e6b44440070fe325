"""flite as a library: what the program says, in a third of the time, and answers with words on the codec's grid.

A frame of the codec is 80 ms long, and in plain speech a word begins anywhere in one: so the same word gives other
codes each time, and a small model has to learn them all. [`speak_on_grid`] stretches each word a little (flite's own
`local_duration_stretch`, 13 % in the mean), so that it begins with a frame and lasts whole ones. A recogniser
understands that as well as plain speech, and the chance that two recordings of a word have the same code in the same
place grows by half.
"""

import ctypes
import functools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

RATE = 16000
FRAME = RATE * 80 // 1000
FADE = FRAME // 4
# What brings a voice's median recording to an RMS of 0.08. One for each recording would make the same word louder here
# than there, and the first codebook is loudness.
GAINS = {"slt": 0.45, "rms": 0.84, "awb": 0.75, "kal16": 1.9}
PEAK = 0.99
# flite keeps the pointer to the name of a feature that is set, so it has to live as long as the utterance.
_STRETCH = b"local_duration_stretch"


class _Wave(ctypes.Structure):
    """flite's `cst_wave`."""

    _fields_ = (
        ("type", ctypes.c_char_p),
        ("sample_rate", ctypes.c_int),
        ("num_samples", ctypes.c_int),
        ("num_channels", ctypes.c_int),
        ("samples", ctypes.POINTER(ctypes.c_short)),
    )


_POINTER, _TEXT, _FLOAT = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_float
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "default_tokenization": (_POINTER, _POINTER),
    "delete_utterance": (None, _POINTER),
    "ffeature_float": (_FLOAT, _POINTER, _TEXT),
    "flite_init": (ctypes.c_int,),
    "flite_text_to_speech": (_FLOAT, _TEXT, _POINTER, _TEXT),
    "item_as": (_POINTER, _POINTER, _TEXT),
    "item_equal": (ctypes.c_int, _POINTER, _POINTER),
    "item_next": (_POINTER, _POINTER),
    "item_parent": (_POINTER, _POINTER),
    "item_set_float": (None, _POINTER, _TEXT, _FLOAT),
    "new_utterance": (_POINTER,),
    "relation_head": (_POINTER, _POINTER),
    "utt_init": (_POINTER, _POINTER, _POINTER),
    "utt_relation": (_POINTER, _POINTER, _TEXT),
    "utt_set_input_text": (ctypes.c_int, _POINTER, _TEXT),
    "utt_synth_tokens": (_POINTER, _POINTER),
    "utt_wave": (ctypes.POINTER(_Wave), _POINTER),
}


@functools.cache
def _library() -> ctypes.CDLL:
    """flite's own, with the types of what is used of it; OSError where it is not installed."""
    library = ctypes.CDLL("libflite.so.1", mode=ctypes.RTLD_GLOBAL)
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.flite_init()
    return library


def _begin_noise() -> None:
    """Starts the C library's random numbers, of which consonants are made: a text is said in one way."""
    ctypes.CDLL(None).srand(1)


@functools.cache
def _voice(name: str) -> int:
    """A voice, as flite's functions take it; ValueError where there is none of that name."""
    _library()
    if name not in GAINS:
        raise ValueError(f"There is no voice {name!r} here, but {', '.join(GAINS)}.")
    try:
        register = getattr(ctypes.CDLL(f"libflite_cmu_us_{name}.so.1"), f"register_cmu_us_{name}")
    except (OSError, AttributeError) as error:
        raise ValueError(
            f"flite's voice {name!r} is not installed (Debian, Ubuntu: apt install flite): {error}"
        ) from error
    register.restype, register.argtypes = _POINTER, [_TEXT]
    return register(None)


def is_installed() -> bool:
    """Whether flite's library and its voices are there."""
    try:
        for name in GAINS:
            _voice(name)
    except (OSError, AttributeError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class Spoken:
    """
    What flite has said.

    Args:
        waveform (`np.ndarray` of shape `(num_samples,)`): Float32, at 16 kHz.
        words (list of `tuple[float, float]`): Begin and end in seconds of each word that has a sound.
    """

    waveform: np.ndarray
    words: list[tuple[float, float]]


def speak_text(text: str, voice: str) -> np.ndarray:
    """
    What `flite -voice VOICE -t TEXT` says.

    Args:
        text (`str`): What to say; where flite knows no word of it, the result is silence.
        voice (`str`): `"slt"`, `"rms"`, `"awb"` or `"kal16"`.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: Float32, at 16 kHz.

    Raises:
        ValueError: Another voice, one that is not installed, or a text with a NUL character.
    """
    _check_text(text)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        _begin_noise()
        _library().flite_text_to_speech(text.encode(), _voice(voice), str(path).encode())
        if not path.is_file():
            raise ValueError(f"flite wrote nothing for {text!r:.60}.")
        waveform, rate = soundfile.read(path, dtype="float32")
    _check_rate(rate, voice)
    return waveform


def _check_rate(rate: int, voice: str) -> None:
    if rate != RATE:
        raise ValueError(f"flite's voice {voice!r} speaks at {rate} Hz, {RATE} Hz are expected.")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError(f"flite reads a text up to its first NUL character, and there is one in {text!r:.60}.")


def _items(utterance: int, relation: bytes) -> Iterator[int]:
    library = _library()
    item = library.relation_head(library.utt_relation(utterance, relation))
    while item:
        yield item
        item = library.item_next(item)


def _token_of(segment: int, tokens: Sequence[int]) -> int | None:
    """Which of the tokens a segment belongs to; None for a pause."""
    library = _library()
    segment = library.item_as(segment, b"SylStructure")
    if not segment:
        return None
    word = library.item_parent(library.item_parent(segment))
    token = library.item_parent(library.item_as(word, b"Token"))
    found = [index for index, other in enumerate(tokens) if library.item_equal(token, other)]
    if not found:
        raise ValueError("flite speaks something that is no word of the text: put it in words.")
    return found[0]


def speak_stretched(text: str, voice: str, stretches: Sequence[float] = ()) -> Spoken:
    """
    Speaks one utterance.

    Args:
        text (`str`): Words and punctuation marks behind them.
        voice (`str`): See [`speak_text`].
        stretches (list of `float`, *optional*): Of the durations of its words, in the order of `Spoken.words`.

    Raises:
        ValueError: There is nothing to say, a part of the text has no sound (such as a dash alone), or as
            [`speak_text`].
    """
    _check_text(text)
    library = _library()
    utterance = library.new_utterance()
    try:
        library.utt_set_input_text(utterance, text.encode())
        library.utt_init(utterance, _voice(voice))
        library.default_tokenization(utterance)
        tokens = list(_items(utterance, b"Token"))
        for token, stretch in zip(tokens, stretches, strict=False):
            library.item_set_float(token, _STRETCH, stretch)
        _begin_noise()
        if not tokens or not library.utt_synth_tokens(utterance):
            raise ValueError(f"flite has nothing to say for {text!r:.60}.")
        spans: dict[int, tuple[float, float]] = {}
        begin = 0.0
        for segment in _items(utterance, b"Segment"):
            end = library.ffeature_float(segment, b"end")
            token = _token_of(segment, tokens)
            if token is not None:
                spans[token] = (spans.get(token, (begin,))[0], end)
            begin = end
        if list(spans) != list(range(len(tokens))):
            raise ValueError(f"flite does not speak each of the {len(tokens)} words of {text!r:.60}: put it in words.")
        wave = library.utt_wave(utterance).contents
        _check_rate(wave.sample_rate, voice)
        samples = np.ctypeslib.as_array(wave.samples, (wave.num_samples,)) / np.float32(2**15)
    finally:
        library.delete_utterance(utterance)
    return Spoken(samples, list(spans.values()))


def stretches_on_grid(text: str, voice: str) -> list[float]:
    """
    Stretches that make each word of an utterance, with the pause behind it, last a whole number of frames.

    Args:
        text, voice (`str`): See [`speak_stretched`], with the same errors.
    """
    words = speak_stretched(text, voice).words
    ends = [begin for begin, _ in words[1:]] + [words[-1][1]]
    stretches = []
    for (begin, stop), end in zip(words, ends, strict=True):
        frames = max(1, round((end - begin) * RATE / FRAME))
        # The pause is not stretched, so the word makes up for it.
        stretches.append(max(0.2, (frames * FRAME / RATE - (end - stop)) / (stop - begin)))
    return stretches


def speak_on_grid(text: str, voice: str) -> np.ndarray:
    """
    Speaks one utterance whose words begin on a grid of 80 ms; a pause belongs to the word before it.

    Args:
        text (`str`): Words and punctuation.
        voice (`str`): See [`speak_text`].

    Returns:
        `np.ndarray` of shape `(num_frames * 1280,)`: Float32, at 16 kHz: a frame of silence, the words, a frame of
        silence. Its loudness is the voice's.

    Raises:
        ValueError: As [`speak_stretched`].
    """
    spoken = speak_stretched(text, voice, stretches_on_grid(text, voice))
    begin, end = (round(second * RATE) for second in (spoken.words[0][0], spoken.words[-1][1]))
    speech = spoken.waveform[begin:end]
    # Stretching is exact to flite's own frames of 5 ms.
    frames = max(1, round(len(speech) / FRAME))
    speech = np.pad(speech, (0, max(0, frames * FRAME - len(speech))))[: frames * FRAME]
    # Outside the words flite's own faint noise fades, so that every recording begins and ends in the same way.
    ramp = np.linspace(0, 1, FADE, dtype=np.float32)
    before = spoken.waveform[max(0, begin - FADE) : begin]
    after = spoken.waveform[end : end + FADE]
    laid = np.zeros((frames + 2) * FRAME, np.float32)
    laid[FRAME - len(before) : FRAME] = before * ramp[FADE - len(before) :]
    laid[FRAME : FRAME + len(speech)] = speech
    laid[FRAME + len(speech) :][: len(after)] = after * ramp[::-1][: len(after)]
    return np.clip(laid * np.float32(GAINS[voice]), -PEAK, PEAK)
