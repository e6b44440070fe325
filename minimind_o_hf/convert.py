"""From the original's layout to one complete transformers directory, and back."""

import contextlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    FunAsrNanoEncoder,
    FunAsrNanoEncoderConfig,
    GenerationConfig,
    MimiModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .files import new_directory, new_file
from .modeling import CamPlusPlusConfig, CamPlusPlusModel, MiniMindOConfig, MiniMindOForConditionalGeneration
from .processing import CamPlusPlusFeatureExtractor, MiniMindOFeatureExtractor, MiniMindOProcessor
from .processing.processing_minimind_o import IMAGE_PROCESSOR_DEFAULTS

PathLike = str | os.PathLike

# In an original directory or repository; the remote code (`*.py`) stays where it is.
_SOURCE_FILES = ["*.json", "*.jinja", "*.safetensors", "*.bin", "*.pth"]
_TOWERS = ("audio_tower.", "vision_tower.")
_SENSEVOICE_NAMES = {
    "self_attn.linear_out.weight": "self_attn.o_proj.weight",
    "self_attn.linear_out.bias": "self_attn.o_proj.bias",
    "self_attn.fsmn_block.weight": "self_attn.fsmn.conv.weight",
    "feed_forward.w_1.weight": "mlp.fc1.weight",
    "feed_forward.w_1.bias": "mlp.fc1.bias",
    "feed_forward.w_2.weight": "mlp.fc2.weight",
    "feed_forward.w_2.bias": "mlp.fc2.bias",
    "norm1.weight": "input_layernorm.weight",
    "norm1.bias": "input_layernorm.bias",
    "norm2.weight": "post_attention_layernorm.weight",
    "norm2.bias": "post_attention_layernorm.bias",
}


def _some(names, limit: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _local_directory(source: PathLike, what: str, patterns: list[str]) -> Path:
    """The path itself where it exists; otherwise the files of a Hub repository that match `patterns`."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise OSError(f"{what}: {source} does not exist, and is no Hub id (`owner/name`) either.")
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise OSError(f"{what}: {source} does not exist here and cannot be downloaded: {error}") from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a state dict from a safetensors or a PyTorch file, on the CPU; nothing is unpickled but tensors.

    Raises:
        OSError: the file is missing, truncated or damaged.
        ValueError: it holds pickled objects, or something else than a flat dictionary of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise ValueError(f"{path} holds pickled objects, and nothing but tensors is loaded: {error}") from error
        raise OSError(f"{path} is damaged, or is no PyTorch file: {error}") from error
    # What torch.load makes of files that are something else: it takes them for pickles of some age.
    except (SafetensorError, RuntimeError, EOFError, OSError, UnicodeDecodeError, LookupError, ValueError) as error:
        raise OSError(f"{path} is truncated, damaged, or no weights file: {error or type(error).__name__}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors.")
    return state


def _check_state(state: dict, path: Path) -> dict[str, torch.Tensor]:
    other = [str(name) for name, value in state.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if other:
        raise ValueError(f"{path} is no state dict: the values of {_some(other)} are no tensors.")
    if not state:
        raise ValueError(f"{path} holds no tensors.")
    return state


def _count(state: dict[str, torch.Tensor], prefix: str, path: Path) -> int:
    """Number of `prefix.0.`, `prefix.1.`, … among the tensors' names."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    if lacking := set(range(len(found))) - found:
        raise ValueError(f"{path} lacks {prefix}.{min(lacking)}, though it holds {prefix}.{max(found)}.")
    return len(found)


def _check_tensors(
    state: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], path: PathLike, optional: tuple[str, ...] = ()
) -> None:
    """Raise a `ValueError` unless `state` has exactly the names and shapes of `wanted`."""
    problems = []
    if missing := wanted.keys() - state.keys() - set(optional):
        problems.append(f"it lacks {len(missing)} tensors ({_some(missing)})")
    if unknown := state.keys() - wanted.keys():
        problems.append(f"it holds {len(unknown)} unknown tensors ({_some(unknown)})")
    shapes = [
        f"{name} {list(state[name].shape)} for {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} tensors do not fit its configuration ({_some(shapes)})")
    if problems:
        raise ValueError(f"{path} cannot be converted: " + "; ".join(problems) + ".")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


# ---- SenseVoice ----


