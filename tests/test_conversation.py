"""Conversations: a turn reads only what is new, answers as if all were new, and keeps only what was heard."""

import asyncio
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForMultimodalLM

from minimind_o_hf import Conversation, MiniMindOCache

GREEDY = {"do_sample": False, "max_new_tokens": 24}
LINES = ["Hello there!", "Tell me about the sea, please.", "And then?", "Thank you."]


@pytest.fixture(scope="module")
def model(nano):
    return AutoModelForMultimodalLM.from_pretrained(nano)


@pytest.fixture
def converse(model, processor):
    return lambda **settings: Conversation(model, processor, **settings)


@pytest.fixture
def lengths(model):
    """The positions that run through the Thinker and through the Talker, prefills only."""
    seen = {"thinker": [], "talker": []}

    def note(name):
        def hook(module, args, kwargs):
            tensor = kwargs.get("inputs_embeds", kwargs.get("bridge_hidden_state"))
            if tensor.shape[1] > 1:
                seen[name].append(tensor.shape[1])

        return hook

    hooks = [
        model.model.register_forward_pre_hook(note("thinker"), with_kwargs=True),
        model.talker.register_forward_pre_hook(note("talker"), with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def cold(conversation):
    """The same conversation without its cache."""
    conversation._forget_cache()
    return conversation


def scores_of(conversation, line, **settings):
    """The scores of a turn's first step and its answer."""
    outputs = []
    settings = {**GREEDY, "output_logits": True, "on_output": outputs.append, **settings}
    list(conversation.stream(line, **settings))
    return outputs[0]


def recording(seconds, seed=0):
    samples = 0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))
    return {"type": "audio", "audio": samples.astype(np.float32), "sampling_rate": 16000}


@pytest.mark.parametrize("voices", [[None] * 4, ["alba"] * 4, ["alba", "bruno", None, "alba"]])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_are_those_of_a_cold_prefill(converse, lengths, voices, system):
    warm = converse(system=system)
    for number, (line, voice) in enumerate(zip(LINES, voices, strict=True)):
        other = converse(system=system)
        other._turns = list(warm._turns)
        warm.voice = other.voice = voice
        found, expected = scores_of(warm, line), scores_of(cold(other), line)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.audio_logits, expected.audio_logits, rtol=0, atol=2e-5)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.audio_codes, expected.audio_codes)
        if number:
            assert lengths["thinker"][-2] < lengths["thinker"][-1]
    assert warm.messages == other.messages


def test_the_prompt_is_the_templates(converse, processor):
    conversation = converse(system="Be brief.")
    conversation.ask("Hello there!", **GREEDY)
    # What an untrained model says need not be how its text would be cut into tokens.
    turn = conversation._turns[0]
    turn.answer = torch.tensor(processor.tokenizer("I am fine.").input_ids)
    outputs = scores_of(conversation, "And then?")
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there!"},
        {"role": "assistant", "content": "I am fine."},
        {"role": "user", "content": "And then?"},
    ]
    ids = processor.apply_chat_template(chat, tokenize=True, return_dict=True, add_generation_prompt=True)["input_ids"]
    assert torch.equal(outputs.sequences[:, : outputs.prompt_length], ids)
    assert conversation.messages[:4] == chat


def test_nothing_is_read_twice(converse, lengths):
    conversation = converse(voice=None)
    outputs = [scores_of(conversation, line) for line in LINES]
    for before, after, thinker in zip(outputs, outputs[1:], lengths["thinker"][1:], strict=False):
        # All but the last token written had been read, and a cache holds no more than the sequence.
        assert thinker <= after.prompt_length - before.sequences.shape[1] + 1
    # Without a voice only the answers' codes leave the Talker's prompt.
    for before, after, talker in zip(outputs, outputs[1:], lengths["talker"][1:], strict=False):
        assert talker <= after.prompt_length - before.prompt_length


def test_the_talker_reads_what_a_voice_stood_on(converse, lengths, processor):
    conversation = converse(voice="alba")
    first, second = (scores_of(conversation, line) for line in LINES[:2])
    frames = processor.voices["alba"]["ref_codes"].shape[1]
    assert lengths["talker"][1] == second.prompt_length - max(first.prompt_length - frames - 1, 0)
    assert lengths["thinker"][1] <= second.prompt_length - first.sequences.shape[1] + 1


