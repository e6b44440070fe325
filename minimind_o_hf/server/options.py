"""The options of `minimind-o serve`, which are told without the packages that serving needs."""

import argparse
from pathlib import Path

import torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `minimind-o serve`."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano, a toy)")
    parser.add_argument(
        "--adapter", metavar="DIR", action="append", default=[], help="LoRA adapter to merge into the model (one)"
    )
    parser.add_argument("--name", metavar="NAME", help="what the model is called (default: its directory's name)")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines too (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument(
        "--api-key", metavar="K", help="what clients must show (or MINIMIND_O_API_KEY; made up for other hosts)"
    )
    parser.add_argument("--https", action="store_true", help="with a certificate of its own: a phone needs it")
    parser.add_argument("--certificate", type=Path, metavar="PEM", help="another certificate, with --key")
    parser.add_argument("--key", type=Path, metavar="PEM", help="its key")
    parser.add_argument("--voice", metavar="NAME", help="voice where a client names none (default: the first)")
    parser.add_argument("--library", type=Path, metavar="FILE", help="file of cloned voices (default: your own)")
    parser.add_argument("--max-answers", type=int, default=8, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument("--max-waiting", type=int, default=32, metavar="N", help="more are refused (default: 32)")
    parser.add_argument("--max-sessions", type=int, default=64, metavar="N", help="open at a time (default: 64)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="steps of 80 ms (default: the checkpoint's)")
    parser.add_argument(
        "--max-turns", type=int, metavar="N", help="earlier turns remembered (default: the checkpoint's)"
    )
    parser.add_argument("--requests-per-minute", type=int, default=600, metavar="N", help="of a client; 0: any number")
    parser.add_argument("--watermark", action="store_true", help="put an inaudible watermark into the speech")
    parser.add_argument("--threads", type=int, metavar="N", help="of PyTorch (default: half the cores)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: the checkpoint's")


__all__ = ["add_arguments"]
