"""Where codes stand on the text's time axis: the delay pattern, its inverse, and the voice before an answer."""

import pytest
import torch
from minimind_o_hf.modeling import apply_delay_pattern, place_voice, revert_delay_pattern

P, S, V = 33, 34, 35  # pad, stop, speaker
CODEBOOK_SIZE = 32


def lay_out(codes, start, length, num_frames=None):
    num_frames = None if num_frames is None else torch.tensor(num_frames)
    return apply_delay_pattern(torch.tensor(codes), torch.tensor(start), length, P, S, num_frames)


# ---- the delay pattern ----


def test_frames_are_delayed_by_one_step_a_codebook_and_end_with_a_stop():
    delayed, mask = lay_out([[[10, 11], [20, 21], [30, 31]]], start=[2], length=8)
    assert delayed.tolist() == [
        [
            [P, P, 10, 11, S, P, P, P],
            [P, P, P, 20, 21, S, P, P],
            [P, P, P, P, 30, 31, S, P],
        ]
    ]
    assert mask.int().tolist() == [
        [
            [0, 0, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 1, 1, 0],
        ]
    ]
    assert delayed.dtype == torch.long
    assert mask.dtype == torch.bool


def test_each_row_has_its_start_and_length():
    # What stands behind a row's frames does not matter.
    delayed, mask = lay_out(
        [[[1, 2, 3], [4, 5, 6]], [[7, 99, -1], [8, 99, -1]], [[99, 99, 99], [99, 99, 99]]],
        start=[0, 3, 1],
        length=6,
        num_frames=[3, 1, 0],
    )
    assert delayed.tolist() == [
        [[1, 2, 3, S, P, P], [P, 4, 5, 6, S, P]],
        [[P, P, P, 7, S, P], [P, P, P, P, 8, S]],
        [[P, S, P, P, P, P], [P, P, S, P, P, P]],
    ]
    assert mask.equal(delayed != P)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (6, [[P, 1, 2, S, P, P], [P, P, 3, 4, S, P]]),
        (5, [[P, 1, 2, S, P], [P, P, 3, 4, S]]),
        (4, [[P, 1, 2, S], [P, P, 3, 4]]),
        (3, [[P, 1, 2], [P, P, 3]]),
        (1, [[P], [P]]),
        (0, [[], []]),
    ],
)
def test_what_does_not_fit_is_cut_at_the_end(length, expected):
    delayed, mask = lay_out([[[1, 2], [3, 4]]], start=[1], length=length)
    assert delayed[0].tolist() == expected
    assert mask.equal(delayed != P)


def test_the_specifications_layout():
    """Frame f of codebook i stands at s + 1 + i + f, the stop after the last frame."""
    s, num_frames, length = 5, 3, 24
    codes = torch.arange(8 * num_frames).view(1, 8, num_frames)
    delayed, _ = apply_delay_pattern(codes, torch.tensor([s + 1]), length, 2049, 2050)
    expected = torch.full((1, 8, length), 2049)
    for i in range(8):
        for f in range(num_frames):
            expected[0, i, s + 1 + i + f] = codes[0, i, f]
        expected[0, i, s + 1 + i + num_frames] = 2050
    assert delayed.equal(expected)


def test_the_inverse_by_hand():
    delayed = torch.tensor(
        [
            [[P, 1, 2, S, P], [P, P, 3, 4, S]],
            [[5, 6, 7, 8, 9], [P, 10, 11, 12, 13]],
            [[P, P, P, P, 1], [P, P, P, P, P]],
        ]
    )
    codes, mask = revert_delay_pattern(delayed, torch.tensor([1, 0, 4]), CODEBOOK_SIZE)
    assert codes.tolist() == [
        [[1, 2, 0, 0], [3, 4, 0, 0]],
        [[5, 6, 7, 8], [10, 11, 12, 13]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
    ]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]


def test_a_frame_needs_all_its_codes_before_their_stop():
    # Codebook 1 stops after two frames and goes on sampling: what follows its stop does not count, in any codebook.
    delayed = torch.tensor([[[1, 2, 3, 4, 5, 6], [P, 11, 12, S, 14, 15], [P, P, 21, 22, 23, 24]]])
    codes, mask = revert_delay_pattern(delayed, torch.tensor([0]), CODEBOOK_SIZE)
    assert mask.int().tolist() == [[1, 1, 0, 0]]
    assert codes.tolist() == [[[1, 2, 0, 0], [11, 12, 0, 0], [21, 22, 0, 0]]]


