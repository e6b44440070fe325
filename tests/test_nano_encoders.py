"""The nano recipe's tokenizer, pictures and encoders: the pieces exactly, and quick runs of the whole stages."""

import importlib
import json
import math
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from minimind_o_hf.modeling import CamPlusPlusModel, MiniMindOForConditionalGeneration
from minimind_o_hf.processing import CamPlusPlusFeatureExtractor, MiniMindOFeatureExtractor
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, SiglipVisionModel
from transformers.models.fun_asr_nano import FunAsrNanoEncoder

from minimind_o_hf.presets import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_scripts" / "nano"))
stages, words, make_corpus, make_tokenizer, pictures, vision, speech, speaker = (
    importlib.import_module(name)
    for name in (
        *("stages", "corpus_words", "make_corpus", "make_tokenizer", "draw_pictures"),
        *("train_vision_encoder", "train_speech_encoder", "train_speaker_encoder"),
    )
)


# The tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = ["What colour is the sky?", "The sky is blue.", "Tell me what colour the sky is."] * 20
    make_tokenizer.learn_tokenizer(texts, 320).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_tokenizer_keeps_the_special_and_the_byte_ids(tokenizer):
    preset = build_tokenizer()
    fixed = len(SPECIAL_TOKENS) + len(ADDED_TOKENS) + 256
    assert fixed == 292
    assert tokenizer.convert_ids_to_tokens(range(fixed)) == preset.convert_ids_to_tokens(range(fixed))
    assert tokenizer("\n\n").input_ids == [234, 234]
    assert tokenizer("<think>\n</think><|im_end|>").input_ids == [25, 234, 26, 2]
    assert (tokenizer.image_token, tokenizer.audio_token, tokenizer.padding_side) == (
        *("<|image_pad|>", "<|audio_pad|>"),
        "left",
    )


def test_the_tokenizer_learns_frequent_words_and_still_writes_everything(tokenizer):
    assert len(tokenizer) == 320
    assert tokenizer.tokenize(" colour is the sky") == ["Ġcolour", "Ġis", "Ġthe", "Ġsky"]
    text = "Größe: 7 ≠ 8\t<tool_call>"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert make_tokenizer.share_of_whole_words(tokenizer, [" sky", " colour", " elephant", " stone"]) == 0.5


# Pictures


def regions(mask):
    """Masks of the connected regions of a mask that hold more than 20 pixels."""
    left, found = np.pad(mask, 1), []
    while left.any():
        region = np.zeros_like(left)
        region.flat[left.argmax()] = True
        size = 0
        while region.sum() > size:
            size = region.sum()
            for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
                region |= np.roll(region, step, axis) & left
        left &= ~region
        found.append(region[1:-1, 1:-1])
    return [region for region in found if region.sum() > 20]


def regions_of(picture, colour):
    """Where a picture has a colour: shades and noise are within 30."""
    distance = np.abs(np.asarray(picture).astype(int) - pictures.COLOURS[colour]).max(-1)
    return regions(distance <= 30)


@pytest.mark.parametrize("colour", pictures.COLOURS)
@pytest.mark.parametrize("where", pictures.CENTRES)
def test_an_object_is_drawn_in_its_colour_at_its_place(colour, where):
    for seed, shape in enumerate(words.SHAPES):
        picture = pictures.draw_scene([{"shape": shape, "colour": colour, "where": where}], seed)
        assert (picture.size, picture.mode) == ((128, 128), "RGB")
        (region,) = regions_of(picture, colour)
        y, x = np.argwhere(region).mean(0) / 128
        assert abs(x - pictures.CENTRES[where][0]) < 0.07
        assert abs(y - pictures.CENTRES[where][1]) < 0.07
        for other in set(pictures.COLOURS) - {colour}:
            assert not regions_of(picture, other)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_equal_objects_are_as_many_as_the_scene_says(count):
    for seed in range(10):
        for shape in words.SHAPES:
            scene = [{"shape": shape, "colour": "blue", "where": None}] * count
            assert len(regions_of(pictures.draw_scene(scene, seed), "blue")) == count


@pytest.mark.parametrize(
    ("shape", "share"), [("square", 1.0), ("circle", 0.785), ("triangle", 0.5), ("star", 0.33), ("heart", 0.61)]
)
def test_a_shape_fills_its_part_of_its_box(shape, share):
    corners = (pictures.outline(shape) + 1.3) / 2.6 * 400
    mask = Image.new("1", (400, 400))
    ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners.tolist()], fill=1)
    width, height = np.ptp(corners, axis=0)
    assert np.asarray(mask).sum() / (width * height) == pytest.approx(share, abs=0.03)


