"""Generation: the delayed loop for whole batches, its sampling, its ends, its streamer, and what it refuses.

Prompts are written as one string a row: `t` is a text token, a digit a speech clip of that many frames, `P` a picture;
`@` gives the row a speaker embedding and `#` reference codes. The contents are a function of the string, so a row is
the same alone and in any batch.
"""

import collections
import itertools
import json
import zlib

import pytest
import torch
from minimind_o_hf.modeling import (
    MiniMindOForConditionalGeneration,
    MiniMindOStreamer,
    apply_delay_pattern,
    place_voice,
)
from minimind_o_hf.modeling.generation_minimind_o import penalize_repetition, sample_from_uniform
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from minimind_o_hf.presets import build_tokenizer

IMAGE, AUDIO = 12, 16
THINK, THINK_END = 25, [26, 234, 234]
PAD, STOP, SPEAKER = 33, 34, 35  # codes of the toy configuration
CODEBOOK, CODES = 32, 40
MIX = ("t3tt@#", "ttPtttt", "ttttttttttt@", "2tPt#", "tttt")
GREEDY = {"do_sample": False}
# An untrained model says anything: every 13th token ends an answer.
ENDS = list(range(39, 320, 13))


@pytest.fixture(params=[False, True], ids=["dense", "moe"])
def use_moe(request):
    return request.param


@pytest.fixture
def lively(tiny_model):
    """Models whose answers depend on what they read, speak for a while, and stop at different times."""

    def make(use_moe=False, **overrides):
        seed = 3 if use_moe else 0  # of the first few, one whose rows differ most in length
        model = tiny_model(use_moe, seed, **{"initializer_range": 0.125, **overrides})
        with torch.no_grad():
            # Of the special codes only the stop is left, rare enough for some frames.
            scale = torch.tensor([4.0] * CODEBOOK + [0.0] * (CODES - CODEBOOK))
            scale[STOP] = 5.0
            for part in (model.talker.lm_head.base, *(a[2] for a in model.talker.lm_head.adapters)):
                part.weight *= scale[:, None]
        return model

    return make


def prompts(*specs):
    """Inputs of `generate` for a batch of rows, left padded."""
    rows, masks, clips, pictures, references, speakers = [], [], [], [], [], []
    for spec in specs:
        generator = torch.Generator().manual_seed(zlib.crc32(spec.encode()))
        ids, reference, speaker = [], torch.zeros(8, 0, dtype=torch.long), torch.zeros(12)
        for item in spec:
            if item == "t":
                ids.append(int(torch.randint(40, 230, (), generator=generator)))
            elif item == "P":
                ids += [IMAGE] * 4
                pictures.append(torch.randn(3, 64, 64, generator=generator))
            elif item == "@":
                speaker = torch.randn(12, generator=generator)
            elif item == "#":
                frames = int(torch.randint(3, 9, (), generator=generator))
                reference = torch.randint(0, CODEBOOK, (8, frames), generator=generator)
            else:
                ids += [AUDIO] * int(item)
                clips.append(torch.randn(int(item), 560, generator=generator))
        rows.append(torch.tensor(ids))
        masks.append(torch.ones(len(ids), dtype=torch.long))
        references.append(reference)
        speakers.append(speaker)

    def stack(values, fill):
        length = max(value.shape[-1] for value in values)
        return torch.stack([nn.functional.pad(v, (length - v.shape[-1], 0), value=fill) for v in values])

    inputs = {"input_ids": stack(rows, 0), "attention_mask": stack(masks, 0)}
    if any(reference.shape[1] for reference in references):
        inputs["reference_codes"] = stack(references, PAD)
    if any(speaker.any() for speaker in speakers):
        inputs["speaker_embeddings"] = torch.stack(speakers)
    if clips:
        frames = max(len(clip) for clip in clips)
        inputs["input_features"] = torch.stack([nn.functional.pad(c, (0, 0, 0, frames - len(c))) for c in clips])
        inputs["input_features_mask"] = torch.tensor([[1] * len(c) + [0] * (frames - len(c)) for c in clips])
    if pictures:
        inputs["pixel_values"] = torch.stack(pictures)
    return inputs


def text_of(output, row, ends=()):
    """A row's answer up to its end token (all of it without one)."""
    tokens = output.sequences[row, output.prompt_length :].tolist()
    for number, token in enumerate(tokens):
        if token in ends:
            assert not any(tokens[number + 1 :])  # pad
            return tokens[: number + 1]
    return tokens


def frames_of(output, row):
    mask = output.audio_codes_mask[row]
    assert mask.long().diff().le(0).all()  # frames come first
    assert not output.audio_codes[row][:, ~mask].any()
    return output.audio_codes[row][:, mask].T.tolist()


def assert_same_answers(output, expected, ends=()):
    for row in range(len(expected.sequences)):
        assert text_of(output, row, ends) == text_of(expected, row, ends)
        assert frames_of(output, row) == frames_of(expected, row)


class Script(LogitsProcessor):
    """Forces the text: the n-th token of each row, the last one from then on."""

    def __init__(self, *texts):
        self.texts, self.step = texts, 0

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self.texts):
            scores[row, text[min(self.step, len(text) - 1)]] = 0
        self.step += 1
        return scores


class ScriptedHead(nn.Module):
    """Makes the Talker say `codes` `(batch_size, num_codebooks, steps)`, one column a step."""

    def __init__(self, codes):
        super().__init__()
        self.codes, self.step = codes, 0

    def forward(self, hidden_states):
        scores = nn.functional.one_hot(self.codes[:, :, min(self.step, self.codes.shape[-1] - 1)], CODES).float() * 9
        self.step += 1
        return scores.unsqueeze(2).expand(-1, -1, hidden_states.shape[1], -1)


def scripted(model, *texts, codes, **kwargs):
    """`generate` with the words and codes given, and the inputs of every forward."""
    model.talker.lm_head = ScriptedHead(codes)
    calls = []
    hook = model.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    output = model.generate(
        logits_processor=LogitsProcessorList([Script(*texts)]), audio_repetition_penalty=1.0, **GREEDY, **kwargs
    )
    hook.remove()
    return output, calls


def numbered(batch_size, steps):
    """Codes that tell their codebook and step apart: (7 * codebook + step) mod 32."""
    codes = (7 * torch.arange(8)[:, None] + torch.arange(steps)) % CODEBOOK
    return codes.repeat(batch_size, 1, 1)


# ---- batches ----


@pytest.mark.parametrize("seeds", [None, [11, 12, 13, 14, 15]], ids=["greedy", "seeds"])
def test_a_batch_is_its_rows(lively, use_moe, seeds):
    model = lively(use_moe)
    settings = {"max_new_tokens": 36, "eos_token_id": ENDS, "audio_temperature": 0.4, "do_sample": seeds is not None}
    together = model.generate(**prompts(*MIX), seeds=seeds, **settings)
    for row, spec in enumerate(MIX):
        alone = model.generate(**prompts(spec), seeds=None if seeds is None else [seeds[row]], **settings)
        assert text_of(together, row, ENDS) == text_of(alone, 0, ENDS)
        assert frames_of(together, row) == frames_of(alone, 0)
    # The rows do differ in what they say and where they end.
    assert len({tuple(text_of(together, row, ENDS)) for row in range(5)}) == 5
    assert len({len(text_of(together, row, ENDS)) for row in range(5)}) >= 3
    assert len({len(frames_of(together, row)) for row in range(5)}) >= 2


