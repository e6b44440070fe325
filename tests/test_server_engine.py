"""The server's engine: answers that are made together are those that are made alone, and rows come and go."""

import asyncio
import itertools
import threading

import pytest
import torch
from minimind_o_hf.modeling import MiniMindOSlotCache
from PIL import Image
from serving import DATA, load_nano, question, wait_until

from minimind_o_hf import Conversation, MiniMindOCache
from minimind_o_hf.server.engine import Busy, Engine, SinglePrompt

# Text that goes on, so that there is something to interrupt.
LONG = {"min_new_tokens": 60, "max_new_tokens": 70}


@pytest.fixture(scope="module")
def model():
    return load_nano()[0]


@pytest.fixture(scope="module")
def processor():
    return load_nano()[1]


@pytest.fixture
def converse(model, processor):
    return lambda **settings: Conversation(model, processor, **{"voice": "slt", "max_turns": 8, **settings})


@pytest.fixture
def start(model, processor):
    """Starts engines, and looks in the end whether they left something."""
    engines = []

    def make(**settings) -> Engine:
        engines.append(Engine(model, processor, **settings))
        engines[-1].start()
        return engines[-1]

    yield make
    for engine in engines:
        if engine.is_alive:
            wait_until(lambda engine=engine: engine.num_open == 0)
            assert (engine.num_active, engine.num_waiting, len(engine._slots)) == (0, 0, 0)
            engine.close()
        assert not any(thread.is_alive() for thread in engine._threads)
        assert engine.sound.empty()


async def read(answer):
    """All of an answer: its text and sound."""
    events = [event async for event in answer]
    sound = [event.audio for event in events if event.audio is not None]
    return "".join(event.text for event in events), torch.cat(sound) if sound else None


def heard_alone(conversation, content, **settings):
    """What `generate` itself makes of a turn, and its text and sound."""
    outputs = []
    events = list(conversation.stream(content, on_output=outputs.append, **settings))
    sound = [event.audio for event in events if event.audio is not None]
    return outputs[0], "".join(event.text for event in events), torch.cat(sound) if sound else None


