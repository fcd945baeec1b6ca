"""`make load`: tables of 84,916 and of 1,000,000 rows, and notebooks 07 to 09 on 84,916 rows.

Prints seconds, and peak memory of all processes, in all and for each row. The texts are invented
(tests/full_size.py); the representations are random, of full width: T_c, D_c, T_f, D_f 768, P 2048.
What the encoders would have made is put in their stages' places. Notebook 09 asks two encoders, a
text encoder of one layer and a whole SE-ResNeXt-50, both untrained, and reads pictures of 64 x 64.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import helpers as h
from engine.files import temporary_folder
from engine.keys import MAKERS, kind_of, recipe_of
from engine.looks import one_look
from engine.tensors import save_pretrained
from full_size import write_tables

SETTINGS = {"rows": "all", "camembert": "small", "flaubert": "small", "image_weights": "none",
            "text_layers": 1, "vocabulary": 2000, "region_size": 64, "fusion_epochs": 1,
            "fusion_seeds": 1, "bootstrap": 200}
LIMIT_GB = 6
CLASSES, WIDTHS = 27, {"P": 2048}  # of texts: 768


def many_rows(folder: Path, rows: int) -> None:
    """Tables of so many rows, those of the public size again and again under other ids."""
    write_tables(folder)
    if rows == 84_916:
        return
    for file, ids in ((h.LAYOUTS["ENS"]["x"], "productid"), (h.LAYOUTS["ENS"]["y"], None)):
        table = pd.read_csv(folder / file, index_col=0, keep_default_na=False)
        parts = [table.assign(**{ids: table[ids] + 4_000_000 * i}) if ids else table
                 for i in range(rows // len(table) + 1)]
        pd.concat(parts, ignore_index=True)[:rows].to_csv(folder / file)


def read_rows(folder: str) -> None:
    """Load, check, select, split and clean, as notebooks 01 and 02 do; in a process of its own."""
    start = time.perf_counter()
    products = h.load_catalogue(Path(folder))
    loaded = time.perf_counter()
    h.make_split(h.select_rows(products, "all"), "90-10", 0)
    split = time.perf_counter()
    for field in h.FIELDS:
        h.clean_texts(products[field], "paper", field)
    end = time.perf_counter()
    print(f"{len(products):,} rows: load and check {loaded - start:.1f} s, split "
          f"{split - loaded:.1f} s, clean {end - split:.1f} s; {(end - start) / len(products):.1e} "
          "s a row")


def with_peak(words: list[str]) -> tuple[str, float]:
    """What a command prints, and the peak memory of its processes, without this one, in GB."""
    from benchmark import Memory

    command = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    with Memory(command.pid) as memory:
        said, _ = command.communicate()
    assert command.returncode == 0, f"{words} has failed"
    return said.strip(), memory.peak / 1e9


def write_pictures(folder: Path) -> None:
    """A picture for each row, all of one content; a file system limits the names of one file."""
    products = h.load_catalogue(folder)
    paths = list(map(Path, products["picture"]))
    paths[0].parent.mkdir(parents=True)
    for i, path in enumerate(paths):
        if i % 10_000 == 0:
            first = path
            Image.new("RGB", (8, 8), "white").save(path, "JPEG")
        else:
            path.hardlink_to(first)


def random_stage(run: h.Run, name: str, folder: Path) -> dict:
    """What an encoder or the baselines would have written, of random numbers."""
    random = torch.Generator().manual_seed(len(name))
    width = WIDTHS["P"] if "image" in name or "ser" in name else 768
    if name == "baselines":
        rest = h.read_split(run).query("part != 'train'")["product_id"]
        chances = {model: torch.rand(len(rest), CLASSES, generator=random)
                   for model in h.BASELINES}
        h.save_tensors(folder / "probabilities.safetensors", rest, **chances)
        return {}
    ids = h.chosen_labels(run)["product_id"]
    if name != "seresnext":
        h.save_tensors(folder / "features.safetensors", ids,
                       features=torch.randn(len(ids), width, generator=random))
    if name == "seresnext":
        encoder = h.ImageEncoder(run.profile.seresnext, size=run.profile.image_size)
        h.save_weights(folder / "encoder.safetensors", encoder.state_dict())
    if name == "camembert_title":
        with temporary_folder() as place:
            made = h.load_text_model(run, "camembert", h.read_text(run)["title"][:5000], place)
        save_pretrained(folder / "encoder", *made)
    if not name.startswith("image"):
        head = torch.nn.Linear(width, CLASSES)
        h.save_weights(folder / "head.safetensors", head.state_dict())
    curve = {"epoch": [1], "train_loss": [3.3], "val_loss": [3.3], "val_accuracy": [0.04],
             "val_macro_f1": [0.04]}
    h.save_table(folder / "curve.csv", pd.DataFrame(curve))
    return {"best_epoch": 1, "val_accuracy": 0.04, "val_macro_f1": 0.04, "parameters": 0}


def put_in_place(run: h.Run, name: str) -> None:
    """Write a stage of random numbers under the key of the real one."""
    with one_look():
        recipe_of(run, name)  # of the real maker; looked up once
        real = MAKERS[kind_of(name)]
        MAKERS[kind_of(name)] = random_stage
        try:
            h.stage(run, name)
        finally:
            MAKERS[kind_of(name)] = real


def fuse_and_score(folder: Path) -> None:
    """Notebooks 07 to 09 on all rows, as run.py executes them."""
    os.environ |= {"RAKUTEN_DATA": str(folder), "STUDY_RUNS": str(folder / "runs"),
                   "STUDY_CACHE": str(folder / "cache")}
    write_pictures(folder)
    run = h.open_run("paper", "90-10", 0, SETTINGS)
    for name in ("splits", "text"):
        h.stage(run, name)
    names = ("baselines", *h.REPRESENTATIONS.values(), "seresnext", "image_whole")
    for name in sorted(names, key=lambda name: name.startswith("image")):  # these read seresnext
        put_in_place(run, name)
    words = [sys.executable, str(ROOT / "run.py"), "study", *run.options]
    for notebook in ("07", "08", "09"):
        start = time.perf_counter()
        _, peak = with_peak([*words, "--only", notebook])
        print(f"notebook {notebook}, 84,916 rows: {time.perf_counter() - start:.0f} s, peak "
              f"{peak:.1f} GB", flush=True)
        assert peak < LIMIT_GB, f"more than {LIMIT_GB} GB"
    scores = pd.read_csv(h.read_stage(run, "scores") / "scores.csv")
    assert (scores["n"] == 8_492).all() and np.isfinite(scores["accuracy"]).all()


def main() -> None:
    if len(sys.argv) > 1:
        return read_rows(sys.argv[1])
    with tempfile.TemporaryDirectory() as place:
        for rows in (84_916, 1_000_000):
            folder = Path(place) / str(rows)
            many_rows(folder, rows)
            said, peak = with_peak([sys.executable, __file__, str(folder)])
            print(f"{said}; peak {peak:.2f} GB, {1e9 * peak / rows / 1e3:.1f} kB a row", flush=True)
        fuse_and_score(Path(place) / "84916")
    return None


if __name__ == "__main__":
    main()
