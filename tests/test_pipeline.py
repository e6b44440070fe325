"""`pipeline("any-to-any")` answers a chat with text and with sound."""

import numpy as np
import pytest
from transformers import pipeline

from minimind_o_hf.presets import init_checkpoint


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return pipeline("any-to-any", model=str(init_checkpoint("nano", tmp_path_factory.mktemp("pipe") / "nano")))


@pytest.fixture
def chat():
    tone = 0.1 * np.sin(np.arange(16000) * 0.05).astype(np.float32)
    return [{"role": "user", "content": [{"type": "audio", "audio": tone}, {"type": "text", "text": "What is this?"}]}]


def test_text(pipe, chat):
    (result,) = pipe(text=chat, max_new_tokens=12, do_sample=False, return_full_text=False)
    assert isinstance(result["generated_text"], str)
    assert result["generated_text"]
    assert "What is this?" not in result["generated_text"]


def test_full_text_continues_the_chat(pipe, chat):
    (result,) = pipe(text=chat, max_new_tokens=4, do_sample=False)
    assert [message["role"] for message in result["generated_text"]] == ["user", "assistant"]


def test_audio(pipe, chat):
    (result,) = pipe(text=chat, max_new_tokens=24, generation_mode="audio")
    audio = result["generated_audio"]
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert len(audio) % 1920 == 0
    assert np.isfinite(audio).all()


def test_several_chats(pipe, chat):
    results = pipe(text=[chat, [{"role": "user", "content": "Hello"}]], max_new_tokens=12, generation_mode="audio")
    assert len(results) == 2


def test_unknown_mode(pipe, chat):
    with pytest.raises(ValueError, match="image"):
        pipe(text=chat, generation_mode="image")
