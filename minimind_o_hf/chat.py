"""`minimind-o chat`: one turn from options, or a conversation on a terminal."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, set_seed
from transformers.utils.import_utils import is_peft_available

from .conversation import MAX_POSITIONS, Conversation
from .modeling import MiniMindOForConditionalGeneration
from .packaged import choose_checkpoint
from .processing import MiniMindOProcessor
from .voices import VoiceLibrary
from .watermark import Watermark

HELP = """\
Type a message, or one of:
  /audio FILE    send speech with the next message     /image FILE   send a picture with it
  /voice NAME    answer in another voice               /adapter NAME switch to another adapter, or to none
  /send          send without typing anything          /reset        forget the conversation
  /quit          leave (also Ctrl-D)"""


def shown(text: str) -> str:
    """Text without what would steer the terminal it is printed on."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how `chat` and `talk` answer."""
    parser.add_argument("--system", metavar="S", help="system prompt")
    parser.add_argument("--voice", metavar="NAME", help="voice of the checkpoint, or of your library, to answer in")
    parser.add_argument("--watermark", action="store_true", help="put an inaudible watermark into the speech")
    parser.add_argument("--seed", type=int, metavar="N", help="make the answers reproducible")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer, in steps of 80 ms")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")


def open_conversation(options: argparse.Namespace, model: Any, processor: MiniMindOProcessor) -> Conversation:
    """A conversation as these options have it."""
    # Room for the longest answer that is asked for, and for what it is asked after.
    room = max(MAX_POSITIONS, (options.max_new_tokens or 0) + MAX_POSITIONS // 2)
    return Conversation(model, processor, system=options.system, voice=options.voice, max_positions=room)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `minimind-o chat`."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="LoRA adapter trained on the model: directory or Hub id (repeatable, for /adapter)",
    )
    parser.add_argument("--text", metavar="T", help="what to say; with --audio or --image, said along with them")
    parser.add_argument(
        "--audio", metavar="FILE", action="append", default=[], help="speech to listen to (repeatable)"
    )
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help="picture to look at (repeatable)")
    parser.add_argument(
        "--out",
        metavar="WAV",
        default="reply.wav",
        help="where speech is written (default: %(default)s; in a conversation reply-1.wav, reply-2.wav, ...)",
    )
    parser.add_argument("--text-only", action="store_true", help="answer in text alone")
    parser.add_argument("--think", action="store_true", help="let the model think before it answers")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    add_answer_arguments(parser)


def load(
    model_id: str | None, device: str, dtype: str | None, adapters: Sequence[str] = (), merge: bool = True
) -> tuple[MiniMindOForConditionalGeneration, MiniMindOProcessor]:
    """
    Loads a checkpoint's model and processor.

    Args:
        model_id (`str`, *optional*): Directory or Hub id; the package's nano by default.
        device (`str`), dtype (`str`, *optional*): Where and in which precision the model runs.
        adapters (list of `str`): Adapters to put on the model, with their voices; they need PEFT.
        merge (`bool`, defaults to `True`): Merge the one there is, which is faster; or keep them apart, to switch.
    """
    model_id = choose_checkpoint(model_id)
    if not Path(model_id).exists() and "/" not in model_id:
        raise FileNotFoundError(f"There is no directory {model_id}, and a Hub id has the form OWNER/NAME.")
    model: Any = AutoModelForMultimodalLM.from_pretrained(model_id, dtype=dtype or "auto")
    processor = AutoProcessor.from_pretrained(model_id)
    if adapters:
        if not is_peft_available():
            raise ValueError("--adapter needs PEFT: pip install peft")
        from .adapters import merge_adapter, put_on, read_adapter

        if merge:
            info = read_adapter(adapters[0])
            model = merge_adapter(model, info.folder)
            processor.load_voices(info.folder)
        else:
            sys.stderr.write(f"Adapters: {', '.join(put_on(model, processor, adapters))} (the first one is on)\n")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
    return model.eval(), processor


def check(options: argparse.Namespace, processor: MiniMindOProcessor) -> None:
    """Refuses, before anything is generated, what would be lost after it."""
    check_voice(options.voice, processor)
    if options.text_only:
        return
    if processor.audio_tokenizer is None:
        raise ValueError(
            "This checkpoint has no codec, so its answers cannot be heard: attach one (`minimind-o convert "
            "CHECKPOINT DIR --codec MIMI`), or pass --text-only."
        )
    if options.watermark:
        Watermark()
    out = Path(options.out)
    if out.suffix not in (".wav", ".flac", ".ogg", ".mp3"):
        raise ValueError(f"--out {out}: the name must end in .wav, .flac, .ogg or .mp3.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}.")


def check_voice(name: str | None, processor: MiniMindOProcessor) -> None:
    """Refuses a voice that neither the checkpoint nor the user's library has; the library's joins the checkpoint's."""
    if name is None or name in processor.voices:
        return
    library = VoiceLibrary()
    voices = library.voices()
    if name not in voices:
        raise ValueError(
            f"There is no voice {name!r}: the checkpoint has {', '.join(sorted(processor.voices)) or 'none'}, the "
            f"library {library.path} has {', '.join(voices) or 'none'}."
        )
    processor.add_voice(name, voices[name])


