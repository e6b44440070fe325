"""The `minimind-o` command."""

import argparse
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


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

    talk = commands.add_parser(
        "talk",
        help="speak with a model",
        description="A spoken conversation, by microphone and loudspeaker or by files.",
    )
    from .talk import add_arguments as add_talking

    add_talking(talk)

    serve = commands.add_parser(
        "serve",
        help="serve a model to browsers and programs",
        description="Serve a model: a page to talk to, and OpenAI's protocols for programs.",
    )
    from .server.options import add_arguments as add_serving

    add_serving(serve)

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
    convert.add_argument(
        "--kind",
        choices=["model", "speaker-encoder"],
        default="model",
        help="what SRC is; a speaker encoder is CAM++'s state dict (default: %(default)s)",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands there")
    _add_data(commands)
    from .voices_cli import add_arguments as add_voices

    add_voices(commands)
    from .adapters_cli import add_arguments as add_adapter

    add_adapter(commands)
    from .export import add_arguments as add_export

    add_export(commands)

    _add_evaluate(commands)
    publish = commands.add_parser(
        "publish",
        help="upload a checkpoint to the Hub",
        description="Check a checkpoint, add a model card and the code that loads it where this package is not "
        "installed, and upload it in one commit. After an interruption the same command sends what is missing.",
    )
    publish.add_argument("directory", metavar="DIR", help="a complete checkpoint; it is not changed")
    publish.add_argument("repo_id", metavar="REPO", help="OWNER/NAME on the Hub")
    publish.add_argument("--private", action="store_true", help="make a private repository")
    publish.add_argument("--update", action="store_true", help="into a repository that something else filled")
    publish.add_argument("--dry-run", metavar="OUT", help="write what would be uploaded to the directory OUT instead")
    inspect = commands.add_parser(
        "inspect",
        help="say whether a sound file is marked as AI-generated",
        description="Prints the mark of a sound file as JSON, or that it has none, and whether it has the inaudible "
        'watermark, where `pip install "minimind_o_hf[watermark]"` was run. Files without either may be generated all '
        "the same: marks can be removed.",
    )
    inspect.add_argument("file", metavar="FILE")
    return parser


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="build, check and show training data")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser(
        "build",
        help="make a parquet file of recordings, chats or text",
        description="Make training data. SRC is a folder of recordings with .txt files of the same names (or with a "
        "metadata.csv, .tsv or .jsonl), a .csv, .tsv, .json or .jsonl of recordings and text or of `messages` with "
        "`audios` and `images`, a `datasets` set on disk, a .parquet file, a Hub id, or a .txt with a sentence or "
        "'question TAB answer' a line, which --tts speaks. An interrupted build goes on where it stopped.",
    )
    build.add_argument("source", metavar="SRC")
    build.add_argument("out", type=Path, metavar="OUT.parquet")
    for kind in ("audio", "text", "speaker"):
        build.add_argument(f"--{kind}-column", metavar="NAME", help="default: found by its usual names")
    build.add_argument("--prompt", metavar="P", help="what asks for a recording, with a field {text}")
    build.add_argument("--language", default="en", help="of the default prompt, en or zh; {language} in --tts")
    build.add_argument(
        "--tts", metavar="CMD", help='speaks {text} into {out}, without a shell: "espeak-ng -w {out} -- {text}"'
    )
    build.add_argument("--text-questions", action="store_true", help="--tts speaks answers alone")
    build.add_argument("--voice", metavar="NAME", help="voice of the checkpoint (default: the speaker's own)")
    build.add_argument("--speaker-encoder", metavar="P", help="CAM++: directory or Hub id; makes speaker embeddings")
    build.add_argument("--no-reference", dest="reference", action="store_false", help="write no reference codes")
    build.add_argument("--split", default="train", help="of a `datasets` set (default: %(default)s)")
    build.add_argument("--subset", metavar="NAME", help="configuration of a set on the Hub")
    build.add_argument("--limit", type=int, metavar="N", help="take the first N records")
    build.add_argument("--device", default="cpu", help="where the codec runs (default: %(default)s)")
    build.add_argument("--skip-errors", action="store_true", help="leave out, and list, records with errors")
    build.add_argument("--overwrite", action="store_true", help="replace a file that stands there")

    check = actions.add_parser(
        "check", help="check every row, and count", description="Exits with 1 and names the rows (file:row) on errors."
    )
    check.add_argument("files", nargs="+", metavar="FILE", help="parquet files")
    check.add_argument("--plot", metavar="PNG", help="draw histograms of durations and lengths")

    show = actions.add_parser("show", help="one sample as a picture, sound and text")
    show.add_argument("file", metavar="FILE", help="parquet file")
    show.add_argument("row", type=int, metavar="N", help="row, counted from 0")
    show.add_argument("--out", type=Path, metavar="DIR", help="default: FILE's name and N")
    show.add_argument("--seed", type=int, metavar="S", help="make training's random choices, with this seed")
    for action in (build, check, show):
        action.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
        action.add_argument(
            "--max-length", type=int, default=512, metavar="N", help="longest sequence in training (default: 512)"
        )
    for action in (build, check):
        action.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="default: the cores")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a model a suite of questions, listen, and write a report",
        description="Ask a checkpoint a suite of questions, transcribe its answers, compare voices and pictures, and "
        "write report.json, report.md and plots. Or score another model's recordings (--wavs), or make a table of "
        "several checkpoints (--table). An interrupted evaluation goes on where it stopped. It needs "
        'pip install "minimind_o_hf[evaluation]".',
    )
    evaluate.add_argument("model", nargs="?", metavar="MODEL", help="directory or Hub id (default: the nano model)")
    evaluate.add_argument("--suite", default="nano", metavar="S", help="YAML or JSON file, or nano, english")
    evaluate.add_argument("--wavs", type=Path, metavar="DIR", help="recordings with .txt files of the same names")
    evaluate.add_argument("--table", metavar="T", help="YAML file that names checkpoints, or one of the package's")
    evaluate.add_argument("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="default: evaluation")
    evaluate.add_argument("--asr", default="pocketsphinx", metavar="P", help="or directory or Hub id (Whisper, ...)")
    evaluate.add_argument(
        "--speaker-encoder",
        metavar="P",
        help="CAM++: directory or Hub id (default: the checkpoint's own)",
    )
    evaluate.add_argument(
        "--voices", type=Path, metavar="FILE", help="voices it was not trained with (default: its own)"
    )
    evaluate.add_argument("--recordings", type=Path, metavar="DIR", help="real recordings of voices, VOICE/*.wav")
    evaluate.add_argument("--data", type=Path, metavar="PARQUET", help="for perplexity and codebook accuracy")
    evaluate.add_argument("--only", metavar="LIST", help="of typed,spoken,picture (default: all)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="ask at most N questions of each")
    evaluate.add_argument("--language", default="en", help="of --wavs: en or zh (default: %(default)s)")
    evaluate.add_argument("--batch-size", type=int, default=16, metavar="N", help="default: %(default)s")
    evaluate.add_argument("--device", default="cpu", help="default: %(default)s")
    evaluate.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")


def _run_data(options: argparse.Namespace) -> None:
    from .modeling import MiniMindOConfig
    from .packaged import choose_checkpoint
    from .processing import MiniMindOProcessor

    model = choose_checkpoint(options.model, "the tokenizer, codec and sizes of nano, a toy.")
    config: Any = MiniMindOConfig.from_pretrained(model)
    processor = MiniMindOProcessor.from_pretrained(model, load_audio_tokenizer=options.action != "check")
    if options.action == "build":
        from dataclasses import fields

        from .data.building import BuildSettings, build_data

        settings = BuildSettings(**{item.name: getattr(options, item.name) for item in fields(BuildSettings)})
        report = build_data(options.source, options.out, processor, config, settings)
        print(f"{options.out}: {report}")
    elif options.action == "check":
        from .data.checking import check_files

        report = check_files(options.files, processor, config, options.max_length, options.workers)
        print(report)
        if options.plot:
            report.plot(options.plot)
        if report.errors:
            raise ValueError(f"{len(report.errors)} errors in {report.rows} rows")
    else:
        from .data.showing import show_sample

        out = options.out or Path(f"{Path(options.file).stem}-{options.row}")
        print(show_sample(options.file, options.row, processor, config, out, options.max_length, options.seed))


def _has_watermark(path: str) -> bool | None:
    """Whether a sound file has the inaudible watermark; None where that cannot be told."""
    from .watermark import THRESHOLD, Watermark, is_watermark_available

    if not is_watermark_available():
        return None
    try:
        return Watermark().detect(path) >= THRESHOLD
    except (ValueError, OSError) as error:  # cut short, or empty: its mark can be read all the same
        print(f"minimind-o: not searched for a watermark: {error}", file=sys.stderr)
        return None


def _run(options: argparse.Namespace) -> None:
    import torch

    if options.command == "chat":
        from .chat import run

        run(options)
        return
    if options.command == "talk":
        from .talk import run

        run(options)
        return
    if options.command == "serve":
        try:
            from .server.command import run
        except ModuleNotFoundError as error:
            raise ValueError(f'{error}: pip install "minimind_o_hf[server]"') from error
        run(options)
        return
    if options.command == "data":
        _run_data(options)
        return
    if options.command in ("voices", "say"):
        from .voices_cli import run

        run(options)
        return
    if options.command == "evaluate":
        try:
            from .evaluation.command import run
        except ModuleNotFoundError as error:
            raise ValueError(f'{error}: pip install "minimind_o_hf[evaluation]"') from error
        run(options)
        return
    if options.command == "adapter":
        from .adapters_cli import run

        print(run(options))
        return
    if options.command == "export":
        from .export import run

        print(run(options))
        return
    if options.command == "publish":
        from .publishing import publish

        print(publish(options.directory, options.repo_id, options.private, options.update, options.dry_run))
        return
    if options.command == "inspect":
        from .chat import shown
        from .processing import read_mark

        mark, watermark = read_mark(options.file), _has_watermark(options.file)
        if mark is not None:
            found = {} if watermark is None else {"watermark": watermark}
            print(shown(json.dumps({**mark, **found}, ensure_ascii=False)))
        else:
            note = {None: "", True: ", but a watermark", False: ", no watermark"}[watermark]
            print(f"{options.file}: no mark{note}")
        return
    dtype = getattr(torch, options.dtype) if options.dtype else None
    if options.command == "init":
        from .presets import init_checkpoint

        made = init_checkpoint(
            options.preset, options.directory, seed=options.seed, dtype=dtype, overwrite=options.overwrite
        )
        print(f"{made}: an untrained {options.preset} checkpoint. Its answers are noise until it is trained.")
        return
    if options.kind == "speaker-encoder":
        from .convert import convert_campplus

        for name in ("audio_encoder", "vision_encoder", "codec", "tokenizer", "dtype"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} has no place in a speaker encoder: leave it out.")
        made = convert_campplus(options.source, options.directory, overwrite=options.overwrite)
    elif options.directory.suffix in (".pth", ".bin"):
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