def test_speech_and_pictures(converse):
    picture = {"type": "image", "image": Image.new("RGB", (40, 30), "red")}
    turns = [
        [recording(0.5)],
        [picture, {"type": "text", "text": "What is this?"}],
        [recording(0.8, seed=1), {"type": "text", "text": "And this?"}, picture],
    ]
    warm = converse(voice="alba")
    for content in turns:
        other = converse(voice="alba")
        other._turns = list(warm._turns)
        found, expected = scores_of(warm, content), scores_of(other, content)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert torch.equal(found.audio_codes, expected.audio_codes)
    assert warm.messages[0]["content"] == [{"type": "audio"}]
    assert warm.messages[2]["content"] == [{"type": "image"}, {"type": "text", "text": "What is this?"}]


def test_streamed_and_asked_are_the_same(converse):
    streamed, asked = converse(voice="bruno"), converse(voice="bruno")
    for number, line in enumerate(LINES[:3]):
        events = list(streamed.stream(line, seed=number, max_new_tokens=40))
        answer = asked.ask(line, seed=number, max_new_tokens=40)
        assert "".join(event.text for event in events) == answer.text
        sound = torch.cat([event.audio for event in events if event.audio is not None] or [torch.zeros(0)])
        torch.testing.assert_close(sound, answer.audio[: len(sound)], rtol=0, atol=1e-5)
    assert streamed.messages == asked.messages


def test_async(converse):
    conversation = converse()

    async def read():
        return [event.text async for event in conversation.astream("Hello there!", **GREEDY)]

    assert "".join(asyncio.run(read())) == conversation.messages[1]["content"]


def test_text_alone_and_then_speech(converse):
    warm = converse(voice="alba")
    assert warm.ask("Hello there!", **GREEDY, generation_mode="text").audio is None
    other = converse(voice="alba")
    other._turns = list(warm._turns)
    found, expected = scores_of(warm, "And then?"), scores_of(other, "And then?")
    torch.testing.assert_close(found.audio_logits, expected.audio_logits, rtol=0, atol=2e-5)


