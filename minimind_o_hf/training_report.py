"""What a run leaves to look at: samples spoken while it trains, its curves, and a section of the model card."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.utils import logging

from .files import new_file
from .processing import MiniMindOProcessor

if TYPE_CHECKING:
    from .trainer import MiniMindOTrainer

logger = logging.get_logger(__name__)

SECTION = ("<!-- training: start -->", "<!-- training: end -->")
# Arguments that say how a run is stored and shown, not what it does.
_UNTOLD = re.compile(
    "_dir$|hub|logging|disable_tqdm|report_to|run_name|save_|dataloader_|^eval_|push_|skip_memory|trackio|log_level|"
    "sample_|include_|project|accelerator_config|checkpointing|ddp_|scheduler_kwargs|^mode$|max_steps|num_train_epochs|"
    "per_device|accumulation|use_cpu|prediction_loss_only|remove_unused"
)


class SampleCallback(TrainerCallback):
    """
    Answers fixed prompts every so many steps: the texts are logged wherever the Trainer logs to, the sound goes to
    `samples/step-N/` of the run's folder and to tensorboard. The training goes on as if nothing had been generated.

    Args:
        trainer ([`MiniMindOTrainer`]): Whose model answers.
        processor ([`MiniMindOProcessor`]): With its codec.
        prompts (list of `str` or of chats): What is asked.
        every (`int`): Steps between two rounds.
        max_new_tokens (`int`, defaults to 128): Longest answer, in steps (12.5 are a second of speech).
        voice (`str`, *optional*): Voice of the answers.
    """

    def __init__(
        self,
        trainer: "MiniMindOTrainer",
        processor: MiniMindOProcessor,
        prompts: Sequence[str | list[dict]],
        every: int,
        max_new_tokens: int = 128,
        voice: str | None = None,
    ):
        if every < 1 or not prompts:
            raise ValueError(f"Samples need prompts and a number of steps above 0, got {prompts!r:.80} and {every}.")
        self.trainer, self.processor, self.every, self.max_new_tokens = trainer, processor, every, max_new_tokens
        self.voice = voice
        chats = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt) for prompt in prompts
        ]
        self.inputs: Any = processor.apply_chat_template(
            chats, tokenize=True, return_dict=True, add_generation_prompt=True, voice=[voice] * len(chats)
        )

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.generate()

    @torch.no_grad()
    def generate(self) -> None:
        """Answers the prompts now."""
        trainer = self.trainer
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        # Where each process holds a part of the weights, all have to take part.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.is_world_process_zero()):
            return
        was_training = model.training
        model.eval()
        try:
            with torch.random.fork_rng():
                outputs = model.generate(
                    **self.inputs.to(trainer.args.device),
                    seeds=list(range(len(self.inputs["input_ids"]))),
                    max_new_tokens=self.max_new_tokens,
                    use_cache=True,
                    return_dict_in_generate=True,
                )
        finally:
            model.train(was_training)
        if trainer.is_world_process_zero():
            self._write(self.processor.decode(outputs))

    def _write(self, answers: Sequence[Any]) -> None:
        trainer, step = self.trainer, self.trainer.state.global_step
        folder = Path(trainer.args.output_dir or ".") / "samples" / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        boards = [item for item in trainer.callback_handler.callbacks if isinstance(item, TensorBoardCallback)]
        for index, answer in enumerate(answers):
            with new_file(folder / f"{index}.txt") as temporary:
                temporary.write_text(answer.text, encoding="utf-8")
            if answer.audio is None:
                continue
            self.processor.save_audio(
                answer.audio,
                folder / f"{index}.wav",
                answer.sampling_rate,
                model=f"{Path(trainer.args.output_dir or '.').name}, step {step}",
                voice=self.voice,
            )
            for board in boards:
                if board.tb_writer is not None and len(answer.audio):
                    sound = answer.audio.float().cpu()[None]
                    board.tb_writer.add_audio(f"samples/{index}", sound, step, sample_rate=answer.sampling_rate)
        # Logging says that what was to be logged has been, and the losses of this step have not.
        should_log = trainer.control.should_log
        trainer.log({f"sample_{index}": answer.text for index, answer in enumerate(answers)})
        for index, answer in enumerate(answers):
            # On a terminal, the Trainer's own log leaves long texts out.
            logger.info("Sample %d at step %d: %s", index, step, answer.text)
        trainer.control.should_log = should_log


def plot_training_curves(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """
    Draws losses, codebook losses, accuracies and learning rates over the steps; dashed lines are the held-out set's.

    Args:
        log_history (list of `dict`): `trainer.state.log_history`.
        path (`str` or `Path`): The PNG file to write.
    """
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[int, float]]] = {}
    for entry in log_history:
        for name, value in entry.items():
            if isinstance(value, (int, float)) and "step" in entry:
                series.setdefault(name, []).append((entry["step"], value))
    panels = {
        "loss": r"(eval_)?(text_|audio_|aux_)?loss",
        "loss of each codebook": r"codebook_\d+_loss",
        "predicted right": r"(eval_)?\w+_accuracy",
        "learning rate": r"(\w+_)?learning_rate",
    }
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (title, pattern) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in sorted(name for name in series if re.fullmatch(pattern, name)):
            if name == "learning_rate" and any(other.endswith("_learning_rate") for other in series):
                continue  # the Trainer's own is that of the first group, which has its own line
            held_out = name.startswith("eval_")
            label = re.sub("_learning_rate|_accuracy|_loss$", "", name).replace("_", " ")
            label = label.replace("eval", "held out")
            # Few and far between: a line would tell of what was not measured.
            axes.plot(*zip(*series[name], strict=True), "o:" if held_out else "-", label=label, linewidth=1.2)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small", loc="best", framealpha=0.6)
        else:
            axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def describe_training(trainer: "MiniMindOTrainer", settings: Mapping[str, Any] | None = None) -> str:
    """
    A run in Markdown: what was trained on what and how, and its last figures.

    Args:
        trainer ([`MiniMindOTrainer`]): After training.
        settings (`Mapping`, *optional*): What else to tell, such as the base model and the data files.
    """
    state = trainer.state
    model: Any = trainer.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    args = trainer.args
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    told = {
        "mode": args.mode,
        "parameters trained": f"{trained / 1e6:.2f} M",
        "optimiser steps": state.global_step,
        "epochs": f"{state.epoch or 0:.2f}",
        "samples a step": batch,
        **{name: getattr(args, name) for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed")},
    }
    if "adapter" in (settings or {}):
        told.pop("mode")  # an adapter says itself what is trained
    changed = {name: value for name, value in _changed(args).items() if not _UNTOLD.search(name)}
    rows = {**(settings or {}), **told, **{name: value for name, value in changed.items() if name not in told}}
    figures: dict[str, tuple[Any, Any]] = {}
    for entry in state.log_history:
        for name, value in entry.items():
            is_told = re.fullmatch(r"(eval_)?(((text|audio|aux)_)?loss|(token|code|frame)_accuracy)", name)
            if is_told and isinstance(value, (int, float)):
                figures[name] = (figures.get(name, (value,))[0], value)
    lines = ["## Training", "", "![Training curves](training_curves.png)", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in rows.items()]
    if figures:
        lines += ["", "| figure | first logged | last logged |", "|---|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {first:.4f} | {last:.4f} |" for name, (first, last) in figures.items()]
    return "\n".join(lines) + "\n"


def _changed(args: Any) -> dict[str, Any]:
    """The arguments that are not what they are by default."""
    changed = {}
    for item in fields(args):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        value = getattr(args, item.name)
        if item.init and value != default and value not in (None, [], {}):
            changed[item.name] = getattr(value, "value", value)  # enumerations by their value
    return changed


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def write_training_report(
    trainer: "MiniMindOTrainer", directory: str | Path, settings: Mapping[str, Any] | None = None
) -> None:
    """
    Writes `training_curves.png`, and the section on training into the model card (`README.md`), in place of one that
    is there. The rest of a card is left as it is; without one, a short card is made.

    Args:
        trainer ([`MiniMindOTrainer`]): After training.
        directory (`str` or `Path`): The run's folder.
        settings (`Mapping`, *optional*): As [`describe_training`].
    """
    folder = Path(directory)
    plot_training_curves(trainer.state.log_history, folder / "training_curves.png")
    card = folder / "README.md"
    settings = settings or {}
    # PEFT writes a form to be filled in; it is replaced.
    is_new = not card.exists() or ("adapter" in settings and SECTION[0] not in card.read_text("utf-8", "replace"))
    text = _new_card(settings) if is_new else card.read_text(encoding="utf-8", errors="replace")
    section = f"{SECTION[0]}\n{describe_training(trainer, settings)}{SECTION[1]}\n"
    if all(mark in text for mark in SECTION):
        before, _, rest = text.partition(SECTION[0])
        text = before + section + rest.partition(SECTION[1])[2].lstrip("\n")
    else:
        text = f"{text.rstrip()}\n\n{section}"
    with new_file(card) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_hub_id(name: Any) -> bool:
    """Whether it is the form of a Hub id and no directory that is here."""
    return isinstance(name, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _new_card(settings: Mapping[str, Any]) -> str:
    base = settings.get("base model")
    if "adapter" in settings:
        named = f"base_model: {json.dumps(base)}\n" if is_hub_id(base) else ""
        return (
            f"---\nlibrary_name: peft\n{named}tags: [minimind-o, lora]\n---\n"
            f"# An adapter for MiniMind-O\n\nA LoRA adapter for `{base}`. Load it with `PeftModel.from_pretrained` on "
            "that model, after `import minimind_o_hf`.\n"
        )
    origin = f", fine-tuned from `{base}`" if base else ""
    return (
        "---\nlibrary_name: transformers\npipeline_tag: any-to-any\ntags: [minimind-o]\n---\n"
        f"# MiniMind-O, fine-tuned\n\nA MiniMind-O checkpoint{origin}. Load it with `AutoModelForMultimodalLM` and "
        "`AutoProcessor` after `import minimind_o_hf`.\n"
    )


__all__ = ["SampleCallback", "describe_training", "is_hub_id", "plot_training_curves", "write_training_report"]
