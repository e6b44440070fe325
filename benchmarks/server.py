"""Many conversations on one server: speech made a second, who is served in real time, and the wait for first sound.

    python benchmarks/server.py                          # ten minutes on two busy cores
    python benchmarks/server.py --quick                  # seconds
    python benchmarks/server.py --sessions 1 32 --rounds 5
    python benchmarks/server.py --microphones            # the sessions also send what a microphone hears

`minimind-o serve` runs as a process of its own, with the packaged nano in float32; the clients, in this process, hold
realtime sessions. Each session asks typed questions of nano's evaluation, one as soon as the last is answered: the
batch is as full as so many sessions can make it, where people would listen and think in between. Each number of
sessions is measured in every round, and figures are medians of the rounds; `ratio` is the speech made a second
against one session's, which is served one answer at a time.

* `speech, s/s` counts the sound that arrives until the first session has no question left.
* A listener plays each answer from its first sound on. `real time` counts the sessions none of whose answers kept
  their listener waiting for more than `--tolerance`, and `pauses` is the share of answers that did.
* `rows` is how many answers a step of the model serves, in the mean, from the server's own counts.
* `CPU` is the server's processor time for a second of speech: what is left to compare where other programs run.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files

import psutil
import websockets

RATE = 24000  # Hz, 2 bytes a sample
MICROPHONE_SECONDS = 0.1  # between two messages of a microphone


@dataclass
class Heard:
    """What a listener got of one answer: arrival times and lengths of its pieces of sound, in seconds."""

    asked: float
    pieces: list[tuple[float, float]] = field(default_factory=list)

    @property
    def first_sound(self) -> float:
        return self.pieces[0][0] - self.asked

    @property
    def longest_pause(self) -> float:
        """Of a listener who plays from the first piece on."""
        plays_until, longest = self.pieces[0][0], 0.0
        for arrived, seconds in self.pieces:
            longest = max(longest, arrived - plays_until)
            plays_until = max(plays_until, arrived) + seconds
        return longest


class Server:
    """`minimind-o serve` on a free port, within `with`."""

    def __init__(self, model: str | None, threads: int, answers: int):
        command = [sys.executable, "-m", "minimind_o_hf", "serve", "--port", "0", "--dtype", "float32"]
        command += ["--threads", str(threads), "--max-answers", str(answers), "--max-sessions", str(answers)]
        command += ["--requests-per-minute", "0", "--device", "cpu", *(["--model", model] if model else [])]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def __enter__(self) -> "Server":
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("http://"):
                self.address = line.strip().removeprefix("http://")
                break
        else:
            raise RuntimeError(f"the server ended with {self.process.wait()}")
        while True:
            try:
                self.get("/ready")
                return self
            except OSError:
                time.sleep(0.1)

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as response:
            return response.read().decode()

    def counts(self) -> tuple[float, float, float]:
        """Steps of the model so far, steps of all answers, and seconds of processor time."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        used = psutil.Process(self.process.pid).cpu_times()
        return float(lines["minimind_o_steps"]), float(lines["minimind_o_row_steps"]), used.user + used.system


def questions() -> Iterator[str]:
    """Typed questions of nano's evaluation, again and again."""
    suite = json.loads((files("minimind_o_hf") / "evaluation/suites/nano.json").read_text(encoding="utf-8"))
    return itertools.cycle(item["text"] for item in suite["questions"] if item["id"].startswith("typed-"))


async def listen_in(socket: websockets.ClientConnection) -> None:
    """Sends silence, as fast as it passes."""
    silence = base64.b64encode(bytes(int(RATE * MICROPHONE_SECONDS) * 2)).decode()
    message = json.dumps({"type": "input_audio_buffer.append", "audio": silence})
    while True:
        await socket.send(message)
        await asyncio.sleep(MICROPHONE_SECONDS)


