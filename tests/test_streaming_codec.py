"""The streaming codec: pieces equal the whole, for any cut, any row and any length, and the state is a value."""

import copy
import pickle

import pytest
import torch
from minimind_o_hf.modeling.streaming_codec_minimind_o import (
    MimiStreamingDecoder,
    MimiStreamingEncoder,
    MimiStreamState,
)
from transformers import MimiConfig, MimiModel

FRAME = 1920


@pytest.fixture(scope="module")
def codec():
    """Mimi's layers at toy width, with codebooks that differ and sound about as loud as speech."""
    torch.manual_seed(0)
    config = MimiConfig(
        num_filters=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        upsample_groups=32,
        num_quantizers=8,
        codebook_size=64,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        layer_scale_initial_scale=0.5,
    )
    model = MimiModel(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    with torch.no_grad():
        last = model.decoder.decoder_seanet.layers[-1].conv
        scale = model.decode(make_codes(1, 50)).audio_values.abs().max()
        last.weight.div_(scale)
        last.bias.div_(scale)
    return model


def make_codes(rows, frames, seed=0):
    return torch.randint(0, 64, (rows, 8, frames), generator=torch.Generator().manual_seed(seed))


def whole(codec, codes):
    with torch.no_grad():
        return codec.decode(codes).audio_values[:, 0]


def pieces(function, values, sizes, state=None):
    outputs = []
    for part in values.split(sizes, dim=-1):
        output, state = function(part, state)
        outputs.append(output)
    return torch.cat(outputs, dim=-1), state


def assert_same_sound(found, expected):
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 1, 16, 20], [39, 1]])
def test_any_cut_gives_the_same_sound(codec, sizes):
    codes = make_codes(2, 40)
    expected = whole(codec, codes)
    assert expected.abs().max() > 0.1
    found, _ = pieces(MimiStreamingDecoder(codec), codes, sizes)
    assert_same_sound(found, expected)


def test_beyond_the_window_and_over_a_minute(codec):
    codes = make_codes(1, 800)  # 64 s, 1,600 positions of the attention, whose window is 250
    sizes = torch.randint(1, 30, (80,), generator=torch.Generator().manual_seed(1)).tolist()
    sizes = sizes[: next(n for n in range(80) if sum(sizes[: n + 1]) >= 780)]
    sizes.append(800 - sum(sizes))
    found, _ = pieces(MimiStreamingDecoder(codec), codes, sizes)
    assert_same_sound(found, whole(codec, codes))
    # The window matters: without what came before, the sound is another.
    alone, _ = MimiStreamingDecoder(codec)(codes[:, :, 700:])
    assert (alone - found[:, 700 * FRAME :]).abs().max() > 1e-2


def test_a_step_costs_the_same_after_a_minute(codec):
    decoder, sizes = MimiStreamingDecoder(codec), []
    state = None
    for part in make_codes(1, 780).split(260, dim=-1):
        _, state = decoder(part, state)
        sizes.append(sum(tensor.numel() for tensor in state.tensors.values()))
    assert sizes[0] == sizes[1] == sizes[2]


def test_rows_at_different_positions(codec):
    decoder = MimiStreamingDecoder(codec)
    first, second, third = (make_codes(1, 200, seed) for seed in (1, 2, 3))
    expected = [whole(codec, codes) for codes in (first, second, third)]
    # Three rows, begun after one another, one of them in the place of a row that is done.
    found = [[], [], []]
    state = None
    for step in range(150):
        joined = torch.cat([(first, second)[row][:, :, step : step + 1] for row in range(2)])
        sound, state = decoder(joined, state)
        for row in range(2):
            found[row].append(sound[row : row + 1])
    state = state.reset([0])
    assert state.positions.tolist() == [0, 300]
    for step in range(50):
        sound, state = decoder(torch.cat([third[:, :, step : step + 1], second[:, :, 150 + step : 151 + step]]), state)
        found[2].append(sound[:1])
        found[1].append(sound[1:])
    for sounds, wanted in zip(found, expected, strict=True):
        sound = torch.cat(sounds, dim=1)
        assert_same_sound(sound, wanted[:, : sound.shape[1]])


def test_rows_come_and_go(codec):
    decoder = MimiStreamingDecoder(codec)
    codes = make_codes(3, 60)
    expected = whole(codec, codes)
    _, state = decoder(codes[:, :, :20])
    # Two of the rows go on alone, in another order; then all three.
    sound, some = decoder(codes[[2, 0], :, 20:45], state.select([2, 0]))
    assert_same_sound(sound, expected[[2, 0], 20 * FRAME : 45 * FRAME])
    state = state.replace([2, 0], some)
    assert state.positions.tolist() == [90, 40, 90]
    middle, other = decoder(codes[[1], :, 20:45], state.select([1]))
    state = state.replace([1], other)
    sound, _ = decoder(codes[:, :, 45:], state)
    assert_same_sound(sound, expected[:, 45 * FRAME :])
    # A row that joins a batch of fresh ones.
    fresh = decoder.initial_state(2).replace([1], decoder(codes[:1, :, :20])[1])
    sound, _ = decoder(torch.cat([codes[1:2, :, :5], codes[:1, :, 20:25]]), fresh)
    assert_same_sound(sound[0], expected[1, : 5 * FRAME])
    assert_same_sound(sound[1], expected[0, 20 * FRAME : 25 * FRAME])