def assert_same_caches(found, expected):
    assert found.get_seq_length() == expected.get_seq_length()
    assert len(found.layers) == len(expected.layers)
    for own, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(own.keys, other.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(own.values, other.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.bridge_hidden_states, expected.bridge_hidden_states, rtol=1e-5, atol=1e-5)
    assert (found.audio_codes is None) == (expected.audio_codes is None)
    assert found.audio_codes is None or torch.equal(found.audio_codes, expected.audio_codes)


# ---------------------------------------------------------------- together as alone


def prompts():
    """Two turns each of eight conversations, with their voices and settings."""
    clip = {"type": "audio", "audio": question(16000), "sampling_rate": 16000}
    picture = {"type": "image", "image": Image.open(DATA / "two_blue_circles.png")}
    look = {"type": "text", "text": "What do you see?"}
    return [
        ("slt", ["Where does a lion live?", "And a fish?"], {}),
        ("awb", ["Hello!", "Tell me about the sea."], {"temperature": 0.6}),
        ("rms", [[clip], "Where?"], {"temperature": 1.2, "top_p": 0.9}),
        (None, ["What is two plus three?", [clip]], {}),
        ("slt", [[look, picture], "Are you sure?"], {"temperature": 0.3}),
        ("awb", ["What is one plus one?", "Why?"], {"generation_mode": "text"}),
        ("rms", ["Good morning.", [look, picture]], {"do_sample": False}),
        ("slt", ["Tell me a story.", "Go on."], LONG),
    ]


def test_answers_of_a_batch_are_those_made_alone(start, converse):
    expected = []
    for number, (voice, turns, settings) in enumerate(prompts()):
        conversation = converse(voice=voice)
        made = [heard_alone(conversation, turn, seed=number, **settings) for turn in turns]
        expected.append((conversation, made))
    engine = start(max_answers=3)

    async def hold(number):
        voice, turns, settings = prompts()[number]
        conversation, made = converse(voice=voice), []
        await asyncio.sleep(0.03 * number)
        for turn in turns:
            answer = engine.submit(conversation.prepare(turn, seed=number, **settings))
            text, sound = await read(answer)
            made.append((answer.output, text, sound))
        return conversation, made

    async def hold_all():
        return await asyncio.gather(*map(hold, range(len(expected))))

    for (found, answers), (alone, others) in zip(asyncio.run(hold_all()), expected, strict=True):
        for (output, text, sound), (other_output, other_text, other_sound) in zip(answers, others, strict=True):
            assert torch.equal(output.sequences, other_output.sequences)
            assert text == other_text
            assert (output.audio_codes is None) == (other_output.audio_codes is None) == (sound is None)
            if sound is not None:
                assert torch.equal(output.audio_codes, other_output.audio_codes)
                assert torch.equal(output.audio_codes_mask, other_output.audio_codes_mask)
                torch.testing.assert_close(sound, other_sound, rtol=0, atol=1e-4)
        assert found.messages == alone.messages
        assert_same_caches(found._cache, alone._cache)
    assert engine.num_row_steps > 2 * engine.num_steps  # they really were made together


def test_a_prompt_without_a_conversation(start, model, processor):
    chat = [{"role": "user", "content": "Where does a lion live?"}]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice="slt"
    )
    expected = model.generate(**inputs, seeds=[3], return_dict_in_generate=True)
    engine = start()

    async def ask():
        answer = engine.submit(SinglePrompt({**inputs, "seeds": [3]}))
        return await read(answer), answer

    (text, sound), answer = asyncio.run(ask())
    assert torch.equal(answer.output.audio_codes, expected.audio_codes)
    assert text == processor.decode(expected)[0].text
    assert len(sound) == 1920 * int(expected.audio_codes_mask.sum())
    assert 0 < answer.waited < answer.first_sound < 5


# ---------------------------------------------------------------- cancelling


def test_cancelled_while_it_waits(start, converse):
    engine, first, second = start(max_answers=1), converse(), converse()

    async def ask():
        speaking = engine.submit(first.prepare("Hello!", seed=0, **LONG))
        waiting = engine.submit(second.prepare("Hello!", seed=0))
        third = engine.submit(converse().prepare("Hello!", seed=0))
        async for event in speaking:
            if event.text:
                break
        waiting.cancel()
        assert await read(waiting) == ("", None)
        assert engine.num_active == 1  # the first still speaks
        assert waiting.output is None
        assert second.num_turns == 0
        speaking.cancel()
        await read(speaking)
        text, _ = await read(third)
        assert text
        # Nothing of it stuck to the conversation.
        assert (await read(engine.submit(second.prepare("Hello!", seed=0))))[0] == text

    asyncio.run(ask())
    assert second.num_turns == 1


@pytest.mark.parametrize("when", ["at once", "before the first sound", "in the middle"])
def test_cancelled_while_it_is_made(start, converse, when):
    engine, conversation = start(max_answers=2), converse()

    async def ask():
        other = engine.submit(converse().prepare("Hello!", seed=5, **LONG))
        answer = engine.submit(conversation.prepare("Tell me a story.", seed=1, **LONG))
        heard, sounds = "", 0
        if when == "at once":
            while not engine.num_active:
                await asyncio.sleep(0.001)
        else:
            async for event in answer:
                heard, sounds = heard + event.text, sounds + (event.audio is not None)
                if (event.text and when == "before the first sound") or sounds == 2:
                    break
        answer.cancel()
        assert answer.is_cancelled
        assert await read(answer) == ("", None)  # not another word
        text, _ = await read(other)
        return heard, sounds, text

    heard, sounds, text = asyncio.run(ask())
    assert (sounds == 2) == (when == "in the middle")
    assert text == heard_alone(converse(), "Hello!", seed=5, **LONG)[1]
    assert conversation.num_turns in ((0, 1) if when == "at once" else (1,))
    if conversation.num_turns:
        assert conversation.messages[1]["content"].startswith(heard)
        assert len(conversation._turns[0].answer) < 60
    # The next turn builds on what is kept, as a conversation that reads it all anew.
    anew = converse()
    anew._turns = list(conversation._turns)
    expected = heard_alone(anew, "And then?", seed=2)

    async def go_on():
        answer = engine.submit(conversation.prepare("And then?", seed=2))
        return await read(answer), answer.output

    (text, _), output = asyncio.run(go_on())
    assert text == expected[1]
    assert torch.equal(output.audio_codes, expected[0].audio_codes)
    assert_same_caches(conversation._cache, anew._cache)


