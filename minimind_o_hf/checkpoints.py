"""Checkpoints that are there whole or not at all, whenever a run is killed and however full the disk is."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints

STAGING = ".saving"


class WholeCheckpoints(Trainer):
    """
    A Trainer whose checkpoints, and whose last model, are written in a hidden folder of `output_dir` and take their
    names when they are complete. transformers' own writes them in place, and takes what a killed run left half-written
    for the last checkpoint.
    """

    _staging: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def train(self, *args, **kwargs):
        """As [`Trainer.train`]; removes what an interrupted run left half-written."""
        self._remove(Path(self._get_output_dir(None)) / STAGING)
        return super().train(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        # A finished run that is started again is finished: transformers looks after a step only.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _remove(self, folder: Path) -> None:
        # One process of each machine, as there may be no common disk; before the others write.
        if self.is_local_process_zero():
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _stage(self, folder: Path, what: str) -> Iterator[Path]:
        """A new folder to write into, gone again after an error, which becomes an `OSError` that says what to do."""
        staging = folder / STAGING
        self._remove(staging)
        try:
            staging.mkdir(parents=True, exist_ok=True)
            yield staging
            self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError, RuntimeError) as error:
            # torch.save has no error class of its own; others, of a process group among them, are none of this.
            if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
                raise
            last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            kept = f"a new start goes on from {last}" if last else "no checkpoint is there"
            raise OSError(f"{what} could not be written to {folder}: {error} ({kept}). Is the disk full?") from error
        finally:
            if self.is_local_process_zero():
                shutil.rmtree(staging, ignore_errors=True)

    def _save_checkpoint(self, model, trial) -> None:
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._stage(run, f"The checkpoint of step {self.state.global_step}") as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            written, target = staging / name, run / name
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(target)
                if self.args.should_save:
                    self.state.save_to_json(str(written / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.is_local_process_zero() and written.is_dir():
                # On a common disk, one process of another machine may have been first.
                with contextlib.suppress(FileNotFoundError):
                    if target.exists():
                        target.rename(staging / f"replaced-{name}")
                    written.rename(target)
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`Trainer.save_model`]; every file is written under another name and renamed."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir or self._get_output_dir(None))
        with self._stage(target, "The model") as staging:
            super().save_model(str(staging), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for file in sorted(staging.iterdir()):
                    os.replace(file, target / file.name)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)


__all__ = ["WholeCheckpoints"]
