"""Speaks with what `minimind-o export onnx` made. It needs numpy, onnxruntime, tokenizers and soundfile alone, and
lies in the exported folder as well:

    python nano-onnx/onnx_runner.py "How are you?" --out reply.wav
"""

import argparse
import datetime
import json
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import soundfile
from tokenizers import Tokenizer


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponents / exponents.sum(axis=-1, keepdims=True)


def _draw(scores: np.ndarray, random: np.random.Generator) -> int:
    return int(random.choice(len(scores), p=_softmax(scores.astype(np.float64))))


def _penalize(scores: np.ndarray, penalty: np.ndarray | float) -> np.ndarray:
    return np.where(scores > 0, scores / penalty, scores * penalty)


def _keep_best(scores: np.ndarray, count: int) -> np.ndarray:
    """Scores with all but the `count` best of each row at -inf; 0 keeps all."""
    if not 0 < count < scores.shape[-1]:
        return scores
    return np.where(scores < np.sort(scores, axis=-1)[..., -count, None], -np.inf, scores)


def process_text_scores(scores: np.ndarray, text_ids: list[int], settings: Mapping[str, Any]) -> np.ndarray:
    """
    What a text token is chosen by, as with transformers' logits processors.

    Args:
        scores (`np.ndarray` of shape `(vocab_size,)`): The model's.
        text_ids (`list[int]`): Prompt and answer so far.
        settings (`dict`): `OnnxSpeaker.settings`.
    """
    scores, seen = scores.copy(), np.unique(text_ids)
    scores[seen] = _penalize(scores[seen], settings["repetition_penalty"])
    scores[settings["suppress_tokens"] or []] = -np.inf
    if not settings["do_sample"]:
        return scores
    scores = _keep_best(scores / settings["temperature"], settings["top_k"])
    order = np.argsort(scores)
    is_tail = _softmax(scores[order]).cumsum() <= 1 - settings["top_p"]
    is_tail[-1] = False
    scores[order[is_tail]] = -np.inf
    return scores


def process_code_scores(scores: np.ndarray, history: list[np.ndarray], settings: Mapping[str, Any]) -> np.ndarray:
    """
    What the codes of a step are chosen by.

    Args:
        scores (`np.ndarray` of shape `(num_codebooks, audio_vocab_size)`): The model's.
        history (`list[np.ndarray]`): The codes of the steps so far, `(num_codebooks,)` each.
        settings (`dict`): `OnnxSpeaker.settings`.
    """
    scores = scores.copy()
    window = history[max(len(history) - settings["audio_repetition_window"], 0) :]
    for codebook, codes in enumerate(np.stack(window, axis=1) if window else []):
        recent, count = np.unique(codes, return_counts=True)
        penalty = settings["audio_repetition_penalty"] ** count
        scores[codebook, recent] = _penalize(scores[codebook, recent], penalty)
    if not settings["do_sample"]:
        return scores
    return _keep_best(scores, settings["audio_top_k"]) / settings["audio_temperature"]


