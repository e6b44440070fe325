"""A conversation: turns that share one cache, and of which only what was heard is kept."""

import contextlib
import json
import os
import re
import threading
from collections.abc import AsyncIterator, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from .files import new_file
from .modeling import (
    MiniMindOCache,
    MiniMindOForConditionalGeneration,
    MiniMindOGenerateOutput,
    MiniMindOStreamEvent,
    adapters_in_use,
    stream_answers,
)
from .modeling.streaming_minimind_o import FRAME_SECONDS, check_codec, iterate_async
from .processing import MiniMindOAnswer, MiniMindOProcessor
from .processing.voices_minimind_o import Voice as VoiceMapping

FILE_KEY = "minimind_o_conversation"
# Measured on the release's four English example questions: 6.1 s of speech for 37 tokens.
TOKEN_SECONDS = 0.17
SPEECH = ("input_features", "input_features_mask")
CLIPS = (*SPEECH, "pixel_values")
MAX_POSITIONS = 2048
MAX_NEW_TOKENS = 512  # the default of `generate`
MARK = "ANSWER"
# Two neighbours inside a word or a number, in scripts that put spaces between words.
INSIDE_WORD = re.compile(r"[^\W_\u2e80-\U0010ffff]{2}|[^\W_\u2e80-\U0010ffff]'|'[^\W_\u2e80-\U0010ffff]|\d[.,]|[.,]\d")


@dataclass
class _Turn:
    """
    What the model is given of one turn.

    Args:
        message (`dict`): The user's message; of speech and pictures only that they were there.
        prompt (`torch.Tensor` of shape `(prompt_length,)`): It as tokens.
        answer (`torch.Tensor` of shape `(answer_length,)`): The answer's tokens, without thoughts and end.
        clips (`dict[str, torch.Tensor]`): The encoders' inputs.
        frames (`int`): Frames of the answer's speech.
        is_complete (`bool`): Whether text and speech came to their ends.
        whole (`tuple[torch.Tensor, float]`, *optional*): Of an answer that was cut: as it was, and its length in s.
    """

    message: dict[str, Any]
    prompt: torch.Tensor
    answer: torch.Tensor
    clips: dict[str, torch.Tensor] = field(default_factory=dict)
    frames: int = 0
    is_complete: bool = False
    whole: tuple[torch.Tensor, float] | None = None


