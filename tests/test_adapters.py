"""LoRA adapters: they train, are saved small with what tells their base and voices, load onto it alone, switch while a
conversation goes on, and merge into the same voice."""

import io
import itertools
import json
import re
import shutil

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from minimind_o_hf import Conversation, MiniMindOForConditionalGeneration, Voice, VoiceLibrary, default_checkpoint
from minimind_o_hf.adapters import (
    carry_voices,
    get_peft_model,
    lora_config,
    merge_adapter,
    merge_checkpoint,
    put_on,
    read_adapter,
    switch_adapter,
)
from minimind_o_hf.cli import main
from minimind_o_hf.publishing import publish
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 320, (4, 12), generator=generator)
    codes = torch.randint(0, 32, (4, 8, 12), generator=generator)
    return {"input_ids": ids, "labels": ids, "audio_codes": codes, "audio_labels": codes}


def trained(base, config, batch, folder):
    model = peft.get_peft_model(base, config)
    samples = [{name: value[index] for name, value in batch.items()} for index in range(4)]
    arguments = MiniMindOTrainingArguments(
        output_dir=str(folder / "run"),
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        max_steps=5,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
    )
    MiniMindOTrainer(model, arguments, train_dataset=samples).train()
    return model


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize(
    ("preset", "train_codec"), [("thinker", False), ("talker", False), ("all", False), ("all", True), ("talker", True)]
)
def test_trained_saved_loaded_and_merged(tiny_model, tmp_path, batch, preset, train_codec, use_moe):
    def base():
        return tiny_model(use_moe, audio_config=None, vision_config=None)

    model = trained(base(), lora_config(preset, rank=4, train_codec=train_codec), batch, tmp_path)
    adapted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {"thinker": ("model.model.layers.",), "talker": ("model.talker.",)}.get(preset)
    for name in adapted:
        assert wanted is None or name.startswith(tuple(f"base_model.{prefix}" for prefix in wanted)), name
    assert any(".lm_head" in name for name in adapted) == train_codec
    model.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        saved = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert saved == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    model.eval()
    prompt = batch["input_ids"][:2, :5]
    settings = {"seeds": [1, 2], "max_new_tokens": 16}
    with torch.no_grad():
        expected, plain = model(**batch), base()(**batch)
    assert not torch.allclose(expected.logits, plain.logits, atol=1e-3) or preset == "talker"
    assert not torch.allclose(expected.audio_logits, plain.audio_logits, atol=1e-3)
    spoken = model.generate(prompt, **settings)

    fresh = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        loaded = fresh(**batch)
    assert torch.equal(loaded.logits, expected.logits)
    assert torch.equal(loaded.audio_logits, expected.audio_logits)

    merged = fresh.merge_and_unload()
    assert type(merged) is MiniMindOForConditionalGeneration
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).audio_logits, expected.audio_logits, rtol=0, atol=1e-4)
    said = merged.generate(prompt, **settings)
    assert torch.equal(said.sequences, spoken.sequences)
    assert torch.equal(said.audio_codes, spoken.audio_codes)
    merged.save_pretrained(tmp_path / "merged")
    again = MiniMindOForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.generate(prompt, **settings).audio_codes, spoken.audio_codes)


def test_bad_presets():
    with pytest.raises(ValueError, match="thinker, talker, all"):
        lora_config("ears")
    with pytest.raises(ValueError, match="train_codec"):
        lora_config("thinker", train_codec=True)


# --- Adapters of the package's nano: their base, their voices, several on one model, merging


def nano():
    return AutoModelForMultimodalLM.from_pretrained(default_checkpoint())