def load_sensevoice_encoder(path: PathLike, num_attention_heads: int = 4) -> FunAsrNanoEncoder:
    """Load the encoder of a SenseVoice-Small checkpoint into transformers' network of the same arithmetic.

    Args:
        path (`str` or `os.PathLike`): a `model.pt`, or a directory that holds one. Its tensors may be nested under
            `state_dict`, `model` or `model_state_dict`; those not prefixed `encoder.` (the CTC head, …) are ignored.
        num_attention_heads (`int`, *optional*, defaults to 4): the one size that no tensor's shape tells.

    Returns:
        `FunAsrNanoEncoder`: in evaluation mode, in the checkpoint's dtype.

    Raises:
        OSError: the file is missing or damaged.
        ValueError: a tensor is missing, unknown or of an unexpected shape.
    """
    path = Path(path).expanduser()
    path = path / "model.pt" if path.is_dir() else path
    state = read_tensors(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    prefix = "encoder."
    state = {name.removeprefix(prefix): value for name, value in state.items() if str(name).startswith(prefix)}
    if not state:
        raise ValueError(f"{path} holds no tensor whose name starts with `{prefix}`: it is no SenseVoice checkpoint.")
    _check_state(state, path)

    # The three parts run one after the other; each of the last two ends with a norm.
    part_of = re.compile(r"(encoders0|encoders|tp_encoders)\.(\d+)\.(.+)")
    sizes = {part: _count(state, part, path) for part in ("encoders0", "encoders", "tp_encoders")}
    if absent := [f"{prefix}{part}" for part, count in sizes.items() if not count]:
        raise ValueError(f"{path} lacks the layers {_some(absent)}.")
    starts = {"encoders0": 0, "encoders": sizes["encoders0"], "tp_encoders": sizes["encoders0"] + sizes["encoders"]}
    num_layers = sum(sizes.values())

    renamed, unknown = {}, []
    for name, value in state.items():
        match = part_of.fullmatch(name)
        layer = f"layers.{starts[match[1]] + int(match[2])}" if match else None
        if match and match[3] in _SENSEVOICE_NAMES:
            renamed[f"{layer}.{_SENSEVOICE_NAMES[match[3]]}"] = value
        elif match and match[3] in ("self_attn.linear_q_k_v.weight", "self_attn.linear_q_k_v.bias"):
            if not value.ndim or value.shape[0] % 3:
                raise ValueError(f"{path}: encoder.{name} of shape {list(value.shape)} must hold three equal parts.")
            for projection, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{projection}_proj.{match[3].rsplit('.', 1)[1]}"] = part
        elif name in ("after_norm.weight", "after_norm.bias"):
            renamed[f"layers.{starts['tp_encoders'] - 1}.final_layernorm.{name.rsplit('.', 1)[1]}"] = value
        elif name in ("tp_norm.weight", "tp_norm.bias"):
            renamed[f"layers.{num_layers - 1}.final_layernorm.{name.rsplit('.', 1)[1]}"] = value
        else:
            unknown.append(prefix + name)
    if unknown:
        raise ValueError(f"{path} holds tensors that SenseVoice-Small's encoder has not: {_some(unknown)}.")

    def size(name: str, axis: int) -> int:
        if name not in renamed or not renamed[name].ndim:
            raise ValueError(f"{path} lacks the tensor that becomes {name}: its sizes cannot be told.")
        return renamed[name].shape[axis]

    num_mel_bins = FunAsrNanoEncoderConfig.num_mel_bins
    input_size = size("layers.0.input_layernorm.weight", 0)
    hidden_size = size("layers.0.self_attn.o_proj.weight", 0)
    if input_size % num_mel_bins or hidden_size % num_attention_heads:
        raise ValueError(
            f"{path}: {input_size} inputs must be a multiple of {num_mel_bins} mel bins, and a width of {hidden_size} "
            f"one of {num_attention_heads} heads."
        )
    config = FunAsrNanoEncoderConfig(
        num_mel_bins=num_mel_bins,
        num_stacked_frames=input_size // num_mel_bins,
        hidden_size=hidden_size,
        intermediate_size=size("layers.0.mlp.fc1.weight", 0),
        fsmn_kernel_size=size("layers.0.self_attn.fsmn.conv.weight", -1),
        num_hidden_layers=num_layers,
        num_timestamp_prediction_layers=sizes["tp_encoders"],
        num_attention_heads=num_attention_heads,
    )
    with torch.device("meta"):
        wanted = FunAsrNanoEncoder(config).state_dict()
    _check_tensors(renamed, wanted, path)
    dtype = renamed["layers.0.input_layernorm.weight"].dtype
    return FunAsrNanoEncoder.from_pretrained(None, config=config, state_dict=renamed, dtype=dtype)


def read_am_mvn(path: PathLike) -> tuple[torch.Tensor, torch.Tensor]:
    """Read SenseVoice's feature normalisation, `(features + shift) * scale`, from a Kaldi nnet text file (`am.mvn`).

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: shift and scale, float32, of the features' size (560) each.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or its sizes do not agree.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text file.") from error
    vectors = []
    for tag in ("AddShift", "Rescale"):
        match = re.search(rf"<{tag}>\s+(\d+)\s+(\d+)\s+<LearnRateCoef>\s+\S+\s+\[([^\]]*)\]", text)
        if match is None:
            raise ValueError(f"{path} has no `<{tag}> N N <LearnRateCoef> 0 [ … ]`: it is no am.mvn, or truncated.")
        try:
            vector = torch.tensor([float(value) for value in match[3].split()], dtype=torch.float32)
        except ValueError as error:
            raise ValueError(f"{path}: <{tag}> holds something else than numbers: {error}") from error
        if not int(match[1]) == int(match[2]) == vector.numel() > 0:
            raise ValueError(f"{path}: <{tag}> promises {match[1]} and {match[2]} values and holds {vector.numel()}.")
        if not vector.isfinite().all():
            raise ValueError(f"{path}: <{tag}> holds values that are not finite.")
        vectors.append(vector)
    shift, scale = vectors
    if shift.numel() != scale.numel():
        raise ValueError(f"{path}: {shift.numel()} shifts and {scale.numel()} scales do not agree.")
    return shift, scale


# ---- CAM++ ----


def _campplus_modules(config: CamPlusPlusConfig) -> dict[str, str]:
    """The original's name of each module with weights. It counts blocks and layers from 1."""
    names = {
        "front_end.conv_in": "head.conv1",
        "front_end.norm_in": "head.bn1",
        "front_end.conv_out": "head.conv2",
        "front_end.norm_out": "head.bn2",
        "tdnn": "xvector.tdnn.linear",
        "tdnn_norm": "xvector.tdnn.nonlinear.batchnorm",
        "norm": "xvector.out_nonlinear.batchnorm",
        "projection": "xvector.dense.linear",
        "projection_norm": "xvector.dense.nonlinear.batchnorm",
    }
    for index, block in enumerate(("layer1.0", "layer1.1", "layer2.0", "layer2.1")):
        for name in ("conv1", "conv2", "shortcut.0", "shortcut.1"):
            names[f"front_end.blocks.{index}.{name}"] = f"head.{block}.{name}"
        for name in ("1", "2"):
            names[f"front_end.blocks.{index}.norm{name}"] = f"head.{block}.bn{name}"
    for index, num_layers in enumerate(config.block_layers):
        names[f"blocks.{index}.norm"] = f"xvector.transit{index + 1}.nonlinear.batchnorm"
        names[f"blocks.{index}.transition"] = f"xvector.transit{index + 1}.linear"
        for layer in range(num_layers):
            ours, original = f"blocks.{index}.layers.{layer}", f"xvector.block{index + 1}.tdnnd{layer + 1}"
            names[f"{ours}.norm1"] = f"{original}.nonlinear1.batchnorm"
            names[f"{ours}.bottleneck"] = f"{original}.linear1"
            names[f"{ours}.norm2"] = f"{original}.nonlinear2.batchnorm"
            names[f"{ours}.local"] = f"{original}.cam_layer.linear_local"
            names[f"{ours}.context_in"] = f"{original}.cam_layer.linear1"
            names[f"{ours}.context_out"] = f"{original}.cam_layer.linear2"
    return names


def convert_campplus(source: PathLike, directory: PathLike, overwrite: bool = False) -> Path:
    """Make a directory that `AutoModel` and `AutoFeatureExtractor` load from the released CAM++ speaker encoder.

    Args:
        source (`str` or `os.PathLike`): its bare state dict (`.bin`, `.pt`, or `.safetensors`).
        directory (`str` or `os.PathLike`): the directory to make.
        overwrite (`bool`, *optional*, defaults to `False`): replace a checkpoint that stands in `directory`.

    Returns:
        `Path`: the directory.

    Raises:
        FileExistsError: `directory` is not empty.
        OSError: the file is missing, truncated or damaged.
        ValueError: `source` is a directory, or its tensors are missing, unknown, of a wrong shape or no floats.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the file in it that holds the speaker encoder's state dict.")
    target = Path(directory).expanduser().resolve()
    with new_directory(target, overwrite) as temporary:
        counter = "num_batches_tracked"  # of training; some files hold it, some do not
        read = _check_state(read_tensors(path), path)
        read = {name: tensor for name, tensor in read.items() if not name.endswith(counter)}
        config = CamPlusPlusConfig()
        with torch.device("meta"):
            skeleton = CamPlusPlusModel(config).state_dict()
        modules = _campplus_modules(config)
        original = {}
        for name in skeleton:
            module, _, kind = name.rpartition(".")
            if kind != counter:
                original[name] = f"{modules[module]}.{kind}"
        _check_tensors(read, {original[name]: skeleton[name] for name in original}, path)
        if odd := [name for name, tensor in read.items() if not tensor.is_floating_point()]:
            raise ValueError(f"{path} cannot be converted: {_some(odd)} are no floats.")
        state = {name: read[original[name]] for name in original}
        model = CamPlusPlusModel.from_pretrained(
            None, config=config, state_dict=state, dtype=state["tdnn.weight"].dtype
        )
        model.save_pretrained(temporary)
        CamPlusPlusFeatureExtractor().save_pretrained(temporary)
    return target


# ---- MiniMind-O ----


@contextlib.contextmanager
def _config_errors(path: PathLike) -> Iterator[None]:
    """Turn the strict configurations' own exceptions, which are no `ValueError`, into one."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {path} does not hold together: {error}") from error


def _read_source(source: PathLike) -> tuple[dict[str, torch.Tensor], MiniMindOConfig, Path]:
    """State dict (original names), configuration, and the directory where tokenizer files may lie."""
    path = _local_directory(source, "the checkpoint", _SOURCE_FILES)
    if path.is_file():
        state = _check_state(read_tensors(path), path)
        return state, _infer_config(state, path), path.parent

    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} holds no config.json: give a directory with one, or the .pth file itself.")
    content = _read_json(path / "config.json")
    if content.get("model_type") != MiniMindOConfig.model_type:
        raise ValueError(
            f"{path / 'config.json'} is of the model type {content.get('model_type')!r}, not "
            f"{MiniMindOConfig.model_type!r}."
        )
    # Names of remote code; ours needs none.
    content.pop("auto_map", None)
    with _config_errors(path / "config.json"):
        config = MiniMindOConfig.from_dict(content)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _check_state(read_tensors(path / name), path / name), config, path
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            state = {}
            for shard in shards:
                if Path(shard).name != shard:
                    raise ValueError(f"{index} names a file outside its directory: {shard!r}.")
                state |= read_tensors(path / shard)
            return _check_state(state, index), config, path
    raise FileNotFoundError(f"{path} holds no model.safetensors and no pytorch_model.bin, whole or in shards.")


