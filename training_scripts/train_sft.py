"""Fine-tunes MiniMind-O on conversations in parquet files.

    python training_scripts/train_sft.py training_scripts/recipes/mini/1_t2a.yaml --model checkpoint \
        --train_files "t2a*.parquet" --output_dir runs/t2a
    accelerate launch training_scripts/train_sft.py ...             # several processes

CPU-sized, a minute on two cores:

    minimind-o init nano nano
    python training_scripts/train_sft.py --model nano --train_files small.parquet --output_dir runs/try \
        --max_steps 20 --per_device_train_batch_size 2 --max_length 256 --use_cpu true

A YAML file holds any of the options, and the command line wins over it. A run that was interrupted goes on where its
last checkpoint stands when it is started again. `--output_dir` ends up as a complete checkpoint (or adapter), with
`training_curves.png` and a model card that tells how it was made.
"""

import importlib.util
import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForMultimodalLM, AutoProcessor, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from minimind_o_hf.adapters import PRESETS, get_peft_model, lora_config
from minimind_o_hf.data import (
    FeatureCache,
    FeatureMasking,
    MiniMindODataCollator,
    MiniMindODataset,
    MiniMindOIterableDataset,
    SampleSettings,
    SpeechAugmentation,
    cache_features,
)
from minimind_o_hf.data.features import DTYPES as CACHE_DTYPES
from minimind_o_hf.files import new_file
from minimind_o_hf.trainer import MiniMindOTrainer, MiniMindOTrainingArguments, initialize_talker_from_thinker
from minimind_o_hf.training_report import SampleCallback, write_training_report

logger = logging.getLogger(__name__)
ADAPTER_RANK = 16


@dataclass
class ModelArguments:
    """Which model is trained, and how it starts."""

    model: str = field(metadata={"help": "checkpoint directory or Hub id"})
    adapter: str | None = field(default=None, metadata={"help": "train a LoRA adapter: thinker, talker or all"})
    adapter_rank: int = field(default=ADAPTER_RANK, metadata={"help": "rank of the adapter"})
    train_codec: bool = field(
        default=False, metadata={"help": "with an adapter: train codec embedding and head whole"}
    )
    talker_from_thinker: bool = field(
        default=False,
        metadata={"help": "start the Talker as a copy of the Thinker's last layers, for a language model"},
    )

    def __post_init__(self):
        if self.adapter is not None and self.adapter not in PRESETS:
            raise ValueError(f"--adapter must be one of {', '.join(PRESETS)}, got {self.adapter!r}.")


@dataclass
class DataArguments:
    """What it is trained on."""

    train_files: list[str] = field(metadata={"help": "parquet files, or patterns of their names"})
    eval_files: list[str] | None = field(default=None, metadata={"help": "held-out files to evaluate on"})
    max_length: int = field(default=512, metadata={"help": "longest sequence, in positions; longer ones are cut"})
    streaming: bool = field(default=False, metadata={"help": "read from front to back; needs --max_steps"})
    shuffle_buffer: int = field(default=1000, metadata={"help": "with --streaming: rows to draw from (0: in order)"})
    augment: bool | None = field(
        default=None, metadata={"help": "augment input speech and mask its features (on, but with --cache_features)"}
    )
    cache_features: str | None = field(
        default=None, metadata={"help": "folder that keeps what the frozen encoders return, computed before training"}
    )
    cache_dtype: str = field(default="float32", metadata={"help": "of the kept features: float32 or bfloat16"})
    swap_probability: float = field(default=0.05, metadata={"help": "scheduled sampling of codes and text (0: off)"})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "round batch lengths up"})
    packing: bool = field(default=False, metadata={"help": "lay samples one after another in place of padding"})
    pack_length: int | None = field(
        default=None, metadata={"help": "length of packed rows (one row; flash attention needs that)"}
    )

    def __post_init__(self):
        if self.augment and self.cache_features:
            raise ValueError("Cached features are those of the speech as it is: use --augment or --cache_features.")
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"--cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}.")
        if not 0 <= self.swap_probability <= 1:
            raise ValueError(f"--swap_probability must be from 0 to 1, got {self.swap_probability}.")
        if self.augment is None:
            self.augment = self.cache_features is None