def changed(seed, **settings):
    """nano with an adapter that changes something."""
    torch.manual_seed(seed)
    model = get_peft_model(nano(), lora_config("all", rank=2, init_lora_weights=False, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def voice_library(path, name="me", **notes):
    library = VoiceLibrary(path)
    notes = {"language": "en", "licence": "CC0-1.0", "consent": "The speaker agrees."} | notes
    library.add(Voice(spk_emb=torch.linspace(-1, 1, 192), name=name, **notes))
    return library


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of nano; the first one trains the codec's embedding and head whole, and carries a voice."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, name in enumerate(("calm", "talker")):
        changed(number, train_codec=name == "calm").save_pretrained(folder / name)
    carry_voices(voice_library(folder / "voices.safetensors"), folder / "calm")
    return folder


@pytest.fixture(scope="module")
def expected(adapters):
    """What nano says with each of them, and with none."""
    said = {None: outputs(nano())}
    for name in ("calm", "talker"):
        said[name] = outputs(peft.PeftModel.from_pretrained(nano(), adapters / name).eval())
    assert not any(torch.equal(said[a][1], said[b][1]) for a, b in itertools.combinations(said, 2))
    return said


def outputs(model):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(40, 320, (2, 9), generator=generator)
    codes = torch.randint(0, 32, (2, 8, 9), generator=generator)
    with torch.no_grad():
        found = model(input_ids=ids, audio_codes=codes)
    return found.logits, found.audio_logits


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_an_adapter_names_its_base_and_carries_its_voices(adapters):
    info = read_adapter(adapters / "calm")
    assert (info.base, info.revision, info.has_probe) == (str(default_checkpoint()), None, True)
    assert (info.method, info.rank, info.alpha) == ("LORA", 2, 4)
    assert set(info.parts) == {"Thinker", "Talker"}
    assert info.whole == ["talker.embed_tokens", "talker.lm_head"]
    assert info.voices["me"].licence == "CC0-1.0"
    for told in ("rank 2", str(default_checkpoint()), "voice me: CC0-1.0", "talker.lm_head"):
        assert told in str(info)


def test_voices_of_an_adapter_join_those_of_the_processor(adapters):
    processor = AutoProcessor.from_pretrained(default_checkpoint(), load_audio_tokenizer=False)
    before = set(processor.voices)
    assert processor.load_voices(adapters / "calm") == ["me"]
    assert set(processor.voices) == before | {"me"}
    assert torch.equal(processor.voices["me"]["spk_emb"], torch.linspace(-1, 1, 192))
    assert processor.load_voices(adapters / "talker") == []


def test_the_commit_of_a_base_from_the_hub_is_named(tmp_path):
    base = nano()
    base.config.name_or_path, base.config._commit_hash = "somebody/nano", "a" * 40
    get_peft_model(base, lora_config("talker", rank=1)).save_pretrained(tmp_path)
    info = read_adapter(tmp_path)
    assert (info.base, info.revision) == ("somebody/nano", "a" * 40)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["revision"] == "a" * 40


# A name may be that of a part of the model, too.
@pytest.mark.parametrize("names", [("calm", "talker"), ("default", "model"), ("layers", "weight")])
def test_several_adapters_on_one_model_switch(adapters, expected, names, caplog):
    model = nano()
    for name, folder in zip(names, ("calm", "talker"), strict=True):
        found = model.load_adapter(adapters / folder, name)
        assert not found.missing_keys
        assert not found.unexpected_keys
    assert "MISSING" not in caplog.text
    first, second = names
    for name, folder in ((second, "talker"), (first, "calm"), (None, None), (first, "calm"), (second, "talker")):
        switch_adapter(model, name)
        assert same(outputs(model), expected[folder])
    model.delete_adapter(second)
    switch_adapter(model, first)
    assert same(outputs(model), expected["calm"])
    with pytest.raises(ValueError, match=f"no adapter 'loud': {first}"):
        switch_adapter(model, "loud")


def test_a_peft_model_switches_too(adapters, expected):
    model = peft.PeftModel.from_pretrained(nano(), adapters / "calm", "calm")
    model.load_adapter(adapters / "talker", "talker")
    model.eval()
    assert same(outputs(model), expected["calm"])
    model.set_adapter("talker")
    assert same(outputs(model), expected["talker"])
    with model.disable_adapter():
        assert same(outputs(model), expected[None])


def test_in_bfloat16_the_base_is_known_again(adapters):
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForMultimodalLM.from_pretrained(default_checkpoint(), dtype=dtype)
        model.load_adapter(adapters / "calm")
        assert outputs(model)[0].isfinite().all()


def other_base(kind, tiny_model):
    if kind == "other weights":
        torch.manual_seed(5)
        base = type(nano())(nano().config)
    elif kind == "another adapter merged in":
        base = changed(7, train_codec=False).merge_and_unload()
    elif kind == "a projector trained on":
        base = nano()
        with torch.no_grad():
            base.audio_proj.mlp[0].weight.mul_(1.02)
    else:
        base = tiny_model(audio_config=None, vision_config=None)
    base.config.name_or_path = "somebody/else"
    return base.eval()


@pytest.mark.parametrize(
    "kind", ["other weights", "another adapter merged in", "a projector trained on", "other sizes"]
)
def test_an_adapter_of_another_base_is_refused_with_both_names(adapters, tiny_model, kind):
    base = other_base(kind, tiny_model)
    with torch.no_grad():
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for put_on_base in (base.load_adapter, lambda folder: merge_adapter(base, folder)):
        with pytest.raises(ValueError, match="trained on") as caught:
            put_on_base(adapters / "calm")
        assert "somebody/else" in str(caught.value)
        assert str(default_checkpoint()) in str(caught.value)
        after = base.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in after)
        assert not base._hf_peft_config_loaded


def spoilt(adapters, folder, spoil):
    """A copy of an adapter, without the file that tells its base, and with other tensors."""
    shutil.copytree(adapters / "talker", folder)
    (folder / "base_model.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    spoil(tensors, min(tensors))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors, name: tensors.pop(name), "missing or have no place"),
        (lambda tensors, name: tensors.update({f"{name}.x": torch.ones(1)}), "missing or have no place"),
        (lambda tensors, name: tensors.update({name: tensors[name][:1].clone()}), "other sizes"),
    ],
    ids=["missing", "surplus", "size"],
)
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(adapters, expected, tmp_path, spoil, said):
    folder = spoilt(adapters, tmp_path / "spoilt", spoil)
    model = nano()
    names = set(model.state_dict())
    for put_it_on in (model.load_adapter, lambda folder: merge_adapter(model, folder)):
        with pytest.raises(ValueError, match=f"{said}|se the model it was trained on"):
            put_it_on(folder)
        assert not model._hf_peft_config_loaded
        assert set(model.state_dict()) == names
        assert same(outputs(model), expected[None])
    model.load_adapter(adapters / "calm")
    with pytest.raises(ValueError, match=said):
        model.load_adapter(folder, "second")
    assert same(outputs(model), expected["calm"])