@pytest.mark.parametrize("special", [CODEBOOK_SIZE, P, S, V, 39, -100])
def test_every_code_outside_the_codebook_ends_the_speech(special):
    delayed = torch.tensor([[[1, 2, special, 4], [P, 5, 6, 7]]])
    _, mask = revert_delay_pattern(delayed, torch.tensor([0]), CODEBOOK_SIZE)
    assert mask.int().tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("length", [0, 1, 2])
def test_too_short_for_a_frame(length):
    codes, mask = revert_delay_pattern(torch.zeros(2, 3, length, dtype=torch.long), torch.tensor([0, 1]), 32)
    assert codes.shape == (2, 3, 0)
    assert mask.shape == (2, 0)


@pytest.mark.parametrize("start", [4, 5, 100])
def test_a_start_beyond_the_end_gives_no_frames(start):
    _, mask = revert_delay_pattern(torch.ones(1, 2, 4, dtype=torch.long), torch.tensor([start]), CODEBOOK_SIZE)
    assert mask.shape == (1, 3)
    assert not mask.any()


def test_the_inverse_of_random_codes():
    generator = torch.Generator().manual_seed(0)
    for num_codebooks in (1, 2, 8):
        num_frames = torch.tensor([6, 0, 3, 1])
        start = torch.tensor([0, 2, 5, 1])
        codes = torch.randint(0, CODEBOOK_SIZE, (4, num_codebooks, 6), generator=generator)
        inside = torch.arange(6) < num_frames[:, None]
        length = int((start + num_frames).max()) + num_codebooks
        delayed, mask = apply_delay_pattern(codes, start, length, P, S, num_frames)
        assert mask.sum(dim=(1, 2)).tolist() == ((num_frames + 1) * num_codebooks).tolist()
        returned, returned_mask = revert_delay_pattern(delayed, start, CODEBOOK_SIZE)
        assert returned_mask[:, :6].equal(inside)
        assert not returned_mask[:, 6:].any()
        assert returned[:, :, :6].equal(codes.masked_fill(~inside[:, None], 0))
        assert not returned[:, :, 6:].any()


def test_the_inverse_of_cut_codes_is_the_complete_frames():
    codes = torch.arange(1, 13).view(1, 3, 4)
    for length in range(10):
        delayed, _ = apply_delay_pattern(codes, torch.tensor([1]), length, P, S)
        returned, mask = revert_delay_pattern(delayed, torch.tensor([1]), CODEBOOK_SIZE)
        complete = min(max(length - 1 - 2, 0), 4)  # frame f is complete with codebook 2, at 1 + 2 + f
        assert int(mask.sum()) == complete
        assert returned[0, :, :complete].equal(codes[0, :, :complete])


# ---- the voice ----


def voice(prompt_lengths, end=None, length=6, reference=None, speaker=None, num_codebooks=2):
    """Codebook 0 of every row, and a check that the speaker token and the pads stand in all of them."""
    prompt_lengths = torch.tensor(prompt_lengths)
    end = torch.full_like(prompt_lengths, length) if end is None else torch.tensor(end)
    if reference is not None:
        reference = torch.tensor(reference)
        # The other codebooks hold the same reference, 10 higher.
        reference = torch.stack(
            [torch.where(reference == P, P, reference + 10 * i) for i in range(num_codebooks)], dim=1
        )
    if speaker is not None:
        speaker = torch.tensor(speaker, dtype=torch.float32)[:, None].repeat(1, 3)
    codes = place_voice(prompt_lengths, end, length, num_codebooks, P, V, reference, speaker)
    assert codes.dtype == torch.long
    first = codes[:, 0]
    for i in range(num_codebooks):
        assert codes[:, i].equal(torch.where(first < CODEBOOK_SIZE, first + 10 * i, first))
    return first.tolist()


def test_without_a_voice_all_is_pad():
    assert voice([6, 2]) == [[P] * 6] * 2


def test_the_reference_ends_at_the_prompts_end():
    assert voice([6], reference=[[1, 2, 3]]) == [[P, P, P, 1, 2, 3]]


