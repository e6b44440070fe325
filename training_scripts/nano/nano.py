"""Makes the nano family from nothing: every stage of the recipe.

    python training_scripts/nano/nano.py WORK            (hours on two cores)
    python training_scripts/nano/nano.py WORK --quick    (minutes: shows that the parts fit together, and no more)

Each stage is a script of its own, which also runs alone, and has a folder in WORK with its figures and their plot; see
`stages.py`. A finished stage is reused as long as nothing that it is made from has changed; one that was interrupted
goes on. Stages that do not need each other run at the same time, each on its share of the cores; what they say is in
WORK/logs. flite (Debian, Ubuntu: apt install flite) and `pip install -e ".[train,evaluation]"` are needed.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stages import stage_arguments

LANES = 2
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Step:
    """
    One process.

    Args:
        script (`str`): A script of this folder, without `.py`.
        needs (tuple of `str`): Names of the steps before it.
        arguments (tuple of `str`): Its own, after WORK.
        alone (`bool`): Whether nothing else can run beside it, so that it gets all cores.
    """

    script: str
    needs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    alone: bool = False


# In the order in which they are begun where there is a choice: what others wait for comes first.
STEPS = {
    "corpus": Step("make_corpus", alone=True),
    "speech": Step("make_speech", ("corpus",), alone=True),
    "phrases": Step("make_phrases", ("corpus",), alone=True),
    "tokenizer": Step("make_tokenizer", ("corpus",)),
    "codec encoder": Step("train_codec", ("speech",), ("--only", "encoder")),
    "model": Step("assemble_model", ("tokenizer",)),
    "text": Step("build_data", ("corpus",), ("text",)),
    "scenes": Step("build_data", ("corpus",), ("scenes",)),
    "lm": Step("train_model", ("model", "text"), ("lm",)),
    "speech_encoder": Step("train_speech_encoder", ("speech", "phrases", "tokenizer")),
    "codec": Step("train_codec", ("codec encoder",)),
    "pictures": Step("draw_pictures", ("corpus",)),
    "speaker_encoder": Step("train_speaker_encoder", ("speech",)),
    "vision_encoder": Step("train_vision_encoder", ("pictures",)),
    "data": Step("build_data", ("codec", "speaker_encoder", "pictures"), ("speech",)),
    "t2a": Step("train_model", ("lm", "data"), ("t2a",), alone=True),
    "a2a_projector": Step("train_model", ("t2a", "speech_encoder"), ("a2a_projector",), alone=True),
    "a2a": Step("train_model", ("a2a_projector",), ("a2a",), alone=True),
    "i2t_projector": Step("train_model", ("a2a", "vision_encoder"), ("i2t_projector",), alone=True),
    "i2t": Step("train_model", ("i2t_projector",), ("i2t",), alone=True),
    "understanding": Step("train_model", ("i2t", "scenes"), ("understanding",), alone=True),
    "talker": Step("train_model", ("understanding",), ("talker",), alone=True),
    "decoder": Step("tune_decoder", ("talker",), alone=True),
    "nano": Step("finish_model", ("decoder",), alone=True),
}


def log_of(work: Path, name: str) -> Path:
    """Where a step writes what it says."""
    return work / "logs" / f"{name.replace(' ', '_')}.log"


def start(name: str, work: Path, quick: bool) -> subprocess.Popen:
    """Begins a step, with its share of the cores."""
    step = STEPS[name]
    cores = os.cpu_count() or 1
    threads = cores if step.alone else max(1, cores // LANES)
    script = Path(__file__).with_name(f"{step.script}.py")
    command = [sys.executable, str(script), str(work), *step.arguments, *(["--quick"] if quick else [])]
    path = log_of(work, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
        )


def run(work: Path, quick: bool) -> None:
    """
    Runs all steps.

    Raises:
        SystemExit: A step failed; those that run beside it are stopped, and go on the next time.
    """
    waiting, done = list(STEPS), set()
    running: dict[str, subprocess.Popen] = {}
    try:
        while waiting or running:
            begin(waiting, running, done, work, quick)
            time.sleep(POLL_SECONDS)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    raise SystemExit(f"{name} failed: see {log_of(work, name)}")
                done.add(name)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def begin(waiting: list[str], running: dict[str, subprocess.Popen], done: set[str], work: Path, quick: bool) -> None:
    """Starts what can run now, and moves it from `waiting` to `running`."""
    for name in [name for name in waiting if done.issuperset(STEPS[name].needs)]:
        together = not STEPS[name].alone and not any(STEPS[other].alone for other in running)
        if not running or (together and len(running) < LANES):
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {name}\n")
            running[name] = start(name, work, quick)
            waiting.remove(name)


def main(arguments: list[str] | None = None) -> None:
    """Runs the recipe."""
    options = stage_arguments(__doc__).parse_args(arguments)
    run(options.work, options.quick)


if __name__ == "__main__":
    # As Ctrl-C: the steps are stopped too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    sys.exit(main())