class Conversation:
    """
    Several turns with a model. Keys and values of what was said before are kept, so that a turn costs its own length
    and not the whole conversation's; what is answered is what a model that reads it all anew would answer. Adapters of
    the model may be switched between turns: the next turn then reads all of it with what is on.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): The model.
        processor ([`MiniMindOProcessor`]): Its processor.
        system (`str`, *optional*): System prompt.
        voice (`str` or `Voice`, *optional*): The voice to answer in; `conversation.voice` may change between turns.
        max_positions (`int`, defaults to 2048):
            Bound of the memory: a prompt and the longest answer to it may take so many positions (at the released
            size in float32 40 KB each). Where they would take more, the oldest turns are forgotten, until half
            of the positions are free.
        max_turns (`int`, *optional*):
            Most earlier turns that are remembered. By default as the model's generation config says (nano, which has
            learnt single questions, takes each by itself), else all that fit.

    Example:

    ```python
    >>> conversation = Conversation(model, processor, voice="alba")
    >>> for event in conversation.stream("Tell me about the sea."):
    ...     play(event.audio)  # until somebody speaks
    >>> conversation.cut(heard=1.5)  # seconds
    >>> answer = conversation.ask([{"type": "audio", "path": "question.wav"}])
    ```
    """

    def __init__(
        self,
        model: MiniMindOForConditionalGeneration,
        processor: MiniMindOProcessor,
        *,
        system: str | None = None,
        voice: str | VoiceMapping | None = None,
        max_positions: int = MAX_POSITIONS,
        max_turns: int | None = None,
    ):
        if max_positions < 1:
            raise ValueError(f"`max_positions` must be at least 1, got {max_positions}.")
        max_turns = getattr(model.generation_config, "max_turns", None) if max_turns is None else max_turns
        if max_turns is not None and max_turns < 0:
            raise ValueError(f"`max_turns` must be at least 0, got {max_turns}.")
        self.model: Any = model
        self.processor = processor
        self.system, self.voice = system, voice
        self.max_positions, self.max_turns = max_positions, max_turns
        self._turns: list[_Turn] = []
        self._kept: list[_Turn] = []  # of them, what the answer that is being made was given
        self._answering = threading.Lock()
        opening, _, closing = self._rendered_after({"role": "assistant", "content": MARK}).rpartition(MARK)
        self._opening, self._closing = self._ids(opening), self._ids(closing)
        self._forget_cache()

    def _forget_cache(self) -> None:
        self._cache = MiniMindOCache(self.model.config)
        self._cached = torch.zeros(0, dtype=torch.long)
        self._cached_with: tuple = ()  # adapters
        # Where each turn begins: the same placeholders may stand for other clips.
        self._cached_turns: list[tuple[int, _Turn]] = []

    def _encode(self, messages: list[dict], **kwargs) -> Any:
        # A `<|im_end|>` that someone types is text, not the end of their turn.
        return self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, sanitize_control_tokens=True, **kwargs
        )

    def _rendered_after(self, message: dict[str, str] | None, **kwargs) -> str:
        """What the template writes after a user's message."""
        user = {"role": "user", "content": "Hello"}
        whole = self.processor.apply_chat_template([user, message] if message else [user], **kwargs)
        return whole[len(self.processor.apply_chat_template([user])) :]

    def _ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.processor.tokenizer(text, add_special_tokens=False).input_ids, dtype=torch.long)

    # ---------------------------------------------------------------- what has been said

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The turns that the model is given, as a chat; speech and pictures without their sources."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self._turns:
            messages += [turn.message, {"role": "assistant", "content": self._text(turn.answer)}]
        return messages

    @property
    def num_cached_positions(self) -> int:
        """Positions whose keys and values are kept."""
        return int(self._cache.get_seq_length())

    def _text(self, tokens: torch.Tensor) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def cut(self, heard: float) -> str:
        """
        Keeps of the last answer what was heard of it before it was interrupted, to the last whole word. Speech does
        not say which word it is at: the part of the text is the part of the sound; of an answer that was never spoken
        to its end, the length is guessed from those that were.

        Args:
            heard (`float`): How much of the answer's sound was played, in seconds. A second cut takes away more or
                nothing.

        Returns:
            `str`: what is kept.

        Raises:
            ValueError: There is no answer, it is being made, or `heard` is negative.
        """
        if not heard >= 0:
            raise ValueError(f"`heard` must be at least 0 seconds, got {heard}.")
        with self._alone():
            if not self._turns:
                raise ValueError("There is no answer to cut.")
            turn = self._turns[-1]
            turn.whole = turn.whole or (turn.answer, self._seconds(turn))
            whole, length = turn.whole
            if heard < length:
                kept = self._whole_words(whole, int(len(whole) * heard / length))
                turn.answer = kept if len(kept) < len(turn.answer) else turn.answer
                turn.frames, turn.is_complete = min(turn.frames, round(heard / FRAME_SECONDS)), False
            return self._text(turn.answer)

    def _seconds(self, turn: _Turn) -> float:
        """How long the turn's answer takes to say."""
        if turn.is_complete:
            return turn.frames * FRAME_SECONDS
        said = [turn for turn in self._turns if turn.is_complete and turn.frames]
        tokens = sum(len(turn.answer) for turn in said)
        rate = FRAME_SECONDS * sum(turn.frames for turn in said) / tokens if tokens else TOKEN_SECONDS
        return max(turn.frames * FRAME_SECONDS, len(turn.answer) * rate)

    def _whole_words(self, tokens: torch.Tensor, count: int) -> torch.Tensor:
        """The first `count` tokens, without what they hold of a word or a character that goes on after them."""
        whole = self._text(tokens)
        while count:
            text = self._text(tokens[:count])
            border = whole[len(text) - 1 : len(text) + 1] if whole.startswith(text) else ""
            if border and not INSIDE_WORD.fullmatch(border):
                break
            count -= 1
        return tokens[:count]

    @property
    def num_turns(self) -> int:
        """Turns that the model is given."""
        return len(self._turns)

    def remember(self, content: str | Sequence[Mapping[str, Any]], answer: str) -> None:
        """
        Adds a turn that was held elsewhere.

        Args:
            content (`str` or `list[dict]`): The message, as `stream` takes it.
            answer (`str`): What was answered.
        """
        turn, _ = self._new_turn(content)
        # As the template has it, in which an answer is text and not the end of itself.
        said = self._encode([{"role": "assistant", "content": answer}])["input_ids"][0]
        turn.answer = said[len(self._opening) : len(said) - len(self._closing)]
        with self._alone():
            self._turns = [*self._turns, turn]

    def forget(self, index: int) -> None:
        """Takes a turn out: 0 is the oldest, -1 the last; `IndexError` where there is none."""
        with self._alone():
            turns = list(self._turns)
            del turns[index]
            self._turns = turns

    def reset(self) -> None:
        """Forgets all turns."""
        with self._alone():
            self._turns = []
            self._forget_cache()

    # ---------------------------------------------------------------- answering

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._answering.acquire(blocking=False):
            raise ValueError("This conversation is answering already: read that answer to its end, or close it.")
        try:
            yield
        finally:
            self._answering.release()

    def stream(
        self,
        content: str | Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        open_thinking: bool = False,
        **settings,
    ) -> Generator[MiniMindOStreamEvent, None, None]:
        """
        Answers the next message, and yields the answer while it is made. An answer that is not read to its end, or
        that `cancel` ends, is kept as far as it went; of one that fails, the message is not kept either.

        Args:
            content (`str` or `list[dict]`):
                The message, as a chat's `content`: a text, or a list of text, speech and pictures.
            seed (`int`, *optional*): Makes the answer reproducible.
            open_thinking (`bool`, defaults to `False`): Whether the model thinks first. Thoughts are not kept.
            **settings: As [`stream_answers`] (`max_latency`, `pcm16`, `cancel` ...) and
                [`~MiniMindOGenerationMixin.generate`].

        Yields:
            [`MiniMindOStreamEvent`]: of row 0.

        Raises:
            ValueError: The message cannot be rendered, or, when it is first read: it is too long for `max_positions`,
                another answer is being made.
        """
        return self._stream(self.prepare(content, seed=seed, open_thinking=open_thinking, **settings))

    def _stream(self, pending: "PendingAnswer") -> Generator[MiniMindOStreamEvent, None, None]:
        with pending as inputs:
            outputs: list[MiniMindOGenerateOutput] = []
            tell = inputs.pop("on_output", None)

            def on_output(output: MiniMindOGenerateOutput) -> None:
                outputs.append(output)
                if tell is not None:
                    tell(output)

            events = stream_answers(self.model, self.processor, **inputs, on_output=on_output)
            try:
                yield from events
            finally:
                events.close()
                pending.outputs = outputs[0] if outputs else None

    def prepare(
        self,
        content: str | Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        open_thinking: bool = False,
        **settings,
    ) -> "PendingAnswer":
        """
        The next message, made ready for a model that the caller runs.

        Args:
            content, seed, open_thinking, **settings: As `stream`.

        Returns:
            [`PendingAnswer`].
        """
        turn, voice = self._new_turn(content)
        settings = {"seeds": None if seed is None else [seed], **voice, **settings}
        return PendingAnswer(self, turn, settings, open_thinking)

    def astream(self, content: str | Sequence[Mapping[str, Any]], **kwargs) -> AsyncIterator[MiniMindOStreamEvent]:
        """As `stream`, for `async for`."""
        return iterate_async(self.stream, kwargs.pop("cancel", None), content, **kwargs)

    def ask(
        self,
        content: str | Sequence[Mapping[str, Any]],
        *,
        seed: int | None = None,
        open_thinking: bool = False,
        **settings,
    ) -> MiniMindOAnswer:
        """As `stream`, but the whole answer at once."""
        pending = self.prepare(content, seed=seed, open_thinking=open_thinking, **settings)
        check_codec(self.model, self.processor, pending.settings)
        with pending as inputs:
            pending.outputs = outputs = self.model.generate(**{**inputs, "return_dict_in_generate": True})
        return self.processor.decode(outputs)[0]

    def _new_turn(self, content: str | Sequence[Mapping[str, Any]]) -> tuple[_Turn, dict[str, torch.Tensor]]:
        """The message as a turn without an answer, and what the voice adds to the model's inputs."""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)) or not all(
            isinstance(part, Mapping) and isinstance(part.get("text", part.get("type")), str) for part in parts
        ):
            raise ValueError(f"A message is a text, or a list of text, speech and pictures, got {content!r:.200}.")
        message = {"role": "user", "content": content}
        inputs = self._encode([message], voice=self.voice)
        clips = {name: inputs[name] for name in CLIPS if name in inputs}
        voice = {name: inputs[name] for name in ("reference_codes", "speaker_embeddings") if name in inputs}
        turn = _Turn(_without_sources(message), inputs["input_ids"][0], torch.zeros(0, dtype=torch.long), clips)
        return turn, voice

    def _inputs(self, turn: _Turn, settings: dict, thinks: bool) -> dict[str, Any]:
        """What `generate` needs to answer a turn; the cache is cut to what the prompt shares with the last one."""
        generation_config = settings.get("generation_config") or self.model.generation_config
        if (settings.get("num_return_sequences") or generation_config.num_return_sequences or 1) > 1:
            raise ValueError("A conversation goes on with one answer: leave `num_return_sequences` out.")
        own = {"input_ids", "inputs", "inputs_embeds", "past_key_values", "use_cache", "cache_implementation"}
        if taken := sorted(own & settings.keys()):
            raise ValueError(f"A conversation has its own prompt and cache: leave {', '.join(taken)} out.")
        if settings.get("max_length") or (generation_config.max_length and not generation_config.max_new_tokens):
            raise ValueError("A prompt grows with the conversation: pass `max_new_tokens` in place of `max_length`.")
        longest = settings.get("max_new_tokens") or generation_config.max_new_tokens or MAX_NEW_TOKENS
        room = self.max_positions - longest
        kept = self._turns if self.max_turns is None else self._turns[max(0, len(self._turns) - self.max_turns) :]
        prompt, turns = self._prompt([*kept, turn], thinks)
        is_full = len(prompt) > room
        while kept and is_full and len(prompt) > room // 2:
            kept = kept[1:]
            prompt, turns = self._prompt([*kept, turn], thinks)
        if len(prompt) > room:
            raise ValueError(
                f"The message takes {len(prompt)} positions and its answer up to {longest}, which is more than "
                f"`max_positions` ({self.max_positions}): shorten it, or raise `max_positions`."
            )
        self._kept = kept
        if self._cached_with != (adapters := adapters_in_use(self.model)):
            self._forget_cache()
            self._cached_with = adapters
        shared = self._shared(prompt, turns)
        self._cache.crop_to(shared)
        self._cached, self._cached_turns = prompt[:shared], turns
        new = [turn.clips for start, turn in turns if start >= shared]
        return {
            **settings,
            **{name: value.to(self.model.device) for name, value in _joined(new).items()},
            "input_ids": prompt.unsqueeze(0).to(self.model.device),
            "past_key_values": self._cache,
        }

    def _prompt(self, turns: list[_Turn], thinks: bool) -> tuple[torch.Tensor, list[tuple[int, _Turn]]]:
        """All tokens up to the answer of the last turn, and where each turn begins."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces = [self._encode(system)["input_ids"][0]] if system else []
        starts, position = [], sum(map(len, pieces))
        for turn in turns:
            starts.append((position, turn))
            pieces += [turn.prompt, self._opening, turn.answer, self._closing]
            position += sum(map(len, pieces[-4:]))
        opening = self._rendered_after(None, add_generation_prompt=True, open_thinking=thinks)
        return torch.cat([*pieces[:-3], self._ids(opening)]), starts

    def _shared(self, prompt: torch.Tensor, turns: list[tuple[int, _Turn]]) -> int:
        """How many of the cached positions are the prompt's, too; at least one is left to read."""
        length = min(len(prompt) - 1, len(self._cached))
        shared = int((prompt[:length] == self._cached[:length]).long().cumprod(dim=0).sum())
        for (start, new), (_, old) in zip(turns, self._cached_turns, strict=False):
            if new is not old:
                return min(shared, start)
        return shared

    def _keep(self, turn: _Turn, outputs: MiniMindOGenerateOutput | None, thinks: bool) -> None:
        """Adds an answered turn, and remembers what the cache holds."""
        if outputs is None or outputs.past_key_values is None:
            self._forget_cache()
        if outputs is None:
            return
        answer = outputs.sequences[0, outputs.prompt_length :].cpu()
        ends = (answer == self.processor.tokenizer.eos_token_id).nonzero()
        answer = answer[: int(ends[0])] if len(ends) else answer
        if thinks:
            end = torch.tensor(self.model.config.think_end_ids)
            begins = [i for i in range(len(answer) - len(end) + 1) if torch.equal(answer[i : i + len(end)], end)]
            answer = answer[begins[0] + len(end) :] if begins else answer[:0]
        turn.answer = answer
        turn.frames = 0 if outputs.audio_codes_mask is None else int(outputs.audio_codes_mask.sum())
        turn.is_complete = outputs.is_complete is not None and bool(outputs.is_complete.all())
        self._turns = [*self._kept, turn]
        self._cached = outputs.sequences[0, : self.num_cached_positions].cpu()

    # ---------------------------------------------------------------- files

    def save(self, path: str | os.PathLike) -> None:
        """
        Writes the conversation to a safetensors file: tokens, the encoders' inputs, and the voice's name. Not the
        cache, which the next turn makes anew.

        Raises:
            ValueError: The voice has no name by which it could be found again.
        """
        voice = self.voice
        if voice is not None and not isinstance(voice, str):
            voice = str(voice.get("name") or "")
            if not voice:
                raise ValueError("The voice has no name to save: give it one, or add it to the processor.")
        tensors, turns = {}, []
        for number, turn in enumerate(self._turns):
            turns.append({"message": turn.message, "frames": turn.frames, "is_complete": turn.is_complete})
            parts = {"prompt": turn.prompt, "answer": turn.answer, **turn.clips}
            tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in parts.items()}
        notes = {
            "system": self.system,
            "voice": voice,
            "max_positions": self.max_positions,
            "vocab_size": self.model.config.vocab_size,
            "turns": turns,
        }
        with new_file(path) as partial:
            save_file(tensors, partial, metadata={FILE_KEY: json.dumps(notes)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: MiniMindOForConditionalGeneration,
        processor: MiniMindOProcessor,
    ) -> "Conversation":
        """
        Reads a conversation that `save` wrote.

        Raises:
            ValueError: It is no such file, or damaged, or was held with a model of another vocabulary; the processor
                has no voice of its name.
            FileNotFoundError: There is no file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            with safe_open(path, "pt") as file:
                notes = json.loads((file.metadata() or {})[FILE_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            turns = [
                _read_turn(turn, number, tensors, notes["vocab_size"]) for number, turn in enumerate(notes["turns"])
            ]
            settings = {name: notes[name] for name in ("system", "voice", "max_positions")}
            if not all(isinstance(settings[name], (str, type(None))) for name in ("system", "voice")):
                raise TypeError("system prompt and voice are no texts")
            if not isinstance(settings["max_positions"], int):
                raise TypeError("`max_positions` is no number")
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds no conversation, or is damaged ({error!r}).") from error
        if notes.get("vocab_size") != model.config.vocab_size:
            raise ValueError(
                f"{path} was held with a vocabulary of {notes.get('vocab_size')} tokens, the model has "
                f"{model.config.vocab_size}: load the model it was held with."
            )
        if settings["voice"] is not None and settings["voice"] not in processor.voices:
            raise ValueError(
                f"{path} speaks with the voice {settings['voice']!r}, which the processor has not: add it "
                f"(`processor.add_voice`). It has {sorted(processor.voices) or 'none'}."
            )
        conversation = cls(model, processor, **settings)
        conversation._turns = turns
        return conversation


class PendingAnswer:
    """
    A message of a [`Conversation`] whose answer is to be made. As a context manager it gives the inputs of `generate`;
    until it ends, no other message is taken, and what `outputs` then holds is kept as the answer.

    Args:
        outputs ([`MiniMindOGenerateOutput`], *optional*):
            To be set to what `generate` returned. Where it is not, the message is not kept either.
    """

    def __init__(self, conversation: Conversation, turn: _Turn, settings: dict[str, Any], thinks: bool):
        self.conversation, self.settings = conversation, settings
        self.outputs: MiniMindOGenerateOutput | None = None
        self._turn, self._thinks = turn, thinks
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> dict[str, Any]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.conversation._alone())
            inputs = self.conversation._inputs(self._turn, self.settings, self._thinks)
            stack.callback(lambda: self.conversation._keep(self._turn, self.outputs, self._thinks))
            self._stack = stack.pop_all()
        return inputs

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _read_turn(notes: dict[str, Any], number: int, tensors: dict[str, torch.Tensor], vocab_size: int) -> _Turn:
    """A turn out of a file, checked."""
    message = _without_sources(notes["message"])
    tokens = [tensors[f"{number}.{name}"] for name in ("prompt", "answer")]
    for ids in tokens:
        if ids.dim() != 1 or ids.dtype != torch.long or not ((ids >= 0) & (ids < vocab_size)).all():
            raise ValueError(f"turn {number} holds no tokens of the vocabulary")
    clips = {name: tensors[f"{number}.{name}"] for name in CLIPS if f"{number}.{name}" in tensors}
    if notes["frames"] < 0:
        raise ValueError(f"turn {number} has {notes['frames']} frames")
    return _Turn(message, tokens[0], tokens[1], clips, int(notes["frames"]), bool(notes["is_complete"]))


def _without_sources(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, str):
        content = [
            {key: item[key] for key in (("type", "text") if item["type"] == "text" else ("type",))} for item in content
        ]
    return {"role": message["role"], "content": content}


def _joined(clips: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The encoders' inputs of some turns as one batch."""
    joined = {}
    for name in SPEECH:
        rows = [row for turn in clips if name in turn for row in turn[name]]
        if rows:
            joined[name] = pad_sequence(rows, batch_first=True)
    pictures = [turn["pixel_values"] for turn in clips if "pixel_values" in turn]
    if pictures:
        joined["pixel_values"] = torch.cat(pictures)
    return joined


__all__ = ["Conversation", "PendingAnswer"]
