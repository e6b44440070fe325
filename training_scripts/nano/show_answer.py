"""Asks nano the demo's question and draws what it says: docs/nano_answer.wav and its spectrogram.

python training_scripts/nano/show_answer.py        (seconds)
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torchaudio
from listening import transcribe
from stages import new_plot, save_plot
from transformers import AutoModelForMultimodalLM, AutoProcessor

from minimind_o_hf import default_checkpoint

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Where does a pig live?"


def decibels(waveform: torch.Tensor) -> torch.Tensor:
    """`(frequencies, frames)` of a waveform `(num_samples,)`."""
    spectrogram = torchaudio.transforms.Spectrogram(n_fft=768, hop_length=192)(waveform)
    return 10 * spectrogram.clamp(min=1e-8).log10()


def main() -> None:
    """Writes both files and prints what was said and what a recogniser heard."""
    path = default_checkpoint()
    model: Any = AutoModelForMultimodalLM.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(path)
    chat = [{"role": "user", "content": QUESTION}]
    figure, axes = new_plot(1, 3, 14, 4)
    for axis, voice in zip(axes, sorted(processor.voices), strict=True):
        inputs = processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, add_generation_prompt=True, voice=voice
        )
        (answer,) = processor.decode(model.generate(**inputs))
        heard = transcribe(answer.audio.numpy(), answer.sampling_rate)
        sys.stdout.write(f"{voice}: {answer.text!r}, heard as {heard!r}\n")
        if voice == "rms":
            processor.save_audio(answer.audio, str(ROOT / "docs" / "nano_answer.wav"))
        seconds = len(answer.audio) / answer.sampling_rate
        axis.imshow(
            decibels(answer.audio), origin="lower", aspect="auto", extent=(0, seconds, 0, 12), vmin=-50, vmax=20
        )
        axis.set(title=f"{voice}: {answer.text}", xlabel="seconds", ylabel="kHz")
    save_plot(figure, ROOT / "docs" / "nano_answer.png")


if __name__ == "__main__":
    main()