# ---------------------------------------------------------------- failing


def test_a_prompt_that_fails_fails_alone(start, converse):
    engine, bad = start(max_answers=2), converse(max_positions=600)

    async def ask():
        good = engine.submit(converse().prepare("Hello!", seed=0))
        long = engine.submit(bad.prepare("Well. " * 400))
        wrong = engine.submit(bad.prepare("Hello!", num_return_sequences=2))
        with pytest.raises(ValueError, match="positions"):
            await read(long)
        with pytest.raises(ValueError, match="one answer"):
            await read(wrong)
        again = engine.submit(bad.prepare("Hello!", seed=0, max_new_tokens=100))
        return (await read(good))[0], (await read(again))[0]

    text, again = asyncio.run(ask())
    assert text == again == heard_alone(converse(), "Hello!", seed=0)[1]
    assert bad.num_turns == 1


def test_scores_that_are_not_finite_fail_alone(start, converse, model):
    engine = start(max_answers=2)
    steps = itertools.count()

    def break_the_second_row(module, args, kwargs, outputs):
        if kwargs["input_ids"].shape[0] == 2 and next(steps) == 3:
            outputs.logits[1] = float("nan")

    async def ask():
        first = engine.submit(converse().prepare("Hello!", seed=0, **LONG))
        second = engine.submit(converse().prepare("Tell me a story.", seed=0, **LONG))
        with pytest.raises(ValueError, match="finite"):
            await read(second)
        return (await read(first))[0]

    hook = model.register_forward_hook(break_the_second_row, with_kwargs=True)
    try:
        text = asyncio.run(ask())
    finally:
        hook.remove()
    assert text == heard_alone(converse(), "Hello!", seed=0, **LONG)[1]


def test_a_step_that_fails_ends_the_active_and_the_engine_goes_on(start, converse, model):
    engine = start(max_answers=2)
    steps = itertools.count()

    def run_out_of_memory(module, args, kwargs):
        if kwargs["input_ids"].shape[0] == 2 and next(steps) == 5:
            raise RuntimeError("out of memory")

    conversations = [converse() for _ in range(3)]

    async def ask():
        answers = [engine.submit(c.prepare("Hello!", seed=0, **LONG)) for c in conversations]
        for answer in answers[:2]:
            with pytest.raises(RuntimeError, match="out of memory"):
                await read(answer)
        return (await read(answers[2]))[0]

    hook = model.register_forward_pre_hook(run_out_of_memory, with_kwargs=True)
    try:
        text = asyncio.run(ask())
    finally:
        hook.remove()
    assert engine.is_alive
    assert text == heard_alone(converse(), "Hello!", seed=0, **LONG)[1]
    assert [c.num_turns for c in conversations] == [0, 0, 1]


def test_sound_that_fails_fails_alone(start, converse, processor, monkeypatch):
    engine = start(max_answers=2)

    async def ask():
        good = engine.submit(converse().prepare("Hello!", seed=0))
        bad = engine.submit(converse().prepare("Tell me a story.", seed=0, **LONG))

        def fail(*args):
            raise RuntimeError("codec")

        monkeypatch.setattr(bad._streamer, "_samples", fail)
        with pytest.raises(RuntimeError, match="codec"):
            await read(bad)
        return (await read(good))[0]

    assert asyncio.run(ask()) == heard_alone(converse(), "Hello!", seed=0)[1]