async def converse(address: str, asked: list[str], start: asyncio.Barrier, microphone: bool) -> list[Heard]:
    """Asks questions, one after the other."""
    answers = []
    async with websockets.connect(f"ws://{address}/v1/realtime", max_size=None) as socket:
        if not microphone:
            turns = {"type": "realtime", "audio": {"input": {"turn_detection": None}}}
            await socket.send(json.dumps({"type": "session.update", "session": turns}))
        await start.wait()
        sending = asyncio.create_task(listen_in(socket)) if microphone else None
        for question in asked:
            content = [{"type": "input_text", "text": question}]
            item = {"type": "message", "role": "user", "content": content}
            answer = Heard(time.perf_counter())
            await socket.send(json.dumps({"type": "conversation.item.create", "item": item}))
            await socket.send(json.dumps({"type": "response.create"}))
            async for message in socket:
                now, event = time.perf_counter(), json.loads(message)
                if event["type"] == "response.output_audio.delta":
                    answer.pieces.append((now, len(event["delta"]) * 3 / 4 / 2 / RATE))
                elif event["type"] == "error":
                    raise RuntimeError(event["error"]["message"])
                elif event["type"] == "response.done":
                    if event["response"]["status"] == "failed":
                        raise RuntimeError(event["response"]["status_details"])
                    break
            # A sampled answer may end before a frame is complete.
            answers += [answer] if answer.pieces else []
        if sending is not None:
            sending.cancel()
    return answers


async def measure(server: Server, asked: list[list[str]], tolerance: float, microphones: bool) -> dict[str, float]:
    """Figures of as many sessions as there are lists of questions."""
    start = asyncio.Barrier(len(asked) + 1)
    sessions = [asyncio.create_task(converse(server.address, part, start, microphones)) for part in asked]
    await start.wait()
    began, before = time.perf_counter(), server.counts()
    await asyncio.wait(sessions, return_when=asyncio.FIRST_COMPLETED)
    ended, after = time.perf_counter(), await asyncio.to_thread(server.counts)
    results = [await session for session in sessions]
    answers = [answer for result in results for answer in result]
    made = sum(seconds for answer in answers for arrived, seconds in answer.pieces if arrived <= ended)
    is_late = [[answer.longest_pause > tolerance for answer in result] for result in results]
    firsts = sorted(answer.first_sound for answer in answers)
    steps = after[0] - before[0]
    return {
        "speech": made / (ended - began),
        "real time": sum(not any(late) for late in is_late),
        "pauses": sum(map(sum, is_late)) / len(answers),
        "p50": statistics.median(firsts),
        "p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "steps": steps / (ended - began),
        "rows": (after[1] - before[1]) / max(1, steps),
        "cpu": (after[2] - before[2]) / made,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one and two sessions, two questions, one round")
    parser.add_argument("--model", metavar="DIR", help="checkpoint directory or Hub id (default: nano)")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N")
    parser.add_argument("--questions", type=int, default=8, metavar="N", help="of each session (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    # The model and the codec have a thread each, and each of them so many.
    half = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--threads", type=int, default=half, metavar="N", help="of the server (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.02, metavar="S", help="pause that is not heard, in s")
    parser.add_argument("--microphones", action="store_true", help="sessions send silence, and turns are looked for")
    options = parser.parse_args()
    if options.quick:
        options.sessions, options.questions, options.rounds = [1, 2], 2, 1
    counts = sorted({1, *options.sessions})  # one alone is what the others are compared with
    load, began = os.getloadavg()[0], time.perf_counter()
    print(f"{os.cpu_count()} cores, {options.threads} threads, float32, load {load:.1f} before", flush=True)
    asked, results = questions(), {count: [] for count in counts}
    with Server(options.model, options.threads, max(counts)) as server:
        for round_ in range(options.rounds + 1):
            for count in counts if round_ else counts[:1]:  # the first round warms up
                parts = [list(itertools.islice(asked, options.questions)) for _ in range(count)]
                figures = asyncio.run(measure(server, parts, options.tolerance, options.microphones))
                results[count] += [figures] if round_ else []
    print(
        f"load {os.getloadavg()[0]:.1f} after {time.perf_counter() - began:.0f} s, of which up to two are this one's"
    )
    columns = "sessions | speech, s/s | ratio | real time | pauses | first sound p50, ms | p95, ms | steps/s | rows"
    print(f"\n| {columns} | CPU, s/s |\n{'|---' * 10}|")
    alone = [figures["speech"] for figures in results[1]]
    for count, rounds in results.items():
        middle = {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}
        ratio = statistics.median(own["speech"] / one for own, one in zip(rounds, alone, strict=True))
        print(
            f"| {count} | {middle['speech']:.2f} | {ratio:.2f} | {middle['real time']:.0f} | {middle['pauses']:.0%} | "
            f"{1e3 * middle['p50']:.0f} | {1e3 * middle['p95']:.0f} | {middle['steps']:.0f} | {middle['rows']:.1f} | "
            f"{middle['cpu']:.2f} |"
        )


if __name__ == "__main__":
    main()
