"""What 8 and 4 bits save, and what they cost.

    pip install torchao bitsandbytes
    python benchmarks/quantisation.py            # the packaged nano; a minute on two cores
    python benchmarks/quantisation.py --model DIR

The batch is made by the model itself: answers in text and codes, sampled in full precision at temperature 1. Their
loss in full precision is then the model's own entropy, and what quantisation adds to it estimates the Kullback-Leibler
divergence between the two models, in nats a token. `size` counts all of the model's tensors, encoders included.
In the quantised rows all else is in bfloat16. What is not installed, or does not run here, has its reason in its row.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from minimind_o_hf import (
    MiniMindOForConditionalGeneration,
    MiniMindOProcessor,
    apply_delay_pattern,
    default_checkpoint,
)
from minimind_o_hf.quantisation import KEPT_IN_FULL_PRECISION

QUESTIONS = [
    *("Hello, how are you?", "What is three plus four?", "Who are you?", "What can you do?"),
    *("Is the sky blue?", "Good night.", "What do cats eat?", "How many legs has a dog?"),
]
# What transformers leaves alone by default, and has to be left alone here.
HEAD = ["lm_head"]
ENCODERS = ["audio_tower", "vision_tower", "audio_proj", "vision_proj"]


def torchao_8_bits(kept: list[str]) -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)


def torchao_4_bits(kept: list[str]) -> TorchAoConfig:
    """Packed for this processor by torchao's own kernel for CPUs; a GPU has `Int4WeightOnlyConfig`."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=32), modules_to_not_convert=kept)


def bitsandbytes_8_bits(kept: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)


def bitsandbytes_4_bits(kept: list[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=kept)


def make_batch(model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor) -> dict[str, torch.Tensor]:
    """Prompts and sampled answers with their labels, one stream of text and one of codes."""
    config = model.config
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": question}] for question in QUESTIONS],
        add_generation_prompt=True,
        tokenize=True,
        return_tensors="pt",
        return_dict=True,
    )
    settings: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    settings |= {"audio_temperature": 1.0, "audio_top_k": 0, "audio_repetition_penalty": 1.0, "max_new_tokens": 96}
    said = model.generate(**inputs, **settings, seeds=list(range(len(QUESTIONS))))
    prompt, rows = said.prompt_length, len(QUESTIONS)
    length = prompt + 96
    input_ids = torch.full((rows, length), config.pad_token_id)
    input_ids[:, : said.sequences.shape[1]] = said.sequences
    ends = (said.sequences[:, prompt:] == config.eos_token_id).long().argmax(dim=1)
    position = torch.arange(length)
    is_text = (position >= prompt) & (position <= prompt + ends[:, None])
    codes, is_code = apply_delay_pattern(
        said.audio_codes,
        torch.full((rows,), prompt + 1),
        length,
        config.audio_pad_token,
        config.audio_stop_token,
        said.audio_codes_mask.sum(dim=1),
    )
    mask = torch.ones_like(input_ids)
    mask[:, :prompt] = inputs["attention_mask"]
    return {
        "input_ids": input_ids,
        "attention_mask": mask,
        "audio_codes": codes,
        "labels": input_ids.masked_fill(~is_text, -100),
        # Stops are left out: an answer that was cut has none.
        "audio_labels": codes.masked_fill(~is_code | (codes >= config.audio_codebook_size), -100),
    }


def num_bytes(tensor: Any) -> int:
    """Of a tensor, or of the tensors that a quantised one is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) else 0


def model_bytes(model: MiniMindOForConditionalGeneration) -> int:
    return sum(num_bytes(part) for name, part in model.state_dict().items() if name not in model.all_tied_weights_keys)


@torch.no_grad()
def measure(model: MiniMindOForConditionalGeneration, batch: dict[str, torch.Tensor]) -> tuple[float, float, float]:
    """Size in MB, loss of the text and loss of the codes."""
    outputs = model(**batch)
    return model_bytes(model) / 1e6, float(outputs.text_loss), float(outputs.audio_loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(default_checkpoint()), metavar="DIR", help="default: the packaged nano")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")

    def load(**kwargs: Any) -> MiniMindOForConditionalGeneration:
        model: Any = MiniMindOForConditionalGeneration.from_pretrained(options.model, **kwargs)
        return model.eval()

    full = load(dtype=torch.float32)
    processor = MiniMindOProcessor.from_pretrained(options.model, load_audio_tokenizer=False)
    batch = make_batch(full, processor)
    counts = [int((batch[name] != -100).sum()) for name in ("labels", "audio_labels")]
    print(f"{counts[0]} tokens of text, {counts[1]} codes\n")

    rows: list[tuple[str, Callable[[], MiniMindOForConditionalGeneration]]] = [
        ("float32", lambda: full),
        ("bfloat16", lambda: load(dtype=torch.bfloat16)),
    ]
    for make in (torchao_8_bits, torchao_4_bits, bitsandbytes_8_bits, bitsandbytes_4_bits):
        for what, kept in (("all but head and encoders", HEAD + ENCODERS), ("recommended", KEPT_IN_FULL_PRECISION)):
            rows.append(
                (
                    f"{make.__name__.replace('_', ' ')}, {what}",
                    lambda make=make, kept=kept: load(dtype=torch.bfloat16, quantization_config=make(kept)),
                )
            )
    print("| | size, MB | text loss | rise | code loss | rise |\n|---|---|---|---|---|---|")
    reference: tuple[float, float, float] | None = None
    for name, make_model in rows:
        try:
            size, text, code = measure(make_model(), batch)
        except (ImportError, ValueError, RuntimeError, NotImplementedError) as error:
            print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | | |", flush=True)
            continue
        reference = reference or (size, text, code)
        rises = text - reference[1], code - reference[2]
        print(f"| {name} | {size:.1f} | {text:.4f} | {rises[0]:+.4f} | {code:.4f} | {rises[1]:+.4f} |", flush=True)


if __name__ == "__main__":
    main()
