"""Streamed answers: the same text and sound as at once, soon, whole characters, and an end when nobody listens."""

import asyncio
import gc
import itertools
import queue
import threading
import time
from contextlib import contextmanager

import psutil
import pytest
import torch
from minimind_o_hf.modeling.streaming_minimind_o import _Pace, _RowText
from transformers import AutoModelForMultimodalLM, StoppingCriteria

from minimind_o_hf import MiniMindOIteratorStreamer, MiniMindOProcessor

CHAT = [{"role": "user", "content": "Hello there!"}]


@pytest.fixture(scope="module")
def model(nano):
    return AutoModelForMultimodalLM.from_pretrained(nano)


@pytest.fixture(scope="module")
def inputs(processor):
    chats = [CHAT, [{"role": "user", "content": "A longer question, with more words: why is the sky blue?"}]]
    inputs = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, voice=["alba", None]
    )
    # An untrained model stops where it likes: these seeds speak for a while.
    return {**inputs, "seeds": [3, 4], "max_new_tokens": 60}


def joined(events):
    """Each row's text and sound; how they are cut is a matter of time."""
    texts, sounds = {}, {}
    for event in events:
        texts[event.row] = texts.get(event.row, "") + event.text
        if event.audio is not None:
            sounds.setdefault(event.row, []).append(event.audio)
    return texts, {row: torch.cat(chunks) for row, chunks in sounds.items()}


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    for row, sound in expected[1].items():
        torch.testing.assert_close(found[1][row], sound, rtol=0, atol=1e-5)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "minimind-o-generate"]


@contextmanager
def counted_steps(model):
    steps = []
    hook = model.register_forward_pre_hook(lambda *args: steps.append(1))
    try:
        yield steps
    finally:
        hook.remove()


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not threads()


@pytest.mark.parametrize("max_latency", [0.08, 0.64, 10.0])
def test_streamed_is_what_is_said_at_once(model, processor, inputs, max_latency):
    outputs = model.generate(**inputs)
    answers = processor.decode(outputs)
    events = list(model.stream(processor, **inputs, max_latency=max_latency))
    for row, answer in enumerate(answers):
        mine = [event for event in events if event.row == row]
        assert [event.is_last for event in mine] == [False] * (len(mine) - 1) + [True]
        said = torch.cat([event.audio for event in mine if event.audio is not None] or [torch.zeros(0)])
        assert said.dtype == torch.float32
        frames = int(outputs.audio_codes_mask[row].sum())
        assert len(said) == 1920 * frames
        torch.testing.assert_close(said, answer.audio[: len(said)], rtol=0, atol=1e-5)
        text = "".join(event.text for event in mine)
        ids = outputs.sequences[row, outputs.prompt_length :]
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert sum(int(mask.sum()) for mask in outputs.audio_codes_mask) > 20


def test_a_streamer_for_a_thread_of_ones_own(model, processor, inputs):
    expected = joined(model.stream(processor, **inputs))
    streamer = MiniMindOIteratorStreamer(processor, max_latency=0.4)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    events = list(streamer)
    thread.join()
    assert_same(joined(events), expected)
    assert [event.row for event in events if event.is_last] == [0, 1]
    pcm = MiniMindOIteratorStreamer(processor, pcm16=True)
    model.generate(**inputs, streamer=pcm)
    assert {event.audio.dtype for event in pcm if event.audio is not None} == {torch.int16}


def test_what_generate_returns(model, processor, inputs):
    outputs = []
    list(model.stream(processor, **inputs, on_output=outputs.append))
    expected = model.generate(**inputs)
    assert torch.equal(outputs[0].audio_codes, expected.audio_codes)
    assert torch.equal(outputs[0].is_complete, expected.is_complete)

    def fail(output):
        raise RuntimeError("nobody wants it")

    with pytest.raises(RuntimeError, match="nobody wants it"):
        list(model.stream(processor, **inputs, on_output=fail))