def test_without_its_adapters_the_model_is_what_it_was(adapters, tmp_path):
    model = nano()
    before = model.state_dict()
    for name in ("calm", "talker"):
        model.load_adapter(adapters / name, name)
    model.delete_adapter(["talker", "calm"])
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path)
    assert same(outputs(AutoModelForMultimodalLM.from_pretrained(tmp_path)), outputs(nano()))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"use_rslora": True}], ids=["DoRA", "rsLoRA"])
def test_other_kinds_of_lora_load(settings, tmp_path):
    model = changed(3, **settings)
    model.save_pretrained(tmp_path)
    loaded = nano()
    loaded.load_adapter(tmp_path)
    assert same(outputs(loaded), outputs(model))


def test_an_adapter_of_tied_embeddings_is_loaded_but_not_merged(tmp_path):
    model = get_peft_model(
        nano(), peft.LoraConfig(r=2, target_modules=r"model\.embed_tokens", init_lora_weights=False)
    )
    model.eval().save_pretrained(tmp_path)
    loaded = nano()
    loaded.load_adapter(tmp_path)
    assert same(outputs(loaded), outputs(model))
    base = nano()
    with pytest.raises(ValueError, match="can be loaded, but not merged"):
        merge_adapter(base, tmp_path)
    assert same(outputs(base), outputs(nano()))


def test_hot_swapping_takes_an_adapter_of_the_same_tensors_alone(adapters, expected, tmp_path):
    torch.manual_seed(9)
    changed(9).save_pretrained(tmp_path)
    model = nano()
    model.load_adapter(tmp_path, "x")
    model.load_adapter(adapters / "talker", "x", hotswap=True)
    assert same(outputs(model), expected["talker"])
    with pytest.raises(ValueError, match="other tensors"):
        model.load_adapter(adapters / "calm", "x", hotswap=True)
    assert same(outputs(model), expected["talker"])