@dataclass
class SampleArguments:
    """What it says while it is trained."""

    sample_steps: int | None = field(default=None, metadata={"help": "answer the prompts every so many steps"})
    sample_prompts: list[str] = field(
        default_factory=lambda: ["Hello, who are you?", "你好，请介绍一下你自己。"], metadata={"help": "what is asked"}
    )
    sample_voice: str | None = field(default=None, metadata={"help": "voice of the answers"})
    sample_tokens: int = field(default=128, metadata={"help": "longest answer, in steps of 80 ms"})


def parse(
    arguments: list[str],
) -> tuple[ModelArguments, DataArguments, SampleArguments, MiniMindOTrainingArguments]:
    """Options of the command line over those of a YAML file, if the first one is its name."""
    parser = HfArgumentParser((ModelArguments, DataArguments, SampleArguments, MiniMindOTrainingArguments))
    if arguments and not arguments[0].startswith("-"):
        settings = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8")) or {}
        if not isinstance(settings, dict):
            raise ValueError(f"{arguments[0]} must hold options with their values, got {settings!r:.80}")
        known = {action.dest for action in parser._actions}
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"{arguments[0]} has options that this script does not know: {', '.join(unknown)}.")
        flags = []
        for name, value in settings.items():
            if value is None or value == []:
                continue  # as where it is left out
            if isinstance(value, dict):
                value = json.dumps(value)
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        arguments = flags + arguments[1:]
    model_args, data_args, sample_args, args = parser.parse_args_into_dataclasses(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('The report of a run needs matplotlib: pip install "minimind_o_hf[train]"')
    if data_args.streaming and args.max_steps <= 0:
        raise ValueError("--streaming needs --max_steps: how many rows there are to an epoch is not known.")
    if not Path(model_args.model).exists() and model_args.model.count("/") != 1:
        raise FileNotFoundError(f"There is no directory {model_args.model}, and a Hub id has the form OWNER/NAME.")
    if model_args.adapter is None and (model_args.train_codec or model_args.adapter_rank != ADAPTER_RANK):
        raise ValueError("--train_codec and --adapter_rank are of an adapter: name one with --adapter.")
    if model_args.adapter is not None and (args.mode != "all" or args.freeze_backbone != "none"):
        raise ValueError("--adapter says what is trained: leave --mode and --freeze_backbone out.")
    return model_args, data_args, sample_args, args


def main(arguments: list[str] | None = None) -> MiniMindOTrainer:
    """Trains, saves and reports; returns the trainer."""
    model_args, data_args, sample_args, args = parse(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO)
    set_seed(args.seed)  # before anything is initialised

    model = AutoModelForMultimodalLM.from_pretrained(
        model_args.model, dtype=torch.float32, allow_missing=model_args.talker_from_thinker
    )
    processor = AutoProcessor.from_pretrained(model_args.model)
    if model_args.talker_from_thinker and not initialize_talker_from_thinker(model):
        logger.warning("The Talker's layers have other sizes than the Thinker's: they start at random.")
    config = model.config
    if model_args.adapter is not None:
        model = get_peft_model(
            model,
            lora_config(model_args.adapter, rank=model_args.adapter_rank, train_codec=model_args.train_codec),
        )

    features = None
    if data_args.cache_features:
        features = cached_features(model, processor, data_args, args)
    swap = data_args.swap_probability
    settings = SampleSettings(
        max_length=data_args.max_length,
        swap_codes=swap,
        swap_text=swap,
        augmentation=SpeechAugmentation() if data_args.augment else None,
    )
    if data_args.streaming:
        # The Trainer's loader splits what one process reads, so each process may read everything.
        train = MiniMindOIterableDataset(
            data_args.train_files,
            processor,
            config,
            settings,
            args.seed,
            shuffle_buffer=data_args.shuffle_buffer,
            features=features,
        )
    else:
        train = MiniMindODataset(data_args.train_files, processor, config, settings, args.seed, features)
    held_out = None
    if data_args.eval_files:
        unchanged = SampleSettings.deterministic(data_args.max_length)
        held_out = MiniMindODataset(data_args.eval_files, processor, config, unchanged, args.seed, features)
    collator = MiniMindODataCollator(
        processor,
        config,
        pad_to_multiple_of=data_args.pad_to_multiple_of,
        feature_masking=FeatureMasking() if data_args.augment else None,
        packing=data_args.packing,
        pack_length=data_args.pack_length,
    )

    trainer = MiniMindOTrainer(model, args, train_dataset=train, eval_dataset=held_out, data_collator=collator)
    if sample_args.sample_steps:
        trainer.add_callback(
            SampleCallback(
                trainer,
                processor,
                sample_args.sample_prompts,
                sample_args.sample_steps,
                sample_args.sample_tokens,
                sample_args.sample_voice,
            )
        )
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    check_same_run(Path(args.output_dir), model_args, data_args, last)
    result = trainer.train(resume_from_checkpoint=last)
    trainer.save_model()
    if result.metrics["train_loss"] or last is None:  # not for a finished run that was started again
        trainer.save_metrics("train", result.metrics)
    if held_out is not None:
        trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()
    if trainer.is_world_process_zero():
        if model_args.adapter is None:
            processor.save_pretrained(args.output_dir)
        told = {
            # A published card should not tell of this machine's folders.
            "base model": Path(model_args.model).name if Path(model_args.model).exists() else model_args.model,
            "adapter": model_args.adapter,
            "training data": [Path(name).name for name in data_args.train_files],
            "held-out data": [Path(name).name for name in data_args.eval_files or []],
            "longest sequence": data_args.max_length,
            "input speech": "augmented" if data_args.augment else "as it is",
            "scheduled sampling": data_args.swap_probability,
        }
        write_training_report(trainer, args.output_dir, {name: value for name, value in told.items() if value})
    return trainer


def check_same_run(folder: Path, model_args: ModelArguments, data_args: DataArguments, checkpoint: str | None) -> None:
    """Says where a run goes on, and refuses to go on with another model or other data than it began with."""
    described = {
        "model": model_args.model,
        "adapter": model_args.adapter,
        "train_files": data_args.train_files,
        "max_length": data_args.max_length,
    }
    record = folder / "run.json"
    if checkpoint is not None:
        logger.info("Going on from %s.", checkpoint)
        before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else described
        changed = [name for name, value in described.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{folder} holds a run with another {', '.join(changed)} ({before[changed[0]]!r}, not "
                f"{described[changed[0]]!r}): give another --output_dir, or remove it to start anew."
            )
    elif int(os.environ.get("RANK", "0")) == 0:
        with new_file(record) as temporary:
            temporary.write_text(json.dumps(described), encoding="utf-8")


def cached_features(model, processor, data_args: DataArguments, args: MiniMindOTrainingArguments) -> FeatureCache:
    """The frozen encoders' outputs for all files, each process computing its share."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.to(args.device)
    for files in filter(None, (data_args.train_files, data_args.eval_files)):
        rows = MiniMindODataset(files, processor, base.config).rows
        cache = cache_features(
            rows,
            base,
            processor,
            data_args.cache_features,
            data_args.cache_dtype,
            rank=args.process_index,
            world_size=args.world_size,
        )
    if args.world_size > 1:
        torch.distributed.barrier()
    return FeatureCache(cache.directory)


if __name__ == "__main__":
    main().accelerator.end_training()  # a process group that is left open may abort a finished run