@pytest.mark.parametrize("kind", ["@", "#"])
def test_a_voice_changes_its_row_alone(lively, kind):
    model = lively()
    settings = {"max_new_tokens": 12, "output_logits": True, **GREEDY}
    inputs = prompts("tttttt", "ttttt")
    silent = model.generate(**inputs, **settings)
    voice = prompts(f"tttttt{kind}", "ttttt")
    voice = {name: voice[name] for name in ("reference_codes", "speaker_embeddings") if name in voice}
    voiced = model.generate(**inputs, **voice, **settings)
    assert voiced.sequences.equal(silent.sequences)
    for step in range(12):
        scores, expected = voiced.audio_logits[step], silent.audio_logits[step]
        assert not torch.allclose(scores[0], expected[0], atol=1e-3)
        torch.testing.assert_close(scores[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
@pytest.mark.parametrize("sampling", [GREEDY, {"seeds": [1, 2, 3, 4, 5]}], ids=["greedy", "seeds"])
def test_caches(lively, use_moe, options, sampling):
    model = lively(use_moe)
    settings = {"max_new_tokens": 20, "eos_token_id": ENDS, **sampling}
    expected = model.generate(**prompts(*MIX), **settings)
    assert expected.audio_codes_mask.any()
    assert_same_answers(model.generate(**prompts(*MIX), **settings, **options), expected)


def test_encoder_outputs_in_place_of_raw_inputs(lively):
    model = lively()
    inputs = prompts(*MIX)
    expected = model.generate(**inputs, max_new_tokens=16, **GREEDY)
    mask = inputs["input_features_mask"]
    audio = model.get_audio_features(inputs.pop("input_features"), mask)
    image = model.get_image_features(inputs.pop("pixel_values"))
    for options in ({}, {"use_cache": False}):
        output = model.generate(
            **inputs, audio_hidden_states=audio, image_hidden_states=image, max_new_tokens=16, **GREEDY, **options
        )
        assert_same_answers(output, expected)


def test_encoders_run_once(lively):
    model = lively()
    calls = []
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in (model.audio_tower, model.vision_tower)]
    model.generate(**prompts(*MIX), max_new_tokens=5, **GREEDY)
    for hook in hooks:
        hook.remove()
    assert calls == [model.audio_tower, model.vision_tower]


@pytest.mark.parametrize("precomputed", [False, True], ids=["raw", "precomputed"])
def test_several_answers_to_each_prompt(lively, use_moe, precomputed):
    model = lively(use_moe)
    specs = ("t2t3tP@", "tttt", "PtPt2#", "ttP")
    inputs = prompts(*specs)
    if precomputed:
        inputs["audio_hidden_states"] = model.get_audio_features(
            inputs.pop("input_features"), inputs["input_features_mask"]
        )
        inputs["image_hidden_states"] = model.get_image_features(inputs.pop("pixel_values"))
    seeds = list(range(8))
    settings = {"max_new_tokens": 20, "eos_token_id": ENDS, "temperature": 1.0, "audio_temperature": 0.4}
    output = model.generate(**inputs, num_return_sequences=2, seeds=seeds, **settings)
    assert len(output.sequences) == len(output.audio_codes) == len(output.audio_codes_mask) == 8
    assert output.sequences[:, : output.prompt_length].equal(inputs["input_ids"].repeat_interleave(2, dim=0))
    for row, seed in enumerate(seeds):
        alone = model.generate(**prompts(specs[row // 2]), seeds=[seed], **settings)
        assert text_of(output, row, ENDS) == text_of(alone, 0, ENDS)
        assert frames_of(output, row) == frames_of(alone, 0)
    assert text_of(output, 0) != text_of(output, 1)


def test_several_answers_without_a_clip_mask(lively):
    model = lively()
    inputs = prompts("t3tt", "tttt", "3t3t")
    del inputs["input_features_mask"]
    settings = {"num_return_sequences": 2, "seeds": range(6), "max_new_tokens": 9}
    expected = model.generate(**prompts("t3tt", "tttt", "3t3t"), **settings)
    output = model.generate(**inputs, **settings)
    assert_same_answers(output, expected)


# ---- seeds and random numbers ----


def test_seeds(lively):
    model = lively()
    settings = {"max_new_tokens": 16, "temperature": 1.0, "audio_temperature": 1.0}
    first = model.generate(**prompts("tttt", "tt3@", "tttt"), seeds=[5, 6, 7], **settings)
    state = torch.get_rng_state()
    again = model.generate(**prompts("tttt", "tt3@", "tttt"), seeds=torch.tensor([5, 6, 7]), **settings)
    assert torch.get_rng_state().equal(state)  # the global generator is left alone
    assert_same_answers(again, first)
    moved = model.generate(**prompts("ttttttttt", "tttt"), seeds=[1, 5], **settings)
    assert text_of(moved, 1) == text_of(first, 0)
    assert frames_of(moved, 1) == frames_of(first, 0)
    # One prompt, two seeds: two answers.
    assert text_of(first, 0) != text_of(first, 2)
    # More steps begin with the same ones.
    longer = model.generate(**prompts("tttt"), seeds=[5], **{**settings, "max_new_tokens": 20})
    assert text_of(longer, 0)[:16] == text_of(first, 0)
    assert frames_of(longer, 0)[: len(frames_of(first, 0))] == frames_of(first, 0)


def test_without_seeds_the_global_generator_draws(lively):
    model = lively()
    settings = {"max_new_tokens": 16, "temperature": 1.0, "audio_temperature": 1.0}
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model.generate(**prompts("tttt", "ttt"), **settings))
    assert_same_answers(outputs[1], outputs[0])
    assert text_of(outputs[2], 0) != text_of(outputs[0], 0)
    following = model.generate(**prompts("tttt", "ttt"), **settings)
    assert text_of(following, 0) != text_of(outputs[2], 0)


def slow_draw(probabilities, uniform):
    total = 0.0
    for index, probability in enumerate(probabilities):
        total += probability
        if uniform < total:
            return index
    raise AssertionError


def test_sample_from_uniform_against_a_plain_loop():
    scores = torch.randn(50, 3, 9) * 3
    scores[:, :, 4] = -torch.inf
    scores[10:20, :, :4] = -torch.inf
    scores[20:30, :, 6:] = -torch.inf
    uniform = torch.rand(50, 3)
    drawn = sample_from_uniform(scores, uniform)
    assert drawn.shape == (50, 3)
    for row, column in itertools.product(range(50), range(3)):
        probabilities = scores[row, column].double().softmax(-1).tolist()
        assert drawn[row, column] == slow_draw(probabilities, float(uniform[row, column]))


def test_the_ends_of_the_unit_interval_draw_possible_entries():
    largest = float(torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)))
    scores = torch.randn(200, 300) * 4
    scores[:, 0] = scores[:, -1] = -torch.inf
    for uniform in (0.0, largest):
        drawn = sample_from_uniform(scores, torch.full((200,), uniform))
        assert torch.isfinite(scores.gather(1, drawn[:, None])).all()
    one_hot = torch.full((5, 5), -torch.inf).fill_diagonal_(0.0)
    for uniform in (0.0, 0.5, largest):
        assert sample_from_uniform(one_hot, torch.full((5,), uniform)).tolist() == list(range(5))


def test_draws_follow_the_probabilities():
    scores = torch.tensor([0.0, 1.0, -1.0, -torch.inf, 2.0])
    number = 20000
    drawn = sample_from_uniform(scores.expand(number, -1), torch.rand(number))
    frequencies = torch.bincount(drawn, minlength=5) / number
    torch.testing.assert_close(frequencies, scores.softmax(-1), rtol=0, atol=5 * 0.5 / number**0.5)


@pytest.mark.parametrize("penalty", [1.0, 1.05, 1.5, 0.8])
@pytest.mark.parametrize("window", [0, 1, 3, 5])
def test_penalize_repetition_against_a_plain_loop(penalty, window):
    scores = torch.randn(4, 8, CODES)
    recent = torch.randint(0, 4, (4, 8, window))  # often the same code twice or three times
    expected = scores.clone()
    for row, codebook in itertools.product(range(4), range(8)):
        for code in recent[row, codebook].tolist():
            value = expected[row, codebook, code]
            expected[row, codebook, code] = value / penalty if value > 0 else value * penalty
    before = scores.clone()
    torch.testing.assert_close(penalize_repetition(scores, recent, penalty), expected)
    assert scores.equal(before)


def test_the_penalty_sees_the_codes_of_this_call_only(tiny_model):
    model = tiny_model()
    output = model.generate(
        **prompts("ttttt@#"),
        max_new_tokens=20,
        output_scores=True,
        output_logits=True,
        audio_repetition_penalty=2.0,
        audio_repetition_window=3,
        audio_temperature=1.0,
        seeds=[0],
    )
    calls = emitted_codes(model, output, 20)
    for step in range(20):
        # Step 0 has no past: a reference is no repetition. The pads before a codebook's start count.
        recent = calls[:, :, max(step - 3, 0) : step]
        expected = penalize_repetition(output.audio_logits[step], recent, 2.0)
        torch.testing.assert_close(output.audio_scores[step], expected)
    assert output.audio_scores[0].equal(output.audio_logits[0])
    assert not output.audio_scores[1].equal(output.audio_logits[1])  # of the pad


def emitted_codes(model, output, steps):
    """The codes of every step `(1, 8, steps)`, from a second run with the same seed that shows what is fed back."""
    fed = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: fed.append(kw["audio_codes"]), with_kwargs=True)
    again = model.generate(
        **prompts("ttttt@#"),
        max_new_tokens=steps + 1,
        audio_repetition_penalty=2.0,
        audio_repetition_window=3,
        audio_temperature=1.0,
        seeds=[0],
    )
    hook.remove()
    assert text_of(again, 0)[:steps] == text_of(output, 0)
    return torch.cat(fed[1:], dim=-1)


