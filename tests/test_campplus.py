"""CAM++, the speaker encoder: its own numbers, batches of any lengths, features, conversion, bad input.

The full-size network has weights that are a function of their names in the original file and their shapes, as the
reference values were made; the figures below are copies of them.
"""

import os
import zlib

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from minimind_o_hf.modeling.modeling_campplus import CamPlusPlusFrames
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from minimind_o_hf import CamPlusPlusConfig, CamPlusPlusFeatureExtractor, CamPlusPlusModel
from minimind_o_hf.cli import main
from minimind_o_hf.convert import convert_campplus

TINY = {
    "num_mel_bins": 16,
    "front_end_channels": 4,
    "tdnn_channels": 8,
    "block_layers": [2, 1],
    "block_dilations": [1, 2],
    "growth_rate": 4,
    "bottleneck_channels": 8,
    "segment_length": 5,
    "embedding_size": 6,
}
# Of `test_waveform(3.2, 16000, seed=9)`: the first values of its embedding, and every 16th bin of its 100th frame.
EMBEDDING = [0.209958, 0.215554, -0.130928, -0.222571, 0.194621, -0.304451, -0.122064, -0.045123]
FRAME = [0.37688, 0.03429, 0.31309, -0.21455, 0.23018]


def original_shapes() -> dict[str, list[int]]:
    """Names and shapes of the released file's tensors."""
    shapes = {}

    def norm(name, size, affine=True):
        for kind in ("weight", "bias") * affine + ("running_mean", "running_var"):
            shapes[f"{name}.{kind}"] = [size]

    def residual(name, has_shortcut):
        for index in (1, 2):
            shapes[f"{name}.conv{index}.weight"] = [32, 32, 3, 3]
            norm(f"{name}.bn{index}", 32)
        if has_shortcut:
            shapes[f"{name}.shortcut.0.weight"] = [32, 32, 1, 1]
            norm(f"{name}.shortcut.1", 32)

    shapes["head.conv1.weight"] = [32, 1, 3, 3]
    norm("head.bn1", 32)
    for layer in (1, 2):
        residual(f"head.layer{layer}.0", True)
        residual(f"head.layer{layer}.1", False)
    shapes["head.conv2.weight"] = [32, 32, 3, 3]
    norm("head.bn2", 32)
    shapes["xvector.tdnn.linear.weight"] = [128, 320, 5]
    norm("xvector.tdnn.nonlinear.batchnorm", 128)
    width = 128
    for block, num_layers in ((1, 12), (2, 24), (3, 16)):
        for layer in range(1, num_layers + 1):
            name = f"xvector.block{block}.tdnnd{layer}"
            norm(f"{name}.nonlinear1.batchnorm", width)
            shapes[f"{name}.linear1.weight"] = [128, width, 1]
            norm(f"{name}.nonlinear2.batchnorm", 128)
            shapes[f"{name}.cam_layer.linear_local.weight"] = [32, 128, 3]
            shapes |= {f"{name}.cam_layer.linear1.weight": [64, 128, 1], f"{name}.cam_layer.linear1.bias": [64]}
            shapes |= {f"{name}.cam_layer.linear2.weight": [32, 64, 1], f"{name}.cam_layer.linear2.bias": [32]}
            width += 32
        norm(f"xvector.transit{block}.nonlinear.batchnorm", width)
        shapes[f"xvector.transit{block}.linear.weight"] = [width // 2, width, 1]
        width //= 2
    norm("xvector.out_nonlinear.batchnorm", 512)
    shapes["xvector.dense.linear.weight"] = [192, 1024, 1]
    norm("xvector.dense.nonlinear.batchnorm", 192, affine=False)
    return shapes


def filled(name: str, shape: list[int]) -> torch.Tensor:
    noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)  # noqa: NPY002
    noise = noise.astype(np.float32)
    if len(shape) > 1:
        noise /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith("running_var"):
        noise = 1 + 0.1 * abs(noise)
    else:
        noise = 0.1 * noise + (not name.endswith(("bias", "running_mean")))
    return torch.from_numpy(np.asarray(noise, np.float32))


