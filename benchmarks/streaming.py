"""Sound that streams: time to the first sound, what the codec costs, and the seam, against the simple way.

    python benchmarks/streaming.py                  # three minutes on two cores
    python benchmarks/streaming.py --quick          # toy size
    python benchmarks/streaming.py --frames 256     # a longer answer
    python benchmarks/streaming.py --picture a.png  # the joint of two chunks

Released sizes, random weights, float32, one answer of `--frames` frames after a prompt of 32 tokens. The simple way is
the original's: whenever four new frames are there, six are decoded anew, the four are played, and chunks are joined by
a hard cut. Ours keeps the codec's state: one frame first, then as many as a listener who plays without a pause leaves
time for. Both are fed the same codes as they would appear, in the same process, in turns; `ratio` is ours against the
simple way. The seam is the largest difference of a sample from the waveform of one call for all codes, as a share of
its loudest.

At last `--streams` answers are streamed to their end, and as many closed at their first sound: the time to a first
sound with everything running at once, and the threads and the resident memory before and after.
"""

import argparse
import gc
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from minimind_o_hf.modeling.streaming_minimind_o import FRAME_SECONDS, _Pace, stream_answers
from transformers import MimiConfig, MimiModel

from minimind_o_hf import MimiStreamingDecoder, MiniMindOConfig, MiniMindOForConditionalGeneration, load_audio
from minimind_o_hf.presets import _nano_configs

PROMPT_LENGTH = 32
WINDOW, HOP = 6, 4
SAMPLES = 1920


def build(quick: bool) -> tuple[MiniMindOForConditionalGeneration, MimiModel]:
    torch.manual_seed(0)
    model_config, codec_config = _nano_configs() if quick else (MiniMindOConfig(), MimiConfig())
    model_config.audio_config = model_config.vision_config = None
    codec = MimiModel(codec_config).eval()
    for name, buffer in codec.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    model = MiniMindOForConditionalGeneration(model_config).eval()
    model.generation_config.eos_token_id = None
    return model, codec


def generation_seconds(model: MiniMindOForConditionalGeneration) -> tuple[float, float]:
    """Medians of the prefill with the first step, and of a further step."""
    ids = torch.randint(300, model.config.vocab_size, (1, PROMPT_LENGTH))
    firsts, steps = [], []
    for _ in range(4):
        times = []
        for count in (1, 33):
            begin = time.perf_counter()
            model.generate(ids, max_new_tokens=count)
            times.append(time.perf_counter() - begin)
        firsts.append(times[0])
        steps.append((times[1] - times[0]) / 32)
    return statistics.median(firsts[1:]), statistics.median(steps[1:])