def _infer_config(state: dict[str, torch.Tensor], path: Path) -> MiniMindOConfig:
    """Configuration of a bare state dict: sizes from the tensors' shapes, everything else as released."""

    def shape(name: str, ndim: int) -> torch.Size:
        if name not in state:
            raise ValueError(f"{path} lacks the tensor {name}: it is no MiniMind-O state dict, or it is incomplete.")
        if state[name].ndim != ndim or not state[name].numel():
            raise ValueError(f"{path}: {name} must have {ndim} axes, its shape is {list(state[name].shape)}.")
        return state[name].shape

    def stack(prefix: str) -> dict[str, int]:
        layer = f"{prefix}.layers.0."
        head_dim = shape(layer + "self_attn.q_norm.weight", 1)[0]
        sizes = {
            "head_dim": head_dim,
            "num_attention_heads": shape(layer + "self_attn.q_proj.weight", 2)[0] // head_dim,
            "num_key_value_heads": shape(layer + "self_attn.k_proj.weight", 2)[0] // head_dim,
        }
        if layer + "mlp.gate.weight" in state:
            sizes["num_experts"] = shape(layer + "mlp.gate.weight", 2)[0]
            sizes["moe_intermediate_size"] = shape(layer + "mlp.experts.0.gate_proj.weight", 2)[0]
        else:
            sizes["intermediate_size"] = shape(layer + "mlp.gate_proj.weight", 2)[0]
        return sizes

    vocab_size, hidden_size = shape("model.embed_tokens.weight", 2)
    audio_vocab_size, talker_hidden_size = shape("talker.embed_tokens.base.weight", 2)
    # 64 rows are for specials: 2,112 = 2,048 + 64 in the release.
    codebook_size = audio_vocab_size - (MiniMindOConfig().audio_vocab_size - MiniMindOConfig().audio_codebook_size)
    sizes: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=_count(state, "model.layers", path),
        use_moe="model.layers.0.mlp.gate.weight" in state,
        **stack("model"),
        talker_hidden_size=talker_hidden_size,
        num_talker_hidden_layers=_count(state, "talker.layers", path),
        **{f"talker_{name}": value for name, value in stack("talker").items()},
        num_codebooks=_count(state, "talker.embed_tokens.adapters", path),
        audio_vocab_size=audio_vocab_size,
        audio_codebook_size=codebook_size,
        audio_pad_token=codebook_size + 1,
        audio_stop_token=codebook_size + 2,
        audio_spk_token=codebook_size + 3,
        audio_adapter_rank=shape("talker.embed_tokens.adapters.0.0.weight", 2)[1],
        audio_hidden_size=shape("audio_proj.mlp.0.weight", 1)[0],
        image_hidden_size=shape("vision_proj.mlp.0.weight", 1)[0],
        spk_emb_size=shape("talker.spk_proj.weight", 2)[1],
    )
    with _config_errors(path):
        return MiniMindOConfig(**sizes)