def test_no_chunk_is_longer_than_the_latency(model, processor, inputs):
    events = list(model.stream(processor, **inputs, max_latency=0.4))
    chunks = [len(event.audio) // 1920 for event in events if event.row == 0 and event.audio is not None]
    assert chunks[0] == 1
    assert max(chunks) <= 5
    assert sum(chunks) > 8


def play(step, decode, frames=100, limit=16):
    """Chunks of a stream whose frames take `step` seconds and whose decoding `decode`; and pauses in playing."""
    now = [0.0]
    pace = _Pace(limit, clock=lambda: now[0])
    waiting, chunks, plays_until, pauses = 0, [], None, 0.0
    for _ in range(frames):
        now[0] += step
        waiting += 1
        if pace.is_due(waiting):
            now[0] += decode
            pace.gave(waiting, decode)
            if plays_until is not None and now[0] > plays_until:
                pauses += now[0] - plays_until
            plays_until = max(now[0], plays_until or 0.0) + 0.08 * waiting
            chunks.append(waiting)
            waiting = 0
    return chunks, pauses


@pytest.mark.parametrize("step", [0.004, 0.015, 0.029])
def test_chunks_grow_while_playing_is_ahead_and_never_pauses(step):
    chunks, pauses = play(step, 0.037)
    assert chunks[0] == 1
    assert pauses == 0
    # Two frames a chunk, on average, would cost twice what four cost.
    assert sum(chunks) / len(chunks) > (2 if step > 0.02 else 4)
    assert max(chunks) <= 16


def test_a_few_frames_at_a_time_where_playing_cannot_keep_up():
    chunks, pauses = play(0.1, 0.037)
    assert chunks[:3] == [1, 1, 2]
    assert set(chunks[3:-1]) == {4}
    # What comes too late in any case, and the decoding, of which there is less than for each frame alone.
    assert 100 * 0.02 < pauses < 100 * 0.02 + 0.4 * 100 * 0.037


def test_one_late_frame_is_one_short_pause():
    now = [0.0]
    pace = _Pace(32, clock=lambda: now[0])
    waiting, until, pauses = 0, 0.0, []
    for frame in range(100):
        now[0] += 0.06 + (frame == 60)
        waiting += 1
        if pace.is_due(waiting):
            now[0] += 0.01
            pace.gave(waiting, 0.01)
            if until and now[0] > until:
                pauses.append(now[0] - until)
            until = max(now[0], until) + 0.08 * waiting
            waiting = 0
    assert len(pauses) == 1
    assert pauses[0] < 1


def test_a_row_that_ends_early_is_given_out_then(model, processor, inputs):
    """The first row ends at step 30, the second one at 200."""

    class EndsFirst(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            steps.append(1)
            time.sleep(0.01)  # as long as a step takes a larger model: the reader keeps up
            return torch.tensor([len(steps) >= 30, False])

    steps = []
    settings = {**inputs, "max_new_tokens": 200, "min_new_tokens": 200}
    outputs = model.generate(**settings, stopping_criteria=[EndsFirst()])
    steps.clear()
    ends = {}
    sound = []
    for event in model.stream(processor, **settings, stopping_criteria=[EndsFirst()]):
        if event.is_last:
            ends[event.row] = len(steps)
        elif event.row == 0:
            assert 0 not in ends
        if event.row == 0 and event.audio is not None:
            sound.append(event.audio)
    assert sum(map(len, sound)) == 1920 * int(outputs.audio_codes_mask[0].sum())
    assert ends[0] < 190
    assert ends[1] == 200


def test_sound_beyond_full_scale_is_clipped_alike(model, nano, inputs):
    loud = MiniMindOProcessor.from_pretrained(nano)
    loud.audio_tokenizer.get_submodule("decoder.decoder_seanet.layers")[-1].conv.weight.data.mul_(100)
    answers = loud.decode(model.generate(**inputs))
    _, sounds = joined(model.stream(loud, **inputs))
    for row, sound in sounds.items():
        assert answers[row].audio.abs().max() == 1
        torch.testing.assert_close(sound, answers[row].audio[: len(sound)], rtol=0, atol=1e-4)


def test_a_streamer_serves_again_and_does_not_wait_for_ever(model, processor, inputs):
    streamer = MiniMindOIteratorStreamer(processor, timeout=20)
    found = []
    for _ in range(2):
        model.generate(**inputs, streamer=streamer)
        found.append(joined(streamer))
    assert_same(*found)
    streamer.timeout = 0.01
    with pytest.raises(queue.Empty):
        next(iter(streamer))


def test_ended_rows_write_no_padding(model, processor, inputs):
    eos = processor.tokenizer.eos_token_id

    def end_first(tokens, scores):
        if tokens.shape[1] > inputs["input_ids"].shape[1] + 2:
            scores = scores.clone()
            scores[0, eos] = 1e4
        return scores

    settings = {**inputs, "logits_processor": [end_first], "max_new_tokens": 12, "generation_mode": "text"}
    texts, _ = joined(model.stream(processor, **settings, skip_special_tokens=False))
    assert texts[0].endswith("<|im_end|>")
    assert "<|endoftext|>" not in texts[0]


def test_sound_comes_before_the_answer_is_complete(model, processor, inputs):
    with counted_steps(model) as steps:
        events = model.stream(processor, **inputs)
        next(event for event in events if event.audio is not None)
        seen = len(steps)
        rest = list(events)
    assert rest[-1].is_last
    assert seen < len(steps)


def test_pcm16(model, processor, inputs):
    _, whole = joined(model.stream(processor, **inputs))
    _, pcm = joined(model.stream(processor, **inputs, pcm16=True))
    for row, sound in whole.items():
        assert pcm[row].dtype == torch.int16
        torch.testing.assert_close(pcm[row].float() / 32767, sound, rtol=0, atol=3e-5)


def test_text_alone(model, processor, inputs):
    events = list(model.stream(processor, **inputs, generation_mode="text"))
    assert all(event.audio is None for event in events)
    assert sum(event.is_last for event in events) == 2


def test_a_character_is_never_cut(processor):
    text = "中文 ✓ 🙂 é"
    row = _RowText(processor.tokenizer, True)
    parts = [row.add(token) for token in processor.tokenizer(text)["input_ids"]]
    assert len(parts) > len(text)  # several tokens a character
    assert "".join(parts) + row.end() == text
    assert not any("\ufffd" in part for part in parts)
    # Bytes that never become a character are shown at the end.
    row = _RowText(processor.tokenizer, True)
    assert row.add(processor.tokenizer("🙂")["input_ids"][0]) == ""
    assert row.end() == "\ufffd"


@pytest.mark.parametrize("how", ["close", "break", "event", "delete"])
def test_nobody_listens(model, processor, inputs, how):
    cancel = threading.Event()
    with counted_steps(model) as steps:
        settings = {**inputs, "max_new_tokens": 4000, "min_new_tokens": 4000}
        events = model.stream(processor, **settings, cancel=cancel)
        list(itertools.islice(events, 3))
        assert threads()
        if how == "close":
            events.close()
        elif how == "event":
            cancel.set()
            assert sum(event.is_last for event in events) == 2  # what was left is still given
        else:
            del events
        assert not threads()
        after = len(steps)
        time.sleep(0.2)
    assert len(steps) == after < 1000


def live_tensors():
    gc.collect()
    return sum(type(item) is torch.Tensor for item in gc.get_objects())


def test_fifty_finished_and_fifty_cancelled_streams_leave_nothing(model, processor):
    inputs = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, add_generation_prompt=True)

    def stream(is_cancelled):
        steps = 4000 if is_cancelled else 16
        events = model.stream(processor, **inputs, seeds=[3], max_new_tokens=steps, min_new_tokens=steps)
        for event in events:
            if is_cancelled and event.audio is not None:
                events.close()

    process = psutil.Process()
    for is_cancelled in (False, True) * 3:
        stream(is_cancelled)
    before = live_tensors(), threading.active_count(), process.memory_info().rss
    for is_cancelled in [False] * 50 + [True] * 50:
        stream(is_cancelled)
    assert live_tensors() == before[0]
    assert threading.active_count() == before[1]
    # One stream's caches and codec state are a megabyte here: a hundred that stayed would show.
    assert process.memory_info().rss - before[2] < 30e6


def test_an_error_inside_reaches_the_reader(model, processor, inputs):
    events = model.stream(processor, **{**inputs, "input_ids": inputs["input_ids"] + 5000})
    with pytest.raises(ValueError, match="vocabulary"):
        next(events)
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")

    hook = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="the device is gone"):
            list(model.stream(processor, **inputs))
    finally:
        hook.remove()