def test_two_objects_are_where_the_scene_says():
    scene = [
        {"shape": "star", "colour": "red", "where": "top"},
        {"shape": "heart", "colour": "white", "where": "bottom"},
    ]
    for seed in range(10):
        picture = pictures.draw_scene(scene, seed, size=96)
        ((red,), (white,)) = regions_of(picture, "red"), regions_of(picture, "white")
        assert np.argwhere(red)[:, 0].max() < np.argwhere(white)[:, 0].min()


def test_a_picture_only_depends_on_its_scene_and_seed():
    scene = [{"shape": "star", "colour": "red", "where": None}] * 3
    first, again, other = (np.asarray(pictures.draw_scene(scene, seed)) for seed in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    with pytest.raises(ValueError, match="There is no shape 'cube'"):
        pictures.draw_scene([{"shape": "cube", "colour": "red", "where": "top"}], 0)


# The vision encoder


@pytest.fixture(scope="module")
def scenes():
    return vision.all_scenes(0)


def test_scenes_are_all_that_can_be_and_held_out_as_in_the_corpus(scenes):
    singles, equals, pairs = 5 * 8 * 5, 5 * 8 * 4, 20 * 56 * 2
    assert len(scenes["train"]) + len(scenes["eval"]) == singles + equals + pairs
    assert 0.03 < len(scenes["eval"]) / (singles + equals + pairs) < 0.07
    corpus = make_corpus.make_conversations(seed=0, size=100)
    for split in ("train", "eval"):
        known = {json.dumps(scene) for scene in scenes[split]}
        own = {json.dumps(row["scene"]) for row in corpus if row["scene"] and row["split"] == split}
        assert own
        assert own <= known


def test_labels_say_what_the_scene_says():
    labels = vision.scene_labels(
        [
            {"shape": "square", "colour": "green", "where": "left"},
            {"shape": "heart", "colour": "red", "where": "right"},
        ]
    )
    assert labels["count"] == 1
    assert labels["shapes"] == [0, 1, 0, 0, 1]
    assert labels["colours"] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert {name: value for name, value in labels.items() if " " in name and value} == {
        "shape left": 2,
        "colour left": 2,
        "shape right": 5,
        "colour right": 1,
    }
    labels = vision.scene_labels([{"shape": "star", "colour": "blue", "where": None}] * 4)
    assert labels["count"] == 3
    assert {value for name, value in labels.items() if " " in name} == {-100}


def test_tokens_answer_for_what_lies_on_their_patch():
    scene = [{"shape": "square", "colour": "white", "where": "bottom"}]
    for seed in range(5):
        picture, shapes, colours = vision.draw_labelled(scene, np.random.default_rng(seed))
        white = (np.abs(picture.astype(int) - 244).max(-1) <= 30).reshape(6, 16, 6, 16).mean((1, 3)).reshape(-1)
        assert (shapes[white > 0.3] == 2).all()
        assert (colours[white > 0.3] == 6).all()
        assert (shapes[white < 0.1] == 0).all()
        assert (colours[white < 0.1] == 0).all()


def test_accuracy_counts_what_is_right():
    scene = [{"shape": "star", "colour": "blue", "where": "top"}]
    labels = {name: torch.tensor([value] * 2) for name, value in vision.scene_labels(scene).items()}
    labels["patch"] = torch.zeros(2, 2, 36, dtype=torch.long)
    heads = vision.Heads(16)
    scores = {name: torch.zeros(2, head.out_features) for name, head in zip(heads.names, heads.answers, strict=True)}
    scores["patch"] = torch.zeros(2, 36, 15)
    scores["shapes"] = torch.tensor([[-1.0, -1, -1, 1, -1], [-1.0, -1, -1, 1, 1]])
    scores["colours"] = torch.where(labels["colours"] > 0, 1.0, -1.0)
    for name in scores:
        if name.split()[-1] in vision.PLACES:
            scores[name][torch.arange(2), labels[name]] = 1
    scores["colour middle"][1, 3] = 2
    right = {name: values.tolist() for name, values in vision.count_right(scores, labels).items()}
    assert right == {"count": [1, 1], "shapes": [1, 0], "colours": [1, 1], "places": [1, 0], "tokens": [1, 1]}


# The speech encoder


def test_greedy_decoding_drops_repetitions_and_blanks():
    best = torch.tensor([3, 0, 0, 3, 0, 2, 2, 3, 3])
    scores = torch.nn.functional.one_hot(best, 4).float()
    assert speech.greedy(scores) == [0, 0, 2]


def test_the_ctc_loss_of_one_frame_is_its_cross_entropy():
    scores = torch.tensor([[[1.0, 2.0, 0.0]], [[0.5, 0.0, 0.0]]])
    wanted = torch.nn.functional.cross_entropy(scores[:, 0], torch.tensor([1, 0]))
    assert speech.ctc_loss(scores, torch.tensor([1, 1]), [[1], [0]]).item() == pytest.approx(wanted.item())


def test_features_are_normalised_over_the_recordings():
    random = np.random.default_rng(0)
    waveforms = [0.1 * random.standard_normal(size).astype(np.float32) for size in (16000, 24000)]
    extractor = speech.measure_features(waveforms)
    frames = torch.cat([extractor(waveform, sampling_rate=16000).input_features[0] for waveform in waveforms])
    torch.testing.assert_close(frames.mean(0), torch.zeros(560), atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.std(0), torch.ones(560), atol=1e-4, rtol=0)


def test_features_are_made_once_and_augmented_where_that_is_asked_for(tmp_path, monkeypatch):
    speech.measure_features([np.random.default_rng(0).normal(0, 0.1, 16000)]).save_pretrained(tmp_path / "features")
    paths = [tmp_path / f"{number}.flac" for number in range(3)]
    for number, path in enumerate(paths):
        soundfile.write(path, np.random.default_rng(number).normal(0, 0.1, 8000 * (number + 1)), 16000)
    monkeypatch.setattr(speech, "_extractor", MiniMindOFeatureExtractor.from_pretrained(tmp_path / "features"))
    pool = ThreadPoolExecutor(1)
    plain = speech.Features(tmp_path / "plain.npy", paths, False, 0, pool)
    extractor = MiniMindOFeatureExtractor.from_pretrained(tmp_path / "features", dither=0.0)
    for number, path in enumerate(paths):
        wanted = extractor(speech.read(path), sampling_rate=16000).input_features[0]
        torch.testing.assert_close(plain[number], wanted, atol=0.02, rtol=0.01)
    augmented = speech.Features(tmp_path / "augmented.npy", paths, True, 0, pool)
    assert any(
        plain[number].shape != augmented[number].shape or (plain[number] - augmented[number]).abs().max() > 0.5
        for number in range(3)
    )
    for path in paths:
        path.unlink()
    again = speech.Features(tmp_path / "plain.npy", paths, False, 0, pool)
    assert all(torch.equal(plain[number], again[number]) for number in range(3))
    with pytest.raises(ValueError, match=r"plain.npy is of 3 recordings, not of 2: remove it"):
        speech.Features(tmp_path / "plain.npy", paths[:2], False, 0, pool)
    pool.shutdown()


@pytest.mark.parametrize("count", [3, 40, 2000])
def test_a_batch_is_of_recordings_of_about_one_length(count):
    features = [torch.ones(length, 1) for length in range(1, count + 1)]
    pieces = speech.learn_pieces(["one two"], 20)
    clips = speech.Clips(
        [{"text": "one"}] * count, features, pieces, lambda texts, **_: types.SimpleNamespace(input_ids=[[1]] * count)
    )
    drawn = set()
    for seed in range(60):
        inputs, mask, targets = clips.draw(np.random.default_rng(seed))
        found = mask.sum(1).tolist()
        assert len(set(found)) == len(found) == min(count, speech.BATCH) == len(targets["tokens"])
        assert max(found) - min(found) < speech.BATCH * speech.NEIGHBOURS
        assert inputs.shape[1] % speech.FRAMES == 0
        drawn.update(found)
    assert {*drawn} >= {1, count} if count < 2000 else min(drawn) < 100 and max(drawn) > count - 100


def test_pieces_spell_any_sentence_in_lower_case():
    pieces = speech.learn_pieces(["The sky is blue.", "Is the sea blue?"], 40)
    assert pieces.decode(pieces.encode("the sea is blue").ids) == "the sea is blue"


# The speaker encoder


@pytest.mark.parametrize("factor", speaker.FACTORS)
def test_a_pseudo_speaker_is_higher_and_faster_by_the_factor(factor):
    tone = np.sin(2 * np.pi * 300 * np.arange(16000) / 16000).astype(np.float32)
    changed = speaker.pseudo_speaker(tone, factor)
    assert len(changed) == math.ceil(16000 / factor)
    peak = np.abs(np.fft.rfft(changed * np.hanning(len(changed)))).argmax() * 16000 / len(changed)
    assert peak == pytest.approx(300 * factor, abs=1)


def test_a_crop_has_its_length_whatever_the_recording_has():
    random = np.random.default_rng(0)
    assert speaker.crop(np.arange(3.0), 7, random).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert speaker.crop(np.arange(3.0), 3, random).tolist() == [0, 1, 2]
    part = speaker.crop(np.arange(100.0), 10, random)
    assert part.tolist() == list(range(int(part[0]), int(part[0]) + 10))


def test_the_margin_makes_the_right_speaker_harder():
    classifier = speaker.MarginClassifier(2, 2)
    with torch.no_grad():
        classifier.speakers.copy_(torch.tensor([[2.0, 0.0], [0.0, 5.0]]))
    loss = classifier(torch.tensor([[1.0, 1.0]]), torch.tensor([1])).item()
    assert loss == pytest.approx(math.log(1 + math.exp(20 * 0.2)), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "same", "wanted"),
    [
        ([0.9, 0.8, 0.2, 0.1], [True, True, False, False], 0.0),
        ([0.9, 0.3, 0.6, 0.1], [True, True, False, False], 0.5),
        ([0.9, 0.8, 0.7, 0.3, 0.6, 0.2, 0.1, 0.0], [True] * 4 + [False] * 4, 0.25),
    ],
)
def test_the_equal_error_rate_is_where_both_errors_are_as_many(scores, same, wanted):
    assert speaker.equal_error_rate(np.array(scores), np.array(same)) == wanted