def simple_way(codec: MimiModel, codes: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Frames that must be there, and the sound of a chunk."""
    for start in range(0, codes.shape[2] - HOP + 1, HOP):
        begin = max(0, start + HOP - WINDOW)
        sound = codec.decode(codes[:, :, begin : start + HOP]).audio_values[0, 0]
        yield start + HOP, sound[-HOP * SAMPLES :]


class Clock:
    """The time of a stream in which frames appear every `step` seconds and decoding takes what it takes."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def play_simple(codec, codes, first: float, step: float) -> dict[str, float | torch.Tensor]:
    """The simple way, its decoding timed, its frames as they appear."""
    return _play(simple_way(codec, codes), first, step)


def _play(chunks: Iterator[tuple[int, torch.Tensor]], first: float, step: float):
    now, heard, plays_until, pauses, decoding, sounds = 0.0, None, 0.0, 0.0, 0.0, []
    while True:
        begin = time.perf_counter()
        chunk = next(chunks, None)
        seconds = time.perf_counter() - begin
        if chunk is None:
            break
        frames, sound = chunk
        # Codebook 7 completes a frame eight steps after the text's first token.
        now = max(now, first + (7 + frames) * step) + seconds
        decoding += seconds
        heard = now if heard is None else heard
        pauses += max(0.0, now - plays_until) if plays_until else 0.0
        plays_until = max(now, plays_until) + len(sound) / SAMPLES * FRAME_SECONDS
        sounds.append(sound)
    return {"first": heard, "decoding": decoding, "pauses": pauses, "sound": torch.cat(sounds)}


def play_ours(codec, codes, first: float, step: float):
    """Ours, with the pace that `stream` keeps."""
    decoder, clock = MimiStreamingDecoder(codec), Clock()
    pace = _Pace(32, clock)
    state, waiting, plays_until, heard, pauses, decoding, sounds = None, 0, 0.0, None, 0.0, 0.0, []
    total = codes.shape[2]
    for frame in range(total):
        clock.now = max(clock.now, first + (8 + frame) * step)
        waiting += 1
        if pace.is_due(waiting) or frame == total - 1:
            begin = time.perf_counter()
            sound, state = decoder(codes[:, :, frame + 1 - waiting : frame + 1], state)
            seconds = time.perf_counter() - begin
            clock.now += seconds
            pace.gave(waiting, seconds)
            decoding += seconds
            heard = clock.now if heard is None else heard
            pauses += max(0.0, clock.now - plays_until) if plays_until else 0.0
            plays_until = max(clock.now, plays_until) + waiting * FRAME_SECONDS
            sounds.append(sound[0])
            waiting = 0
    return {"first": heard, "decoding": decoding, "pauses": pauses, "sound": torch.cat(sounds)}


def stream_and_leave(model, codec, count: int) -> None:
    """Prints what finished and cancelled streams leave behind."""
    processor: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(decode=lambda ids, **_: "x" * len(ids)), audio_tokenizer=codec
    )
    ids = torch.randint(300, model.config.vocab_size, (1, PROMPT_LENGTH))
    process = psutil.Process()

    def stream(is_cancelled: bool) -> float:
        begin, heard = time.perf_counter(), 0.0
        events = stream_answers(model, processor, input_ids=ids, max_new_tokens=24)
        for event in events:
            if event.audio is not None and not heard:
                heard = time.perf_counter() - begin
                if is_cancelled:
                    events.close()
        return heard

    for is_cancelled in (False, True) * 2:
        stream(is_cancelled)
    threads, memory = threading.active_count(), process.memory_info().rss
    print(f"streams: {threads} threads, {memory / 1e6:.0f} MB before")
    for name, is_cancelled in (("finished", False), ("cancelled", True)):
        heard = [stream(is_cancelled) for _ in range(count)]
        gc.collect()
        growth = (process.memory_info().rss - memory) / 1e6
        print(
            f"after {count} {name}: {threading.active_count()} threads, {growth:+.1f} MB, first sound "
            f"{statistics.median(filter(None, heard)) * 1e3:.0f} ms (median)"
        )