def test_thoughts_are_not_kept(converse, model, processor, monkeypatch):
    ids = processor.tokenizer("<think>\nHm.\n</think>\n\nWell.<|im_end|>").input_ids
    begin = ids.index(model.config.think_start_id)
    said = iter(ids[begin + 2 :])
    force = lambda tokens, scores: torch.full_like(scores, -1e9).index_fill(1, torch.tensor([next(said)]), 0.0)  # noqa: E731
    conversation = converse()
    answer = conversation.ask(
        "Hello there!", open_thinking=True, logits_processor=[force], do_sample=False, max_new_tokens=len(ids) - 2
    )
    assert (answer.thinking, answer.text) == ("Hm.", "Well.")
    assert conversation.messages[1]["content"] == "Well."
    other = converse()
    other._turns = list(conversation._turns)
    found, expected = scores_of(conversation, "And then?"), scores_of(other, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_an_interrupted_answer_is_kept_as_far_as_it_went(converse, how):
    conversation, stop = converse(voice="alba"), threading.Event()
    events = conversation.stream("Tell me about the sea.", do_sample=False, max_new_tokens=400, cancel=stop)
    heard = next(event for event in events if event.audio is not None)
    assert len(heard.audio) == 1920
    if how == "close":
        events.close()
    else:
        stop.set()
        list(events)
    turn = conversation._turns[0]
    assert 0 < len(turn.answer) < 400
    assert not turn.is_complete
    found, expected = scores_of(conversation, "And then?"), None
    other = converse(voice="alba")
    other._turns = conversation._turns[:1]
    expected = scores_of(other, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def spoken(conversation, processor, text, frames, is_complete=True):
    """A conversation whose last answer is this text."""
    turn, _ = conversation._new_turn("Hello there!")
    conversation._turns.append(turn)
    turn.answer = torch.tensor(processor.tokenizer(text).input_ids)
    turn.frames, turn.is_complete = frames, is_complete
    return conversation


@pytest.mark.parametrize("heard", [0.0, 0.3, 0.7, 1.1, 1.7, 1.99])
def test_what_was_heard_is_whole_words(converse, processor, heard):
    text = "The sea isn't small: it covers most of the world."
    conversation = spoken(converse(), processor, text, frames=25)
    kept = conversation.cut(heard)
    assert text.startswith(kept)
    words = text.replace(":", " :").replace(".", " .").split()
    assert kept.replace(":", " :").split() == words[: len(kept.replace(":", " :").split())]
    # No more of the text than of the sound.
    assert len(processor.tokenizer(kept).input_ids) <= len(processor.tokenizer(text).input_ids) * heard / 2.0
    assert (heard < 0.3) == (not kept)
    assert conversation.messages[-1]["content"] == kept


def test_a_second_cut_counts_from_the_same_answer(converse, processor):
    text = "The sea isn't small: it covers most of the world."
    kept = spoken(converse(), processor, text, frames=25).cut(1.2)
    conversation = spoken(converse(), processor, text, frames=25)
    assert [conversation.cut(heard) for heard in (1.5, 1.2, 1.2)][1:] == [kept, kept]
    assert conversation.cut(1.9) == kept


@pytest.mark.parametrize("text", ["Das Schloss ist über München.", "Привет всем друзьям", "Pi is 3.14159, no less."])
def test_words_of_other_scripts_and_numbers_are_whole(converse, processor, text):
    words = text.split()
    for heard in torch.linspace(0.1, 1.9, 30).tolist():
        kept = spoken_words = spoken(converse(), processor, text, frames=25).cut(heard).split()
        assert kept == words[: len(kept)] or spoken_words[-1] in ("3.14159", "less", "München")


def test_all_that_was_heard_is_kept(converse, processor):
    conversation = spoken(converse(), processor, "All of it.", frames=10)
    assert conversation.cut(0.8) == "All of it."
    assert conversation._turns[0].is_complete


def test_no_character_is_cut_in_two(converse, processor):
    text = "天空是蓝色的😀"
    conversation = spoken(converse(), processor, text, frames=100)
    for heard in torch.linspace(7.9, 0, 60).tolist():
        assert text.startswith(conversation.cut(heard))


def test_the_length_of_an_unfinished_answer_is_that_of_others(converse, processor):
    conversation = spoken(converse(), processor, "One two three four five six.", frames=20)
    tokens = len(conversation._turns[0].answer)
    conversation = spoken(conversation, processor, "One two three four five six.", frames=5, is_complete=False)
    assert conversation._seconds(conversation._turns[1]) == pytest.approx(1.6)
    alone = spoken(converse(), processor, "One two three four five six.", frames=5, is_complete=False)
    assert alone._seconds(alone._turns[0]) == pytest.approx(0.17 * tokens)


def test_after_a_cut_the_rest_is_as_never_said(converse):
    warm = converse(voice="alba")
    scores_of(warm, "Tell me about the sea.", max_new_tokens=60)
    warm._turns[0].is_complete = True
    warm.cut(heard=0.08 * warm._turns[0].frames / 2)
    other = converse(voice="alba")
    other._turns = list(warm._turns)
    found, expected = scores_of(warm, "And then?"), scores_of(other, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.audio_logits, expected.audio_logits, rtol=0, atol=2e-5)


# ---------------------------------------------------------------- memory and files


def test_the_oldest_turns_are_forgotten(converse):
    conversation = converse(system="Be brief.", max_positions=160)
    for number in range(12):
        outputs = scores_of(conversation, f"This is line {number} of a long conversation.")
        assert outputs.sequences.shape[1] <= 160
        assert conversation.num_cached_positions <= 160
    messages = conversation.messages
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert messages[-2]["content"] == "This is line 11 of a long conversation."
    assert 3 <= len(messages) < 13
    other = converse(system="Be brief.", max_positions=160)
    other._turns = list(conversation._turns)
    found, expected = scores_of(conversation, "And then?"), scores_of(other, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_a_message_that_does_not_fit_is_refused_and_nothing_is_lost(converse):
    conversation = converse(max_positions=200)
    conversation.ask("Hello there!", **GREEDY)
    before = conversation.messages
    with pytest.raises(ValueError, match=r"up to 24, which is more than `max_positions` \(200\)"):
        conversation.ask("word " * 300, **GREEDY)
    assert conversation.messages == before


def test_saved_and_loaded(converse, model, processor, tmp_path):
    conversation = converse(system="Be brief.", voice="alba", max_positions=700)
    conversation.ask("Hello there!", seed=1, max_new_tokens=20)
    conversation.ask([recording(0.5), {"type": "text", "text": "And this?"}], seed=2, max_new_tokens=20)
    conversation.save(tmp_path / "talk.safetensors")
    again = Conversation.load(tmp_path / "talk.safetensors", model, processor)
    assert (again.messages, again.voice, again.max_positions) == (conversation.messages, "alba", 700)
    found, expected = scores_of(again, "And then?"), scores_of(conversation, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    assert torch.equal(found.audio_codes, expected.audio_codes)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.safetensors"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "text", "shape", "range", "deep"])
def test_files_that_hold_no_conversation(converse, model, processor, tmp_path, damage):

    path = tmp_path / "talk.safetensors"
    conversation = converse()
    conversation.ask("Hello there!", **GREEDY)
    conversation.save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    elif damage == "deep":
        save_file({"a": torch.zeros(2)}, path, metadata={"minimind_o_conversation": "[" * 200_000})
    elif damage in ("shape", "range"):
        with safe_open(path, "pt") as file:
            notes = file.metadata()
        ids = torch.zeros(2, 2, dtype=torch.long) if damage == "shape" else torch.tensor([10**6])
        save_file({"0.prompt": ids, "0.answer": torch.tensor([5])}, path, metadata=notes)
    else:
        path.write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no conversation, or is damaged"):
        Conversation.load(path, model, processor)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        Conversation.load(tmp_path / "nothing", model, processor)


def test_a_voice_that_cannot_be_found_again(converse, model, processor, tmp_path):
    conversation = converse(voice={"ref_codes": torch.ones(8, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match="no name to save"):
        conversation.save(tmp_path / "talk.safetensors")
    conversation.voice = {"ref_codes": torch.ones(8, 4, dtype=torch.long), "name": "stranger"}
    conversation.save(tmp_path / "talk.safetensors")
    with pytest.raises(ValueError, match="the voice 'stranger', which the processor has not"):
        Conversation.load(tmp_path / "talk.safetensors", model, processor)


# ---------------------------------------------------------------- errors


def test_what_fails_leaves_the_conversation_as_it_was(converse):
    conversation = converse(voice="alba")
    conversation.ask("Hello there!", **GREEDY)
    before = conversation.messages

    def fail(tokens, scores):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        list(conversation.stream("And then?", **GREEDY, logits_processor=[fail]))
    conversation.voice = "nobody"
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        conversation.ask("And then?", **GREEDY)
    conversation.voice = "alba"
    for settings, message in [
        ({"num_return_sequences": 2}, "goes on with one answer"),
        ({"use_cache": False}, "its own prompt and cache: leave use_cache out"),
        ({"max_length": 900}, "pass `max_new_tokens`"),
    ]:
        with pytest.raises(ValueError, match=message):
            conversation.ask("And then?", **{**GREEDY, **settings})
    for content in (None, 5, b"hello", [{"text": 3}], ["hello"], [{}]):
        with pytest.raises(ValueError, match="A message is a text, or a list|cannot be rendered"):
            conversation.ask(content)
    assert conversation.messages == before
    other = converse(voice="alba")
    other._turns = list(conversation._turns)
    found, expected = scores_of(conversation, "And then?"), scores_of(other, "And then?")
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)


def test_a_failed_answer_does_not_forget_old_turns(converse):
    conversation = converse(max_positions=200)
    while len(conversation.messages) < 6:
        conversation.ask("This is a line of a long conversation.", **GREEDY)
    before = conversation.messages

    def fail(tokens, scores):
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        conversation.ask("word " * 60, **GREEDY, logits_processor=[fail])
    assert conversation.messages == before


def test_control_tokens_are_text_in_a_system_prompt(converse, processor):
    conversation = converse(system="<|im_end|> and <|audio_pad|>")
    outputs = scores_of(conversation, "Hello there!")
    prompt = outputs.sequences[0, : outputs.prompt_length].tolist()
    assert processor.audio_token_id not in prompt
    assert prompt.count(processor.tokenizer.eos_token_id) == 2


def test_no_codec_to_speak_with(model, nano):
    from minimind_o_hf import MiniMindOProcessor

    conversation = Conversation(model, MiniMindOProcessor.from_pretrained(nano, load_audio_tokenizer=False))
    with pytest.raises(ValueError, match="no codec to speak with"):
        conversation.ask("Hello there!", **GREEDY)
    assert conversation.messages == []
    assert conversation.ask("Hello there!", **GREEDY, generation_mode="text").audio is None


def test_one_answer_at_a_time(converse):
    conversation = converse()
    events = conversation.stream("Hello there!", do_sample=False, max_new_tokens=100)
    next(events)
    for call in (
        lambda: conversation.ask("And then?"),
        lambda: next(conversation.stream("And then?")),
        lambda: conversation.cut(1.0),
        conversation.reset,
    ):
        with pytest.raises(ValueError, match="answering already"):
            call()
    events.close()
    conversation.stream("Never read.")
    conversation.reset()
    assert (conversation.messages, conversation.num_cached_positions) == ([], 0)
    with pytest.raises(ValueError, match="no answer to cut"):
        conversation.cut(1.0)
    with pytest.raises(ValueError, match="at least 0 seconds"):
        conversation.cut(-1.0)


def test_the_cache_needs_whole_prompts(model, processor):
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    cache = MiniMindOCache(model.config)
    outputs = model.generate(**inputs, **GREEDY, past_key_values=cache)
    assert outputs.past_key_values is cache
    new = torch.ones(1, 3, dtype=torch.long)
    mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
    with pytest.raises(ValueError, match="needs the whole prompt's ids"):
        model.generate(new, attention_mask=mask, **GREEDY, past_key_values=cache)


@pytest.mark.parametrize("use_moe", [False, True])
def test_rows_of_a_batch_and_experts(tiny_model, use_moe):
    model = tiny_model(use_moe)
    first = torch.randint(50, 300, (2, 9))
    mask = torch.ones_like(first)
    mask[1, :4] = 0
    codes = torch.randint(0, 32, (2, 8, 5))
    cache = MiniMindOCache(model.config)
    settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "output_logits": True}
    model.generate(first, attention_mask=mask, reference_codes=codes, **settings, past_key_values=cache)
    cache.crop_to(9)
    second = torch.cat([first, torch.randint(50, 300, (2, 4))], dim=1)
    mask = torch.cat([mask, torch.ones(2, 4, dtype=torch.long)], dim=1)
    inputs = {"attention_mask": mask, "reference_codes": codes, **settings}
    found = model.generate(second, **inputs, past_key_values=cache)
    expected = model.generate(second, **inputs)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.audio_logits, expected.audio_logits, rtol=0, atol=2e-5)


# --- Turns from elsewhere, and answers that the caller makes


def test_a_remembered_turn_is_read_as_the_template_has_it(converse, processor):
    conversation = converse(system="Be brief.")
    conversation.remember("Hello there!", "I am <|im_end|> fine.")  # which is text, and ends nothing
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello there!"},
        {"role": "assistant", "content": "I am <|im_end|> fine."},
    ]
    assert conversation.messages == chat
    assert conversation.num_turns == 1
    outputs = scores_of(conversation, "And then?")
    ids = processor.apply_chat_template(
        [*chat, {"role": "user", "content": "And then?"}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        sanitize_control_tokens=True,
    )["input_ids"]
    assert torch.equal(outputs.sequences[:, : outputs.prompt_length], ids)


def test_a_forgotten_turn_is_as_never_said(converse):
    conversation, other = converse(), converse()
    for line in LINES[:3]:
        conversation.ask(line, **GREEDY)
    other._turns = [conversation._turns[0], conversation._turns[2]]
    conversation.forget(1)
    assert conversation.num_turns == 2
    found, expected = scores_of(conversation, LINES[3]), scores_of(other, LINES[3])
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    with pytest.raises(IndexError):
        conversation.forget(7)


def test_no_more_turns_are_remembered_than_asked_for(converse, model, monkeypatch):
    conversation, alone = converse(max_turns=1), converse()
    for line in LINES:
        last = scores_of(conversation, line)
    assert conversation.num_turns == 2
    alone._turns = conversation._turns[:1]
    torch.testing.assert_close(last.logits, scores_of(alone, LINES[3]).logits, rtol=0, atol=1e-5)
    monkeypatch.setattr(model.generation_config, "max_turns", 0, raising=False)
    assert converse().max_turns == 0  # as the checkpoint says
    assert converse(max_turns=3).max_turns == 3
    with pytest.raises(ValueError, match="`max_turns` must be at least 0, got -1"):
        converse(max_turns=-1)


def test_an_answer_that_the_caller_makes(converse, model):
    conversation, other = converse(), converse()
    pending = conversation.prepare("Hello there!", **GREEDY)
    with pending as inputs:
        with pytest.raises(ValueError, match="answering already"):
            conversation.ask("And then?")
        decoding = model.start_decoding(**inputs)
        outputs = decoding.prefill()
        while not decoding.is_finished:
            decoding.advance(outputs)
            outputs = model(**decoding.next_inputs())
        pending.outputs = decoding.end()
    other.ask("Hello there!", **GREEDY)
    assert conversation.messages == other.messages
    with conversation.prepare("Never answered.", **GREEDY):
        pass
    assert conversation.messages == other.messages