@pytest.mark.parametrize("top_k", [1, 3, 0, 50])
def test_top_k_of_the_codes(lively, top_k):
    model = lively()
    fed = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: fed.append(kw["audio_codes"]), with_kwargs=True)
    inputs = prompts("tttt", "ttttt", "tt")
    output = model.generate(**inputs, max_new_tokens=20, audio_top_k=top_k, audio_temperature=50.0, output_scores=True)
    hook.remove()
    ranks = set()
    for step in range(8, 19):
        codes = fed[step + 1][..., -1]
        order = output.audio_scores[step].argsort(dim=-1, descending=True)
        ranks |= set((order == codes[..., None]).int().argmax(-1).flatten().tolist())
    if top_k in (1, 3):
        assert ranks == set(range(top_k))
    else:
        assert len(ranks) > 30  # at this temperature all codes are about equally likely


def test_text_sampling_settings(lively):
    """One step of 4,000 equal rows has the frequencies of transformers' processors."""
    model = lively()
    ids = prompts("ttt")["input_ids"]
    settings = {"temperature": 0.5, "top_p": 0.8, "top_k": 5}
    output = model.generate(
        ids.expand(4000, -1), max_new_tokens=1, generation_mode="text", output_logits=True, **settings
    )
    scores = output.logits[0][0] / 0.5
    scores[[IMAGE, AUDIO]] = -torch.inf
    top = scores.topk(5)
    probabilities = torch.zeros_like(scores).scatter(0, top.indices, top.values.softmax(-1))
    ordered, order = probabilities.sort(descending=True)
    kept = ordered.cumsum(0) - ordered < 0.8
    probabilities[order[~kept]] = 0
    probabilities /= probabilities.sum()
    frequencies = torch.bincount(output.sequences[:, -1], minlength=len(scores)) / 4000
    torch.testing.assert_close(frequencies, probabilities, rtol=0, atol=0.04)
    assert not frequencies[probabilities == 0].any()


def test_temperature_of_the_codes(tiny_model):
    model = tiny_model(num_codebooks=1)
    output = model.generate(
        prompts("ttt")["input_ids"].expand(4000, -1),
        max_new_tokens=2,
        do_sample=True,
        top_k=1,  # one text, so that all rows have the same code scores
        audio_temperature=0.7,
        audio_top_k=0,
        output_scores=True,
    )
    probabilities = (output.audio_scores[1][0, 0] / 0.7).softmax(-1)
    counts = torch.bincount(output.audio_codes[output.audio_codes_mask[:, None]], minlength=CODEBOOK)
    torch.testing.assert_close(counts / 4000, probabilities[:CODEBOOK], rtol=0, atol=0.04)


def test_placeholders_are_never_said(lively):
    model = lively()
    output = model.generate(**prompts("tttt", "tt"), max_new_tokens=30, output_scores=True, temperature=2.0, top_p=1.0)
    for scores in output.scores:
        assert torch.isinf(scores[:, [IMAGE, AUDIO]]).all()
    assert not torch.isin(output.sequences[:, output.prompt_length :], torch.tensor([IMAGE, AUDIO])).any()


# ---- the layout of an answer ----


def test_codebooks_start_one_after_another(lively):
    model = lively()
    codes = numbered(1, 20)
    inputs = prompts("ttttttt@#")
    output, calls = scripted(model, [50], codes=codes, **inputs, max_new_tokens=20)
    # Frame f of codebook i is emitted at step 1 + i + f, and is complete with codebook 7.
    expected = [[int(codes[0, i, 1 + i + f]) for i in range(8)] for f in range(20 - 8)]
    assert frames_of(output, 0) == expected
    # What the model has read is what it is trained on: the frames stand from the answer's second position on.
    length = output.prompt_length
    fed = torch.cat([call["audio_codes"] for call in calls], dim=-1)
    assert fed.shape[-1] == length + 19
    start = torch.tensor([length + 1])
    all_codes = torch.stack([codes[0, i, 1 + i : 1 + i + 12] for i in range(8)])[None]
    layout, _ = apply_delay_pattern(all_codes, start, length + 13, PAD, STOP)
    assert fed[:, :, length : length + 13].equal(layout[:, :, length:])
    voice = {name: inputs[name] for name in ("reference_codes", "speaker_embeddings")}
    placed = place_voice(torch.tensor([length]), torch.tensor([length]), length, 8, PAD, SPEAKER, **voice)
    assert fed[:, :, :length].equal(placed)


