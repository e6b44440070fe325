"""`minimind-o adapter`: looking at adapters, merging and publishing them."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(commands: Any) -> None:
    """Adds `minimind-o adapter` to the command's subparsers."""
    adapter = commands.add_parser("adapter", help="look at, merge and publish LoRA adapters")
    actions = adapter.add_subparsers(dest="action", required=True, metavar="ACTION")
    info = actions.add_parser(
        "info",
        help="what an adapter changes, which model it belongs to, which voices it carries",
        description="Say what an adapter is. With --model, also whether it belongs to that model.",
    )
    merge = actions.add_parser(
        "merge",
        help="make a checkpoint of an adapter and its base",
        description="Merge an adapter into its base: DIR becomes a complete checkpoint, in which what the adapter "
        "does not change is what it was.",
    )
    push = actions.add_parser(
        "push",
        help="upload an adapter to the Hub",
        description="Put an adapter on its base and have it answer, add a card, and upload it with its voices in one "
        "commit. What a training left beside it is not sent.",
    )
    for action in (info, merge, push):
        action.add_argument("adapter", metavar="ADAPTER", help="directory or Hub id")
    merge.add_argument("directory", type=Path, metavar="DIR", help="directory to make")
    for action in (info, merge):
        action.add_argument("--model", metavar="BASE", help="directory or Hub id (default: what the adapter names)")
    merge.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: the base's")
    merge.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands there")
    push.add_argument("repo_id", metavar="REPO", help="OWNER/NAME on the Hub")
    push.add_argument("--base", metavar="ID", help="the base's Hub id (default: what the adapter names)")
    push.add_argument("--voices", metavar="FILE", help="library of voices to carry (default: the adapter's own)")
    push.add_argument("--private", action="store_true", help="make a private repository")
    push.add_argument("--update", action="store_true", help="into a repository that something else filled")
    push.add_argument("--dry-run", metavar="OUT", help="write what would be uploaded to the directory OUT instead")


def run(options: argparse.Namespace) -> str:
    """Runs `minimind-o adapter` with parsed options, and returns what there is to say."""
    import torch

    try:
        from .adapters import merge_adapter, merge_checkpoint, publish_adapter, read_adapter
    except ImportError as error:
        raise ValueError(str(error)) from error
    from .modeling import MiniMindOForConditionalGeneration
    from .voices import VoiceLibrary

    if options.action == "info":
        info = read_adapter(options.adapter)
        if options.model is None:
            return str(info)
        if not Path(options.model).exists() and options.model.count("/") != 1:
            raise FileNotFoundError(f"There is no directory {options.model}, and a Hub id has the form OWNER/NAME.")
        model: Any = MiniMindOForConditionalGeneration.from_pretrained(options.model)
        merge_adapter(model, info.folder)
        return f"{info}\nIt belongs to {options.model}."
    if options.action == "merge":
        dtype = getattr(torch, options.dtype) if options.dtype else None
        made = merge_checkpoint(options.adapter, options.directory, options.model, dtype, options.overwrite)
        return f"{made}: {options.adapter}, merged."
    voices = VoiceLibrary(options.voices) if options.voices else None
    return publish_adapter(
        options.adapter, options.repo_id, options.base, voices, options.private, options.update, options.dry_run
    )


__all__ = ["add_arguments", "run"]