def test_an_adapter_with_a_name_of_its_own_has_its_base_beside_it(tmp_path):
    get_peft_model(nano(), lora_config("talker", rank=1), "voice").save_pretrained(tmp_path)
    assert read_adapter(tmp_path / "voice").has_probe


def test_several_are_put_on_all_or_none(adapters, expected, tmp_path):
    processor = AutoProcessor.from_pretrained(default_checkpoint(), load_audio_tokenizer=False)
    model, voices = nano(), set(processor.voices)
    with pytest.raises(FileNotFoundError, match="no directory"):
        put_on(model, processor, [adapters / "calm", tmp_path / "gone"])
    folder = spoilt(adapters, tmp_path / "spoilt", lambda tensors, name: tensors.pop(name))
    with pytest.raises(ValueError, match="missing"):
        put_on(model, processor, [adapters / "calm", folder])
    assert same(outputs(model), expected[None])
    assert not model._hf_peft_config_loaded
    assert set(processor.voices) == voices
    for name in ("lora", "a.b"):
        shutil.copytree(adapters / "talker", tmp_path / name)
    names = put_on(model, processor, [tmp_path / "lora", adapters / "calm", tmp_path / "a.b", adapters / "calm"])
    assert names == ["lora-2", "calm", "a-b", "calm-2"]
    assert same(outputs(model), expected["talker"])
    assert set(processor.voices) == voices | {"me"}