def _build_model(
    state: dict[str, torch.Tensor], config: MiniMindOConfig, dtype: torch.dtype | None, path: PathLike
) -> MiniMindOForConditionalGeneration:
    """The model with exactly these tensors, in `dtype` or else the embedding's."""
    with torch.device("meta"):
        skeleton = MiniMindOForConditionalGeneration(config)
        wanted = revert_weight_conversion(skeleton, skeleton.state_dict())
    _check_tensors(state, wanted, path, optional=("lm_head.weight",) if config.tie_word_embeddings else ())
    if odd := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{path} cannot be converted: {_some(odd)} are no floats.")
    embedding = state["model.embed_tokens.weight"]
    if config.tie_word_embeddings and not torch.equal(state.get("lm_head.weight", embedding), embedding):
        raise ValueError(f"{path}: lm_head.weight and model.embed_tokens.weight are tied, but differ.")
    return MiniMindOForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype or embedding.dtype
    )


def _load_part(model_class: Any, source: Path) -> Any:
    """Load a frozen part whole. What it holds beyond our needs, such as SigLIP's text half, does not matter."""
    try:
        model, info = model_class.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True
        )
    except SafetensorError as error:
        raise OSError(f"The weights in {source} are truncated or damaged: {error}") from error
    missing, mismatched = info["missing_keys"], [name for name, *_ in info["mismatched_keys"]]
    if missing or mismatched:
        raise ValueError(
            f"{source} cannot be used: it lacks {len(missing)} tensors ({_some(missing)}), and {len(mismatched)} have "
            f"shapes that its configuration does not have ({_some(mismatched)})."
        )
    return model