def waveform() -> np.ndarray:
    time = np.arange(51200) / 16000
    tones = sum(a * np.sin(2 * np.pi * (f * time + 40 * time**2)) for a, f in ((0.4, 180), (0.2, 660), (0.1, 2400)))
    noise = np.random.RandomState(9).standard_normal(51200)  # noqa: NPY002
    return (0.8 * tones * (0.5 - 0.5 * np.cos(2 * np.pi * 1.7 * time)) + 0.01 * noise).astype(np.float32)


def noise(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def assert_close(value, expected, atol):
    torch.testing.assert_close(value, torch.as_tensor(expected), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def released() -> dict[str, torch.Tensor]:
    """A state dict laid out as the released file's."""
    return {name: filled(name, shape) for name, shape in original_shapes().items()}


@pytest.fixture(scope="module")
def directory(released, tmp_path_factory):
    """The full-size encoder, converted."""
    folder = tmp_path_factory.mktemp("campplus")
    torch.save(released, folder / "campplus.bin")
    return convert_campplus(folder / "campplus.bin", folder / "converted")


@pytest.fixture(scope="module")
def encoder(directory) -> CamPlusPlusModel:
    return AutoModel.from_pretrained(directory)


@pytest.fixture
def tiny() -> CamPlusPlusModel:
    """A toy encoder whose batch norms shift what they get: padding does not stay 0 by itself."""
    model = CamPlusPlusModel(CamPlusPlusConfig(**TINY)).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                torch.nn.init.normal_(module.bias)
    return model


# --- The original's numbers


@torch.no_grad()
def test_parity(golden, encoder):
    tensors = golden.tensors("campplus")
    features = CamPlusPlusFeatureExtractor()(golden.fill.test_waveform(3.2, 16000, seed=9))
    assert_close(features.input_features[0], tensors["mel_features"], atol=1e-5)
    assert_close(encoder(**features).embeddings[0], tensors["embedding"], atol=1e-5)
    for kind in ("mel_features", "kaldi_features"):
        expected = tensors["embedding" if kind == "mel_features" else "kaldi_embedding"]
        assert_close(encoder(tensors[kind][None]).embeddings[0], expected, atol=1e-5)


def test_names_and_shapes_are_the_released_files(golden):
    assert original_shapes() == golden.manifest("campplus")


@torch.no_grad()
def test_figures(directory, encoder):
    features = AutoFeatureExtractor.from_pretrained(directory)(waveform())
    assert features.input_features.shape == (1, 321, 80)
    assert_close(features.input_features[0, 100, ::16], FRAME, atol=1e-4)
    embedding = encoder(**features).embeddings[0]
    assert embedding.shape == (192,)
    assert_close(embedding[:8], EMBEDDING, atol=1e-5)
    assert_close(embedding.norm(), 1.8651, atol=1e-4)


def test_number_of_parameters():
    with torch.device("meta"):
        model = CamPlusPlusModel(CamPlusPlusConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 6_848_544


# --- Recordings of different lengths in a batch


@torch.no_grad()
def test_a_batch_is_its_recordings(encoder):
    extractor = CamPlusPlusFeatureExtractor()
    # 1, 2 and 3 segments of 2 s in the blocks; the shortest clip there is; an odd number of frames and an even one.
    clips = [noise(320, 1), noise(16000, 2), noise(40160, 3), noise(75040, 4)]
    batch = extractor(clips, pad_to_multiple_of=64)
    assert batch.attention_mask.sum(dim=1).tolist() == [3, 101, 252, 470]
    embeddings = encoder(**batch).embeddings
    for clip, embedding in zip(clips, embeddings, strict=True):
        assert_close(embedding, encoder(**extractor(clip)).embeddings[0], atol=2e-6)
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("padding", [0.0, 1e3])
@pytest.mark.parametrize("length", [3, 4, 9, 10, 11, 12, 20, 21, 39, 40])
def test_padding_changes_nothing(tiny, length, padding):
    """Around the ends of segments (5 frames of the halved rate), whatever stands in the padding."""
    features = torch.randn(1, length, 16)
    expected = tiny(features).embeddings
    padded = functional.pad(features, (0, 0, 0, 40 - length), value=padding)
    mask = (torch.arange(40) < length).long()[None]
    assert_close(tiny(padded, mask).embeddings, expected, atol=2e-5)
    if length < 40:
        assert (tiny(padded).embeddings - expected).abs().max() > 1e-3


@torch.no_grad()
def test_context_and_statistics_by_hand():
    frames = CamPlusPlusFrames(torch.tensor([3, 5]), 5, torch.float32, segment_length=2)
    assert frames.mask.tolist() == [[[1, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]]
    values = torch.tensor([[[1.0, 3.0, 8.0, 9.0, 9.0]], [[1.0, 3.0, 8.0, 0.0, 3.0]]])
    # Means 4 and 3; of the segments: 2, 8, nothing; 2, 4, 3.
    assert frames.context(values * frames.mask).tolist() == [[[6, 12, 4]], [[5, 7, 6]]]
    # Squares of the deviations: 9 + 1 + 16 over 2; 4 + 0 + 25 + 9 + 0 over 4.
    expected = torch.tensor([[[4.0], [13.0**0.5]], [[3.0], [9.5**0.5]]])
    assert_close(frames.mean_and_deviation(values), expected, atol=1e-6)


def test_context_is_average_pooling():
    values = torch.randn(2, 3, 273)
    frames = CamPlusPlusFrames(torch.tensor([273, 273]), 273, torch.float32, segment_length=100)
    expected = functional.avg_pool1d(values, 100, 100, ceil_mode=True) + values.mean(dim=-1, keepdim=True)
    assert_close(frames.context(values), expected, atol=1e-6)
    expected = torch.cat([values.mean(dim=-1), values.std(dim=-1)], dim=1)
    assert_close(frames.mean_and_deviation(values)[..., 0], expected, atol=1e-6)


# --- The model as one of transformers


@torch.no_grad()
def test_save_and_load(tiny, tmp_path):
    tiny.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CamPlusPlusConfig
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CamPlusPlusModel
    assert not loaded.training
    assert loaded.config.to_dict().items() >= TINY.items()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny.state_dict().items())
    features = torch.randn(2, 31, 16)
    assert torch.equal(loaded(features).embeddings, tiny(features).embeddings)
    assert torch.equal(loaded(features, return_dict=False)[0], tiny(features).embeddings)


@torch.no_grad()
def test_half_precision(directory, encoder):
    features = CamPlusPlusFeatureExtractor()([waveform(), noise(70000)])
    expected = encoder(**features).embeddings
    for dtype in (torch.bfloat16, torch.float16):
        embeddings = AutoModel.from_pretrained(directory, dtype=dtype)(**features).embeddings
        assert embeddings.dtype == dtype
        assert embeddings.isfinite().all()
        assert functional.cosine_similarity(embeddings.float(), expected).min() > 0.999


@torch.no_grad()
def test_compiled_whole(tiny):
    features, mask = torch.randn(2, 33, 16), torch.ones(2, 33).long()
    mask[1, 20:] = 0
    compiled = torch.compile(tiny, fullgraph=True, backend="eager")
    assert_close(compiled(features, mask).embeddings, tiny(features, mask).embeddings, atol=1e-6)


def test_gradients_reach_the_features(tiny):
    features = torch.randn(1, 20, 16, requires_grad=True)
    tiny(functional.pad(features, (0, 0, 0, 5)), torch.tensor([[1] * 20 + [0] * 5])).embeddings.sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad != 0).any(dim=-1).all()


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((20, 16), None, r"\(batch_size, frames, 16\), got \(20, 16\)"),
        ((1, 16, 20), None, r"\(batch_size, frames, 16\), got \(1, 16, 20\)"),
        ((1, 5, 16), [1, 1, 1, 1], r"\(1, 5\) as `input_features`, got \(1, 4\)"),
        ((1, 5, 16), [0, 0, 1, 1, 1], "pad on the right"),
        ((1, 5, 16), [1, 1, 0, 1, 1], "pad on the right"),
        ((1, 5, 16), [1, 1, 0, 0, 0], r"at least 3 feature frames, got \[2\]"),
        ((1, 5, 16), [0, 0, 0, 0, 0], r"at least 3 feature frames, got \[0\]"),
        ((2, 2, 16), None, r"at least 3 feature frames, got \[2, 2\]"),
    ],
)
def test_bad_inputs(tiny, shape, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny(torch.randn(shape), None if mask is None else torch.tensor([mask]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_mel_bins": 84}, r"`num_mel_bins` \(84\) must be a multiple of 8"),
        ({"bottleneck_channels": 7}, r"`bottleneck_channels` \(7\) must be even"),
        ({"block_layers": [2]}, r"`block_layers` \(\[2\]\) and `block_dilations` \(\[1, 2\]\)"),
        ({"block_layers": [2, 0]}, r"`block_layers` must hold numbers of at least 1, got \[2, 0\]"),
        ({"block_dilations": []}, "`block_dilations` must hold"),
        ({"embedding_size": 0}, "embedding_size"),
        ({"growth_rate": "4"}, "growth_rate"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(StrictDataclassError, match=message):
        CamPlusPlusConfig(**TINY | change)
    with pytest.raises(ValueError, match=f"(?s)does not fit.*{message}"):
        CamPlusPlusConfig.from_dict(TINY | change)


# --- Features


def test_features_are_those_of_another_implementation():
    samples = noise(8000)
    filters = mel_filter_bank(257, 80, 20.0, 7600.0, 16000, norm="slaney", mel_scale="slaney")
    # A window shorter than the transform stands in its middle.
    window = np.pad(window_function(400, "hann"), 56)
    power = spectrogram(samples, window, 512, 160, power=2.0, mel_filters=filters, mel_floor=1e-10)
    expected = np.log(power).T
    features = CamPlusPlusFeatureExtractor()(samples)
    assert_close(features.input_features[0], torch.from_numpy(expected - expected.mean(0)).float(), atol=1e-3)


def test_a_batch_of_features_is_its_clips():
    extractor = CamPlusPlusFeatureExtractor()
    clips = [noise(16000, 1), noise(320, 2), noise(7999, 3)]
    batch = extractor(clips)
    lengths = [101, 3, 50]
    assert batch.input_features.shape == (3, 101, 80)
    assert batch.input_features.dtype == torch.float32
    assert batch.attention_mask.dtype == torch.long
    assert batch.attention_mask.sum(-1).tolist() == lengths
    for clip, features, mask, length in zip(clips, batch.input_features, batch.attention_mask, lengths, strict=True):
        torch.testing.assert_close(features[:length], extractor(clip).input_features[0], rtol=0, atol=0)
        assert_close(features[:length].mean(dim=0), torch.zeros(80), atol=1e-5)
        assert not features[length:].any()
        assert mask[:length].all()


@torch.no_grad()
def test_loudness_and_rate_do_not_matter(encoder):
    extractor = CamPlusPlusFeatureExtractor()
    samples = waveform()
    features = extractor(samples).input_features
    assert_close(extractor(0.25 * samples).input_features, features, atol=1e-4)
    assert_close(extractor(torch.from_numpy(samples)).input_features, features, atol=0)
    assert_close(extractor(np.stack([samples, samples])).input_features, features, atol=0)
    upsampled = np.interp(np.arange(102400) / 2, np.arange(51200), samples)
    resampled = extractor(upsampled, sampling_rate=32000)
    assert resampled.input_features.shape == features.shape
    embeddings = [encoder(values).embeddings for values in (resampled.input_features, features)]
    assert functional.cosine_similarity(*embeddings) > 0.99


@torch.no_grad()
def test_digital_silence_is_finite(encoder):
    features = CamPlusPlusFeatureExtractor()(np.zeros(16000, np.float32))
    assert not features.input_features.any()
    assert encoder(**features).embeddings.isfinite().all()


def test_the_feature_extractor_is_saved_whole(directory, tmp_path):
    extractor = CamPlusPlusFeatureExtractor(max_frequency=7000.0)
    extractor.save_pretrained(tmp_path)
    loaded = CamPlusPlusFeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert loaded.max_frequency == 7000
    assert AutoFeatureExtractor.from_pretrained(directory).to_dict() == CamPlusPlusFeatureExtractor().to_dict()


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "the list of clips is empty"),
        (noise(319), "audio clip 0 has 319 samples at 16000 Hz; 320 is the least"),
        ([noise(800), noise(100)], "audio clip 1 has 100 samples"),
        ([noise(800), np.full(800, np.nan)], "audio clip 1: 800 of 800 audio samples are NaN"),
        (np.zeros(0), "audio clip 0: audio without samples"),
    ],
)
def test_bad_clips(clips, message):
    with pytest.raises(ValueError, match=message):
        CamPlusPlusFeatureExtractor()(clips)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mel_floor": 0.0}, "`mel_floor` must be above 0, got 0.0"),
        ({"sampling_rate": 8000}, r"`max_frequency` \(7600.0\).*`sampling_rate` \(8000\)"),
        ({"min_frequency": 7600.0}, r"`min_frequency` \(7600.0\)"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        CamPlusPlusFeatureExtractor(**arguments)


# --- Conversion


def test_converted_files(directory, released):
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    written = load_file(directory / "model.safetensors")
    written = {name: tensor for name, tensor in written.items() if not name.endswith("num_batches_tracked")}
    assert len(written) == len(released)
    original = released["xvector.block3.tdnnd16.cam_layer.linear_local.weight"]
    assert torch.equal(written["blocks.2.layers.15.local.weight"], original)


def test_other_forms_of_the_file(released, directory, tmp_path):
    """safetensors, float16, and the counters of the batch norms, which say nothing."""
    state = {name: tensor.half() for name, tensor in released.items()}
    state["head.bn1.num_batches_tracked"] = torch.tensor(7)
    save_file(state, tmp_path / "campplus.safetensors")
    written = load_file(convert_campplus(tmp_path / "campplus.safetensors", tmp_path / "out") / "model.safetensors")
    expected = load_file(directory / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor.half() if tensor.is_floating_point() else tensor), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("head.conv1.weight"), r"lacks 1 tensors \(head.conv1.weight\)"),
        (lambda state: state.pop("xvector.block2.tdnnd24.linear1.weight"), "block2.tdnnd24.linear1.weight"),
        (lambda state: state.update(extra=torch.ones(2)), r"1 unknown tensors \(extra\)"),
        (
            lambda state: state.update({"xvector.dense.linear.weight": torch.ones(512, 1024, 1)}),
            r"xvector.dense.linear.weight \[512, 1024, 1\] for \[192, 1024, 1\]",
        ),
        (
            lambda state: state.update({"head.bn1.bias": torch.ones(32, dtype=torch.long)}),
            "head.bn1.bias are no floats",
        ),
        (lambda state: state.update(state=dict(state)), "is no state dict: the values of state"),
        (lambda state: state.clear(), "holds no tensors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(released, change, message, tmp_path):
    state = dict(released)
    change(state)
    torch.save(state, tmp_path / "campplus.bin")
    with pytest.raises(ValueError, match=message):
        convert_campplus(tmp_path / "campplus.bin", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["campplus.bin"]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_not_loaded(tmp_path):
    torch.save({"head.conv1.weight": Malicious(tmp_path / "canary")}, tmp_path / "campplus.bin")
    with pytest.raises(ValueError, match="pickled objects"):
        convert_campplus(tmp_path / "campplus.bin", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["campplus.bin"]


def test_unreadable_files_and_directories(released, directory, tmp_path):
    torch.save(released, tmp_path / "campplus.bin")
    content = (tmp_path / "campplus.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match="cut.bin is"):
        convert_campplus(tmp_path / "cut.bin", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="nowhere.bin does not exist"):
        convert_campplus(tmp_path / "nowhere.bin", tmp_path / "out")
    with pytest.raises(ValueError, match="is a directory: give the file"):
        convert_campplus(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        convert_campplus(tmp_path / "campplus.bin", directory)
    made = convert_campplus(tmp_path / "campplus.bin", tmp_path / "out")
    (made / "stale").touch()
    convert_campplus(tmp_path / "campplus.bin", made, overwrite=True)
    assert not (made / "stale").exists()


def test_from_the_command_line(released, tmp_path, capsys):
    torch.save(released, tmp_path / "campplus.bin")
    arguments = ["convert", str(tmp_path / "campplus.bin"), str(tmp_path / "out"), "--kind", "speaker-encoder"]
    assert main(arguments) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.embedding_size == 192
    assert main([*arguments, "--dtype", "float32"]) == 1
    assert "--dtype has no place in a speaker encoder" in capsys.readouterr().err
