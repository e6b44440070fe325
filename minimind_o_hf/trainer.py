"""Fine-tuning every part of MiniMind-O with the Hugging Face Trainer, the speech side too."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging

from .checkpoints import WholeCheckpoints
from .data import EpochSampler, MiniMindODataCollator, MiniMindODataset, MiniMindOIterableDataset
from .modeling import MiniMindOForConditionalGeneration, describe_base
from .modeling.adapters_minimind_o import write_base
from .sharding import ShardedTraining

logger = logging.get_logger(__name__)

MODES = ("all", "thinker", "talker", "audio_proj", "vision_proj")
FREEZE = ("none", "all", "last1")


def _check_mode(mode: str, freeze_backbone: str) -> None:
    if mode not in MODES:
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {mode!r}.")
    if freeze_backbone not in FREEZE:
        raise ValueError(f"`freeze_backbone` must be one of {', '.join(FREEZE)}, got {freeze_backbone!r}.")


@dataclass
class MiniMindOTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the original's defaults (AdamW with weight decay 0.01 on every parameter, no warm-up,
    cosine to a tenth of the learning rate, gradients clipped at 1) and what MiniMind-O adds.

    Args:
        mode (`str`, defaults to `"all"`):
            What is trained: `all` (all but the encoders), `thinker`, `talker`, `audio_proj` or `vision_proj`.
        freeze_backbone (`str`, defaults to `"none"`):
            With mode `all`: `all` keeps the Thinker as it is, `last1` all of it but its last layer.
        talker_learning_rate, projector_learning_rate (`float`, *optional*):
            Learning rates of the Talker and of the projectors; `learning_rate` by default, which is the Thinker's.
        min_learning_rate_ratio (`float`, defaults to 0.1):
            What the cosine ends at, as a share of each learning rate.
        stop_weight (`float`, *optional*):
            Weight of the stop code in the audio loss; the model's (10) by default.
        codebook_weights (`list[float]`, *optional*):
            Weights of the codebooks in the audio loss, one each; equal by default.

    Further defaults: batches of similar lengths (`train_sampling_strategy="group_by_length"`; `"random"` for none),
    and logs every 10 steps, for tensorboard where it is installed.
    """

    mode: str = field(default="all", metadata={"help": f"what is trained: {', '.join(MODES)}"})
    freeze_backbone: str = field(default="none", metadata={"help": "freeze the Thinker: none, all or last1"})
    talker_learning_rate: float | None = field(default=None, metadata={"help": "of the Talker (learning_rate)"})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "of projectors (learning_rate)"})
    min_learning_rate_ratio: float = field(default=0.1, metadata={"help": "end of the cosine; 1 for a constant rate"})
    stop_weight: float | None = field(default=None, metadata={"help": "of the stop code in the loss (10); 1 for none"})
    codebook_weights: list[float] | None = field(default=None, metadata={"help": "of each codebook in the loss (1)"})

    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine_with_min_lr"
    train_sampling_strategy: str = "group_by_length"
    report_to: None | str | list[str] = "tensorboard"
    logging_steps: float = 10
    # Without an accelerator there is nothing to pin memory for.
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    # Scores of every position of both streams are not kept: the trainer reports what they say.
    prediction_loss_only: bool = True
    # Samples are objects with clips and pictures, which the collator turns into the model's arguments.
    remove_unused_columns: bool = False

    def __post_init__(self):
        _check_mode(self.mode, self.freeze_backbone)
        if self.freeze_backbone != "none" and self.mode != "all":
            raise ValueError(f"`freeze_backbone` goes with mode 'all', got mode {self.mode!r}.")
        if self.stop_weight is not None and not self.stop_weight >= 0:
            raise ValueError(f"`stop_weight` must be at least 0, got {self.stop_weight}.")
        weights = self.codebook_weights
        if weights is not None and not (min(weights, default=0) >= 0 and sum(weights) > 0):
            raise ValueError(f"`codebook_weights` must be at least 0, and one above it, got {weights}.")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ValueError(f"`min_learning_rate_ratio` must be from 0 to 1, got {self.min_learning_rate_ratio}.")
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": self.min_learning_rate_ratio}
        if self.report_to == "tensorboard" and not is_tensorboard_available():
            logger.warning("No tensorboard is installed (`pip install tensorboard`): nothing is logged for it.")
            self.report_to = []
        if self.ddp_find_unused_parameters is None:
            # `compute_loss` passes empty inputs for what a batch may leave unused.
            self.ddp_find_unused_parameters = False
        super().__post_init__()
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            # A process that reads for all of them would have to make all batches of one length.
            accelerator_config.dispatch_batches = False