def draw(path: str, codec: MimiModel, codes: torch.Tensor) -> None:
    """Draws waveforms and spectrograms around the joint of two chunks that differs most: one call, ours, the simple
    way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = codec.decode(codes).audio_values[0, 0]
    simple = torch.cat([sound for _, sound in simple_way(codec, codes)])
    decoder, state, chunks = MimiStreamingDecoder(codec), None, []
    for chunk in codes.split(HOP, dim=2):
        sound, state = decoder(chunk, state)
        chunks.append(sound[0])
    ours = torch.cat(chunks)
    joints = torch.arange(1, len(simple) // (HOP * SAMPLES)) * HOP * SAMPLES
    steps = [((simple - whole[: len(simple)])[joint - 240 : joint + 240]).abs().max() for joint in joints]
    joint = int(joints[int(torch.stack(steps).argmax())])
    loudest = whole.abs().max()
    whole, ours, simple = whole / loudest, ours / loudest, simple / loudest
    rows = {"one call": whole, "ours, in chunks of 4": ours, "simple way": simple}
    figure, axes = pyplot.subplots(3, 2, figsize=(11, 7), sharex="col", layout="constrained")
    rate = codec.config.sampling_rate
    for (name, sound), (left, right) in zip(rows.items(), axes, strict=True):
        near = slice(joint - rate // 50, joint + rate // 50)
        times = (torch.arange(near.start, near.stop) - joint) / rate * 1e3
        left.plot(times, sound[near], linewidth=0.8)
        if sound is not whole:
            left.plot(times, (sound[: len(whole)] - whole[: len(sound)])[near], linewidth=0.8, label="difference")
            left.legend(loc="upper right")
        far = sound[max(joint - rate // 4, 0) : joint + rate // 4].numpy()
        right.specgram(far, NFFT=512, Fs=rate, noverlap=448, xextent=(-250, 250), vmin=-120, vmax=-40)
        for axis in (left, right):
            axis.axvline(0, color="red", linewidth=0.5)
        left.set_title(name, fontsize=10)
        right.set_ylabel("Hz")
    axes[-1, 0].set_xlabel("ms from the joint of two chunks")
    axes[-1, 1].set_xlabel("ms from the joint")
    figure.savefig(path, dpi=90)


def encoded(codec: MimiModel, path: str) -> torch.Tensor:
    """A recording's codes, `(1, 8, num_frames)`."""
    samples = load_audio(path, None, codec.config.sampling_rate)
    return codec.encode(torch.as_tensor(samples)[None, None], num_quantizers=8).audio_codes


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy size")
    parser.add_argument("--frames", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--picture", metavar="PNG", help="draw a joint of two chunks, and measure nothing")
    parser.add_argument("--codec", metavar="DIR", help="for the picture: a trained codec")
    parser.add_argument("--speech", metavar="FILE", help="for the picture: what is encoded, in place of random codes")
    options = parser.parse_args()
    if options.picture:
        codec = build(options.quick)[1]
        if options.codec:
            codec = MimiModel.from_pretrained(options.codec, dtype=torch.float32)
        codes = torch.randint(0, codec.config.codebook_size, (1, 8, 40))
        draw(options.picture, codec, encoded(codec, options.speech) if options.speech else codes)
        return
    model, codec = build(options.quick)
    seconds = options.frames * FRAME_SECONDS
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {seconds:.1f} s of speech")
    first, step = generation_seconds(model)
    print(f"prefill and first step {first * 1e3:.0f} ms, a further step {step * 1e3:.1f} ms")
    codes = torch.randint(0, codec.config.codebook_size, (1, 8, options.frames))
    whole = codec.decode(codes).audio_values[0, 0]
    loudest = whole.abs().max()
    ways: dict[str, Callable] = {"simple": play_simple, "ours": play_ours}
    results: dict[str, list] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):
        for name, play in ways.items():
            results[name].append(play(codec, codes, first, step))
    print(f"{'way':8}{'first sound, ms':>17}{'codec, ms a s':>15}{'real time':>11}{'pauses, ms':>12}{'seam':>10}")
    figures = {}
    for name, runs in results.items():
        runs = runs[1:]  # the first one allocates
        heard, decoding, pauses = (
            statistics.median(run[key] for run in runs) for key in ("first", "decoding", "pauses")
        )
        sound = runs[0]["sound"]
        seam = ((sound - whole[: len(sound)]).abs().max() / loudest).item()
        figures[name] = heard, decoding
        real_time = seconds / (options.frames * step + decoding)
        cost = decoding / seconds * 1e3
        print(f"{name:8}{heard * 1e3:17.0f}{cost:15.1f}{real_time:10.2f}x{pauses * 1e3:12.0f}{seam:10.1e}")
    ratios = [ours / simple for ours, simple in zip(figures["ours"], figures["simple"], strict=True)]
    print(f"{'ratio':8}{ratios[0]:17.2f}{ratios[1]:15.2f}")
    if options.streams:
        stream_and_leave(model, codec, options.streams)


if __name__ == "__main__":
    main()
