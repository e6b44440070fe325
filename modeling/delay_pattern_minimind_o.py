"""Where codes stand, once: training, generation and streaming all call these functions.

Along the time axis shared with the text, frame `f` of codebook `i` stands at position `start + i + f`, and a stop code
follows the last frame of each codebook. Elsewhere the codes are pad:

```
            start
text    ... w0   w1   w2   w3   w4
code 0  pad pad  c0   c1   STOP pad
code 1  pad pad  pad  c0   c1   STOP
```
"""

import torch


def apply_delay_pattern(
    codes: torch.LongTensor,
    start: torch.LongTensor,
    length: int,
    pad_code: int,
    stop_code: int,
    num_frames: torch.LongTensor | None = None,
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Lays frames of codes out along the text's time axis.

    Args:
        codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`):
            Codes of whole frames, right padded with anything.
        start (`torch.LongTensor` of shape `(batch_size,)`):
            Position of frame 0 of codebook 0 in each row.
        length (`int`):
            Positions of the result. What does not fit is cut at the end, stop codes included.
        pad_code (`int`), stop_code (`int`):
            The codes that mean "nothing here" and "this codebook has ended".
        num_frames (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            Frames of each row; all of `codes` by default.

    Returns:
        `tuple`: the codes of every position, `torch.LongTensor` of shape `(batch_size, num_codebooks, length)`, and a
        `torch.BoolTensor` of the same shape that is True where they are a frame's or a stop (what speech is trained
        on).
    """
    batch_size, num_codebooks, max_frames = codes.shape
    if num_frames is None:
        num_frames = torch.full((batch_size,), max_frames, dtype=torch.long, device=codes.device)
    position = torch.arange(length, device=codes.device)
    delay = torch.arange(num_codebooks, device=codes.device)
    frame = position[None, None, :] - start[:, None, None] - delay[None, :, None]
    last = num_frames[:, None, None]
    is_code = (frame >= 0) & (frame < last)
    is_stop = frame == last
    gathered = torch.cat([codes, codes.new_full((batch_size, num_codebooks, 1), stop_code)], dim=-1)
    gathered = gathered.gather(-1, frame.clamp(0, max_frames))
    delayed = torch.where(is_code, gathered, torch.where(is_stop, stop_code, pad_code))
    return delayed, is_code | is_stop


def revert_delay_pattern(
    delayed_codes: torch.LongTensor, start: torch.LongTensor, codebook_size: int
) -> tuple[torch.LongTensor, torch.BoolTensor]:
    """
    Reads the frames back: the inverse of [`apply_delay_pattern`].

    A frame counts where all its codes lie inside `delayed_codes` and none of them is at or after the first code of its
    codebook that is not below `codebook_size` (a stop).

    Args:
        delayed_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, length)`):
            The codes of every position.
        start (`torch.LongTensor` of shape `(batch_size,)`):
            Position of frame 0 of codebook 0 in each row. A `start` at or past `length` gives a row without frames.
        codebook_size (`int`):
            Codes from here on are specials.

    Returns:
        `tuple`: codes of whole frames, `torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`, zero
        where they do not count, and the mask of the frames that count, `torch.BoolTensor` of shape `(batch_size,
        num_frames)`. `num_frames` is `max(length - num_codebooks + 1, 0)`; in each row the frames that count come
        first.
    """
    batch_size, num_codebooks, length = delayed_codes.shape
    num_frames = max(length - num_codebooks + 1, 0)
    if num_frames == 0:
        mask = torch.zeros(batch_size, 0, dtype=torch.bool, device=delayed_codes.device)
        return delayed_codes[..., :0], mask
    frame = torch.arange(num_frames, device=delayed_codes.device)
    delay = torch.arange(num_codebooks, device=delayed_codes.device)
    position = start[:, None, None] + delay[None, :, None] + frame[None, None, :]
    codes = delayed_codes.gather(-1, position.clamp(0, length - 1))
    is_valid = (position >= 0) & (position < length) & (codes >= 0) & (codes < codebook_size)
    # A stop ends its codebook for good, and a frame needs all its codebooks.
    mask = is_valid.all(dim=1).long().cumprod(dim=-1).bool()
    return codes.masked_fill(~mask[:, None, :], 0), mask


def place_voice(
    prompt_lengths: torch.LongTensor,
    end: torch.LongTensor,
    length: int,
    num_codebooks: int,
    pad_code: int,
    speaker_code: int,
    reference_codes: torch.LongTensor | None = None,
    speaker_embeddings: torch.FloatTensor | None = None,
) -> torch.LongTensor:
    """
    Lays each row's voice out before its answer: the reference codes end right before `end`, and the speaker token
    stands, in every codebook, right before them (or before `end` without a reference).

    Where the reference is longer than the row's own prompt, its last part is kept. A row with a speaker embedding
    keeps one position for the speaker token.

    Args:
        prompt_lengths (`torch.LongTensor` of shape `(batch_size,)`):
            Positions of each row's prompt, which end right before `end`.
        end (`torch.LongTensor` of shape `(batch_size,)`):
            Position after the last one a voice may take.
        length (`int`):
            Positions of the result.
        num_codebooks (`int`), pad_code (`int`), speaker_code (`int`):
            Rows of the result and its special codes.
        reference_codes (`torch.LongTensor` of shape `(batch_size, num_codebooks, num_frames)`, *optional*):
            Reference codes (not delayed), right aligned: columns of pad on the left do not count, and a row of pad has
            no reference.
        speaker_embeddings (`torch.FloatTensor` of shape `(batch_size, size)`, *optional*):
            Rows of zeros have no speaker token.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_codebooks, length)`: pad, the speaker token and the reference.
    """
    batch_size, device = len(end), end.device
    codes = torch.full((batch_size, num_codebooks, length), pad_code, dtype=torch.long, device=device)
    position = torch.arange(length, device=device)
    used = torch.zeros(batch_size, dtype=torch.long, device=device)
    has_speaker = torch.zeros(batch_size, dtype=torch.bool, device=device)
    if speaker_embeddings is not None:
        has_speaker = (speaker_embeddings != 0).any(dim=-1).to(device)
    if reference_codes is not None and reference_codes.shape[-1]:
        reference_codes = reference_codes.to(device)
        num_frames = reference_codes.shape[-1]
        # A column counts from the first one that is not all pad.
        is_frame = (reference_codes != pad_code).any(dim=1).long().cumsum(dim=-1) > 0
        used = torch.minimum(is_frame.sum(dim=-1), prompt_lengths - has_speaker.long()).clamp(min=0)
        index = (position[None, :] - end[:, None] + num_frames).clamp(0, num_frames - 1)
        reference = reference_codes.gather(-1, index.unsqueeze(1).expand(-1, num_codebooks, -1))
        is_reference = (position[None, :] >= (end - used)[:, None]) & (position[None, :] < end[:, None])
        codes = torch.where(is_reference.unsqueeze(1), reference, codes)
    is_speaker = has_speaker[:, None] & (position[None, :] == (end - used - 1)[:, None])
    return codes.masked_fill(is_speaker.unsqueeze(1), speaker_code)


__all__ = ["apply_delay_pattern", "place_voice", "revert_delay_pattern"]