def set_trainable(model: MiniMindOForConditionalGeneration, mode: str = "all", freeze_backbone: str = "none") -> None:
    """
    Switches the gradients of a model's parts on and off.

    Args:
        model ([`MiniMindOForConditionalGeneration`]): Its encoders stay frozen in any mode.
        mode (`str`): See [`MiniMindOTrainingArguments`].
        freeze_backbone (`str`): See [`MiniMindOTrainingArguments`].
    """
    _check_mode(mode, freeze_backbone)
    model.requires_grad_(False)
    parts: dict[str, list[nn.Module]] = {
        "thinker": [model.model, model.lm_head],
        "talker": [model.talker],
        "audio_proj": [model.audio_proj],
        "vision_proj": [model.vision_proj],
    }
    for module in parts[mode] if mode in parts else [module for part in parts.values() for module in part]:
        module.requires_grad_(True)
    if mode == "all" and freeze_backbone != "none":
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        if freeze_backbone == "last1":
            model.model.layers[-1].requires_grad_(True)


@torch.no_grad()
def initialize_talker_from_thinker(model: MiniMindOForConditionalGeneration) -> bool:
    """
    Copies the Thinker's last layers into the Talker, the start for a language model that has none.

    Returns:
        `bool`: Whether the sizes match; if not, nothing is changed.
    """
    count = len(model.talker.layers)
    sources = model.model.layers[-count:]
    states = [source.state_dict() for source in sources]
    if len(sources) < count or any(
        [tensor.shape for tensor in layer.state_dict().values()] != [tensor.shape for tensor in state.values()]
        for layer, state in zip(model.talker.layers, states, strict=False)
    ):
        return False
    for layer, state in zip(model.talker.layers, states, strict=True):
        layer.load_state_dict(state)
    return True


