"""Fixtures shared by the tests: the reference values (where they are found) and seeds."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference values and release data beside the repository; not on users' machines."""
    if not SHARED.is_dir():
        pytest.skip("the reference values (../shared) are not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared_dir):
    """Reads the reference values: `golden.tensors(name)`, `golden.manifest(name)`, `golden.config(name)`,
    `golden.fill`."""
    folder = shared_dir / "golden"
    spec = importlib.util.spec_from_file_location("golden_fill", folder / "fill.py")
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    return SimpleNamespace(
        tensors=lambda name: load_file(folder / f"{name}.safetensors"),
        manifest=lambda name: json.loads((folder / f"{name}.manifest.json").read_text(encoding="utf-8")),
        config=lambda name: json.loads((folder / f"{name}.config.json").read_text(encoding="utf-8")),
        fill=fill,
    )


@pytest.fixture(scope="session")
def tiny_config():
    """Makes configurations of toy width: `tiny_config(use_moe=False, **overrides)`."""
    from minimind_o_hf import MiniMindOConfig

    def make(use_moe: bool = False, **overrides) -> MiniMindOConfig:
        settings = {
            "use_moe": use_moe,
            "vocab_size": 320,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "talker_hidden_size": 48,
            "num_talker_hidden_layers": 2,
            "talker_num_attention_heads": 4,
            "talker_num_key_value_heads": 2,
            "audio_codebook_size": 32,
            "audio_vocab_size": 40,
            "audio_pad_token": 33,
            "audio_stop_token": 34,
            "audio_spk_token": 35,
            "audio_adapter_rank": 16,
            "spk_emb_size": 12,
            "audio_hidden_size": 32,
            "image_hidden_size": 32,
            "image_token_len": 4,
            "max_position_embeddings": 512,
            "audio_config": {
                "model_type": "fun_asr_nano_encoder",
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_timestamp_prediction_layers": 1,
                "max_position_embeddings": 65,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 64,
                "patch_size": 32,
            },
        }
        return MiniMindOConfig(**{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config):
    """Makes toy models with reproducible random weights, in evaluation mode: `tiny_model(use_moe=False,
    **overrides)`."""
    from minimind_o_hf import MiniMindOForConditionalGeneration

    def make(use_moe: bool = False, seed: int = 0, **overrides) -> MiniMindOForConditionalGeneration:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return MiniMindOForConditionalGeneration(tiny_config(use_moe, **overrides)).eval()

    return make


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    """A `nano` checkpoint folder, fresh for every test file."""
    from minimind_o_hf.presets import init_checkpoint

    return init_checkpoint("nano", tmp_path_factory.mktemp("checkpoints") / "nano")


@pytest.fixture(scope="module")
def processor(nano):
    """The processor of the `nano` checkpoint."""
    from minimind_o_hf import MiniMindOProcessor

    return MiniMindOProcessor.from_pretrained(nano)


@pytest.fixture(scope="module")
def config(nano):
    """The configuration of the `nano` checkpoint."""
    from minimind_o_hf import MiniMindOConfig

    return MiniMindOConfig.from_pretrained(nano)


@pytest.fixture(scope="session")
def mixed_parquet(tmp_path_factory) -> Path:
    """
    24 conversations for `nano` of mixed lengths: text to speech, speech to speech, pictures to text, and several
    turns; some with a voice. Two of the recordings are the same.
    """
    import io

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile
    from PIL import Image

    random = np.random.default_rng(0)

    def recording(seconds):
        buffer = io.BytesIO()
        soundfile.write(buffer, 0.1 * random.standard_normal(int(seconds * 16000)), 16000, format="WAV")
        return buffer.getvalue()

    def picture(colour):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30), colour).save(buffer, format="PNG")
        return buffer.getvalue()

    def codes(frames):
        return random.integers(512, size=8 * frames).tolist()

    def turn(question, answer):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    said = recording(0.7)
    rows = []
    for number in range(24):
        kind, frames = number % 4, int(random.integers(4, 40))
        row = {"conversations": turn(f"Say {number}.", f"It is {number}. " * (1 + number % 3))}
        if kind == 0:
            row["answer_audios"] = [codes(frames)]
        elif kind == 1:
            row |= {
                "question_audios": [said if number in (1, 5) else recording(random.uniform(0.3, 1.5))],
                "answer_audios": [codes(frames)],
            }
        elif kind == 2:
            row |= {"conversations": turn("<image>\nWhat is this?", "A colour."), "image_bytes": [picture(number)]}
        else:
            row["conversations"] = turn("One?", "Two.") + turn("Three?", "Four, five and six.")
            row |= {"answer_audios": [codes(5), codes(frames)], "question_audios": [None, recording(0.5)]}
        if number % 3:
            row |= {"spk_emb": random.standard_normal(192).tolist(), "ref_audios": codes(9)}
        rows.append({**row, "conversations": json.dumps(row["conversations"])})
    schema = pa.schema(
        [
            ("conversations", pa.string()),
            ("question_audios", pa.list_(pa.binary())),
            ("answer_audios", pa.list_(pa.list_(pa.int64()))),
            ("image_bytes", pa.list_(pa.binary())),
            ("ref_audios", pa.list_(pa.int64())),
            ("spk_emb", pa.list_(pa.float32())),
        ]
    )
    path = tmp_path_factory.mktemp("mixed") / "mixed.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path