# ---------------------------------------------------------------- the queue, and the end


def test_first_come_first_served_up_to_a_bound(start, converse):
    engine, order = start(max_answers=1, max_waiting=2), []

    async def ask():
        answers = [engine.submit(converse().prepare("Hello!", seed=n)) for n in range(3)]
        with pytest.raises(Busy, match="wait"):
            engine.submit(converse().prepare("Hello!"))

        async def follow(number):
            async for event in answers[number]:
                if not order or order[-1] != number:
                    order.append(number)
                assert event.row == 0

        await asyncio.gather(*map(follow, range(3)))
        assert answers[0].waited < answers[1].waited < answers[2].waited

    asyncio.run(ask())
    assert order == [0, 1, 2]
    assert engine.num_answers == 3


def test_closing_ends_all_answers_with_an_error(start, converse):
    engine = start(max_answers=1)
    conversation = converse()

    async def ask():
        answers = [engine.submit(c.prepare("Hello!", seed=0, **LONG)) for c in (conversation, converse())]
        async for event in answers[0]:
            if event.audio is not None:
                break
        await asyncio.to_thread(engine.close)
        for answer in answers:
            with pytest.raises(RuntimeError, match="stopped"):
                await read(answer)
        with pytest.raises(Busy, match="stopping"):
            engine.submit(conversation.prepare("Hello!"))

    asyncio.run(ask())
    assert not engine.is_alive
    assert (engine.num_open, engine.num_active, engine.num_waiting, len(engine._slots)) == (0, 0, 0, 0)
    assert conversation.ask("Hello!", seed=0).text  # it is not left locked


def test_a_reader_whose_loop_is_gone_blocks_nobody(start, converse):
    engine = start(max_answers=1)

    async def leave():
        engine.submit(converse().prepare("Hello!", seed=0, **LONG))

    asyncio.run(leave())

    async def ask():
        return (await read(engine.submit(converse().prepare("Hello!", seed=0))))[0]

    assert asyncio.run(ask())


@pytest.mark.parametrize("settings", [{"max_answers": 0}, {"max_waiting": -1}])
def test_bounds_that_cannot_be(model, processor, settings):
    with pytest.raises(ValueError, match="at least"):
        Engine(model, processor, **settings)


def test_threads_are_the_engines_own(start):
    names = {thread.name for thread in threading.enumerate()}
    engine = start()
    assert {t.name for t in threading.enumerate()} - names == {"minimind-o-model", "minimind-o-sound"}
    engine.close()


# ---------------------------------------------------------------- the slots


class Rows:
    """Prompts of a toy model, stepped with given tokens: each in a cache of its own, or in slots."""

    def __init__(self, model, lengths, speaks):
        self.model, self.speaks = model, speaks
        config, random = model.config, torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(0, 256, (1, length), generator=random) for length in lengths]
        self.tokens = torch.randint(0, 256, (len(lengths), 60), generator=random)
        shape = (len(lengths), config.num_codebooks, 60)
        self.codes = torch.randint(0, config.audio_codebook_size, shape, generator=random)

    def prefill(self, row):
        cache = MiniMindOCache(self.model.config)
        with torch.no_grad():
            self.model(input_ids=self.prompts[row], past_key_values=cache, run_talker=self.speaks[row])
        return cache

    def alone(self, row, steps):
        cache = self.prefill(row)
        for step in range(steps):
            given = {"audio_codes": self.codes[row : row + 1, :, step : step + 1]} if self.speaks[row] else {}
            with torch.no_grad():
                self.model(
                    input_ids=self.tokens[row : row + 1, step : step + 1],
                    past_key_values=cache,
                    run_talker=self.speaks[row],
                    **given,
                )
        return cache

    def step(self, slots, rows, done):
        """One step of all; `done` counts those of each row."""
        inputs = slots.begin_step()
        inputs["input_ids"] = torch.stack([self.tokens[row, done[row]] for row in rows])[:, None]
        speaks = any(self.speaks[row] for row in rows)
        if speaks:
            codes = [self.codes[row, :, done[row]] for row in rows]
            inputs["audio_codes"] = torch.stack(codes)[..., None]
        with torch.no_grad():
            self.model(**inputs, past_key_values=slots, run_talker=speaks)
        for row in rows:
            done[row] += 1


