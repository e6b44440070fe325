"""The speech front-end: parity with SenseVoice's, lengths, batches, options, bad clips."""

import json

import numpy as np
import pytest
import torch
from minimind_o_hf.processing import MiniMindOFeatureExtractor
from transformers import FunAsrNanoFeatureExtractor


def noise(num_samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


@pytest.mark.parametrize(("name", "arguments"), [("a", (1.37, 16000)), ("b", (0.61, 16000, 3))])
def test_parity_with_sensevoice(golden, name, arguments):
    features = MiniMindOFeatureExtractor()(golden.fill.test_waveform(*arguments))
    expected = golden.tensors("sensevoice_features")[f"features_{name}"]
    torch.testing.assert_close(features.input_features[0], expected, rtol=1e-5, atol=1e-5)
    assert features.input_features_mask.tolist() == [[1] * len(expected)]


def test_parity_after_normalisation(golden):
    tensors = golden.tensors("sensevoice_features")
    extractor = MiniMindOFeatureExtractor(cmvn_shift=tensors["cmvn_shift"], cmvn_scale=tensors["cmvn_scale"].numpy())
    features = extractor(golden.fill.test_waveform(1.37, 16000))
    torch.testing.assert_close(features.input_features[0], tensors["features_a_cmvn"], rtol=1e-5, atol=1e-5)


def test_it_is_the_parents_filter_bank_at_16_bit_scale():
    samples = noise(8000)
    expected = FunAsrNanoFeatureExtractor()(samples * 32768).input_features
    torch.testing.assert_close(MiniMindOFeatureExtractor()(samples).input_features, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_samples", "frames"),
    [(2, 1), (3, 1), (17, 1), (160, 1), (399, 1), (400, 1), (1359, 1), (1360, 2), (2319, 2), (2320, 3), (16000, 17)],
)
def test_number_of_frames(num_samples, frames):
    extractor = MiniMindOFeatureExtractor()
    assert extractor.num_frames(num_samples) == frames
    features = extractor(noise(num_samples)).input_features
    assert features.shape == (1, frames, 560)
    assert features.isfinite().all()


def test_a_short_clip_is_one_window_of_its_own_length():
    """One filter-bank frame, so each of the 7 stacked ones is the same."""
    stacked = MiniMindOFeatureExtractor()(noise(250)).input_features.view(7, 80)
    assert (stacked == stacked[0]).all()


def test_a_batch_is_its_clips():
    extractor = MiniMindOFeatureExtractor(dither=1.0)
    clips = [noise(16000, 1), noise(300, 2), noise(7000, 3)]
    batch = extractor(clips)
    lengths = [17, 1, 7]
    assert batch.input_features.shape == (3, 17, 560)
    assert batch.input_features.dtype == torch.float32
    assert batch.input_features_mask.dtype == torch.long
    assert batch.input_features_mask.sum(-1).tolist() == lengths
    for clip, features, mask, length in zip(
        clips, batch.input_features, batch.input_features_mask, lengths, strict=True
    ):
        torch.testing.assert_close(features[:length], extractor(clip).input_features[0], rtol=0, atol=0)
        assert not features[length:].any()
        assert mask[:length].all()


def test_kinds_of_input():
    extractor = MiniMindOFeatureExtractor()
    samples = noise(4000)
    expected = extractor(samples).input_features
    for same in (
        torch.from_numpy(samples),
        samples.tolist(),
        [samples],
        (samples,),
        [samples.tolist()],
        samples[None],
    ):
        torch.testing.assert_close(extractor(same).input_features, expected, rtol=0, atol=0)
    stereo = np.stack([samples + 0.05, samples - 0.05])
    torch.testing.assert_close(extractor(stereo).input_features, expected, rtol=0, atol=2e-3)
    quantised = np.round(samples * 32768).astype(np.int16)
    torch.testing.assert_close(extractor(quantised).input_features, expected, rtol=0, atol=5e-2)


def test_other_rates_are_resampled():
    extractor = MiniMindOFeatureExtractor()
    time = np.arange(48000) / 48000
    samples = 0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time)
    features = extractor(samples, sampling_rate=48000).input_features
    expected = extractor(samples[::3]).input_features
    assert features.shape == expected.shape == (1, 17, 560)
    # The bins that hold the sweep; the others are near silence, where the filters' ripple shows.
    loud = expected > 15
    assert loud.sum() > 500
    assert (features - expected)[loud].abs().max() < 0.05