def _load_codec(source: PathLike, config: MiniMindOConfig) -> MimiModel:
    source = _local_directory(source, "the codec", ["*.json", "*.safetensors"])
    if (found := _read_json(source / "config.json").get("model_type")) != "mimi":
        raise ValueError(
            f"{source} holds a model of type {found!r}, not Mimi. The codec of a complete checkpoint is in its "
            "`audio_tokenizer` folder."
        )
    codec = _load_part(MimiModel, source)
    if codec.config.codebook_size != config.audio_codebook_size:
        raise ValueError(
            f"The codec of {source} has codebooks of {codec.config.codebook_size} codes, the checkpoint expects "
            f"{config.audio_codebook_size}."
        )
    if codec.config.num_quantizers < config.num_codebooks:
        raise ValueError(
            f"The codec of {source} has {codec.config.num_quantizers} codebooks, the checkpoint needs "
            f"{config.num_codebooks}."
        )
    return codec


def _attach_audio_encoder(
    source: PathLike, config: MiniMindOConfig, state: dict[str, torch.Tensor]
) -> MiniMindOFeatureExtractor:
    """Put a SenseVoice encoder into `config` and `state`; return the front-end with its normalisation."""
    folder = _local_directory(source, "the audio encoder", ["model.pt", "am.mvn"])
    shift, scale = read_am_mvn((folder if folder.is_dir() else folder.parent) / "am.mvn")
    encoder = load_sensevoice_encoder(folder)
    config.audio_config = encoder.config
    _replace_tower(state, "audio_tower.", encoder)
    return MiniMindOFeatureExtractor(
        num_frames_lfr=encoder.config.num_stacked_frames,
        max_frames=encoder.config.max_position_embeddings - 1,
        cmvn_shift=shift.tolist(),
        cmvn_scale=scale.tolist(),
    )


