"""Checkpoints of a training, and its end, with the hashes of their files: damage is set aside."""
from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from engine.files import damaged_file, read_json, seal
from engine.processes import agreed, group

SEAL = "hashes.json"  # written last, of all that a checkpoint holds


def seal_checkpoint(checkpoint: Path, without: str = "") -> None:
    """Say that a checkpoint is whole, `without` a file where one is named."""
    files = sorted(checkpoint.iterdir())
    seal(checkpoint / SEAL, [file for file in files if file.name not in (SEAL, without)])


def last_checkpoint(folder: Path, half: bool) -> str | None:
    """The newest whole checkpoint, the same for all processes; what a stop left is removed, what
    is damaged is set aside with a warning.

    A GPU in another precision than fp16 (`half`) cannot read fp16's scaler, and does without it.
    """
    newest = None
    if group().is_main_process:
        checkpoints = folder.glob("checkpoint-*")
        whole = []
        for checkpoint in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1])):
            if not (checkpoint / SEAL).exists():
                shutil.rmtree(checkpoint)
            elif wrong := damaged_file(checkpoint / SEAL):
                aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
                warnings.warn(f"{checkpoint / wrong} is damaged: {aside.name} is set aside, and "
                              "the training goes on from before it", stacklevel=2)
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)
            else:
                whole.append(checkpoint)
                scaler = checkpoint / "scaler.pt"
                if not half and scaler.exists():
                    seal_checkpoint(checkpoint, without=scaler.name)
                    scaler.unlink()
        while whole and not newest:
            best = read_json(whole[-1] / "trainer_state.json")["best_model_checkpoint"]
            if best is None or Path(best).name in [path.name for path in whole]:
                newest = str(whole[-1])
            else:  # its end would be another epoch than the best
                shutil.rmtree(whole.pop())
    return agreed(newest)


def seal_training(folder: Path) -> None:
    """Say that a training has ended: its best weights and its curve are whole."""
    if group().is_main_process:
        seal(folder / "trained.json", [folder / "trained.safetensors", folder / "curve.csv"])


def is_trained(folder: Path) -> bool:
    """Whether the end of a training is there, the same for all processes; what is damaged is not,
    with a warning.
    """
    wrong, place = "", folder / "trained.json"
    if group().is_main_process:
        wrong = damaged_file(place)
        if wrong and place.exists():
            warnings.warn(f"{folder / wrong} is damaged; the training is done again", stacklevel=2)
    return not agreed(wrong)