def test_the_state_is_a_value(codec):
    decoder = MimiStreamingDecoder(codec)
    codes = make_codes(1, 30)
    _, state = decoder(codes[:, :, :10])
    before = copy.deepcopy(state)
    once, _ = decoder(codes[:, :, 10:], state)
    again, _ = decoder(codes[:, :, 10:], state)
    assert torch.equal(once, again)
    assert all(torch.equal(before.tensors[name], value) for name, value in state.tensors.items())
    carried = pickle.loads(pickle.dumps(state))
    assert torch.equal(decoder(codes[:, :, 10:], carried)[0], once)
    state.reset([0])
    assert state.positions.tolist() == [20]


@pytest.mark.parametrize("sizes", [[30], [1] * 30, [7, 1, 22]])
def test_any_cut_gives_the_same_codes(codec, sizes):
    waveform = 0.1 * torch.randn(2, 30 * FRAME)
    with torch.no_grad():
        expected = codec.encode(waveform[:, None]).audio_codes
    assert expected.unique().numel() > 20
    found, _ = pieces(MimiStreamingEncoder(codec), waveform, [size * FRAME for size in sizes])
    assert torch.equal(found, expected)
    fewer, _ = MimiStreamingEncoder(codec, num_codebooks=3)(waveform)
    assert torch.equal(fewer, expected[:, :3])


def test_encoding_beyond_the_window(codec):
    waveform = 0.1 * torch.randn(1, 200 * FRAME)
    with torch.no_grad():
        expected = codec.encode(waveform[:, None]).audio_codes
    found, state = pieces(MimiStreamingEncoder(codec), waveform, 17 * FRAME)
    assert torch.equal(found, expected)
    again, _ = MimiStreamingEncoder(codec)(waveform[:, : 20 * FRAME], state.reset([0]))
    assert torch.equal(again, expected[:, :, :20])


def test_eager_attention_and_half_precision(codec):
    codes = make_codes(1, 20)
    expected = whole(codec, codes)
    other = copy.deepcopy(codec)
    other.set_attn_implementation("eager")
    assert_same_sound(pieces(MimiStreamingDecoder(other), codes, 3)[0], expected)
    other.to(torch.bfloat16)
    for module in other.modules():
        if hasattr(module, "_embed"):
            module._embed = None  # made of the buffers on first use, and not converted with them
    found, state = pieces(MimiStreamingDecoder(other), codes, 3)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_bad_inputs(codec):
    decoder, encoder = MimiStreamingDecoder(codec), MimiStreamingEncoder(codec)
    codes = make_codes(2, 3)
    with pytest.raises(ValueError, match="Drop stops"):
        decoder(codes + 64)
    with pytest.raises(ValueError, match="Drop stops"):
        decoder(codes.float())
    with pytest.raises(ValueError, match=r"no empty one, got \(2, 8, 0\)"):
        decoder(codes[:, :, :0])
    with pytest.raises(ValueError, match="3 dimensions"):
        decoder(codes[0])
    with pytest.raises(ValueError, match="2 rows, the state 3"):
        decoder(codes, decoder.initial_state(3))
    with pytest.raises(ValueError, match="whole frames of 1920 samples, got 1000"):
        encoder(torch.zeros(1, 1000))
    with pytest.raises(ValueError, match="at least 1"):
        decoder.initial_state(0)
    with pytest.raises(ValueError, match="2 rows are to be replaced by a state of 1"):
        decoder.initial_state(3).replace([0, 1], decoder.initial_state(1))
    assert isinstance(decoder(codes)[1], MimiStreamState)


def test_rows_by_mask_and_no_rows(codec):
    decoder = MimiStreamingDecoder(codec)
    _, state = decoder(make_codes(3, 5))
    mask = torch.tensor([True, False, True])
    assert_equal(state.select(mask), state.select([0, 2]))
    assert_equal(state.reset(mask), state.reset([0, 2]))
    assert_equal(state.reset([]), state)
    assert_equal(state.replace([], state.select([])), state)
    assert len(state.select([])) == 0


def assert_equal(found, expected):
    assert torch.equal(found.positions, expected.positions)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)


def test_more_codebooks_than_there_are(codec):
    with pytest.raises(ValueError, match="9 codebooks, the codec 8"):
        MimiStreamingDecoder(codec)(torch.zeros(1, 9, 2, dtype=torch.long))
    small = make_codes(1, 4)
    found, _ = MimiStreamingDecoder(codec)(small.to(torch.uint8))
    assert torch.equal(found, MimiStreamingDecoder(codec)(small)[0])


@pytest.mark.parametrize("bad", [torch.full((1, FRAME), float("nan")), torch.zeros(1, FRAME, dtype=torch.int16)])
def test_sound_that_is_none(codec, bad):
    with pytest.raises(ValueError, match="must hold finite floats"):
        MimiStreamingEncoder(codec)(bad)


def test_a_long_chunk_does_not_stay_in_memory(codec):
    _, state = MimiStreamingDecoder(codec)(make_codes(1, 900))
    held = sum(tensor.untyped_storage().nbytes() for tensor in state.tensors.values())
    assert held < 1.2 * sum(tensor.nbytes for tensor in state.tensors.values())