def _attach_vision_encoder(source: PathLike, config: MiniMindOConfig, state: dict[str, torch.Tensor]):
    """Put a SigLIP2 vision encoder into `config` and `state`; return its image processor."""
    source = _local_directory(source, "the vision encoder", ["*.json", "*.safetensors"])
    encoder = _load_part(SiglipVisionModel, source)
    config.vision_config = encoder.config
    _replace_tower(state, "vision_tower.", encoder)
    return AutoImageProcessor.from_pretrained(source)


def _replace_tower(state: dict[str, torch.Tensor], prefix: str, encoder: torch.nn.Module) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({prefix + name: tensor for name, tensor in encoder.state_dict().items()})


def _load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | PathLike | None, folder: Path, config: MiniMindOConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the one beside the weights, checked against the configuration's ids."""
    if tokenizer is None:
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{folder} holds no tokenizer.json: say where it is (`--tokenizer DIR`, or `tokenizer=`)."
            )
        tokenizer = folder
    loaded = (
        tokenizer
        if isinstance(tokenizer, PreTrainedTokenizerBase)
        else PreTrainedTokenizerFast.from_pretrained(tokenizer)
    )
    if len(loaded) > config.vocab_size:
        raise ValueError(f"The tokenizer has {len(loaded)} entries, more than `vocab_size` ({config.vocab_size}).")
    wanted = {
        config.audio_special_token: config.audio_token_id,
        config.image_special_token: config.image_token_id,
    }
    for token, token_id in wanted.items():
        if (found := loaded.convert_tokens_to_ids(token)) != token_id:
            raise ValueError(f"The tokenizer is another's: its id of {token!r} is {found}, the model's {token_id}.")
    return loaded