def test_the_speaker_token_stands_before_the_reference():
    assert voice([6], reference=[[1, 2, 3]], speaker=[1.0]) == [[P, P, V, 1, 2, 3]]


def test_the_speaker_token_alone_stands_at_the_prompts_end():
    assert voice([6], speaker=[1.0]) == [[P, P, P, P, P, V]]


def test_pads_on_the_left_are_no_reference():
    assert voice([6, 6], reference=[[P, P, 1, 2], [P, P, P, P]]) == [[P, P, P, P, 1, 2], [P] * 6]
    assert voice([6, 6], reference=[[P, P, 1, 2], [P, P, P, P]], speaker=[1.0, 1.0]) == [
        [P, P, P, V, 1, 2],
        [P, P, P, P, P, V],
    ]


def test_rows_of_zeros_have_no_speaker_token():
    assert voice([6, 6, 6], reference=[[1, 2], [1, 2], [P, P]], speaker=[0.0, 1.0, 0.0]) == [
        [P, P, P, P, 1, 2],
        [P, P, P, V, 1, 2],
        [P] * 6,
    ]


def test_of_a_longer_reference_the_last_part_is_kept():
    reference = [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert voice([6], reference=reference) == [[3, 4, 5, 6, 7, 8]]
    # Within the row's own unpadded prompt.
    assert voice([4], reference=reference) == [[P, P, 5, 6, 7, 8]]
    # One position is reserved for the speaker token.
    assert voice([6], reference=reference, speaker=[1.0]) == [[V, 4, 5, 6, 7, 8]]
    assert voice([4], reference=reference, speaker=[1.0]) == [[P, P, V, 6, 7, 8]]


def test_a_reference_as_long_as_the_prompt():
    assert voice([3], reference=[[1, 2, 3]]) == [[P, P, P, 1, 2, 3]]
    assert voice([3], reference=[[1, 2, 3]], speaker=[1.0]) == [[P, P, P, V, 2, 3]]


@pytest.mark.parametrize("prompt_length", [0, 1, 2])
def test_the_shortest_prompts(prompt_length):
    expected = {0: [P, P, P, V], 1: [P, P, P, V], 2: [P, P, V, 2]}[prompt_length]
    if prompt_length:
        assert voice([prompt_length], length=4, reference=[[1, 2]], speaker=[1.0]) == [expected]
    without = {0: [P, P, P, P], 1: [P, P, P, 2], 2: [P, P, 1, 2]}[prompt_length]
    assert voice([prompt_length], length=4, reference=[[1, 2]]) == [without]


def test_in_training_the_voice_ends_inside_the_sequence():
    assert voice([3, 5], end=[3, 5], length=8, reference=[[1, 2], [P, 2]], speaker=[1.0, 1.0]) == [
        [V, 1, 2, P, P, P, P, P],
        [P, P, P, V, 2, P, P, P],
    ]
    # `end` is where the speech starts: with a think block in the answer it lies behind the prompt.
    assert voice([4], end=[4], length=6, reference=[[1, 2, 3, 4, 5]], speaker=[1.0]) == [[V, 3, 4, 5, P, P]]


def test_each_row_of_a_batch_is_the_row_alone():
    generator = torch.Generator().manual_seed(0)
    lengths, end = torch.tensor([9, 4, 1, 7]), torch.tensor([9, 9, 9, 7])
    reference = torch.randint(0, CODEBOOK_SIZE, (4, 8, 5), generator=generator)
    reference[1, :, :3] = P
    reference[3] = P
    speaker = torch.randn(4, 3, generator=generator)
    speaker[0] = 0
    together = place_voice(lengths, end, 9, 8, P, V, reference, speaker)
    for row in range(4):
        one = slice(row, row + 1)
        alone = place_voice(lengths[one], end[one], 9, 8, P, V, reference[one], speaker[one])
        assert together[one].equal(alone)


def test_an_empty_reference_is_none():
    empty = torch.zeros(1, 2, 0, dtype=torch.long)
    codes = place_voice(torch.tensor([4]), torch.tensor([4]), 4, 2, P, V, empty, torch.ones(1, 3))
    assert codes.tolist() == [[[P, P, P, V]] * 2]