def test_each_rows_voice_stands_before_its_answer(lively):
    model = lively()
    inputs = prompts("ttttttttt@#", "tt@#", "ttttt", "ttt@", "tt#")
    calls = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: calls.append(kw), with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, **GREEDY)
    hook.remove()
    fed = calls[0]["audio_codes"]
    first = fed[:, 0]
    reference = inputs["reference_codes"]
    for row, (length, has_speaker) in enumerate(((9, True), (2, True), (5, False), (3, True), (2, False))):
        own = reference[row][:, (reference[row] != PAD).all(0)]
        kept = min(own.shape[1], length - has_speaker)
        assert fed[row][:, 9 - kept :].equal(own[:, own.shape[1] - kept :])
        before = [PAD] * (9 - kept - has_speaker) + [SPEAKER] * has_speaker
        assert first[row, : 9 - kept].tolist() == before
    assert calls[1]["audio_codes"].equal(torch.full((5, 8, 1), PAD))  # step 0 emits no code


def with_suffix(inputs, suffix):
    suffix = torch.tensor(suffix).expand(len(inputs["input_ids"]), -1)
    return {
        "input_ids": torch.cat([inputs["input_ids"], suffix], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(suffix)], dim=1),
    }


@pytest.mark.parametrize("use_cache", [True, False])
def test_speech_starts_after_the_thoughts(lively, use_cache):
    model = lively()
    inputs = with_suffix(prompts("ttt", "tt", "tttt"), [1, THINK, 234])
    inputs["input_ids"][2, -2:] = torch.tensor([26, 234])  # this row does not think
    thoughts = [60, 61, 62]
    texts = (
        [*thoughts, *THINK_END, 70, 71, 72],
        [26, 63, 234, 26, 234, 26, *THINK_END, *THINK_END, 73],  # the first whole one counts
        [80, *THINK_END, 81],
    )
    last = (5, 8, -1)  # the step n of the last token of the end of the thoughts
    codes = numbered(3, 24)
    output, calls = scripted(model, *texts, codes=codes, **inputs, max_new_tokens=24, use_cache=use_cache)
    for row, n in enumerate(last):
        start = n + 2
        expected = [[int(codes[row, i, start + i + f]) for i in range(8)] for f in range(24 - start - 7)]
        assert frames_of(output, row) == expected
    fed = torch.cat([call["audio_codes"][..., -1:] for call in calls[1:]], dim=-1)  # of step 0, 1, ...
    for row, n in enumerate(last):
        for i in range(8):
            assert (fed[row, i, : n + 2 + i] == PAD).all()
            assert fed[row, i, n + 2 + i :].equal(codes[row, i, n + 2 + i : 23])


@pytest.mark.parametrize(
    ("suffix", "thinks"),
    [
        ([THINK, 234], True),
        ([1, THINK], True),
        ([1, THINK, 234, 60, 61], True),  # a thought that was begun for it
        ([THINK, 234, 234, *THINK_END], False),
        ([THINK, 60, 26], False),
        ([THINK, 60, 2, 1, 61], False),  # of an earlier turn
        ([1, 60], False),
    ],
)
def test_whether_a_prompt_leaves_thoughts_open(lively, suffix, thinks):
    inputs = with_suffix(prompts("ttt"), suffix)
    output, _ = scripted(lively(), [60], codes=numbered(1, 12), **inputs, max_new_tokens=12)
    assert len(frames_of(output, 0)) == (0 if thinks else 4)


def test_an_answer_that_ends_inside_its_thoughts_is_silent(lively):
    model = lively()
    inputs = with_suffix(prompts("ttt", "tt"), [THINK, 234])
    output, calls = scripted(model, [60, 61, 2], [60, 61, 62, 2], codes=numbered(2, 30), **inputs, max_new_tokens=30)
    assert len(calls) == 4
    assert text_of(output, 0, [2]) == [60, 61, 2]
    assert text_of(output, 1, [2]) == [60, 61, 62, 2]
    assert output.audio_codes.shape == (2, 8, 0)
    assert output.audio_codes_mask.shape == (2, 0)


def stopping(steps, stops, num_rows=1):
    """Codes of `steps` steps in which codebook i of row b has its stop at step `stops[b][i]` and goes on after it."""
    codes = numbered(num_rows, steps)
    for row, steps_of_row in enumerate(stops):
        for i, step in enumerate(steps_of_row):
            codes[row, i, step] = STOP
    return codes


def test_the_text_ends_before_the_speech(lively):
    model = lively()
    codes = stopping(40, [[1 + i + 4 for i in range(8)]])  # four frames
    output, calls = scripted(model, [60, 61, 2], codes=codes, **prompts("tttt@"), max_new_tokens=40)
    assert text_of(output, 0) == [60, 61, 2]
    # The text's stream after its end: one newline, then pad, all of it attended to.
    fed = [int(call["input_ids"][0, -1]) for call in calls[1:]]
    assert fed == [60, 61, 2, 234] + [0] * (len(fed) - 4)
    assert all(call.get("attention_mask") is None or call["attention_mask"].all() for call in calls)
    # It is over once the last codebook has stopped, at step 1 + 7 + 4.
    assert len(calls) == 13
    assert frames_of(output, 0) == [[int(codes[0, i, 1 + i + f]) for i in range(8)] for f in range(4)]


def test_another_token_after_the_text(lively):
    codes = stopping(40, [[1 + i + 4 for i in range(8)]])
    _, calls = scripted(lively(), [60, 2], codes=codes, **prompts("ttt"), max_new_tokens=40, post_text_token_id=201)
    assert [int(call["input_ids"][0, -1]) for call in calls[1:6]] == [60, 2, 201, 0, 0]


def test_the_speech_ends_before_the_text(lively):
    codes = stopping(40, [[1 + i + 2 for i in range(8)]])
    output, calls = scripted(lively(), [60] * 20 + [2], codes=codes, **prompts("ttt"), max_new_tokens=40)
    assert len(calls) == 21
    assert text_of(output, 0) == [60] * 20 + [2]
    assert len(frames_of(output, 0)) == 2
    # Codes after a stop are fed back as they are sampled.
    fed = torch.cat([call["audio_codes"] for call in calls[1:]], dim=-1)
    assert fed[0, 0, 1:].equal(codes[0, 0, 1:20])
    assert fed[0, 7, 8:].equal(codes[0, 7, 8:20])