def test_dither_is_deterministic_and_private():
    silence = np.zeros(8000, np.float32)
    state = torch.get_rng_state()
    once = MiniMindOFeatureExtractor(dither=1.0)(silence).input_features
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(3)
    assert torch.equal(once, MiniMindOFeatureExtractor(dither=1.0)(silence).input_features)
    assert not torch.equal(once, MiniMindOFeatureExtractor(dither=1.0, dither_seed=1)(silence).input_features)
    plain = MiniMindOFeatureExtractor()(silence).input_features
    assert (once - plain).min() > 5


def test_the_longest_clip():
    extractor = MiniMindOFeatureExtractor(max_frames=2)
    assert extractor(noise(2319)).input_features.shape[1] == 2
    with pytest.raises(ValueError, match=r"audio clip 1 lasts 0.1 s, 3 frames: .* at most 2 "):
        extractor([noise(400), noise(2320)])
    with pytest.raises(ValueError, match=r"audio clip 0 lasts 130.0 s, 2167 frames: .* at most 2048 \(122 s\)"):
        MiniMindOFeatureExtractor()(np.zeros(130 * 16000, np.float32))


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([], "the list of clips is empty"),
        ([noise(800), []], "audio clip 1"),
        ([noise(800), np.array([0.5])], "audio clip 1 has 1 sample"),
        ([noise(800), np.full(800, np.nan)], "audio clip 1: 800 of 800 audio samples are NaN"),
        (np.zeros(0), "audio clip 0: audio without samples"),
        ([noise(800), np.zeros(800, bool)], "audio clip 1: .* got bool"),
    ],
)
def test_bad_clips(clips, message):
    if isinstance(clips, list) and len(clips) == 2 and isinstance(clips[1], list):
        clips = [clips[0], np.zeros(0)]
    with pytest.raises(ValueError, match=message):
        MiniMindOFeatureExtractor()(clips)


def test_bad_options(tmp_path):
    ones = [1.0] * 560
    for options, message in [
        ({"cmvn_shift": ones}, "both or neither"),
        ({"cmvn_scale": ones}, "both or neither"),
        ({"cmvn_shift": ones[:80], "cmvn_scale": ones}, r"`cmvn_shift` must hold 560 .* got shape \(80,\)"),
        ({"cmvn_shift": ones, "cmvn_scale": [float("nan")] * 560}, "`cmvn_scale` must hold 560 finite"),
        ({"dither": -1.0}, "at least 0, got -1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            MiniMindOFeatureExtractor(**options)
    with pytest.raises(ValueError, match="positive number of Hz, got 0"):
        MiniMindOFeatureExtractor()(noise(800), sampling_rate=0)
    with pytest.raises(ValueError, match="not supported"):
        MiniMindOFeatureExtractor()(noise(800), truncation=True, max_length=1)
    with pytest.raises(OSError, match="missing.wav"):
        MiniMindOFeatureExtractor()([noise(800), str(tmp_path / "missing.wav")])


def test_save_and_load(tmp_path):
    extractor = MiniMindOFeatureExtractor(
        cmvn_shift=np.linspace(-9, -8, 560), cmvn_scale=torch.linspace(0.1, 0.2, 560), dither=0.5, max_frames=99
    )
    extractor.save_pretrained(tmp_path)
    again = MiniMindOFeatureExtractor.from_pretrained(tmp_path)
    assert again.to_dict() == extractor.to_dict()
    assert json.loads(again.to_json_string())["max_frames"] == 99
    assert torch.equal(again(noise(4000)).input_features, extractor(noise(4000)).input_features)