def test_what_is_no_adapter_is_refused(adapters, tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no adapter_config.json"):
        read_adapter(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(adapters / "talker", folder)
    whole = (folder / "base_model.json").read_text()
    for damage in ({"probe": "x"}, {"probe": {}}, {"probe": {"a": [1]}}, {"name": ["x"]}, {"revision": 3}):
        (folder / "base_model.json").write_text(json.dumps(json.loads(whole) | damage))
        with pytest.raises(ValueError, match="damaged"):
            read_adapter(folder)
    (folder / "base_model.json").unlink()
    settings = (folder / "adapter_config.json").read_text()
    for damage in ({"lora_alpha": "x"}, {"r": "x"}, {"modules_to_save": 5}, {"peft_type": "NOPE"}):
        (folder / "adapter_config.json").write_text(json.dumps(json.loads(settings) | damage))
        with pytest.raises(ValueError, match=r"adapter_config\.json of"):
            read_adapter(folder)
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="no JSON object"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(settings)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        read_adapter(folder)
    with pytest.raises(ValueError, match="damaged"):
        nano().load_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"")
    for read in (read_adapter, nano().load_adapter, lambda folder: merge_adapter(nano(), folder)):
        with pytest.raises(ValueError, match="pickle"):
            read(folder)
    for name in ("lora", "a.b"):
        with pytest.raises(ValueError, match="cannot be named"):
            nano().load_adapter(adapters / "talker", name)


def test_the_trainer_leaves_what_tells_the_base_and_no_pickle(batch, tmp_path):
    model = get_peft_model(nano(), lora_config("talker", rank=2))
    samples = [{name: value[index] for name, value in batch.items()} for index in range(4)]
    arguments = MiniMindOTrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_steps=1, save_steps=1, disable_tqdm=True
    )
    trainer = MiniMindOTrainer(model, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert read_adapter(folder).has_probe
        assert not (folder / "training_args.bin").exists()
    nano().load_adapter(tmp_path)


# --- A conversation


@pytest.mark.parametrize("wrapped", [False, True], ids=["load_adapter", "PeftModel"])
def test_adapters_switch_while_a_conversation_goes_on(adapters, wrapped):
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    model = nano()
    if wrapped:
        model = peft.PeftModel.from_pretrained(model, adapters / "calm", "calm")
        model.load_adapter(adapters / "talker", "talker")
        model.eval()
    else:
        put_on(model, processor, [adapters / "calm", adapters / "talker"])
    settings = {"seed": 1, "max_new_tokens": 10}
    conversation = Conversation(model, processor, voice="slt", max_turns=8)
    for number, name in enumerate(("calm", "talker", "talker", "calm")):
        model.set_adapter(name)
        cold = Conversation(model, processor, voice="slt", max_turns=8)
        cold._turns = list(conversation._turns)
        question = f"What is {number} plus one?"
        answer, anew = conversation.ask(question, **settings), cold.ask(question, **settings)
        assert answer.text == anew.text
        assert torch.equal(answer.audio, anew.audio)
    assert len(conversation.messages) == 8


@pytest.mark.parametrize("way", ["loaded anew", "merged", "scaled"])
def test_a_conversation_notices_other_weights_under_the_same_name(adapters, way):
    processor = AutoProcessor.from_pretrained(default_checkpoint())
    model = nano()
    model.load_adapter(adapters / "talker", "x")
    conversation = Conversation(model, processor, max_turns=8)
    conversation.ask("Hello", seed=1, max_new_tokens=4)
    if way == "loaded anew":
        model.delete_adapter("x")
        model.load_adapter(adapters / "calm", "x")
    elif way == "merged":
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(1.5)
    else:
        model.model.layers[0].mlp.down_proj.set_scale("x", 3.0)
    cold = Conversation(model, processor, max_turns=8)
    cold._turns = list(conversation._turns)
    settings = {"seed": 1, "max_new_tokens": 6}
    assert torch.equal(conversation.ask("Who are you?", **settings).audio, cold.ask("Who are you?", **settings).audio)


def test_in_chat(adapters, capsys, tmp_path, monkeypatch):
    lines = ["/adapter talker", "/adapter", "/adapter calm", "/adapter loud", "/voice me", "/quit"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    options = ["--adapter", str(adapters / "calm"), "--adapter", str(adapters / "talker")]
    assert main(["chat", *options, "--out", str(tmp_path / "reply.wav")]) == 0
    printed = capsys.readouterr()
    assert "Adapters: calm, talker" in printed.err
    assert re.findall(r"Adapter: (\w+)", printed.out) == ["talker", "none", "calm"]
    assert "Voice: me" in printed.out
    assert "no adapter 'loud'" in printed.err
    assert main(["chat", *options, "--text", "Hello"]) == 1
    assert "--adapter once" in capsys.readouterr().err


# --- Merging


def test_merged_it_is_the_checkpoint_with_what_the_adapter_changes(adapters, expected, tmp_path, capsys):
    assert main(["adapter", "merge", str(adapters / "calm"), str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    made = tmp_path / "merged"
    base = {path.relative_to(default_checkpoint()).as_posix() for path in default_checkpoint().rglob("*.*")}
    files = {path.relative_to(made).as_posix() for path in made.rglob("*.*")}
    assert files == base - {"provenance.json", "LICENSE"} | (files & {"LICENSE"})
    changes = {"model.safetensors", "config.json", "voices.safetensors", "README.md"}
    for name in files - changes:
        assert (made / name).read_bytes() == (default_checkpoint() / name).read_bytes(), name
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (default_checkpoint(), made))
    assert old == new  # nano's names float32, though its file holds float16

    before, after = load_file(default_checkpoint() / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    different = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert different
    for name in different:
        assert re.fullmatch(r"(model|talker)\.(layers\.\d+\.(self_attn|mlp)|embed_tokens|lm_head)\..*", name), name
    model = AutoModelForMultimodalLM.from_pretrained(made)
    for merged, apart in zip(outputs(model), expected["calm"], strict=True):
        torch.testing.assert_close(merged, apart, rtol=0, atol=1e-3)
    voices = VoiceLibrary(made / "voices.safetensors").voices()
    assert set(voices) == {*VoiceLibrary(default_checkpoint() / "voices.safetensors").names(), "me"}
    assert voices["me"].consent == "The speaker agrees."
    card = (made / "README.md").read_text()
    assert "`nano` with the adapter `calm`" in card
    assert str(tmp_path) not in card
    assert publish(made, "somebody/merged", dry_run=tmp_path / "published") == str(tmp_path / "published")


def test_merged_weights_have_the_type_of_the_base(adapters, tmp_path):
    merge_checkpoint(adapters / "talker", tmp_path / "merged")
    before = load_file(default_checkpoint() / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert (tmp_path / "merged" / "config.json").read_bytes() == (default_checkpoint() / "config.json").read_bytes()
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    for name, tensor in before.items():
        if name.startswith("vision_tower"):
            before[name] = tensor.float()
    other = shutil.copytree(default_checkpoint(), tmp_path / "mixed")
    save_file(before, other / "model.safetensors", metadata={"format": "pt"})
    merge_checkpoint(adapters / "talker", tmp_path / "of mixed", base=other)
    after = load_file(tmp_path / "of mixed" / "model.safetensors")
    assert {name: tensor.dtype for name, tensor in before.items()} == {n: t.dtype for n, t in after.items()}
    same_tensors = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith(("audio_", "vision_", "model.embed"))} <= same_tensors


def test_merging_refuses_what_a_type_cannot_hold(adapters, tmp_path):
    adapter = shutil.copytree(adapters / "talker", tmp_path / "large")
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in tensors if ".lora_B." in name)
    tensors[name] = torch.full_like(tensors[name], 1e6)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"too large for torch\.float16: .*--dtype"):
        merge_checkpoint(adapter, tmp_path / "merged")
    merge_checkpoint(adapter, tmp_path / "whole", dtype=torch.float32)
    double = shutil.copytree(default_checkpoint(), tmp_path / "double")
    weights = load_file(double / "model.safetensors")
    save_file({name: tensor.double() for name, tensor in weights.items()}, double / "model.safetensors")
    with pytest.raises(ValueError, match="of the type F64: .*--dtype"):
        merge_checkpoint(adapters / "talker", tmp_path / "merged", base=double)
    assert not (tmp_path / "merged").exists()


def test_merging_does_not_replace_what_holds_the_adapter_or_its_base(adapters, tmp_path):
    run = shutil.copytree(default_checkpoint(), tmp_path / "run")
    adapter = shutil.copytree(adapters / "talker", run / "adapter")
    base = shutil.copytree(default_checkpoint(), run / "base")
    for merged, model in ((adapter, default_checkpoint()), (adapters / "talker", base)):
        with pytest.raises(ValueError, match="or holds, what is to be merged"):
            merge_checkpoint(merged, run, base=model, overwrite=True)
    assert {path.name for path in run.iterdir()} > {"adapter", "base", "config.json"}


def test_merging_refuses_and_leaves_nothing(adapters, tmp_path, capsys):
    target = tmp_path / "merged"
    moved = tmp_path / "moved"
    shutil.copytree(adapters / "talker", moved)
    config, base = (json.loads((moved / name).read_text()) for name in ("adapter_config.json", "base_model.json"))
    (moved / "base_model.json").write_text(json.dumps(base | {"name": "/gone"}))
    (moved / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    assert main(["adapter", "merge", str(moved), str(target)]) == 1
    assert "name it (`--model`)" in capsys.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(default_checkpoint(), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert main(["adapter", "merge", str(moved), str(target), "--model", str(other)]) == 1
    message = capsys.readouterr().err
    assert "/gone" in message
    assert str(other) in message
    assert not target.exists()
    assert main(["adapter", "merge", str(moved), str(target), "--model", str(default_checkpoint())]) == 0
    assert main(["adapter", "merge", str(moved), str(target), "--model", str(default_checkpoint())]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["adapter", "merge", str(moved), str(other), "--model", str(other), "--overwrite"]) == 1
    assert "another directory" in capsys.readouterr().err
    save_file(load_file(adapters / "calm" / "voices.safetensors"), moved / "voices.safetensors")  # without notes
    assert main(["adapter", "merge", str(moved), str(tmp_path / "new"), "--model", str(default_checkpoint())]) == 1
    assert "The voice 'me'" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_info(adapters, capsys, tmp_path):
    assert main(["adapter", "info", str(adapters / "calm"), "--model", str(default_checkpoint())]) == 0
    told = capsys.readouterr().out
    assert "rank 2" in told
    assert f"It belongs to {default_checkpoint()}" in told
    plain = spoilt(adapters, tmp_path / "plain", lambda tensors, name: None)
    assert main(["adapter", "info", str(plain)]) == 0
    assert "no base_model.json" in capsys.readouterr().out
    assert main(["adapter", "info", str(tmp_path)]) == 1
    assert "is no adapter" in capsys.readouterr().err
