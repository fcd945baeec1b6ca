"""The Trainer that goes on where it was, in what memory there is.

What stands here lets `finetune` of helpers.py be read as what it is: training. Checkpoints, memory
that runs out and several processes are dealt with below.
"""
from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import timm
import torch
import transformers
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import load_file
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from engine.checkpoints import is_trained, last_checkpoint, seal_checkpoint, seal_training
from engine.files import read_json
from engine.processes import device, group, wait_for_file
from engine.progress import Progress, cores
from engine.runs import log_folder
from engine.settings import Profile
from engine.tensors import save_table, save_weights

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()  # Progress shows what the Trainer does


# --- rows and their order -------------------------------------------------------------------------
def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits, all that torch's generator takes, from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class RowDataset(torch.utils.data.Dataset):
    """Rows as the Trainer wants them: `row(i)` gives a dictionary of inputs; the label is added.

    It is asked for a row, or for (epoch, row). With a `seed`, both decide whatever is random in
    `row`, so that augmentation does not depend on which process makes it, or on what came before.
    """

    def __init__(self, row: Callable[[int], dict], labels: Sequence[int], seed: int | None = None):
        self.row, self.labels, self.seed = row, list(labels), seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: int | tuple[int, int]) -> dict:
        epoch, i = draw if isinstance(draw, tuple) else (0, draw)
        if self.seed is None:
            return {**self.row(i), "labels": int(self.labels[i])}
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reset a GPU's generator too, and its dropout.
            torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, i))
            return {**self.row(i), "labels": int(self.labels[i])}


class EpochSampler(torch.utils.data.Sampler):
    """The (epoch, row) of one epoch, in an order that seed and epoch alone decide.

    Whole batches of `batch` rows; the last one is filled with rows from the epoch's beginning.
    With `lengths`, rows of similar length share a batch, so that it pads little. Shown in 03.
    """

    def __init__(self, rows: int, batch: int, seed: int, lengths: Sequence[int] | None = None):
        self.rows, self.batch, self.seed, self.lengths = rows, batch, seed, lengths
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self.rows / self.batch) * self.batch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        random = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
        if self.lengths is None:
            order = torch.randperm(self.rows, generator=random).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self.batch, generator=random)
        for row in np.resize(order, len(self)).tolist():
            yield self.epoch, row


# --- the Trainer ----------------------------------------------------------------------------------
class StudyTrainer(Trainer):
    """The Trainer with our order of rows, which neither a resume nor the number of processes
    changes.
    """

    def __init__(self, *args, sampler: EpochSampler, profile: Profile, label: str, **kwargs):
        self.sampler = sampler
        callbacks = [StudyCallback(label, sampler, profile.checkpoint_steps)]
        if profile.early_stopping:
            callbacks.append(EarlyStoppingCallback(profile.early_stopping))
        super().__init__(*args, callbacks=callbacks, **kwargs)
        self.model_accepts_loss_kwargs = False  # forward's **inputs are the encoder's
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, *args) -> EpochSampler:
        return self.sampler

    def go_on(self) -> pd.DataFrame:
        """Train to the end, from the newest whole checkpoint if there is one; the curve."""
        rows = self.args.per_device_train_batch_size
        last = last_checkpoint(Path(self.args.output_dir), half=self.args.fp16)
        if last and (history := ended_early(Path(last), self.model)):
            return learning_curve(history)
        with memory_explained(rows):
            self.train(resume_from_checkpoint=last)
        return learning_curve(self.state.log_history)


def ended_early(checkpoint: Path, model: nn.Module) -> list[dict]:
    """The log of a training that early stopping had ended at this checkpoint, with its best
    weights in `model`; [] if it had not. The Trainer would train one epoch more.
    """
    state = read_json(checkpoint / "trainer_state.json")
    waited = state["stateful_callbacks"].get("EarlyStoppingCallback")
    if not waited or (waited["attributes"]["early_stopping_patience_counter"]
                      < waited["args"]["early_stopping_patience"]):
        return []
    best = checkpoint.with_name(Path(state["best_model_checkpoint"]).name)
    model.load_state_dict(load_file(best / "model.safetensors"))
    return state["log_history"]