def test_bad_settings(model, processor, inputs, nano):
    for latency in (0.01, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="at least a frame"):
            model.stream(processor, **inputs, max_latency=latency)
    with pytest.raises(ValueError, match="streamer of its own"):
        model.stream(processor, **inputs, streamer=object())
    silent = type(processor).from_pretrained(nano, load_audio_tokenizer=False)
    with pytest.raises(ValueError, match="no codec"):
        model.stream(silent, **inputs)
    assert list(model.stream(silent, **inputs, generation_mode="text"))[-1].is_last


def test_async(model, processor, inputs):
    expected = joined(model.stream(processor, **inputs))
    ticks = []

    async def tick():
        while True:
            ticks.append(1)
            await asyncio.sleep(0.001)

    async def listen():
        ticking = asyncio.ensure_future(tick())
        found = [event async for event in model.astream(processor, **inputs)]
        ticking.cancel()
        return found

    assert_same(joined(asyncio.run(listen())), expected)
    assert len(ticks) > 5  # others had their turn


def test_async_leaves_the_callers_event_alone(model, processor, inputs):
    cancel = threading.Event()

    async def listen():
        return [event async for event in model.astream(processor, **inputs, cancel=cancel)]

    first, second = asyncio.run(listen()), asyncio.run(listen())
    assert not cancel.is_set()
    assert_same(joined(first), joined(second))


def test_async_cancelled(model, processor, inputs):
    async def listen():
        settings = {**inputs, "max_new_tokens": 4000, "min_new_tokens": 4000}
        async for _ in model.astream(processor, **settings):
            pass

    async def main():
        task = asyncio.ensure_future(listen())
        await asyncio.sleep(0.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begin = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begin < 20


def test_two_at_once(model, processor, inputs):
    expected = joined(model.stream(processor, **inputs))
    both = [model.stream(processor, **inputs), model.stream(processor, **inputs)]
    found = [[], []]
    for pair in itertools.zip_longest(*both):
        for index, event in enumerate(pair):
            if event is not None:
                found[index].append(event)
    for events in found:
        assert_same(joined(events), expected)