class MiniMindOTrainer(WholeCheckpoints, ShardedTraining):
    """
    The Hugging Face Trainer for MiniMind-O.

    Losses are divided by the labels of all batches of one optimiser step, over accumulation steps and processes, for
    the text and for every codebook: 1 sample accumulated 8 times is a batch of 8. (The auxiliary loss of a mixture of
    experts is not linear in the batch; it is the mean of the batches'.)

    Logged are both streams' losses, each codebook's, the auxiliary loss, each part's learning rate, and the shares of
    tokens, codes and frames (all codes of one) that were predicted right.

    Projectors and the speaker projection are trained on in every step, with a gradient of zero where a batch has no
    speech, picture or voice, as in the original: all processes of DDP see all parameters, and weight decay does not
    depend on what a batch holds.

    Args:
        model ([`MiniMindOForConditionalGeneration`] or a `PeftModel` of one):
            The model; `args.mode` decides which of its parts are trained, adapters decide for themselves.
        args ([`MiniMindOTrainingArguments`]): The settings.
        **kwargs: As [`Trainer`]; `data_collator` is a [`MiniMindODataCollator`].
    """

    args: MiniMindOTrainingArguments
    # `compute_loss` normalises over the accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(self, model: MiniMindOForConditionalGeneration, args: MiniMindOTrainingArguments, **kwargs):
        if args.codebook_weights is not None and len(args.codebook_weights) != model.config.num_codebooks:
            raise ValueError(
                f"`codebook_weights` must hold {model.config.num_codebooks} numbers, got {args.codebook_weights}."
            )
        # With adapters, PEFT has decided what is trained.
        if isinstance(model, MiniMindOForConditionalGeneration):
            set_trainable(model, args.mode, args.freeze_backbone)
        collator = kwargs.get("data_collator")
        if isinstance(collator, MiniMindODataCollator):
            collator.include_row_ids = True
            if collator.pack_length is not None and "flash" in str(model.config._attn_implementation):
                raise ValueError(
                    "Flash attention keeps packed samples apart in a single row only: leave `pack_length` out, got "
                    f"{collator.pack_length}."
                )
        held_out = kwargs.get("eval_dataset")
        held_out = held_out.values() if isinstance(held_out, dict) else [held_out]
        if args.train_sampling_strategy == "group_by_length" and not all(
            dataset is None or isinstance(dataset, MiniMindODataset)
            for dataset in (kwargs.get("train_dataset"), *held_out)
        ):
            # Only these know their lengths without building every sample.
            args.train_sampling_strategy = "random"
        self._model_config: Any = model.config
        # Now, while every process has it whole.
        adapted: Any = model
        base = adapted.get_base_model() if hasattr(model, "get_base_model") else model
        self._base = describe_base(base) if hasattr(model, "peft_config") else None
        if args.stop_weight is not None:
            model.config.audio_stop_weight = args.stop_weight
        super().__init__(model, args, **kwargs)
        self.loss_is_scaled_for_ga = True
        if isinstance(self.train_dataset, MiniMindOIterableDataset):
            self.train_dataset.is_lazy = args.world_size > 1
            self.train_dataset.repeats = True
        self._sums = self._zeros()
        self._counts = self._zeros()
        self._evaluated = self._zeros()
        self._summed_steps: set[int] = set()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir or ".")
        # The settings, pickled; nothing reads them.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self._base is not None:
            write_base(folder, self._base)

    def _zeros(self) -> dict[str, torch.Tensor]:
        return defaultdict(lambda: torch.zeros((), device=self.args.device))

    def _get_train_sampler(self, train_dataset=None):
        """An order that follows from seed and epoch, grouped by length where the dataset knows its lengths."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if not isinstance(dataset, MiniMindODataset) or strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(train_dataset)
        group_size = self.args.train_batch_size * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(dataset, seed, group_size if strategy == "group_by_length" else None)

    def _get_eval_sampler(self, eval_dataset):
        """The longest first: neighbours are alike, and what is reported does not depend on the order."""
        if isinstance(eval_dataset, MiniMindODataset):
            return (-eval_dataset.lengths()).argsort(kind="stable").tolist()
        return super()._get_eval_sampler(eval_dataset)

    def get_eval_dataloader(self, eval_dataset=None):
        """Batches as they are: no masked features, and padded rows, of which each is one sample."""
        collator = self.data_collator
        if isinstance(collator, MiniMindODataCollator):
            self.data_collator = replace(collator, feature_masking=None, packing=False, pack_length=None)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """Labels of the text, then of each codebook, over the batches of one step and all processes: `(1 +
        codebooks,)`."""
        counts: Any = torch.zeros(1 + self._model_config.num_codebooks, dtype=torch.long, device=device)
        model: Any = self.model
        if batch_samples and model.training:
            batch_samples[-1].update(self._without_repeated(batch_samples[-1], self.args.train_batch_size))
        for batch in batch_samples:
            if batch.get("labels") is not None:
                counts[0] += batch["labels"][:, 1:].ne(-100).sum().to(device)
            if batch.get("audio_labels") is not None:
                counts[1:] += batch["audio_labels"][:, :, 1:].ne(-100).sum(dim=(0, 2)).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        """The step's share of the loss; see the class."""
        counts = num_items_in_batch if model.training else None
        inputs = dict(inputs)
        row_ids = inputs.pop("row_ids", None)
        if model.training:
            inputs |= self._absent(inputs)
        else:
            inputs |= self._without_repeated(inputs, self.args.eval_batch_size)
        outputs = model(
            **inputs,
            skip_logits=self.args.prediction_loss_only or model.training,
            return_predictions=True,
            num_items_in_batch=None if counts is None else counts[0],
            num_audio_items_in_batch=None if counts is None else counts[1:],
        )
        parts = {"text_loss": outputs.text_loss}
        if outputs.codebook_losses is not None:
            weights = outputs.codebook_losses.new_tensor(
                self.args.codebook_weights or [1.0] * len(outputs.codebook_losses)
            )
            parts["audio_loss"] = (weights * outputs.codebook_losses).sum() / weights.sum()
        if all(part is None for part in parts.values()):
            raise ValueError(f"A batch has neither `labels` nor `audio_labels`, but {', '.join(inputs)}.")
        loss: Any = sum(part for part in parts.values() if part is not None)
        if counts is not None:
            # The gradients of the processes are averaged, and each has its own share of the labels.
            loss = loss * self.accelerator.num_processes
        if outputs.aux_loss is not None:
            share = self.current_gradient_accumulation_steps if counts is not None else 1
            parts["aux_loss"] = outputs.aux_loss / share
            loss = loss + parts["aux_loss"]
        if not torch.isfinite(loss):
            rows = "" if row_ids is None else f" in a batch of the rows {row_ids.tolist()}"
            raise ValueError(
                f"The loss is {loss.item()} at step {self.state.global_step}{rows}: look at these rows (`minimind-o "
                "data check`), or train with a lower learning rate."
            )
        if model.training:
            self._add_up(parts, outputs.codebook_losses)
            self._count(self._counts, inputs, outputs)
        else:
            self._count(self._evaluated, inputs, outputs)
            self._count_losses(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _absent(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        No speech, no pictures and voices of zeros, for a batch without: projectors and the speaker projection get a
        gradient of zero, at the same point of the backward pass as in a process whose batch has some. (ZeRO adds up
        gradients in the order in which they arrive; in another order, those of different parameters.)
        """
        config, ids = self._model_config, inputs["input_ids"]
        shapes = {
            ("audio_hidden_states", "input_features"): (0, 1, config.audio_hidden_size),
            ("image_hidden_states", "pixel_values"): (0, config.image_token_len, config.image_hidden_size),
            ("speaker_embeddings",): (len(ids), config.spk_emb_size),
        }
        return {
            names[0]: torch.zeros(shape, device=ids.device)
            for names, shape in shapes.items()
            if all(inputs.get(name) is None for name in names)
        }

    def _without_repeated(self, inputs: dict[str, Any], batch_size: int) -> dict[str, torch.Tensor]:
        """Labels without those of rows that only fill up the last batches, so that all processes have as many. (Packed
        rows keep them: which samples they hold is not known any more.)"""
        state = self.accelerator.gradient_state
        is_packed = inputs.get("position_ids") is not None
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0 or is_packed:
            return {}
        first = self.args.process_index * batch_size
        is_new = torch.arange(first, first + len(inputs["input_ids"])) < state.remainder
        labels = {name: inputs[name] for name in ("labels", "audio_labels") if inputs.get(name) is not None}
        return {
            name: value.masked_fill(~is_new.to(value.device).view(-1, *[1] * (value.dim() - 1)), -100)
            for name, value in labels.items()
        }

    @torch.no_grad()
    def _count(self, counts: dict[str, torch.Tensor], inputs: dict[str, Any], outputs):
        """Adds what a batch has of tokens, codes and whole frames, and how many of each were right."""
        for name, labels, predictions in (
            ("tokens", inputs.get("labels"), outputs.predictions),
            ("codes", inputs.get("audio_labels"), outputs.audio_predictions),
        ):
            if labels is None or predictions is None:
                continue
            labels, predictions = labels[..., 1:], predictions[..., 1:]
            right = (predictions == labels) & (labels != -100)
            counts[name] = counts[name] + (labels != -100).sum()
            counts[f"right_{name}"] = counts[f"right_{name}"] + right.sum()
            if name == "codes":
                # A frame's codes stand one position later in each codebook.
                codebooks = labels.shape[1]
                width = max(0, labels.shape[2] - codebooks + 1)
                frames = torch.stack([labels[:, i, i : i + width] for i in range(codebooks)])
                stop = self._model_config.audio_stop_token
                is_frame = ((frames != -100) & (frames != stop)).all(dim=0)
                all_right = torch.stack([right[:, i, i : i + width] for i in range(codebooks)]).all(dim=0)
                counts["frames"] = counts["frames"] + is_frame.sum()
                counts["right_frames"] = counts["right_frames"] + (all_right & is_frame).sum()

    @torch.no_grad()
    def _count_losses(self, inputs: dict[str, Any], outputs):
        """Adds an evaluation batch's losses, by its labels."""
        sums = self._evaluated
        if outputs.text_loss is not None:
            sums["text_loss"] = sums["text_loss"] + outputs.text_loss * (inputs["labels"][:, 1:] != -100).sum()
        if outputs.codebook_losses is not None:
            labelled_codes = (inputs["audio_labels"][..., 1:] != -100).sum(dim=(0, 2))
            sums["codebook_labels"] = sums["codebook_labels"] + labelled_codes
            sums["codebook_losses"] = sums["codebook_losses"] + outputs.codebook_losses * labelled_codes

    def _accuracies(self, counts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Shares of right tokens, codes and frames, of counts over all processes; none where there are no labels."""
        return {
            f"{name[:-1]}_accuracy": counts[f"right_{name}"] / counts[name]
            for name in ("tokens", "codes", "frames")
            if name in counts and counts[name] > 0
        }

    def evaluation_loop(self, dataloader, description: str, *args, metric_key_prefix: str = "eval", **kwargs):
        """As [`Trainer.evaluation_loop`], with each stream's loss and accuracy, over all labels and processes."""
        self._evaluated = self._zeros()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums: dict[str, Any] = {
            name: self.accelerator.reduce(value, reduction="sum") for name, value in self._evaluated.items()
        }
        figures = self._accuracies(sums)
        losses = []
        if sums.get("tokens", 0) > 0:
            figures["text_loss"] = sums["text_loss"] / sums["tokens"].clamp(min=1)
            losses.append(figures["text_loss"])
        if sums.get("codes", 0) > 0:
            of_codebooks = sums["codebook_losses"] / sums["codebook_labels"].clamp(min=1)
            figures["audio_loss"] = of_codebooks.mean()
            figures |= {f"codebook_{index}_loss": value for index, value in enumerate(of_codebooks)}
            losses.append(figures["audio_loss"])
        if losses:
            # Over all labels; the Trainer's own is the mean of the batches' means.
            figures["loss"] = torch.stack(losses).sum()
        metrics: Any = output.metrics
        metrics.update({f"{metric_key_prefix}_{name}": value.item() for name, value in figures.items()})
        return output

    def _add_up(self, parts: dict[str, torch.Tensor | None], codebook_losses: torch.Tensor | None):
        """Sums the parts of the loss until they are logged."""
        self._summed_steps.add(self.state.global_step)
        scale = self.accelerator.num_processes
        for name, value in parts.items():
            if value is not None:
                self._sums[name] = self._sums[name] + value.detach() * (1 if name == "aux_loss" else scale)
        if codebook_losses is not None:
            for index, value in enumerate(codebook_losses.detach()):
                self._sums[f"codebook_{index}_loss"] = self._sums[f"codebook_{index}_loss"] + value * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss, and each part's learning rate, to what is logged in training."""
        if "loss" in logs and self._sums:
            steps = len(self._summed_steps)
            self._summed_steps.clear()
            counts: Any = {
                name: self.accelerator.reduce(value, reduction="sum") for name, value in sorted(self._counts.items())
            }
            self._counts.clear()
            for name in sorted(self._sums):
                gathered: Any = self.accelerator.gather(self._sums[name].view(1))
                # Without a label of its kind, a loss is 0 and says nothing.
                of = {"text_loss": "tokens", "audio_loss": "codes"}.get(name, "codes" if "codebook" in name else "")
                if not of or counts.get(of, 0) > 0:
                    logs[name] = gathered.mean().item() / steps
            self._sums.clear()
            if not (counts.get("tokens", 0) > 0 or counts.get("codes", 0) > 0) or logs.get("grad_norm") == 0.0:
                logger.warning_once(
                    "Nothing is learnt: a logged interval has no labels, or none that reach what is trained. Are "
                    "prompts longer than the longest sequence, or is the mode one for other data?"
                )
            logs |= {name: value.item() for name, value in self._accuracies(counts).items()}
            for group in self.optimizer.param_groups if self.optimizer is not None else []:
                if "part" in group:
                    logs[f"{group['part']}_learning_rate"] = group["lr"]
        super().log(logs, start_time)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """One parameter group for each part, with its learning rate; weight decay on every parameter, as the
        original."""
        if self.optimizer is None:
            rates = {
                "thinker": self.args.learning_rate,
                "talker": self.args.talker_learning_rate,
                "projectors": self.args.projector_learning_rate,
            }
            rates = {part: self.args.learning_rate if rate is None else rate for part, rate in rates.items()}
            trained: Any = self.model if model is None else model
            groups: dict[str, list[nn.Parameter]] = defaultdict(list)
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    groups[_part_of(name)].append(parameter)
            if not groups:
                raise ValueError(f"Nothing is trained: mode {self.args.mode!r} leaves no parameter with a gradient.")
            optimizer_class, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
            optimizer_kwargs.pop("lr", None)
            self.optimizer = optimizer_class(
                [
                    {"params": parameters, "lr": rates[part], "weight_decay": self.args.weight_decay, "part": part}
                    for part, parameters in groups.items()
                ],
                **optimizer_kwargs,
            )
        return self.optimizer


def _part_of(name: str) -> str:
    """The part of the model a parameter belongs to, whatever wraps the model."""
    pieces = name.split(".")
    if "talker" in pieces:
        return "talker"
    if "audio_proj" in pieces or "vision_proj" in pieces or "audio_tower" in pieces or "vision_tower" in pieces:
        return "projectors"
    return "thinker"


__all__ = [
    "MiniMindOTrainer",
    "MiniMindOTrainingArguments",
    "initialize_talker_from_thinker",
    "set_trainable",
]