def test_voices_are_compared_by_direction():
    found = {"a": torch.tensor([[3.0, 0.0], [1.0, 0.1]]), "b": torch.tensor([[0.0, 1.0], [1.0, 0.5]])}
    references = {"b": torch.tensor([0.0, 9.0]), "a": torch.tensor([0.5, 0.0])}
    assert speaker.compare(found, references)["nearest voice right"] == 0.75


# The stages


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder with a small corpus, and tones in place of its speech."""
    work = tmp_path_factory.mktemp("work")
    make_corpus.main([str(work), "--quick"])

    def make(folder):
        texts = ["What day is it today?", "Where is the ball?", "How are you?", "I like the blue sky."]
        for name, pitch in (("questions", 200), ("answers", 250)):
            rows = []
            for number in range(64):
                voice = ("slt", "rms", "awb", "kal16")[number % 4]
                split = "eval" if number % 8 > 2 or voice == "kal16" else "train"
                row = {"text": texts[number // 4 % 4], "kind": "facts", "split": split, "voice": voice}
                row |= {"seconds": 1.6, "path": f"{name}/{voice}/{number}.flac"}
                time = np.arange(int(1.6 * 16000)) / 16000
                (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
                tone = 0.1 * np.sin(2 * np.pi * (pitch + 7 * number) * time)
                soundfile.write(folder / row["path"], tone, 16000)
                rows.append(row)
            stages.write_lines(folder / f"{name}.jsonl", rows)
        return {}

    def make_phrases(folder):
        shutil.copytree(work / "speech" / "questions", folder / "phrases")
        rows = stages.read_lines(work / "speech" / "questions.jsonl")
        rows = [{**row, "path": row["path"].replace("questions", "phrases"), "split": "train"} for row in rows]
        stages.write_lines(folder / "phrases.jsonl", [row for row in rows if row["voice"] != "kal16"])
        return {}

    stages.run_stage(work / "speech", [work / "corpus"], {}, make)
    stages.run_stage(work / "phrases", [work / "corpus"], {}, make_phrases)
    make_tokenizer.main([str(work), "--quick"])
    return work


def figures_of(folder):
    assert (folder / "figures.png").stat().st_size > 1000
    return json.loads((folder / "figures.json").read_text())


def test_the_tokenizer_stage_writes_a_tokenizer_that_loads(work):
    found = AutoTokenizer.from_pretrained(work / "tokenizer" / "model")
    assert len(found) == 400
    assert found("\n").input_ids == [234]
    assert figures_of(work / "tokenizer")["vocabulary"] == 400


def test_pictures_are_drawn_of_every_scene(work):
    pictures.main([str(work), "--quick"])
    rows = stages.read_lines(work / "pictures" / "pictures.jsonl")
    conversations = stages.read_lines(work / "corpus" / "conversations.jsonl")
    splits = {json.dumps(row["scene"]): row["split"] for row in conversations if row["scene"]}
    assert {json.dumps(row["scene"]): row["split"] for row in rows} == splits
    with Image.open(work / "pictures" / rows[0]["path"]) as found:
        drawn = pictures.draw_scene(rows[0]["scene"], rows[0]["seed"])
        assert (np.asarray(found) == np.asarray(drawn)).all()
    assert sum(figures_of(work / "pictures")["pictures"].values()) == len(rows)


def test_a_vision_encoder_is_trained_reused_and_trained_on(work, capsys, tmp_path):
    vision.main([str(work), "--quick"])
    figures = figures_of(work / "vision_encoder")
    assert figures["training"]["step"] == 4
    assert set(figures["accuracy"]) == {"count", "shapes", "colours", "places"}
    encoder = SiglipVisionModel.from_pretrained(work / "vision_encoder" / "model", dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(work / "vision_encoder" / "model", backend="pil")
    scene = [{"shape": "star", "colour": "red", "where": "top"}]
    pixels = processor(pictures.draw_scene(scene, 0), return_tensors="pt")["pixel_values"]
    assert encoder(pixels).last_hidden_state.shape == (1, 36, 128)
    vision.main([str(work), "--quick"])
    assert "vision_encoder: unchanged, reused" in capsys.readouterr().err
    held_out = figures["training"]["held out"]
    copy = tmp_path / "copy.pt"
    copy.write_bytes((work / "vision_encoder" / "training.pt").read_bytes())
    vision.main([str(work), "--quick", "--steps", "1", "--start", str(copy)])
    # One step of a warm-up changes little: it did start from there.
    assert figures_of(work / "vision_encoder")["training"]["held out"] == pytest.approx(held_out, abs=0.03)


def test_pixels_in_training_are_those_of_the_image_processor():
    scene = [{"shape": "star", "colour": "red", "where": "top"}]
    pixels, _ = vision.draw_batch([scene], np.random.default_rng(3))
    random = np.random.default_rng(3)
    picture = pictures.paint(pictures.place(scene, random), random, 96)
    torch.testing.assert_close(vision.image_processor()(picture, return_tensors="pt")["pixel_values"], pixels)


def test_a_speech_encoder_is_trained(work):
    speech.main([str(work), "--quick"])
    figures = figures_of(work / "speech_encoder")
    assert set(figures["errors"]) == {"slt", "rms", "awb", "kal16"}
    folder = work / "speech_encoder" / "model"
    encoder = FunAsrNanoEncoder.from_pretrained(folder, dtype=torch.float32)
    extractor = MiniMindOFeatureExtractor.from_pretrained(folder)
    assert extractor.cmvn_shift is not None
    inputs = extractor(np.zeros(16000, dtype=np.float32), sampling_rate=16000)
    found = encoder(inputs.input_features, input_features_mask=inputs.input_features_mask).last_hidden_state
    assert found.shape == (1, 17, 144)


def test_a_speaker_encoder_is_trained(work):
    speaker.main([str(work), "--quick"])
    figures = figures_of(work / "speaker_encoder")
    assert figures["speakers"] == 27
    folder = work / "speaker_encoder" / "model"
    encoder = CamPlusPlusModel.from_pretrained(folder, dtype=torch.float32)
    inputs = CamPlusPlusFeatureExtractor.from_pretrained(folder)(np.ones(8000, dtype=np.float32), sampling_rate=16000)
    assert encoder(**inputs).embeddings.shape == (1, 192)
    found = load_file(work / "speaker_encoder" / "voices.safetensors")
    assert {name: embedding.shape for name, embedding in found.items()} == dict.fromkeys(
        ("slt", "rms", "awb", "kal16"), (192,)
    )


def test_the_encoders_fit_into_the_model(tiny_config):
    config = tiny_config(
        audio_hidden_size=144,
        audio_config=speech.encoder_config(),
        image_hidden_size=128,
        image_token_len=36,
        vision_config=vision.vision_config(),
    )
    model = MiniMindOForConditionalGeneration(config)
    model.audio_tower.load_state_dict(FunAsrNanoEncoder(speech.encoder_config()).state_dict())
    model.vision_tower.load_state_dict(SiglipVisionModel(vision.vision_config()).state_dict())
    assert model.get_audio_features(torch.zeros(1, 17, 560)).shape == (1, 17, 144)
    assert model.get_image_features(torch.zeros(1, 3, 96, 96)).shape == (1, 36, 128)


def test_the_encoders_are_small():
    def millions(network):
        return sum(parameter.numel() for parameter in network.parameters()) / 1e6

    assert millions(FunAsrNanoEncoder(speech.encoder_config())) == pytest.approx(1.65, abs=0.01)
    assert millions(SiglipVisionModel(vision.vision_config())) == pytest.approx(0.76, abs=0.01)
    assert millions(CamPlusPlusModel(speaker.encoder_config())) == pytest.approx(0.58, abs=0.01)