@pytest.fixture(scope="module")
def toy(tiny_model):
    return tiny_model()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("speaks", [(True, True, True), (False, True, False)])
def test_rows_join_and_leave_in_every_order(toy, order, speaks):
    rows = Rows(toy, [7, 12, 3], speaks)
    slots, inside, done = MiniMindOSlotCache(toy.config, 3), [], [0, 0, 0]
    caches = [rows.prefill(row) for row in range(3)]
    for row in (1, 0, 2):
        slots.add(caches[row])
        inside.append(row)
        rows.step(slots, inside, done)
    with pytest.raises(ValueError, match="All 3 slots"):
        slots.add(rows.prefill(0))
    for row in order:
        rows.step(slots, inside, done)
        at = inside.index(row)
        slots.remove(at, with_talker=speaks[row])
        inside[at] = inside[-1]
        inside.pop()
        assert len(slots) == len(inside)
        assert_same_caches(caches[row], rows.alone(row, done[row]))
    # A row that left may come again.
    slots.add(caches[0])
    rows.step(slots, [0], done)
    slots.remove(0, with_talker=speaks[0])
    assert_same_caches(caches[0], rows.alone(0, done[0]))


def test_slots_grow_and_keep_what_they_hold(toy):
    rows = Rows(toy, [5, 250], (True, True))
    slots, done = MiniMindOSlotCache(toy.config, 2), [0, 0]
    caches = [rows.prefill(0), rows.prefill(1)]
    slots.add(caches[0])
    rows.step(slots, [0], done)
    assert slots.layers[0].keys.shape[2] == 256
    slots.add(caches[1])
    for _ in range(20):
        rows.step(slots, [0, 1], done)
    assert {layer.keys.shape[2] for layer in slots.layers} == {512}
    slots.remove(1)
    slots.remove(0)
    for row in range(2):
        assert_same_caches(caches[row], rows.alone(row, done[row]))


def test_what_a_row_leaves_behind_reaches_no_other(toy):
    rows = Rows(toy, [12, 9, 4], (True, True, True))
    slots, done = MiniMindOSlotCache(toy.config, 2), [0, 0, 0]
    caches = [rows.prefill(row) for row in range(3)]
    for layer in caches[1].layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    slots.add(caches[0])
    slots.add(caches[1])
    rows.step(slots, [0, 1], done)
    slots.remove(1)
    slots.add(caches[2])  # into the same slot, beside a longer row
    rows.step(slots, [0, 2], done)
    slots.remove(1)
    slots.remove(0)
    for row in (0, 2):
        assert_same_caches(caches[row], rows.alone(row, done[row]))


def test_the_talker_of_a_text_only_turn_stays_as_it_was(toy):
    rows = Rows(toy, [6, 8], (True, True))
    spoken, cache = rows.prefill(0), rows.alone(1, 2)
    slots, done = MiniMindOSlotCache(toy.config, 2), [0, 2]
    codes, read_before = cache.audio_codes.clone(), cache.talker_length
    slots.add(cache)
    slots.add(spoken)
    rows.step(slots, [1, 0], done)
    slots.remove(0, with_talker=False)
    slots.remove(0)
    assert cache.talker_length == read_before
    assert cache.get_seq_length() == read_before + 1
    assert torch.equal(cache.audio_codes, codes)
    assert cache.bridge_hidden_states.shape[1] == cache.get_seq_length()
    assert_same_caches(spoken, rows.alone(0, 1))