def convert_checkpoint(
    source: PathLike,
    directory: PathLike,
    audio_encoder: PathLike | None = None,
    vision_encoder: PathLike | None = None,
    codec: PathLike | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Make one complete directory, which the Auto classes load alone, from an original checkpoint and its parts.

    What is not given is left out (the model then says how to attach it), or taken over where `source` is itself such a
    complete directory. Hub ids are downloaded; no remote code is run and nothing but tensors is unpickled.

    Args:
        source (`str` or `os.PathLike`): an original directory or Hub id (flat `config.json`, `pytorch_model.bin` or
            safetensors, tokenizer files), or a bare state dict file (`.pth`, `.bin` or `.safetensors`), whose
            configuration is told from the tensors' shapes and otherwise the release's.
        directory (`str` or `os.PathLike`): the directory to make.
        audio_encoder (`str` or `os.PathLike`, *optional*): SenseVoice-Small: a directory or Hub id with `model.pt` and
            `am.mvn`.
        vision_encoder (`str` or `os.PathLike`, *optional*): SigLIP2: a directory or Hub id.
        codec (`str` or `os.PathLike`, *optional*): Mimi: a directory or Hub id. It keeps its own dtype.
        dtype (`torch.dtype`, *optional*): dtype of the saved model, encoders included; the source's by default, so a
            float16 source stays float16 (to be run in bfloat16 or float32).
        tokenizer (`PreTrainedTokenizerBase`, `str` or `os.PathLike`, *optional*): the one beside the weights by
            default.
        overwrite (`bool`, *optional*, defaults to `False`): replace a checkpoint that stands in `directory`.

    Returns:
        `Path`: the directory.

    Raises:
        FileExistsError: `directory` is not empty.
        OSError: a file is missing, truncated or damaged, or a Hub id cannot be reached.
        ValueError: tensors are missing, unknown or of a wrong shape, or the parts do not fit each other.
    """
    target = Path(directory).expanduser().resolve()
    if Path(source).expanduser().resolve() == target:
        raise ValueError(f"{target} is the source: give another directory for the result.")
    with new_directory(target, overwrite) as temporary:
        state, config, folder = _read_source(source)
        tokenizer = _load_tokenizer(tokenizer, folder, config)
        # What lies beside a bare state dict is not its own, but for the tokenizer.
        is_bare = Path(source).expanduser().is_file()
        is_complete = not is_bare and (folder / "processor_config.json").is_file()
        parts: Any = MiniMindOProcessor.from_pretrained(folder) if is_complete else None
        feature_extractor = parts.feature_extractor if parts else MiniMindOFeatureExtractor()
        image_processor = parts.image_processor if parts else SiglipImageProcessorPil(**IMAGE_PROCESSOR_DEFAULTS)
        audio_tokenizer = parts.audio_tokenizer if parts else None
        if audio_encoder is not None:
            feature_extractor = _attach_audio_encoder(audio_encoder, config, state)
        if vision_encoder is not None:
            image_processor = _attach_vision_encoder(vision_encoder, config, state)
            if is_bare:
                vision: Any = config.vision_config
                config.image_token_len = (vision.image_size // vision.patch_size) ** 2
        if codec is not None:
            audio_tokenizer = _load_codec(codec, config)
        with _config_errors(source):
            config.validate()
        model = _build_model(state, config, dtype, source)
        if not is_bare and (folder / "generation_config.json").is_file():
            # What it leaves open stays as the model has it.
            model.generation_config.update(**GenerationConfig.from_pretrained(folder).to_diff_dict())
        processor = MiniMindOProcessor(
            feature_extractor=feature_extractor,
            tokenizer=tokenizer,
            image_processor=image_processor,
            audio_tokenizer=audio_tokenizer,
            chat_template=parts.chat_template if parts else None,
            voices=parts.voices if parts else None,
            image_token_len=config.image_token_len,
            num_codebooks=config.num_codebooks,
            audio_pad_code=config.audio_pad_token,
            audio_codebook_size=config.audio_codebook_size,
            speaker_embedding_size=config.spk_emb_size,
        )
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return target


def export_original(
    source_directory: PathLike, path: PathLike, dtype: torch.dtype = torch.float16, overwrite: bool = False
) -> Path:
    """Write a checkpoint's Thinker, Talker and projectors as the original's bare state dict (`.pth`).

    The original's tensor names are kept: one tensor per expert, `lm_head.weight` beside the embedding. Encoders, codec
    and processor are not in it. The file is read back and compared before it gets its name.

    Args:
        source_directory (`str` or `os.PathLike`): a complete or original directory, or a Hub id.
        path (`str` or `os.PathLike`): the file to write.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float16`): dtype of the written tensors, the release's by
            default; `torch.float32` loses nothing.
        overwrite (`bool`, *optional*, defaults to `False`): replace the file where it exists.

    Returns:
        `Path`: the file.

    Raises:
        FileExistsError: `path` exists.
        OSError: a file is missing or damaged, or what was written does not come back equal.
        ValueError: the source is incomplete, or a value is not finite in `dtype`.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir() or (target.exists() and not overwrite):
        raise FileExistsError(f"{target} exists: give another file, or say so (`--overwrite`, or `overwrite=True`).")
    state, config, _ = _read_source(source_directory)
    model = _build_model(state, config, dtype=None, path=source_directory)
    tensors = {}
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        if not name.startswith(_TOWERS):
            # A copy each: an expert is a view of the fused tensor, and saving a view saves all it looks at.
            tensors[name] = tensor.detach().to(dtype, copy=True).contiguous()
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"Values of {_some(bad)} are not finite in {dtype}: choose torch.bfloat16 or torch.float32.")
    with new_file(target) as temporary:
        torch.save(tensors, temporary)
        written = read_tensors(temporary)
        if written.keys() != tensors.keys() or not all(torch.equal(written[name], tensors[name]) for name in tensors):
            raise OSError(f"What was written for {target} does not come back equal: is the disk full or failing?")
    return target


__all__ = [
    "convert_campplus",
    "convert_checkpoint",
    "export_original",
    "load_sensevoice_encoder",
    "read_am_mvn",
    "read_tensors",
]