def content(text: str | None, audio: list[str], images: list[str]) -> list[dict]:
    """A message's content. The order is that of the training data: speech, text, pictures."""
    parts = [{"type": "audio", "path": path} for path in audio]
    parts += [{"type": "text", "text": text}] if text else []
    parts += [{"type": "image", "path": path} for path in images]
    return parts


def answer(conversation: Conversation, said: list[dict], options: argparse.Namespace, out: Path) -> None:
    """Answers a message: prints the text as it comes, writes the speech, says how fast it was. An answer that is
    interrupted is written as far as it went."""
    settings: dict[str, Any] = {"do_sample": False} if options.greedy else {}
    if options.max_new_tokens is not None:
        settings["max_new_tokens"] = options.max_new_tokens
    if options.text_only:
        settings["generation_mode"] = "text"
    begin, first = time.perf_counter(), None
    tokens, sounds = [], []
    settings["on_output"] = lambda outputs: tokens.append(outputs.sequences.shape[1] - outputs.prompt_length)
    events = conversation.stream(said, open_thinking=options.think, **settings)
    with contextlib.closing(events):
        try:
            for event in events:
                print(shown(event.text), end="", flush=True)
                if event.audio is not None:
                    first = time.perf_counter() - begin if first is None else first
                    sounds.append(event.audio)
        finally:
            print(flush=True)
            if sounds and not options.text_only:
                _write(conversation, torch.cat(sounds), options, out)
    seconds = time.perf_counter() - begin
    if options.text_only:
        print(f"{tokens[0]} tokens in {seconds:.1f} s", file=sys.stderr)
        return
    if not sounds:
        _write(conversation, torch.zeros(0), options, out)
    duration = sum(map(len, sounds)) / conversation.processor.output_sampling_rate
    note = f", the first after {first:.2f} s" if first else ", no complete frame: a short silence"
    print(
        f"{out}: {duration:.1f} s of speech{note}, made in {seconds:.1f} s ({duration / seconds:.2f}x real time)",
        file=sys.stderr,
    )


def _write(conversation: Conversation, sound: torch.Tensor, options: argparse.Namespace, out: Path) -> None:
    sound = Watermark().apply(sound, conversation.processor.output_sampling_rate) if options.watermark else sound
    model = Path(options.model or "nano").name
    conversation.processor.save_audio(sound, out, model=model, voice=options.voice)


def converse(conversation: Conversation, options: argparse.Namespace, read: Callable[[str], str] = input) -> None:
    """A conversation: reads lines until the end of input. Answer N's speech goes to `reply-N.wav`."""
    attached: dict[str, list[str]] = {"/audio": [], "/image": []}
    out, turns = Path(options.out), 0
    print(HELP)
    while True:
        try:
            line = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        path = out.with_name(f"{out.stem}-{turns + 1}{out.suffix}")
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command == "/quit":
                return
            if command == "/reset":
                conversation.reset()
                attached = {"/audio": [], "/image": []}
                print("The conversation starts anew.")
            elif command in attached:
                if not Path(argument).is_file():
                    raise FileNotFoundError(f"there is no file {argument or '(name one)'}")
                attached[command].append(argument)
                print(f"{argument} goes with the next message.")
            elif command == "/voice":
                check_voice(argument or None, conversation.processor)
                options.voice = conversation.voice = argument or None
                print(f"Voice: {options.voice or 'none'}")
            elif command == "/adapter":
                if not options.adapter:
                    raise ValueError("no adapter is loaded: name some with --adapter")
                from .adapters import switch_adapter

                switch_adapter(conversation.model, argument or None)
                print(f"Adapter: {argument or 'none'}")
            elif command.startswith("/") and command != "/send":
                print(HELP)
            elif line and (line != "/send" or any(attached.values())):
                said = content(None if line == "/send" else line, attached["/audio"], attached["/image"])
                answer(conversation, said, options, path)
                attached, turns = {"/audio": [], "/image": []}, turns + 1
        except KeyboardInterrupt:
            turns += path.exists()
            print("(interrupted; what was said is kept)")
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            # What was typed wrong, or a file that cannot be read, should not end the conversation.
            print(f"error: {error}", file=sys.stderr)


def run(options: argparse.Namespace) -> None:
    """Runs `minimind-o chat` with parsed options."""
    if options.seed is not None:
        set_seed(options.seed)
    is_conversation = options.text is None and not options.audio and not options.image
    if len(options.adapter) > 1 and not is_conversation:
        raise ValueError("A single answer has one adapter: give --adapter once.")
    model, processor = load(options.model, options.device, options.dtype, options.adapter, not is_conversation)
    check(options, processor)
    conversation = open_conversation(options, model, processor)
    if is_conversation:
        converse(conversation, options)
        return
    answer(conversation, content(options.text, options.audio, options.image), options, Path(options.out))


__all__ = ["add_arguments", "run"]
