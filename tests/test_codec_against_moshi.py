"""The codec against `moshi`, the package of Mimi's authors: the same random weights, the same sound and codes.

Where the two write the same thing differently:

* RoPE turns neighbouring channels in moshi, and a channel of the first half with one of the second in transformers:
  the rows of the query and key weights are reordered. moshi keeps query, key and value weights in one matrix.
* moshi's fixed choices are transformers' defaults: padding with zeros, but with the first input before the
  downsampler; ELU; LayerNorm with eps 1e-5; exact GELU; an upsampler with a group for every channel; a window of 250
  positions that counts the query's own.
* moshi streams a frame (two positions) over a ring of 250 keys and values, and writes both positions before it reads.
  From position 250 on, the first of the two lacks its oldest key: moshi's stream is then not moshi's own whole. With
  one place more in the ring it is, and the comparison is made with that; see `test_a_ring_of_the_window_is_one_short`.
"""

import copy
import json
import os
import subprocess
import tempfile
import venv
from pathlib import Path

import pytest
import torch
from minimind_o_hf.modeling.streaming_codec_minimind_o import MimiStreamingDecoder, MimiStreamingEncoder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiConvTranspose1d, MimiEuclideanCodebook, MimiLayerScale

MOSHI = "moshi==0.2.13"
FRAME = 1920
FRAMES = 188  # 15.04 s, 376 positions of the attention
RESTART = 150  # the frame at which codec_on_moshi.py begins its first row anew

