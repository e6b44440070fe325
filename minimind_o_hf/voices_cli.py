"""`minimind-o voices`: the user's library of voices; `minimind-o say`: a text read aloud in one of them."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch


def add_arguments(commands: Any) -> None:
    """Adds the commands `voices` and `say` to those of `minimind-o`."""
    voices = commands.add_parser("voices", help="make, keep and share voices")
    actions = voices.add_subparsers(dest="action", required=True, metavar="ACTION")

    listed = actions.add_parser("list", help="the voices of the library")

    clone = actions.add_parser(
        "clone",
        help="make a voice of a recording",
        description="Make a voice of a recording: half a minute of one person's clear speech, with pauses, in a quiet "
        "room. It is sped up and checked, and nothing of it is kept but codes and a speaker embedding.",
    )
    clone.add_argument("audio", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    clone.add_argument("name", metavar="NAME")
    clone.add_argument("--consent", metavar="S", help="who the speaker is, and that they agree (required)")
    clone.add_argument(
        "--speaker-encoder",
        metavar="P",
        help="CAM++: directory or Hub id (default: the checkpoint's own)",
    )
    clone.add_argument("--speed", type=float, default=1.5, metavar="X", help="1 leaves it as it is (default: 1.5)")
    clone.add_argument("--description", default="", metavar="S", help="what it sounds like")
    clone.add_argument("--licence", default="", metavar="S", help="under which it may be used")

    imported = actions.add_parser(
        "import",
        help="take in the voices of a file",
        description="Take in the voices of a file: an original dictionary (.pt), a library or a single voice "
        "(.safetensors). Licence and consent are needed where the file does not state them; originals do not.",
    )
    imported.add_argument("file", type=Path, metavar="FILE")
    imported.add_argument("--licence", metavar="S", help="under which the voices may be used")
    imported.add_argument("--consent", metavar="S", help="who agreed to their use")
    imported.add_argument("--name", metavar="NAME", help="another name, for a file of one voice")

    export = actions.add_parser("export", help="write one voice to a file of its own")
    export.add_argument("name", metavar="NAME")
    export.add_argument("file", type=Path, metavar="FILE.safetensors")

    remove = actions.add_parser("remove", help="remove a voice")
    remove.add_argument("name", metavar="NAME")

    rename = actions.add_parser("rename", help="rename a voice")
    rename.add_argument("name", metavar="OLD")
    rename.add_argument("new", metavar="NEW")

    play = actions.add_parser("play", help="hear a voice's reference codes")
    play.add_argument("name", metavar="NAME")
    play.add_argument("--out", type=Path, metavar="WAV", help="write a file instead of playing")

    blend = actions.add_parser("blend", help="make a voice between two, of their speaker embeddings")
    blend.add_argument("first", metavar="A")
    blend.add_argument("second", metavar="B")
    blend.add_argument("name", metavar="NAME")
    blend.add_argument("--weight", type=float, default=0.5, metavar="W", help="share of B, 0 to 1 (default: 0.5)")
    blend.add_argument("--keep-codes", action="store_true", help="keep the heavier one's reference codes")

    for action in (clone, imported):
        action.add_argument("--language", default="", metavar="L", help="of the voice, such as en")
    for action in (clone, imported, export):
        action.add_argument("--overwrite", action="store_true", help="replace what has the name")
    for action in (clone, play):
        action.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
    for action in (listed, clone, imported, export, remove, rename, play, blend):
        action.add_argument("--library", metavar="FILE", help="the library's file (default: your own)")

    say = commands.add_parser(
        "say", help="read a text aloud", description="Ask the model to read a text aloud, and write what it says."
    )
    say.add_argument("text", metavar="TEXT")
    say.add_argument("--voice", metavar="NAME", help="voice of the checkpoint, or of your library")
    say.add_argument("--out", metavar="WAV", default="reply.wav", help="default: %(default)s")
    say.add_argument("--watermark", action="store_true", help="put an inaudible watermark into the speech")
    say.add_argument("--language", default="en", help="of the prompt, en or zh (default: %(default)s)")
    say.add_argument("--prompt", metavar="P", help="what asks for the text, with a field {text}")
    say.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
    say.add_argument(
        "--adapter",
        metavar="DIR",
        action="append",
        default=[],
        help="LoRA adapter trained on the model: directory or Hub id (one)",
    )
    say.add_argument("--greedy", action="store_true", help="take the likeliest token instead of sampling")
    say.add_argument("--seed", type=int, metavar="N", help="make the speech reproducible")
    say.add_argument("--max-new-tokens", type=int, metavar="N", help="longest speech, in steps of 80 ms")
    say.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    say.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")
    # A turn of `minimind-o chat` in all else.
    say.set_defaults(audio=[], image=[], system=None, text_only=False, think=False)


def run(options: argparse.Namespace) -> None:
    """Runs `minimind-o voices` or `minimind-o say` with parsed options."""
    if options.command == "say":
        _say(options)
    else:
        _ACTIONS[options.action](options)


def _library(options: argparse.Namespace):
    from .voices import VoiceLibrary

    return VoiceLibrary(options.library)


def _processor(options: argparse.Namespace):
    from .packaged import choose_checkpoint
    from .processing import MiniMindOProcessor

    model = choose_checkpoint(options.model, "the codec of nano, a toy.")
    processor = MiniMindOProcessor.from_pretrained(model)
    if processor.audio_tokenizer is None:
        raise ValueError(f"{model} has no codec: give another --model, or attach one (`minimind-o convert --codec`).")
    return processor


def _list(options: argparse.Namespace) -> None:
    library = _library(options)
    voices = library.voices()
    if not voices:
        print(f"{library.path} has no voices.", file=sys.stderr)
    for name, voice in voices.items():
        parts = [f"{voice.ref_codes.shape[1] / 12.5:.1f} s of codes"] if voice.ref_codes is not None else []
        parts += ["embedding"] if voice.spk_emb is not None else []
        notes = [voice.language, voice.description, f"licence: {voice.licence or 'not stated'}"]
        notes += [f"consent: {voice.consent or 'not stated'}"]
        line = f"{name}: {' and '.join(parts)}; {'; '.join(note for note in notes if note)}"
        # What a file says must not steer the terminal it is printed on.
        print("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line))


def _clone(options: argparse.Namespace) -> None:
    from .packaged import speaker_encoder_of
    from .processing.voices_minimind_o import check_voice_name
    from .voices import Voice

    library = _library(options)
    if check_voice_name(options.name) in library and not options.overwrite:
        raise ValueError(f"{library.path} has {options.name!r} already: give another name, or --overwrite.")
    voice = Voice.from_audio(
        options.audio,
        options.consent,
        processor=_processor(options),
        speaker_encoder=options.speaker_encoder or speaker_encoder_of(options.model),
        speed=options.speed,
        name=options.name,
        language=options.language,
        description=options.description,
        licence=options.licence,
    )
    library.add(voice, overwrite=options.overwrite)
    print(f"{library.path}: {options.name} is there.")


def _import(options: argparse.Namespace) -> None:
    library = _library(options)
    names = library.import_file(
        options.file, options.licence, options.consent, options.language, options.name, options.overwrite
    )
    print(f"{library.path}: {', '.join(names)} from {options.file}.")


def _export(options: argparse.Namespace) -> None:
    _library(options).export(options.name, options.file, options.overwrite)
    print(f"{options.file}: done.")


def _remove(options: argparse.Namespace) -> None:
    library = _library(options)
    library.remove(options.name)
    print(f"{library.path}: {options.name} is removed.")


def _rename(options: argparse.Namespace) -> None:
    library = _library(options)
    library.rename(options.name, options.new)
    print(f"{library.path}: {options.name} is {options.new} now.")


def _play(options: argparse.Namespace) -> None:
    voice, processor = _library(options).get(options.name), _processor(options)
    if options.out is None:
        voice.play(processor)
        return
    processor.save_audio(voice.to_audio(processor), options.out, voice=voice.name)
    print(f"{options.out}: done.")


def _blend(options: argparse.Namespace) -> None:
    library = _library(options)
    blend = library.blend(options.first, options.second, options.weight, options.name, options.keep_codes)
    print(f"{library.path}: {options.name} is there, a {blend.description}.")


_ACTIONS = {
    "list": _list,
    "clone": _clone,
    "import": _import,
    "export": _export,
    "remove": _remove,
    "rename": _rename,
    "play": _play,
    "blend": _blend,
}


def _say(options: argparse.Namespace) -> None:
    from .chat import run as run_chat
    from .data.sources import reading_prompt

    if not options.text.strip():
        raise ValueError("There is nothing to say: the text is empty.")
    if options.prompt is not None and "{text}" not in options.prompt:
        raise ValueError(f"--prompt {options.prompt!r} has no field {{text}}: the model would not hear of the text.")
    options.text = reading_prompt(options.text, options.language, options.prompt)
    run_chat(options)


__all__ = ["add_arguments", "run"]
