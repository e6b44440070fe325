"""Out to other engines: the Thinker as a plain Qwen3 checkpoint, and `minimind-o export`, which makes ONNX graphs
too."""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from .files import new_directory
from .modeling import MiniMindOConfig, MiniMindOForConditionalGeneration
from .processing import MiniMindOProcessor

# What the text's generation keeps of the whole model's settings; the rest is about speech.
_TEXT_SETTINGS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
    *("repetition_penalty", "max_new_tokens", "suppress_tokens"),
)

# Without the encoders a placeholder would be read as a word.
_TEXT_ONLY = """\
{%- for message in messages -%}
    {%- if message.content is not string and message.content is not mapping and message.content is iterable -%}
        {%- for item in message.content if item.type != 'text' -%}
            {{- raise_exception('This is the Thinker alone, and reads text only, got ' ~ item.type ~ '.') -}}
        {%- endfor -%}
    {%- endif -%}
{%- endfor -%}
"""


def load_whole(source: str | os.PathLike, **kwargs: Any) -> MiniMindOForConditionalGeneration:
    """
    A checkpoint's model in evaluation mode, as [`MiniMindOForConditionalGeneration.from_pretrained`].

    Raises:
        ValueError: The weights are quantised: other engines quantise by their own rules.
    """
    method = getattr(MiniMindOConfig.from_pretrained(source), "quantization_config", None)
    if method is not None:
        kind = method.get("quant_method") if isinstance(method, dict) else type(method).__name__
        raise ValueError(f"The weights of {source} are quantised ({kind}): export the checkpoint they were made from.")
    model: Any = MiniMindOForConditionalGeneration.from_pretrained(source, **kwargs)
    return model.eval()


def thinker_as_qwen3(model: MiniMindOForConditionalGeneration) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """
    The Thinker and its head as transformers' own class; its parameters are the model's, not copies.

    The two are one architecture: norms before attention and MLP and after the last layer, norms of each head's queries
    and keys, rotary embeddings of the same settings (YaRN too), no biases, no shared expert. Only the padding index of
    the embedding is left out, as pad is an ordinary token here.

    Raises:
        ValueError: The Thinker has tensors that Qwen3 has no place for, such as an adapter's.
    """
    own = model.config.thinker_config
    config = type(own).from_dict(own.to_dict())  # without the implementations chosen for this process
    config.bos_token_id, config.eos_token_id = model.config.bos_token_id, model.config.eos_token_id
    config.dtype, config.use_cache = model.dtype, True
    state = {name: value for name, value in model.state_dict().items() if name.startswith(("model.", "lm_head."))}
    with torch.device("meta"):
        qwen3 = (Qwen3MoeForCausalLM if model.config.use_moe else Qwen3ForCausalLM)(config)
    surplus, missing = sorted(state.keys() - qwen3.state_dict().keys()), sorted(qwen3.state_dict().keys() - state)
    if surplus or missing:
        raise ValueError(
            f"The Thinker is no plain Qwen3: it has {len(surplus)} tensors too many, {surplus[:3]}, and "
            f"{len(missing)} too few, {missing[:3]}. Merge adapters into the model first (`merge_adapter`)."
        )
    qwen3.load_state_dict(state, assign=True)
    qwen3.tie_weights()
    settings = {name: getattr(model.generation_config, name) for name in _TEXT_SETTINGS}
    qwen3.generation_config = GenerationConfig(
        **{name: value for name, value in settings.items() if value is not None}
    )
    return qwen3


def export_thinker(source: str | os.PathLike, directory: str | os.PathLike, overwrite: bool = False) -> Path:
    """
    Write a checkpoint's Thinker as a `Qwen3ForCausalLM` or `Qwen3MoeForCausalLM` directory, which transformers loads
    without this package, with the same logits: configuration, weights in the checkpoint's dtype, tokenizer, chat
    template and generation settings. Talker, encoders, codec and voices are left out.

    Args:
        source (`str` or `os.PathLike`): Checkpoint directory or Hub id.
        directory (`str` or `os.PathLike`): The directory to make.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint that stands there.

    Returns:
        `Path`: the directory.

    Raises:
        ValueError: The weights are quantised or hold more than Qwen3 has, or the tokenizer belongs to another model.
        FileExistsError: Something stands there already.
    """
    processor = MiniMindOProcessor.from_pretrained(source, load_audio_tokenizer=False)
    with new_directory(directory, overwrite) as folder:
        qwen3 = thinker_as_qwen3(load_whole(source))
        tokenizer = processor.tokenizer
        if len(tokenizer) > qwen3.config.vocab_size:
            raise ValueError(
                f"The tokenizer of {source} has {len(tokenizer)} tokens, and the model a vocabulary of "
                f"{qwen3.config.vocab_size}: it belongs to another model."
            )
        qwen3.save_pretrained(folder)
        template: Any = processor.chat_template
        tokenizer.chat_template = _TEXT_ONLY + template
        # Its name would ask for this package.
        tokenizer._processor_class = None
        tokenizer.init_kwargs.pop("processor_class", None)
        tokenizer.save_pretrained(folder)
    return Path(directory)


def add_arguments(commands: Any) -> None:
    """Adds `minimind-o export` to the command's subparsers."""
    export = commands.add_parser("export", help="make a checkpoint for other engines")
    actions = export.add_subparsers(dest="action", required=True, metavar="WHAT")
    thinker = actions.add_parser(
        "thinker",
        help="the language model alone",
        description="Write the Thinker as a plain Qwen3 checkpoint with tokenizer and chat template. It reads and "
        "writes text; speech and pictures are left out.",
    )
    thinker.add_argument("--to", choices=["qwen3"], required=True, help="its architecture")
    onnx = actions.add_parser(
        "onnx",
        help="graphs for onnxruntime",
        description="Write model, codec and encoders as ONNX graphs in float32, each compared with torch, and "
        "onnx_runner.py, which speaks with them without torch. It needs "
        'pip install "minimind_o_hf[onnx]".',
    )
    for action, suffix in ((thinker, "qwen3"), (onnx, "onnx")):
        action.add_argument("source", metavar="DIR", help="checkpoint directory or Hub id")
        action.add_argument("--out", type=Path, metavar="OUT", help=f"default: DIR's name, with -{suffix}")
        action.add_argument("--overwrite", action="store_true", help="replace a checkpoint that stands there")
        action.set_defaults(suffix=suffix)


def run(options: argparse.Namespace) -> str:
    """Runs `minimind-o export` with parsed options, and returns what there is to say."""
    out = options.out or Path(f"{Path(options.source).resolve().name}-{options.suffix}")
    if options.action == "thinker":
        return f"{export_thinker(options.source, out, options.overwrite)}: done."
    try:
        from .export_onnx import export_onnx
    except ModuleNotFoundError as error:
        raise ValueError(f'{error}: pip install "minimind_o_hf[onnx]"') from error
    lines = [
        f"{name}: {size / 1e6:.1f} MB, within {difference:.0e} of torch"
        for name, (size, difference) in export_onnx(options.source, out, options.overwrite).items()
    ]
    return "\n".join([*lines, f'{out}: done. Hear it: python {out / "onnx_runner.py"} "Hello"'])


__all__ = ["add_arguments", "export_thinker", "load_whole", "run", "thinker_as_qwen3"]