# The environment takes gigabytes and minutes: packages come from the index that pip is set up with, PyTorch with CUDA
# among them. With MINIMIND_O_MOSHI_VENV=FOLDER it is made there and found again.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def moshi_python():
    """The Python of an environment that holds `moshi`."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("MINIMIND_O_MOSHI_VENV") or temporary)
        python = folder / "bin" / "python"
        if not python.exists():
            venv.create(folder, with_pip=True)
        run(python, "-m", "pip", "install", MOSHI)
        yield python


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def codec():
    """
    Mimi at toy width. No two weights are alike, attention is far from even, and the sound is about as loud as speech.
    """
    torch.manual_seed(0)
    config = MimiConfig(
        num_filters=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        upsample_groups=32,
        num_quantizers=8,
        codebook_size=64,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
    )
    model = MimiModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            elif isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            elif isinstance(module, MimiLayerScale):
                module.scale.uniform_(0.5, 1.5)
            elif isinstance(module, MimiEuclideanCodebook):
                module.embed_sum.normal_()
                module.cluster_usage.uniform_(0.5, 1.5)
        last = model.decoder.decoder_seanet.layers[-1].conv
        loudest = model.decode(torch.randint(64, (1, 8, 50))).audio_values.abs().max()
        last.weight.div_(loudest)
        last.bias.div_(loudest)
    return model


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    return {
        "codes": torch.randint(64, (2, 8, FRAMES), generator=generator),
        "sound": 0.1 * torch.randn(2, FRAMES * FRAME, generator=generator),
    }


@pytest.fixture(scope="module")
def moshi(moshi_python, codec, inputs, tmp_path_factory):
    """What codec_on_moshi.py makes of the inputs."""
    folder = tmp_path_factory.mktemp("moshi")
    (folder / "config.json").write_text(json.dumps(moshi_config(codec.config)), encoding="utf-8")
    save_file(moshi_weights(codec), folder / "weights.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    run(moshi_python, Path(__file__).with_name("codec_on_moshi.py"), folder)
    outputs = load_file(folder / "outputs.safetensors")
    return {name: value.squeeze(1) if name.startswith("sound") else value for name, value in outputs.items()}


def moshi_config(config: MimiConfig) -> dict:
    """The settings that `moshi.models.loaders.get_mimi` takes."""
    return {
        "sample_rate": config.sampling_rate,
        "channels": config.audio_channels,
        "frame_rate": config.frame_rate,
        "seanet": {
            "channels": config.audio_channels,
            "dimension": config.hidden_size,
            "causal": config.use_causal_conv,
            "n_filters": config.num_filters,
            "n_residual_layers": config.num_residual_layers,
            "activation": "ELU",
            "compress": config.compress,
            "dilation_base": config.dilation_growth_rate,
            "kernel_size": config.kernel_size,
            "residual_kernel_size": config.residual_kernel_size,
            "last_kernel_size": config.last_kernel_size,
            "norm": "none",  # transformers', too, has the weights without their norms
            "pad_mode": config.pad_mode,
            "ratios": config.upsampling_ratios,
            "true_skip": not config.use_conv_shortcut,
        },
        "quantizer": {
            "dimension": config.codebook_dim,
            "n_q": config.num_quantizers,
            "bins": config.codebook_size,
            "input_dimension": config.hidden_size,
            "output_dimension": config.hidden_size,
        },
        "transformer": {
            "d_model": config.hidden_size,
            "num_heads": config.num_attention_heads,
            "num_layers": config.num_hidden_layers,
            "causal": True,
            "layer_scale": config.layer_scale_initial_scale,
            "context": config.sliding_window,
            "conv_layout": True,
            "max_period": config.rope_parameters["rope_theta"],
            "gating": "none",
            "norm": "layer_norm",
            "positional_embedding": "rope",
            "dim_feedforward": config.intermediate_size,
            "input_dimension": config.hidden_size,
            "output_dimensions": [config.hidden_size],
        },
    }


MOSHI_NAMES = {
    "encoder.encoder_seanet.layers.": "encoder.model.",
    "decoder.decoder_seanet.layers.": "decoder.model.",
    "encoder.encoder_transformer.": "encoder_transformer.transformer.",
    "decoder.decoder_transformer.": "decoder_transformer.transformer.",
    "encoder.downsample.": "downsample.conv.",
    "decoder.upsample.": "upsample.convtr.",
    "quantizer.semantic_residual_vector_quantizer.": "quantizer.rvq_first.",
    "quantizer.acoustic_residual_vector_quantizer.": "quantizer.rvq_rest.",
    "rvq_first.layers.": "rvq_first.vq.layers.",
    "rvq_rest.layers.": "rvq_rest.vq.layers.",
    ".codebook.initialized": "._codebook._initialized",
    ".codebook.cluster_usage": "._codebook.cluster_usage",
    ".codebook.embed_sum": "._codebook.embedding_sum",
    ".input_layernorm.": ".norm1.",
    ".post_attention_layernorm.": ".norm2.",
    ".mlp.fc1.": ".linear1.",
    ".mlp.fc2.": ".linear2.",
    ".self_attn_layer_scale.": ".layer_scale_1.",
    ".mlp_layer_scale.": ".layer_scale_2.",
    ".self_attn.o_proj.": ".self_attn.out_projs.0.",
}


def moshi_weights(codec: MimiModel) -> dict[str, torch.Tensor]:
    """The codec's weights under moshi's names; moshi refuses a name too many or too few."""
    weights = {}
    for name, value in codec.state_dict().items():
        if ".conv." in name:
            layer = codec.get_submodule(name.rpartition(".conv.")[0])
            kind = "convtr" if isinstance(layer, MimiConvTranspose1d) else "conv"
            name = name.replace(".conv.", f".{kind}.{kind}.")
        for old, new in MOSHI_NAMES.items():
            name = name.replace(old, new)
        weights[name] = value
    for name in [name for name in weights if name.endswith(".q_proj.weight")]:
        query, key, value = (weights.pop(name.replace(".q_proj.", f".{kind}_proj.")) for kind in "qkv")
        fused = torch.cat([interleave(query, codec.config), interleave(key, codec.config), value])
        weights[name.replace(".q_proj.", ".in_projs.0.")] = fused
    return weights


def interleave(weight: torch.Tensor, config: MimiConfig) -> torch.Tensor:
    """Rows of a head from `[r0, r1, ..., i0, i1, ...]` to `[r0, i0, r1, i1, ...]`."""
    halves = weight.unflatten(0, (config.num_attention_heads, 2, config.head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def streamed(function, values, size, restart=None):
    outputs, state = [], None
    for index, piece in enumerate(values.split(size, dim=-1)):
        if index == restart:
            state = state.reset([0])
        output, state = function(piece, state)
        outputs.append(output)
    return torch.cat(outputs, dim=-1)


def assert_same_sound(found, expected):
    assert found.shape == expected.shape == (2, FRAMES * FRAME)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_every_weight_counts(codec, inputs):
    """The comparison below would show a weight left out: each changes the sound or the codes."""
    codes, sound = inputs["codes"][..., :20], inputs["sound"][:, None, : 20 * FRAME]

    @torch.no_grad()
    def outcome(model):
        return model.decode(codes).audio_values, model.encode(sound).audio_codes

    expected = outcome(codec)
    assert 0.05 < expected[0].square().mean().sqrt() < 0.5
    for name in codec.state_dict():
        if name.endswith(".initialized"):  # for training alone
            continue
        other = copy.deepcopy(codec)
        for module in other.modules():
            if isinstance(module, MimiEuclideanCodebook):
                module._embed = None  # made of the buffers on first use
        other.state_dict()[name].zero_()
        found = outcome(other)
        assert (found[0] - expected[0]).abs().max() > 1e-3 or not torch.equal(found[1], expected[1]), name


def test_sound_of_codes(codec, inputs, moshi):
    decoder, codes = MimiStreamingDecoder(codec), inputs["codes"]
    with torch.no_grad():
        whole = codec.decode(codes).audio_values[:, 0]
    assert_same_sound(moshi["sound.whole"], whole)
    assert_same_sound(moshi["sound.streamed"], whole)
    assert_same_sound(streamed(decoder, codes, 1), moshi["sound.whole"])
    assert_same_sound(streamed(decoder, codes, 1), moshi["sound.streamed"])
    assert_same_sound(streamed(decoder, codes, 1, RESTART), moshi["sound.restarted"])


def test_codes_of_sound(codec, inputs, moshi):
    encoder, sound = MimiStreamingEncoder(codec), inputs["sound"]
    with torch.no_grad():
        whole = codec.encode(sound[:, None]).audio_codes
    assert whole.shape == (2, 8, FRAMES)
    assert min(codebook.unique().numel() for codebook in whole.unbind(1)) > 20
    # No near tie decides: the nearest centroid is nearer than the next by at least 1e-4.
    assert torch.equal(moshi["codes.whole"], whole)
    assert torch.equal(moshi["codes.streamed"], whole)
    assert torch.equal(streamed(encoder, sound, FRAME), whole)
    assert torch.equal(streamed(encoder, sound, FRAME, RESTART), moshi["codes.restarted"])


def test_a_ring_of_the_window_is_one_short(moshi):
    """moshi as it is departs from its own whole at the frame of position 250, the first whose oldest key is gone."""
    difference = (moshi["sound.short_ring"] - moshi["sound.whole"]).abs()
    assert difference[:, : 125 * FRAME].max() < 1e-5
    assert difference[:, 125 * FRAME : 126 * FRAME].max() > 1e-4
    is_other = moshi["codes.short_ring"] != moshi["codes.whole"]
    assert not is_other[..., :125].any()
    assert is_other[..., 125:].any()
