"""The `minimind-o` command."""

import argparse
import os
import sys
from importlib.metadata import version
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-o", description="MiniMind-O: text, speech and pictures in; text and speech out."
    )
    parser.add_argument("--version", action="version", version=f"minimind_o_hf {version('minimind_o_hf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    chat = commands.add_parser(
        "chat", help="talk with a model", description="One turn from options, or a conversation."
    )
    from .chat import add_arguments

    add_arguments(chat)

    init = commands.add_parser(
        "init",
        help="make an untrained checkpoint",
        description="Make a complete, untrained checkpoint: model, encoders, codec, tokenizer and processor.",
    )
    init.add_argument("preset", choices=["nano", "dense", "moe"], help="toy size, or one of the released sizes")
    init.add_argument("directory", type=Path, metavar="DIR")
    init.add_argument("--seed", type=int, default=0, help="of the random weights (default: %(default)s)")
    init.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: nano float32, others bfloat16")
    init.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands there")

    convert = commands.add_parser(
        "convert",
        help="convert to and from the original release's layouts",
        description="Make one complete checkpoint directory from an original one, or, where DIR ends in .pth, the "
        "original's state dict from a checkpoint directory.",
    )
    convert.add_argument("source", metavar="SRC", help="original directory, .pth state dict or Hub id")
    convert.add_argument("directory", type=Path, metavar="DIR", help="directory to make, or a .pth file")
    convert.add_argument(
        "--audio-encoder", metavar="P", help="SenseVoice-Small (model.pt, am.mvn): directory or Hub id"
    )
    convert.add_argument("--vision-encoder", metavar="P", help="SigLIP2: directory or Hub id")
    convert.add_argument("--codec", metavar="P", help="Mimi: directory or Hub id")
    convert.add_argument("--tokenizer", metavar="P", help="tokenizer for a bare state dict: directory or Hub id")
    convert.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="default: the source's; float16 for a .pth, which rounds float32 weights",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands there")
    return parser


def _run(options: argparse.Namespace) -> None:
    import torch

    if options.command == "chat":
        from .chat import run

        run(options)
        return
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.command == "init":
        from .presets import init_checkpoint

        made = init_checkpoint(
            options.preset, options.directory, seed=options.seed, dtype=dtype, overwrite=options.overwrite
        )
        print(f"{made}: an untrained {options.preset} checkpoint. Its answers are noise until it is trained.")
        return
    if options.directory.suffix in (".pth", ".bin"):
        from .convert import export_original

        for name in ("audio_encoder", "vision_encoder", "codec", "tokenizer"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} has no place in an original state dict: leave it out.")
        made = export_original(
            options.source, options.directory, dtype=dtype or torch.float16, overwrite=options.overwrite
        )
    else:
        from .convert import convert_checkpoint

        made = convert_checkpoint(
            options.source,
            options.directory,
            audio_encoder=options.audio_encoder,
            vision_encoder=options.vision_encoder,
            codec=options.codec,
            tokenizer=options.tokenizer,
            dtype=dtype,
            overwrite=options.overwrite,
        )
    print(f"{made}: done.")


def main(arguments: list[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        arguments (`list[str]`, *optional*): What follows `minimind-o`; the process's own arguments by default.

    Returns:
        `int`: 0, or 1 after an error, whose message went to the standard error stream.
    """
    options = _parser().parse_args(arguments)
    from transformers.utils import logging

    # Progress bars and advice about flags would stand between the lines of an answer.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        _run(options)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"minimind-o: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


__all__ = ["main"]