class StudyCallback(TrainerCallback):
    """Tells the sampler which epoch it is, shows progress, and saves a checkpoint every `steps`
    steps (0: never).

    Not at an epoch's last step: the Trainer saves there itself, once the epoch has been scored.
    """

    def __init__(self, label: str, sampler: EpochSampler, steps: int):
        self.label, self.sampler, self.steps, self.bar = label, sampler, steps, None
        self.epoch_steps = len(sampler) // sampler.batch

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = Progress(self.label, state.max_steps - state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = state.global_step // self.epoch_steps

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.advance()
        within = state.global_step % self.epoch_steps
        if self.steps and within and state.global_step % self.steps == 0:
            control.should_save = True
            control.should_log = True  # so that an epoch's loss survives a stop

    def on_save(self, args, state, control, **kwargs):
        group().wait_for_everyone()  # each process writes its random state
        if group().is_main_process:
            seal_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def training_arguments(profile: Profile, folder: Path, batch: int, rows: int,
                       **more: object) -> TrainingArguments:
    """The Trainer's settings that text and pictures share: `batch` rows a step, `rows` of them on
    a device at a time.
    """
    cuda, dtype = device().type == "cuda", precision(profile)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(log_folder(folder.name))  # the one way to say it
    arguments = TrainingArguments(
        output_dir=folder / "checkpoints", max_grad_norm=1.0, lr_scheduler_type="linear",
        per_device_train_batch_size=rows, per_device_eval_batch_size=2 * rows,
        gradient_accumulation_steps=batch // group().num_processes // rows,
        eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch", save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="macro_f1", greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not cuda,
        torch_compile_backend=None if profile.compile == "off" else profile.compile,
        dataloader_pin_memory=cuda, label_names=["labels"], remove_unused_columns=False,
        report_to=profile.report_to, run_name=folder.name, disable_tqdm=True, **more)
    # Otherwise one process would spread each batch over all GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def precision(profile: Profile) -> torch.dtype:
    """The data type of the encoders' matrix products; weights are float32 always."""
    types = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if profile.precision != "auto":
        return types[profile.precision]
    if device().type == "cpu":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def loader_workers(profile: Profile) -> int:
    """How many processes load pictures for one that trains: the setting, or its cores, up to 8."""
    if profile.loader_workers >= 0:
        return profile.loader_workers
    return min(8, cores()) if device().type == "cuda" else 0


# --- once, in what memory there is ----------------------------------------------------------------
def trained_once(model: nn.Module, attempt: Callable[[int], pd.DataFrame], folder: Path,
                 batch: int, profile: Profile, seed: int) -> pd.DataFrame:
    """Let `attempt(rows on a device at a time)` train `model`; its curve.

    Fewer rows are tried when memory runs out, from the same start. The end is kept in
    `folder`/trained.safetensors, so that a stop while features are written loses no training.
    """
    trained = folder / "trained.safetensors"
    if not is_trained(folder):
        start = {name: value.clone() for name, value in model.cpu().state_dict().items()}
        sizes = iter(rows_at_a_time(batch, profile.device_batch))
        if group().num_processes > 1 and device().type == "cuda":
            # Statistics of the whole batch; torch's own would lose the activations inside timm's.
            timm.layers.convert_sync_batchnorm(model)

        def begin(rows: int) -> pd.DataFrame:
            set_seed(seed)
            model.load_state_dict(start)
            return attempt(rows)

        curve = find_executable_batch_size(begin, next(sizes), lambda: next(sizes, 0))()
        group().wait_for_everyone()  # all have read the best epoch
        save_table(folder / "curve.csv", curve)
        save_weights(trained, model.state_dict())
        seal_training(folder)
    wait_for_file(trained)
    model.load_state_dict(load_file(trained))
    if group().is_main_process:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return pd.read_csv(folder / "curve.csv")


def rows_at_a_time(batch: int, device_batch: int) -> list[int]:
    """The sizes to try on one device, largest first: divisors of its share of a batch, at most
    `device_batch` (0: all). ValueError if the processes cannot share a batch alike.
    """
    share, left = divmod(batch, group().num_processes)
    if left:
        raise ValueError(f"a batch of {batch} rows cannot be shared by {group().num_processes} "
                         "processes alike; set processes or the batch so that it can")
    most = device_batch or share
    return [size for size in range(share, 0, -1) if share % size == 0 and size <= most]


@contextmanager
def memory_explained(rows: int) -> Iterator[None]:
    """Where no smaller number of rows can be tried after memory ran out, a ValueError that says
    what to set.

    One process alone tries fewer rows. Of several, those that had room are waiting for this one,
    so all must end.
    """
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error) or (rows > 1 and group().num_processes == 1):
            raise
        smaller = f"device_batch={rows // 2} or " if rows > 1 else ""
        raise ValueError(f"out of memory with {rows} row(s) on a device at a time; set {smaller}a "
                         "smaller max_length or image_size, precision=bf16, or "
                         "gradient_checkpointing=True") from error


def learning_curve(history: list[dict]) -> pd.DataFrame:
    """One row an epoch from the Trainer's log, whose losses are means since the entry before."""
    rows, total, first, last = [], 0.0, 0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
        if "eval_cross_entropy" in entry:
            rows.append({"epoch": len(rows) + 1, "train_loss": total / (last - first),
                         "val_loss": entry["eval_cross_entropy"],
                         "val_accuracy": entry["eval_accuracy"],
                         "val_macro_f1": entry["eval_macro_f1"]})
            total, first = 0.0, last
    return pd.DataFrame(rows)