def test_a_frame_needs_all_codebooks_before_their_stops(lively):
    # Codebook 5 ends first, after three frames, long before the others.
    stops = [[20, 21, 22, 23, 24, 1 + 5 + 3, 26, 27]]
    output, calls = scripted(lively(), [60, 2], codes=stopping(60, stops), **prompts("ttt"), max_new_tokens=60)
    assert len(calls) == 28  # all codebooks must have stopped
    assert len(frames_of(output, 0)) == 3


@pytest.mark.parametrize("code", [CODEBOOK, PAD, SPEAKER, CODES - 1])
def test_any_special_code_stops_its_codebook(lively, code):
    codes = numbered(1, 40)
    for i in range(8):
        codes[0, i, 1 + i + 2] = code
    output, calls = scripted(lively(), [2], codes=codes, **prompts("ttt"), max_new_tokens=40)
    assert len(calls) == 11
    assert len(frames_of(output, 0)) == 2


def test_specials_before_a_codebooks_start_do_not_stop_it(lively):
    codes = numbered(1, 20)
    for i in range(8):
        codes[0, i, : 1 + i] = STOP
    output, _ = scripted(lively(), [60], codes=codes, **prompts("ttt"), max_new_tokens=20)
    assert len(frames_of(output, 0)) == 12


def test_rows_end_at_their_own_time(lively):
    model = lively()
    stops = [[1 + i + frames for i in range(8)] for frames in (1, 6, 3)]
    texts = ([60, 2], [61, 62, 2], [63] * 17 + [2])
    output, calls = scripted(
        model, *texts, codes=stopping(40, stops, 3), **prompts("t", "ttttt", "tt"), max_new_tokens=40
    )
    assert len(calls) == 18
    assert [len(frames_of(output, row)) for row in range(3)] == [1, 6, 3]
    assert [text_of(output, row, [2]) for row in range(3)] == [list(text) for text in texts]
    assert output.sequences.shape == (3, 5 + 18)


def test_what_a_finished_row_emits_does_not_count(lively):
    # Row 0 is over at step 9; its codebooks go on with codes while row 1 speaks.
    codes = stopping(40, [[1 + i + 1 for i in range(8)], [1 + i + 9 for i in range(8)]], 2)
    streamer = Recorder()
    output, _ = scripted(
        lively(), [2], [60, 2], codes=codes, **prompts("tt", "tt"), max_new_tokens=40, streamer=streamer
    )
    assert [len(frames_of(output, row)) for row in range(2)] == [1, 9]
    assert streamer.text(0) == [2]
    assert streamer.frames(0) == frames_of(output, 0)
    assert streamer.frames(1) == frames_of(output, 1)


# ---- ends ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_new_tokens": 11}, 11),
        ({"max_length": 15}, 11),
        ({"max_length": 100, "max_new_tokens": 3}, 3),
        ({"generation_config": GenerationConfig(max_length=13, do_sample=False)}, 9),
        ({"generation_config": GenerationConfig(max_new_tokens=9, do_sample=False)}, 9),
        ({"max_new_tokens": 1}, 1),
    ],
)
def test_numbers_of_steps(lively, settings, steps):
    output, calls = scripted_steps(lively(), **prompts("tttt"), **settings)
    assert len(calls) == steps
    assert output.sequences.shape == (1, 4 + steps)
    assert output.audio_codes.shape == (1, 8, max(steps - 8, 0))


def scripted_steps(model, **kwargs):
    return scripted(model, [60], codes=numbered(1, 40), **kwargs)


def test_steps_count_with_and_without_text(lively):
    output, calls = scripted(lively(), [60, 2], codes=numbered(1, 40), **prompts("tttt"), max_new_tokens=20)
    assert len(calls) == 20
    assert output.sequences.shape == (1, 4 + 2)
    assert len(frames_of(output, 0)) == 12


class Until(StoppingCriteria):
    """Ends each row at its own length."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor(input_ids.shape[1]) >= self.lengths


def test_a_criterion_ends_its_row(lively):
    inputs = prompts("tttt", "tttttt")
    streamer = Recorder()
    output, calls = scripted(
        lively(),
        [60],
        [61],
        codes=numbered(2, 40),
        **inputs,
        max_new_tokens=30,
        stopping_criteria=StoppingCriteriaList([Until(6 + 10, 6 + 14)]),
        streamer=streamer,
    )
    assert len(calls) == 14
    assert [len(frames_of(output, row)) for row in range(2)] == [10 - 8, 14 - 8]
    for row in range(2):
        assert streamer.frames(row) == frames_of(output, row)


def test_stop_strings_end_the_text_alone(lively):
    tokenizer = build_tokenizer()
    text = tokenizer.encode("abxyc")
    assert max(text) < 320
    codes = stopping(40, [[1 + i + 6 for i in range(8)]])
    output, calls = scripted(
        lively(),
        text,
        codes=codes,
        **prompts("tttt"),
        max_new_tokens=40,
        stop_strings=["xy"],
        tokenizer=tokenizer,
    )
    said = text_of(output, 0)
    assert tokenizer.decode(said).startswith("abxy")
    assert len(said) < len(text)
    assert len(calls) == 1 + 7 + 6 + 1
    assert len(frames_of(output, 0)) == 6
    fed = [int(call["input_ids"][0, -1]) for call in calls[1:]]
    assert fed[len(said) :] == [234] + [0] * (len(fed) - len(said) - 1)


def test_several_end_tokens(lively):
    codes = stopping(40, [[1 + i for i in range(8)]] * 2, 2)
    output, calls = scripted(
        lively(), [60, 61, 7], [60, 9, 5], codes=codes, **prompts("t", "t"), max_new_tokens=40, eos_token_id=[7, 9]
    )
    assert [text_of(output, row, [7, 9]) for row in range(2)] == [[60, 61, 7], [60, 9]]
    assert len(calls) == 9
    assert output.audio_codes.shape == (2, 8, 0)


# ---- text alone ----


def test_text_alone_does_not_run_the_talker(lively, use_moe):
    model = lively(use_moe)
    calls = []
    hook = model.talker.register_forward_hook(lambda *_: calls.append(1))
    output = model.generate(**prompts(*MIX), max_new_tokens=12, generation_mode="text", **GREEDY)
    hook.remove()
    assert calls == []
    assert output.audio_codes is None
    assert output.audio_codes_mask is None
    spoken = model.generate(**prompts(*MIX), max_new_tokens=12, generation_mode="audio", **GREEDY)
    assert output.sequences.equal(spoken.sequences)


@pytest.mark.parametrize(
    "settings", [{}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}]
)
def test_text_alone_is_transformers_own_loop(lively, use_moe, settings):
    model = lively(use_moe)
    reference_class = Qwen3MoeForCausalLM if use_moe else Qwen3ForCausalLM
    config = model.config.thinker_config
    reference = reference_class(type(config).from_dict(config.to_dict())).eval()
    state = model.state_dict()
    reference.load_state_dict({name: state[name] for name in reference.state_dict()})
    inputs = prompts("ttttttt", "tttt")
    ends = list(range(41, 320, 29))
    common = {"do_sample": False, "max_new_tokens": 40, "eos_token_id": ends, "suppress_tokens": [IMAGE, AUDIO]}
    expected = reference.generate(**inputs, **common, pad_token_id=0, **settings)
    output = model.generate(**inputs, **common, generation_mode="text", return_dict_in_generate=False, **settings)
    assert output.tolist() == expected.tolist()


def test_the_penalty_does_not_see_the_padding(lively):
    model = lively()
    settings = {"max_new_tokens": 24, "repetition_penalty": 1.8, "output_scores": True, **GREEDY}
    specs = ("ttttttttt", "tt", "t3t")
    together = model.generate(**prompts(*specs), **settings)
    for row, spec in enumerate(specs):
        alone = model.generate(**prompts(spec), **settings)
        assert text_of(together, row) == text_of(alone, 0)
        # Of all tokens, pad too.
        for step in range(24):
            torch.testing.assert_close(together.scores[step][row], alone.scores[step][0], rtol=1e-4, atol=1e-4)


class Prefers(LogitsProcessor):
    """Says one token for as long as it may."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.token] = scores[:, self.token].clamp(max=0) + 1e4  # -inf stays
        return scores


