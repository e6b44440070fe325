"""A checkpoint as ONNX graphs: model, codec and encoders, each compared with torch, and a runner that needs neither
torch nor transformers."""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn
from transformers import MimiModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from . import onnx_runner
from .export import load_whole
from .files import new_directory
from .modeling import MimiStreamingDecoder, MimiStreamState, MiniMindOForConditionalGeneration
from .processing import MiniMindOProcessor

TOLERANCE = 1e-4

# What the runner reads of the generation settings.
_SETTINGS = (
    *("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "suppress_tokens", "max_new_tokens"),
    *("audio_temperature", "audio_top_k", "audio_repetition_penalty", "audio_repetition_window"),
    "post_text_token_id",
)

Tensors = dict[str, torch.Tensor]


def _every_expert(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """
    Every expert on every token, and the chosen ones' sum. A graph cannot branch on what a token chose; picking the
    chosen one's weights for each token, transformers' other way, takes 22 MB a token at the released size.
    """
    tokens, experts = hidden_states.shape[0], self.gate_up_proj.shape[0]
    weights = top_k_weights.new_zeros(tokens, experts).scatter(1, top_k_index, top_k_weights)
    inner = self._apply_gate(hidden_states @ self.gate_up_proj.transpose(1, 2))
    outputs = inner @ self.down_proj.transpose(1, 2)
    return (outputs * weights.T.unsqueeze(-1)).sum(dim=0)


@contextlib.contextmanager
def _exportable_experts(model: MiniMindOForConditionalGeneration) -> Iterator[None]:
    if not model.config.use_moe:
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register("every_expert", _every_expert)
    original = model.get_experts_implementation()
    model.set_experts_implementation("every_expert")
    try:
        yield
    finally:
        model.set_experts_implementation(original)


class _Step(nn.Module):
    """Thinker and Talker over the next positions, be they a prompt or one step, with their caches."""

    def __init__(self, model: MiniMindOForConditionalGeneration):
        super().__init__()
        self.model = model

    @staticmethod
    def _insert(embeds: torch.Tensor, is_placeholder: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The features in the places of their placeholders, in reading order."""
        number = is_placeholder.long().flatten().cumsum(0).view_as(is_placeholder) * is_placeholder
        features = torch.cat([features.new_zeros(1, features.shape[1]), features])  # so that there may be none
        return torch.where(is_placeholder.unsqueeze(-1), features[number], embeds)

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        model, config, input_ids = self.model, self.model.config, inputs["input_ids"]
        cache = DynamicCache()
        for layer in range(config.num_hidden_layers + config.num_talker_hidden_layers):
            cache.update(inputs[f"past.{layer}.key"], inputs[f"past.{layer}.value"], layer)
        positions = torch.arange(input_ids.shape[1]).unsqueeze(0) + inputs["past.0.key"].shape[2]
        embeds = model.get_input_embeddings()(input_ids)
        embeds = self._insert(embeds, input_ids == config.audio_token_id, inputs["audio_features"])
        embeds = self._insert(embeds, input_ids == config.image_token_id, inputs["image_features"])
        thinker = model.model(inputs_embeds=embeds, position_ids=positions, past_key_values=cache, use_cache=True)
        talker = model.talker(
            bridge_hidden_state=thinker.bridge_hidden_state,
            audio_codes=inputs["audio_codes"],
            speaker_embeddings=inputs["speaker_embeddings"],
            position_ids=positions,
            past_key_values=cache,
        )
        layers: Any = cache.layers
        logits = model.lm_head(thinker.last_hidden_state[:, -1])
        audio_logits = model.talker.lm_head(talker.last_hidden_state[:, -1:])[:, :, 0]
        return [logits, audio_logits, *(part for layer in layers for part in (layer.keys, layer.values))]


class _CodecStep(nn.Module):
    """[`MimiStreamingDecoder`] without the checks of values, which a graph cannot hold."""

    def __init__(self, codec: MimiModel):
        super().__init__()
        self.codec = codec  # its parameters are the graph's
        self.decoder = MimiStreamingDecoder(codec)

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        tensors = {name.removeprefix("state."): value for name, value in inputs.items() if name.startswith("state.")}
        positions: Any = tensors.pop("positions")
        codes: Any = inputs["codes"]
        waveform, state = self.decoder.step(codes, MimiStreamState(positions, tensors))
        return [waveform, state.positions, *(state.tensors[name] for name in tensors)]


class _AudioEncoder(nn.Module):
    """The speech encoder and its projector, for one clip."""

    def __init__(self, model: MiniMindOForConditionalGeneration):
        super().__init__()
        self.tower: Any = model.audio_tower
        self.projector = model.audio_proj

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        features = inputs["input_features"]
        mask = torch.ones(features.shape[:2], dtype=torch.long)
        return [self.projector(self.tower(features, input_features_mask=mask).last_hidden_state[0])]


class _VisionEncoder(nn.Module):
    """The vision encoder and its projector; all pictures' tokens in a row."""

    def __init__(self, model: MiniMindOForConditionalGeneration):
        super().__init__()
        self.tower: Any = model.vision_tower
        self.projector = model.vision_proj

    def forward(self, inputs: Tensors) -> list[torch.Tensor]:
        return [self.projector(self.tower(inputs["pixel_values"]).last_hidden_state.flatten(0, 1))]


@dataclass
class _Graph:
    """One graph: inputs of the sizes `examples`, the first of which it is traced with; `axes` are free."""

    module: nn.Module
    examples: list[Tensors]
    axes: dict[str, dict[int, str]]
    outputs: list[str]


def _model_graph(model: MiniMindOForConditionalGeneration) -> _Graph:
    config = model.config
    caches = {
        f"{layer}.{part}": (stack.num_key_value_heads, stack.head_dim)
        for layer, stack in enumerate(config.per_layer_config)
        for part in ("key", "value")
    }

    def example(batch: int, length: int, past: int, audio: int, image: int) -> Tensors:
        ids = torch.randint(config.vocab_size, (batch, length))
        ids[(ids == config.audio_token_id) | (ids == config.image_token_id)] = config.bos_token_id
        ids[0, :audio], ids[0, audio : audio + image] = config.audio_token_id, config.image_token_id
        codes = torch.randint(config.audio_codebook_size, (batch, config.num_codebooks, length))
        codes[..., 0] = config.audio_spk_token
        return {
            "input_ids": ids,
            "audio_codes": codes,
            "speaker_embeddings": torch.randn(batch, config.spk_emb_size),
            "audio_features": torch.randn(audio, config.hidden_size),
            "image_features": torch.randn(image, config.hidden_size),
            **{f"past.{name}": torch.randn(batch, heads, past, width) for name, (heads, width) in caches.items()},
        }

    axes = {
        "input_ids": {0: "batch", 1: "length"},
        "audio_codes": {0: "batch", 2: "length"},
        "speaker_embeddings": {0: "batch"},
        "audio_features": {0: "audio_length"},
        "image_features": {0: "image_length"},
        **{f"past.{name}": {0: "batch", 2: "past_length"} for name in caches},
    }
    # With a prompt and one step, as they are generated with.
    examples = [example(2, 9, 5, 3, 4), example(1, 24, 0, 7, 0), example(1, 24, 0, 0, 0), example(1, 1, 24, 0, 0)]
    return _Graph(_Step(model), examples, axes, ["logits", "audio_logits", *(f"present.{name}" for name in caches)])


def _codec_graph(codec: MimiModel, num_codebooks: int) -> _Graph:
    decoder = MimiStreamingDecoder(codec)

    def codes(batch: int, frames: int) -> Any:
        return torch.randint(codec.config.codebook_size, (batch, num_codebooks, frames))

    def example(batch: int, frames: int, past: int) -> Tensors:
        _, state = decoder(codes(batch, max(past, 1)))
        state = state if past else state.reset(torch.arange(batch))
        tensors = {f"state.{name}": tensor for name, tensor in state.tensors.items()}
        return {"codes": codes(batch, frames), "state.positions": state.positions, **tensors}

    examples = [example(2, 3, 2), example(1, 1, 0), example(1, 1, 60), example(1, 4, 5)]
    names = [name for name in examples[0] if name.startswith("state.")]
    axes = {"codes": {0: "batch", 2: "frames"}, **{name: {0: "batch"} for name in names}}
    return _Graph(
        _CodecStep(codec), examples, axes, ["waveform", *(name.replace("state.", "next.", 1) for name in names)]
    )


def _graphs(model: MiniMindOForConditionalGeneration, codec: MimiModel | None) -> Iterator[tuple[str, _Graph]]:
    config = model.config
    yield "model.onnx", _model_graph(model)
    if codec is not None:
        yield "codec.onnx", _codec_graph(codec, config.num_codebooks)
    if model.audio_tower is not None:
        clips = [{"input_features": torch.randn(1, frames, config.audio_config.input_size)} for frames in (9, 1, 40)]
        yield (
            "audio_encoder.onnx",
            _Graph(_AudioEncoder(model), clips, {"input_features": {1: "frames"}}, ["audio_features"]),
        )
    if model.vision_tower is not None:
        size = config.vision_config.image_size
        pictures = [
            {"pixel_values": torch.randn(count, config.vision_config.num_channels, size, size)} for count in (2, 1)
        ]
        yield (
            "vision_encoder.onnx",
            _Graph(_VisionEncoder(model), pictures, {"pixel_values": {0: "pictures"}}, ["image_features"]),
        )


def _write_graph(graph: _Graph, path: Path) -> None:
    example = graph.examples[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of axes that have one name, which is meant
        program: Any = torch.onnx.export(
            graph.module.eval(),
            kwargs={"inputs": example},
            dynamo=True,
            input_names=list(example),
            output_names=graph.outputs,
            dynamic_shapes={"inputs": {name: graph.axes.get(name, {}) for name in example}},
            verbose=False,
        )
    program.save(path)  # from 1.5 GB on with the weights in a file of their own


def _difference(graph: _Graph, path: Path) -> float:
    """The largest difference between onnxruntime and torch, as a part of the output's largest value (at least 1)."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for example in graph.examples:
        found: Any = session.run(None, {name: value.numpy() for name, value in example.items()})
        with torch.no_grad():
            wanted = graph.module(example)
        for name, have, want in zip(graph.outputs, found, wanted, strict=True):
            if have.shape != tuple(want.shape):
                raise ValueError(f"{path.name} gives `{name}` the shape {have.shape}, torch {tuple(want.shape)}.")
            if want.numel():
                difference = np.abs(have - want.numpy()).max() / max(1.0, float(want.abs().max()))
                largest = max(largest, float(difference))
    return largest


def _runner_settings(model: MiniMindOForConditionalGeneration, processor: MiniMindOProcessor, name: str) -> dict:
    config, settings = model.config, model.generation_config
    # The runner has no templates: what stands around a question is cut out of one.
    mark = "<<the question>>"
    prompt = processor.apply_chat_template([{"role": "user", "content": mark}], add_generation_prompt=True)
    around = prompt.split(mark)
    if len(around) != 2:
        raise ValueError(f"The chat template of {name} does not repeat a question once and as it is: {prompt!r}.")
    eos = settings.eos_token_id
    generation = {key: getattr(settings, key) for key in _SETTINGS}
    # The whole length may be limited instead.
    generation["max_new_tokens"] = generation["max_new_tokens"] or 512
    return {
        "model": name,
        "prompt": around,
        "sampling_rate": processor.output_sampling_rate,
        "pad_token_id": settings.pad_token_id or 0,
        "eos_token_ids": eos if isinstance(eos, list) else [] if eos is None else [eos],
        "placeholder_ids": [config.audio_token_id, config.image_token_id],
        "audio_codebook_size": config.audio_codebook_size,
        "audio_pad_token": config.audio_pad_token,
        "audio_spk_token": config.audio_spk_token,
        "generation": generation,
    }


def export_onnx(
    source: str | os.PathLike, directory: str | os.PathLike, overwrite: bool = False
) -> dict[str, tuple[int, float]]:
    """
    Write a checkpoint as ONNX graphs in float32, with what a runner needs beside them.

    `model.onnx` is Thinker and Talker over a prompt or one step, with keys and values of earlier positions in
    (`past.N.key`, `.value`) and out (`present.N...`); rows of a batch have one length. `codec.onnx` is the codec's
    decoder with its state in (`state.*`, zeros at the start) and out (`next.*`). `audio_encoder.onnx` and
    `vision_encoder.onnx` give the features that stand in the places of placeholders. `config.json`, `tokenizer.json`,
    `voices.npz` and `onnx_runner.py` are the runner's.

    Args:
        source (`str` or `os.PathLike`): Checkpoint directory or Hub id.
        directory (`str` or `os.PathLike`): The directory to make.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint or an export that stands there.

    Returns:
        `dict`: of each graph, its size in bytes and its largest difference from torch.

    Raises:
        ValueError: The weights are quantised, or a graph's outputs are further than 1e-4 from torch's.
        FileExistsError: Something stands there already.
    """
    processor = MiniMindOProcessor.from_pretrained(source, dtype=torch.float32)
    report: dict[str, tuple[int, float]] = {}
    with new_directory(directory, overwrite) as folder:
        model = load_whole(source, dtype=torch.float32)
        with _exportable_experts(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name, graph in _graphs(model, processor.audio_tokenizer):
                _write_graph(graph, folder / name)
                difference = _difference(graph, folder / name)
                if not difference <= TOLERANCE:
                    raise ValueError(
                        f"{name} of {source} differs from torch by {difference:.1e}, more than {TOLERANCE:.0e}: "
                        "nothing was written. Other versions of torch, onnxscript or onnxruntime may do better."
                    )
                size = sum(file.stat().st_size for file in folder.glob(f"{name}*"))
                report[name] = (size, difference)
        settings = _runner_settings(model, processor, Path(source).name)
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        processor.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        voices: dict[str, Any] = {
            f"{voice}.{part}": tensor.numpy()
            for voice, parts in processor.voices.items()
            for part, tensor in parts.items()
        }
        np.savez(folder / "voices.npz", **voices)
        shutil.copyfile(onnx_runner.__file__, folder / "onnx_runner.py")
    return report


__all__ = ["export_onnx"]