class OnnxSpeaker:
    """
    A model, its codec and its voices.

    Args:
        directory (`str` or `os.PathLike`): What `minimind-o export onnx` made.
        threads (`int`, defaults to 0): Threads of onnxruntime; 0 for all cores.

    Attributes:
        settings (`dict`): How answers are generated; change them freely. `do_sample`, `temperature`, `top_k`, `top_p`
            and `repetition_penalty` are the text's, `audio_*` the codes'; `max_new_tokens` counts steps of 80 ms.
        voices (`dict`): Each voice's `ref_codes` (int64, `(num_codebooks, frames)`) and `spk_emb` (float32).
    """

    def __init__(self, directory: str | os.PathLike, threads: int = 0):
        self.directory, self.threads = Path(directory), threads
        if not (self.directory / "model.onnx").is_file():
            raise FileNotFoundError(f"{self.directory} has no model.onnx: make one with `minimind-o export onnx`.")
        self.config: dict[str, Any] = json.loads((self.directory / "config.json").read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = dict(self.config["generation"])
        self.tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        self.model = self._session("model.onnx")
        self.voices: dict[str, dict[str, np.ndarray]] = {}
        with np.load(self.directory / "voices.npz", allow_pickle=False) as tensors:
            for key in tensors.files:
                name, _, part = key.rpartition(".")
                self.voices.setdefault(name, {})[part] = tensors[key]

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        return onnxruntime.InferenceSession(self.directory / name, options, providers=["CPUExecutionProvider"])

    @staticmethod
    def _empty(session: onnxruntime.InferenceSession, prefix: str = "") -> dict[str, np.ndarray]:
        """One row of zeros for each input whose name begins so; its other free axes are empty."""
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        return {
            item.name: np.zeros(
                [size if isinstance(size, int) else int(size == "batch") for size in item.shape], kinds[item.type]
            )
            for item in session.get_inputs()
            if item.name.startswith(prefix)
        }

    def prompt_ids(self, text: str) -> list[int]:
        """
        The prompt of a question.

        Raises:
            ValueError: It is empty, or has the placeholder of a clip or a picture in it.
        """
        if not text.strip():
            raise ValueError("The question is empty.")
        before, after = self.config["prompt"]
        ids = self.tokenizer.encode(before + text + after, add_special_tokens=False).ids
        found = [self.tokenizer.id_to_token(i) for i in self.config["placeholder_ids"] if i in ids]
        if found:
            raise ValueError(f"The question has the placeholders {found}, and this runner takes text only.")
        return ids

    def _voice_inputs(self, length: int, voice: str | None) -> tuple[np.ndarray, np.ndarray]:
        """The codes of a prompt with a voice at its end, and the voice's embedding."""
        empty = self._empty(self.model)
        embedding, num_codebooks = empty["speaker_embeddings"], empty["audio_codes"].shape[1]
        codes = np.full((1, num_codebooks, length), self.config["audio_pad_token"])
        if voice is None:
            return codes, embedding
        if voice not in self.voices:
            raise ValueError(f"There is no voice {voice!r}: there are {', '.join(self.voices) or 'none'}.")
        parts = self.voices[voice]
        has_embedding, used = "spk_emb" in parts, 0
        if "ref_codes" in parts:
            used = min(parts["ref_codes"].shape[1], length - has_embedding)
            codes[0, :, length - used :] = parts["ref_codes"][:, parts["ref_codes"].shape[1] - used :]
        if has_embedding:
            embedding = parts["spk_emb"][None]
            codes[0, :, length - used - 1] = self.config["audio_spk_token"]
        return codes, embedding

    def _choose(self, scores: np.ndarray, random: np.random.Generator) -> int:
        return _draw(scores, random) if self.settings["do_sample"] else int(scores.argmax())

    def generate(
        self,
        ids: list[int],
        voice: str | None = None,
        seed: int | None = None,
        audio_features: np.ndarray | None = None,
        image_features: np.ndarray | None = None,
    ) -> Iterator[tuple[int | None, np.ndarray | None]]:
        """
        Answers a prompt, a step at a time.

        Args:
            ids (`list[int]`): The prompt's tokens.
            voice (`str`, *optional*): A name out of `voices`.
            seed (`int`, *optional*): Makes a sampled answer reproducible.
            audio_features, image_features (`np.ndarray` of shape `(placeholders, hidden_size)`, *optional*):
                What `audio_encoder.onnx` and `vision_encoder.onnx` give, for prompts with placeholders.

        Yields:
            The step's token, None once the text has ended; and the frame of codes, `(num_codebooks,)`, that it
            completes, or None.

        Raises:
            ValueError: Another voice, features that do not fit the prompt, scores that are not finite.
        """
        config, settings, random = self.config, self.settings, np.random.default_rng(seed)
        codes, embedding = self._voice_inputs(len(ids), voice)
        inputs = {**self._empty(self.model), "speaker_embeddings": embedding}
        features = {"audio_features": audio_features, "image_features": image_features}
        inputs |= {name: value for name, value in features.items() if value is not None}
        for name, token in zip(features, config["placeholder_ids"], strict=True):
            if ids.count(token) != len(inputs[name]):
                raise ValueError(f"The prompt has {ids.count(token)} places for {len(inputs[name])} `{name}`.")
        delay, size = np.arange(codes.shape[1]), config["audio_codebook_size"]
        text_ids, fed, history = list(ids), list(ids), []
        after_text = settings["post_text_token_id"]
        text_ended, speech_ended, stopped = False, False, np.zeros(len(delay), dtype=bool)
        for step in range(settings["max_new_tokens"]):
            scores, code_scores = self._run(inputs | {"input_ids": np.array([fed]), "audio_codes": codes}, inputs)
            token = None
            if not text_ended:
                token = self._choose(process_text_scores(scores, text_ids, settings), random)
                text_ids.append(token)
                text_ended = token in config["eos_token_ids"]
                fed = [token]
            else:
                fed, after_text = [after_text], config["pad_token_id"]

            # Codebook i starts a step after the one before it, the first with the second token.
            started = step >= 1 + delay
            chosen = [self._choose(row, random) for row in process_code_scores(code_scores, history, settings)]
            history.append(np.where(started, chosen, config["audio_pad_token"]))
            codes = history[-1][None, :, None]
            stopped |= started & (history[-1] >= size)
            frame = None
            if step >= len(delay) and not speech_ended:
                # The diagonal of the last steps is the frame that its last codebook completes now.
                frame = np.array([history[step - len(delay) + 1 + i][i] for i in delay])
                speech_ended = bool((frame >= size).any())
            yield token, None if speech_ended else frame
            if text_ended and stopped.all():
                return

    def _run(self, inputs: dict[str, np.ndarray], kept: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """One run of the model: the scores of text and codes; what the next run starts from goes into `kept`."""
        outputs: Any = self.model.run(None, inputs)
        scores, code_scores, *caches = outputs
        if not (np.isfinite(scores).all() and np.isfinite(code_scores).all()):
            raise ValueError("The model's scores are not finite: its weights are damaged.")
        names = [item.name.replace("present.", "past.") for item in self.model.get_outputs()[2:]]
        kept |= dict(zip(names, caches, strict=True))
        # Features went into the prompt.
        kept |= {name: kept[name][:0] for name in ("audio_features", "image_features")}
        return scores[0], code_scores[0]

    def decode(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """
        Turns frames of codes, `(num_codebooks,)` each, into sound as they come: float32 samples in [-1, 1].

        Raises:
            FileNotFoundError: The checkpoint had no codec.
        """
        if not (self.directory / "codec.onnx").is_file():
            raise FileNotFoundError(f"{self.directory} has no codec.onnx: the checkpoint had no codec.")
        session = self._session("codec.onnx")
        state = self._empty(session, "state.")
        for frame in frames:
            outputs: Any = session.run(None, {"codes": frame[None, :, None], **state})
            waveform, *after = outputs
            state = dict(zip(state, after, strict=True))
            yield waveform[0].clip(-1, 1)

    def speak(self, text: str, voice: str | None = None, seed: int | None = None) -> tuple[str, np.ndarray]:
        """
        Answers a question.

        Args:
            text (`str`): What is asked.
            voice (`str`, *optional*): A name out of `voices`.
            seed (`int`, *optional*): Makes a sampled answer reproducible.

        Returns:
            The answer's text, and its sound, float32 samples at `config["sampling_rate"]`.
        """
        tokens, frames = zip(*self.generate(self.prompt_ids(text), voice, seed), strict=True)
        said = self.tokenizer.decode([token for token in tokens if token is not None], skip_special_tokens=True)
        sound = list(self.decode(frame for frame in frames if frame is not None))
        return said, np.concatenate([np.zeros(0, np.float32), *sound])

    def save(self, waveform: np.ndarray, path: str | os.PathLike, voice: str | None = None) -> None:
        """
        Writes sound (.wav, .flac, .ogg, .mp3), marked as AI-generated as `minimind-o inspect` reads it; one silent
        frame where there is none.

        Raises:
            OSError: It cannot be written there.
        """
        path, rate = Path(path), self.config["sampling_rate"]
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        mark = {"ai_generated": True, "model": self.config["model"], "voice": voice, "date": date}
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with soundfile.SoundFile(partial, "w", rate, 1, format=path.suffix[1:].upper()) as file:
                file.title, file.artist, file.date = "AI-generated speech", self.config["model"], date
                file.software = "minimind_o_hf"
                file.comment = json.dumps({**mark, "software": "minimind_o_hf"})
                file.write(waveform if len(waveform) else np.zeros(round(0.08 * rate), np.float32))
            os.replace(partial, path)
        except (soundfile.SoundFileError, ValueError, TypeError) as error:
            raise OSError(f"cannot write {path}: {error} (the name must end in .wav, .flac, .ogg or .mp3)") from error
        finally:
            partial.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Answers one question: prints the text and writes the sound. Returns 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description="Ask an exported MiniMind-O model a question, and hear the answer.")
    parser.add_argument("text", help="the question")
    parser.add_argument("--directory", default=Path(__file__).parent, metavar="DIR", help="default: this file's")
    parser.add_argument("--voice", metavar="NAME", help="voice to answer in")
    parser.add_argument("--out", default="reply.wav", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    parser.add_argument("--seed", type=int, metavar="N", help="make a sampled answer reproducible")
    options = parser.parse_args(arguments)
    try:
        speaker = OnnxSpeaker(options.directory)
        if options.greedy:
            speaker.settings["do_sample"] = False
        text, waveform = speaker.speak(options.text, options.voice, options.seed)
        speaker.save(waveform, options.out, options.voice)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"onnx_runner: error: {error}\n")
        return 1
    # What a model says must not steer the terminal it is printed on.
    sys.stdout.write("".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text) + "\n")
    return 0


__all__ = ["OnnxSpeaker", "main", "process_code_scores", "process_text_scores"]

if __name__ == "__main__":
    sys.exit(main())