def test_ngrams_do_not_see_the_padding(lively):
    model = lively()
    first = int(prompts("ttt")["input_ids"][0, 0])
    settings = {"max_new_tokens": 5, "no_repeat_ngram_size": 2, "generation_mode": "text", **GREEDY}
    settings["logits_processor"] = LogitsProcessorList([Prefers(first)])
    together = model.generate(**prompts("tttttttt", "ttt"), **settings)
    alone = model.generate(**prompts("ttt"), **settings)
    assert text_of(alone, 0)[:2] == [first, first]  # once it may stand twice in a row
    assert text_of(together, 1) == text_of(alone, 0)


# ---- outputs ----


def test_scores_and_logits(lively, use_moe):
    model = lively(use_moe)
    model.set_attn_implementation("eager")
    output = model.generate(
        **prompts("tttt", "tt3"),
        max_new_tokens=10,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    for name, shape in (
        ("scores", (2, 320)),
        ("logits", (2, 320)),
        ("audio_scores", (2, 8, CODES)),
        ("audio_logits", (2, 8, CODES)),
    ):
        records = getattr(output, name)
        assert [tuple(record.shape) for record in records] == [shape] * 10
        assert {record.dtype for record in records} == {torch.float32}
    assert len(output.hidden_states) == len(output.attentions) == 10
    assert [tuple(h.shape) for h in output.hidden_states[0]] == [(2, 5, 64)] * 4
    assert [tuple(h.shape) for h in output.hidden_states[3]] == [(2, 1, 64)] * 4
    assert [tuple(a.shape) for a in output.attentions[3]] == [(2, 4, 1, 5 + 3)] * 3
    assert output.past_key_values.get_seq_length() == 5 + 9
    plain = model.generate(**prompts("tttt"), max_new_tokens=3)
    assert plain.scores is plain.logits is plain.audio_scores is plain.audio_logits is None
    assert plain.hidden_states is plain.attentions is None


def test_greedy_answers_are_the_best_scores(lively):
    output = lively().generate(**prompts("tttt"), max_new_tokens=12, output_scores=True, **GREEDY)
    assert text_of(output, 0) == [int(scores.argmax()) for scores in output.scores]
    frame = [int(output.audio_scores[1 + i].argmax(-1)[0, i]) for i in range(8)]
    assert frames_of(output, 0)[0] == frame


def test_scores_in_bfloat16_weights_are_float32(lively):
    model = lively().to(torch.bfloat16)
    output = model.generate(**prompts("tttt@"), max_new_tokens=4, output_scores=True)
    assert output.scores[0].dtype == output.audio_scores[0].dtype == torch.float32


def test_sequences_alone(lively):
    model = lively()
    settings = {"max_new_tokens": 8, **GREEDY}
    sequences = model.generate(**prompts("tttt"), return_dict_in_generate=False, **settings)
    assert sequences.equal(model.generate(**prompts("tttt"), **settings).sequences)


def test_other_ways_to_pass_a_prompt(lively):
    model = lively()
    settings = {"max_new_tokens": 12, **GREEDY}
    ids = prompts("tttttt")["input_ids"]
    expected = model.generate(input_ids=ids, **settings)
    assert_same_answers(model.generate(ids, **settings), expected)
    assert_same_answers(model.generate(inputs=ids, **settings), expected)
    # Embeddings leave no prompt in the sequences.
    output = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **settings)
    assert output.sequences.tolist() == expected.sequences[:, 6:].tolist()
    assert frames_of(output, 0) == frames_of(expected, 0)
    # Leading pads are padding without a mask, too.
    padded = nn.functional.pad(ids, (3, 0))
    assert_same_answers(model.generate(padded, **settings), expected)


def test_codes_laid_out_by_the_caller(lively):
    model = lively()
    inputs = prompts("tttttt@#")
    settings = {"max_new_tokens": 16, **GREEDY}
    expected = model.generate(**inputs, **settings)
    reference = inputs.pop("reference_codes")
    lengths = torch.tensor([6])
    codes = place_voice(lengths, lengths, 6, 8, PAD, SPEAKER, reference, inputs["speaker_embeddings"])
    assert_same_answers(model.generate(**inputs, audio_codes=codes, **settings), expected)


def test_a_prompt_continued_from_a_cache(lively):
    model = lively()
    ids = prompts("ttttttttt")["input_ids"]
    settings = {"max_new_tokens": 16, **GREEDY}
    expected = model.generate(ids, **settings)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    output = model.generate(ids, past_key_values=cache, **settings)
    assert output.sequences.equal(expected.sequences)
    assert_same_answers(output, expected)


# ---- streamers ----


class Recorder(MiniMindOStreamer):
    def __init__(self):
        self.prompt, self.steps, self.ended = None, [], 0

    def put(self, value):
        assert not self.ended
        if self.prompt is None:
            self.prompt = value.clone()
        else:
            assert value.dim() == 1
            self.steps.append(("text", value.clone()))

    def put_audio(self, codes, mask):
        assert not self.ended
        assert self.prompt is not None
        assert mask.any()
        self.steps.append(("audio", codes.clone(), mask.clone()))

    def end(self):
        self.ended += 1

    def text(self, row, ends=(2,)):
        tokens = [int(step[1][row]) for step in self.steps if step[0] == "text"]
        for number, token in enumerate(tokens):
            if token in ends:
                assert not any(tokens[number + 1 :])
                return tokens[: number + 1]
        return tokens

    def frames(self, row):
        return [step[1][row].tolist() for step in self.steps if step[0] == "audio" and step[2][row]]


def test_a_streamer_gets_the_answer(lively, use_moe):
    model = lively(use_moe)
    streamer = Recorder()
    inputs = prompts(*MIX)
    settings = {"max_new_tokens": 36, "eos_token_id": ENDS, "audio_temperature": 0.4, "seeds": range(5)}
    output = model.generate(**inputs, streamer=streamer, **settings)
    assert streamer.ended == 1
    assert streamer.prompt.equal(inputs["input_ids"])
    tokens = torch.stack([step[1] for step in streamer.steps if step[0] == "text"], dim=1)
    assert output.sequences[:, output.prompt_length :].equal(tokens)
    for row in range(5):
        assert streamer.frames(row) == frames_of(output, row)
    assert len({len(streamer.frames(row)) for row in range(5)}) > 2
    assert_same_answers(model.generate(**inputs, **settings), output)


def test_frames_come_when_they_are_complete(lively):
    streamer = Recorder()
    scripted(lively(), [60] * 10 + [2], codes=numbered(1, 40), **prompts("tt"), max_new_tokens=14, streamer=streamer)
    kinds = [step[0] for step in streamer.steps]
    assert kinds == ["text"] * 8 + ["text", "audio"] * 3 + ["audio"] * 3
    for _, codes, mask in (step for step in streamer.steps if step[0] == "audio"):
        assert codes.shape == (1, 8)
        assert mask.dtype == torch.bool


def test_a_streamer_gets_every_returned_row(lively):
    streamer = Recorder()
    inputs = prompts("tttt", "t3")
    output = lively().generate(**inputs, num_return_sequences=2, max_new_tokens=12, streamer=streamer)
    assert streamer.prompt.equal(inputs["input_ids"].repeat_interleave(2, dim=0))
    for row in range(4):
        assert streamer.text(row) == text_of(output, row, [2])
        assert streamer.frames(row) == frames_of(output, row)


def test_a_streamer_of_text_alone(lively):
    streamer = Recorder()
    output = lively().generate(
        **prompts("tttt", "tt"), max_new_tokens=9, generation_mode="text", streamer=streamer, **GREEDY
    )
    assert all(step[0] == "text" for step in streamer.steps)
    assert streamer.text(1) == text_of(output, 1)
    assert streamer.ended == 1


@pytest.mark.parametrize("generation_mode", ["text", "audio"])
def test_transformers_own_streamer(lively, capsys, generation_mode):
    tokenizer = build_tokenizer()
    text = [*tokenizer.encode("well, a few words"), 2]
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    scripted(
        lively(vocab_size=1024),
        text,
        codes=numbered(1, 40),
        **prompts("tt"),
        max_new_tokens=40,
        streamer=streamer,
        generation_mode=generation_mode,
    )
    assert capsys.readouterr().out.strip() == "well, a few words"


# ---- settings ----


def test_the_released_settings_are_the_defaults(lively, tmp_path):
    expected = {
        "do_sample": True,
        "temperature": 0.75,
        "top_p": 0.9,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "audio_temperature": 0.2,
        "audio_top_k": 50,
        "audio_repetition_penalty": 1.05,
        "audio_repetition_window": 3,
        "post_text_token_id": 234,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "return_dict_in_generate": True,
        "max_new_tokens": 512,
        "suppress_tokens": [IMAGE, AUDIO],
    }
    model = lively()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert {name: saved.get(name) for name in expected} == expected
    # An original checkpoint has no such file.
    (tmp_path / "generation_config.json").unlink()
    for made in (model, MiniMindOForConditionalGeneration.from_pretrained(tmp_path)):
        assert {name: getattr(made.generation_config, name) for name in expected} == expected


def test_settings_are_saved_and_used(lively, tmp_path):
    settings = {
        "do_sample": True,
        "temperature": 1.5,
        "top_p": 0.8,
        "top_k": 17,
        "repetition_penalty": 1.2,
        "max_new_tokens": 19,
        "audio_temperature": 0.9,
        "audio_top_k": 7,
        "audio_repetition_penalty": 1.4,
        "audio_repetition_window": 5,
        "post_text_token_id": 201,
        "eos_token_id": ENDS,
        "generation_mode": "audio",
    }
    model = lively()
    inputs = prompts("tttt", "tt")
    expected = model.generate(**inputs, seeds=[1, 2], **settings)
    default = model.generate(**inputs, seeds=[1, 2], max_new_tokens=19)
    assert text_of(default, 0) != text_of(expected, 0)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(tmp_path)
    loaded = MiniMindOForConditionalGeneration.from_pretrained(tmp_path)
    for name, value in settings.items():
        assert getattr(loaded.generation_config, name) == value, name
    assert_same_answers(loaded.generate(**inputs, seeds=[1, 2]), expected)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert_same_answers(lively().generate(**inputs, seeds=[1, 2], generation_config=config), expected)


def test_a_call_leaves_the_settings_alone(lively):
    model = lively()
    before = model.generation_config.to_dict()
    config = GenerationConfig(max_new_tokens=3)
    model.generate(**prompts("tt"), generation_config=config, audio_top_k=3, seeds=[1], max_length=9)
    assert model.generation_config.to_dict() == before
    assert config.to_dict() == GenerationConfig(max_new_tokens=3).to_dict()


# ---- waiting for the device ----


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for an accelerator: numbers and shapes read from tensors."""

    reading = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal")

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split(".")[0]
        if name in self.reading:
            self.count[name] += 1
        if name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class Silent(MiniMindOStreamer):
    def put(self, value):
        pass

    def put_audio(self, codes, mask):
        pass

    def end(self):
        pass


@pytest.mark.parametrize("specs", [("tttt",), ("tttt", "tt")], ids=["single", "padded"])
@pytest.mark.parametrize("generation_mode", ["audio", "text"])
@pytest.mark.parametrize("streamer", [None, Silent()], ids=["returned", "streamed"])
@pytest.mark.parametrize("kind", ["greedy", "draws", "seeds", "static"])
def test_one_wait_a_step(lively, monkeypatch, specs, kind, streamer, generation_mode):
    model = lively()
    model.generation_config.eos_token_id = None  # every step runs
    settings = {
        "greedy": GREEDY,
        "draws": {},
        "seeds": {"seeds": range(len(specs))},
        "static": {"cache_implementation": "static"},
    }[kind]
    moved = collections.Counter()
    for name in ("tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            moved[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    counts = []
    for steps in (12, 22):
        moved.clear()
        with Waits() as waits:
            output = model.generate(
                **prompts(*specs),
                max_new_tokens=steps,
                generation_mode=generation_mode,
                streamer=streamer,
                **settings,
            )
        assert output.sequences.shape[1] == 4 + steps
        counts.append(waits.count + moved)
    growth = counts[1] - counts[0]
    if streamer is not None:
        # One copy a step, and what is read from it afterwards is on the host already.
        assert growth.pop("cpu") == 10
        growth.subtract({"tolist": 10, "aten::_local_scalar_dense": 20 if generation_mode == "audio" else 10})
        assert all(count <= 0 for count in growth.values()), growth
    else:
        assert sum(growth.values()) <= 10, growth


# ---- what is refused ----


@pytest.fixture
def untouched(lively):
    """A model whose Thinker must not run."""
    model = lively()

    def fail(*_):
        raise AssertionError("the Thinker has run")

    model.model.register_forward_pre_hook(fail)
    return model


IDS = torch.full((2, 4), 50)
REFERENCE = torch.zeros(2, 8, 3, dtype=torch.long)


def changed(tensor, index, value):
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        # prompts
        ({"input_ids": None}, "Pass prompts"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "non-empty"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "non-empty"),
        ({"input_ids": IDS[0]}, r"\(4,\)"),
        ({"input_ids": IDS.float()}, "float32"),
        ({"inputs": IDS}, "not both"),
        ({"input_ids": changed(IDS, (0, 0), 320)}, "320"),
        ({"input_ids": changed(IDS, (0, 0), -1)}, "-1"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}, "left"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}, "left"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])}, "left"),
        ({"attention_mask": torch.ones(1, 4)}, r"\(1, 4\)"),
        ({"attention_mask": torch.ones(2, 3)}, r"\(2, 3\)"),
        ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"\(2, 1, 4, 4\)"),
        # placeholders
        ({"input_ids": changed(IDS, (0, 1), AUDIO)}, "1 speech placeholders.*0 speech inputs.*`input_features`"),
        ({"input_ids": changed(IDS, 1, IMAGE)}, "4 picture placeholders.*0 picture inputs.*`pixel_values`"),
        (
            {"input_ids": changed(IDS, (0, 1), AUDIO), "audio_hidden_states": torch.zeros(1, 3, 32)},
            "1 speech placeholders.*3 features",
        ),
        (
            {"input_ids": changed(IDS, 1, IMAGE), "image_hidden_states": torch.zeros(2, 4, 32)},
            "4 picture placeholders.*8 features",
        ),
        ({"audio_hidden_states": torch.zeros(1, 3, 32)}, "0 speech placeholders.*3 features"),
        # voices
        ({"reference_codes": REFERENCE.float()}, "integers, got torch.float32"),
        ({"reference_codes": REFERENCE[:1]}, r"\(2, 8, 'any'\), got \(1, 8, 3\)"),
        ({"reference_codes": REFERENCE[:, :7]}, r"got \(2, 7, 3\)"),
        ({"reference_codes": REFERENCE[0]}, r"got \(8, 3\)"),
        ({"reference_codes": changed(REFERENCE, (0, 0, 0), 32)}, "from 0 to 31.*from 0 to 32"),
        ({"reference_codes": changed(REFERENCE, (0, 0, 1), -1)}, "from 0 to 31.*from -1 to 0"),
        ({"reference_codes": changed(REFERENCE, (0, slice(None), 2), PAD)}, "padded on the left"),
        ({"reference_codes": changed(REFERENCE, (0, 3, 0), PAD)}, "padded on the left"),
        ({"speaker_embeddings": torch.zeros(2, 13)}, r"\(2, 12\), got \(2, 13\)"),
        ({"speaker_embeddings": torch.zeros(12)}, r"\(2, 12\), got \(12,\)"),
        ({"speaker_embeddings": torch.zeros(1, 12)}, r"\(2, 12\), got \(1, 12\)"),
        ({"speaker_embeddings": torch.zeros(2, 12, dtype=torch.long)}, "float tensor.*int64"),
        ({"speaker_embeddings": changed(torch.ones(2, 12), (1, 3), torch.nan)}, "finite"),
        ({"speaker_embeddings": changed(torch.ones(2, 12), (1, 3), torch.inf)}, "finite"),
        ({"reference_codes": REFERENCE, "audio_codes": torch.zeros(2, 8, 4, dtype=torch.long)}, "not both"),
        ({"audio_codes": torch.zeros(2, 8, 3, dtype=torch.long)}, r"\(2, 8, 4\), got \(2, 8, 3\)"),
        ({"audio_codes": torch.full((2, 8, 4), CODES)}, "from 0 to 39"),
        # settings
        ({"seeds": [1]}, "each of the 2 returned rows, got 1"),
        ({"seeds": [1, 2], "num_return_sequences": 2}, "each of the 4 returned rows, got 2"),
        ({"generation_mode": "sing"}, "'sing'"),
        ({"audio_temperature": 0.0}, "`audio_temperature` must be above 0, got 0.0"),
        ({"audio_temperature": -1.0}, "`audio_temperature`"),
        ({"audio_repetition_penalty": 0.0}, "`audio_repetition_penalty`"),
        ({"audio_top_k": -1}, "`audio_top_k`.*got -1"),
        ({"audio_top_k": 2.5}, "`audio_top_k`.*got 2.5"),
        ({"audio_repetition_window": -2}, "`audio_repetition_window`.*got -2"),
        ({"post_text_token_id": 320}, "`post_text_token_id`.*320"),
        ({"temperature": 0.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"unheard_of": 1}, "unheard_of"),
        # modes
        ({"num_beams": 2}, "beam"),
        ({"num_beams": 2, "do_sample": True}, "beam"),
        ({"prompt_lookup_num_tokens": 2}, "assisted|prompt_lookup"),
    ],
)
def test_bad_calls_end_before_the_thinker_runs(untouched, kwargs, message):
    with pytest.raises(ValueError, match=f"(?i){message}"):
        untouched.generate(**{"input_ids": IDS, "max_new_tokens": 3, **kwargs})


def test_assisted_generation_is_refused(untouched, lively):
    with pytest.raises(ValueError, match="(?i)assist"):
        untouched.generate(IDS[:1], assistant_model=lively(), max_new_tokens=3)


def test_a_model_without_encoders_says_so(tiny_model):
    model = tiny_model(audio_config=None, vision_config=None)
    with pytest.raises(ValueError, match="--audio-encoder"):
        model.generate(**prompts("t3t"))
    with pytest.raises(ValueError, match="--vision-encoder"):
        model.generate(**prompts("tPt"))


@pytest.mark.parametrize("name", ["model.norm.weight", "talker.norm.weight"])
@pytest.mark.parametrize("sampling", [GREEDY, {}], ids=["greedy", "draws"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_noticed(lively, name, sampling, value):
    model = lively()
    model.get_parameter(name).data[3] = value
    with pytest.raises(ValueError, match="not finite.*weights are damaged"):
        model.generate(**prompts("tttt"), max_new_tokens=3, **sampling)


def test_broken_rows_are_noticed_in_text_alone(lively):
    model = lively()
    model.talker.norm.weight.data[3] = torch.nan
    model.generate(**prompts("tttt"), max_new_tokens=3, generation_mode="text")
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.generate(**prompts("tttt"), max_new_tokens=3, generation_mode="text")


def test_complete_answers_are_told_from_cut_ones(tiny_model):
    """The first row is made to end; the second one goes on to the last step."""
    model = tiny_model()
    end = {"text": 3, "code": model.config.audio_stop_token}

    def ends(module, args, output):
        for scores, value in ((output.logits, end["text"]), (output.audio_logits, end["code"])):
            if scores is not None:
                scores[0, ..., value] = 1e4
                scores[1, ..., value] = -1e4
        if output.audio_logits is not None:
            output.audio_logits[1, ..., model.config.audio_codebook_size :] = -1e4
        return output

    hook = model.register_forward_hook(ends)
    settings = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": 3}
    outputs = model.generate(torch.tensor([[5, 6], [7, 8]]), **settings)
    assert outputs.is_complete.tolist() == [True, False]
    text = model.generate(torch.tensor([[5, 6], [7, 8]]), **settings, generation_mode="text")
    assert text.is_complete.tolist() == [True, False]
    hook.remove()
