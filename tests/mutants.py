"""`make mutants`: lines that decide numbers are broken, one at a time, and a test must notice.

Each mutant is a copy of the project with one line changed, in which the named tests run until the
first fails. What lives is printed, and the exit code is 1.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("helpers.py", "run.py", "pyproject.toml", "README.md", "requirements.txt", "docs",
          "engine", "commands", "tests", "notebooks", "data/rakuten_classes.csv",
          "data/published_results.csv", "data/released_code.csv", "data/sample_catalogue.py",
          "data/sample_words.toml")


# The libraries are imported once, in a process that splits itself for each mutant.
SERVER = multiprocessing.get_context("forkserver")
LIBRARIES = ["timm", "torchvision.transforms.v2", "transformers.trainer", "pretrainedmodels",
             "transformers.models.camembert.modeling_camembert", "seaborn", "scipy.stats",
             "transformers.models.flaubert.modeling_flaubert", "sklearn.linear_model", "papermill",
             "sklearn.feature_extraction.text", "hypothesis", "nltk", "joblib", "sentencepiece"]


@dataclass(frozen=True)
class Mutant:
    """A text that stands once in a file, what it becomes, and the tests that must notice."""
    file: str
    old: str
    new: str
    tests: str


def of(file: str, tests: str, *changes: tuple[str, str]) -> list[Mutant]:
    return [Mutant(file, old, new, tests) for old, new in changes]


SPLIT = 'rest, test = cut(products, SPLITS[split], seed)'
MUTANTS = [
    # Splits and rows
    *of("helpers.py", "test_splits.py",
        (SPLIT, SPLIT.replace("SPLITS[split]", "0.15")),
        ("cut(rest, VALIDATION_SHARE, seed)", "cut(products, VALIDATION_SHARE, seed)"),
        ("4 if held_out else 3", "4 if held_out else 2"),
        ('products = products.sort_values("product_id")  # the', "# the")),
    *of("engine/cuts.py", "test_splits.py",
        ("stratify=labels, random_state=seed", "stratify=None, random_state=seed"),
        ("stratify=labels, random_state=seed", "stratify=labels, random_state=0"),
        ("StratifiedGroupKFold(n, shuffle=True, random_state=seed)",
         "StratifiedGroupKFold(n, shuffle=True, random_state=0)"),
        ("return np.abs(np.bincount(labels[cut[1]]", "return -np.abs(np.bincount(labels[cut[1]]")),
    *of("engine/settings.py", "test_splits.py",
        ("VALIDATION_SHARE = 0.10", "VALIDATION_SHARE = 0.15"),
        ('"80-20": 0.20', '"80-20": 0.25')),
    *of("engine/rows.py", "test_splits.py test_catalogue.py test_full_scale.py -m 'not slow'",
        (".mask(turn < 3, np.inf)", ".mask(turn < 1, np.inf)"),
        ("/ (turn + 0.5)", "/ (turn + 1.0)"),
        ('products["description"].map(has_words)', 'products["description"] != ""'),
        ("random_state=seed)", "random_state=0)")),
    *of("engine/catalogue.py", "test_catalogue.py test_bad_catalogues.py",
        ("codes = y[layout[\"label\"]].loc[x.index]",
         "codes = y[layout[\"label\"]].set_axis(x.index)"),
        ("duplicated(keep=False)", "duplicated()"),
        ("if len(found) > len(there):", "if not there:")),
    *of("engine/rows.py", "test_catalogue.py",
        ('folder / layout["y"], classes_file(folder)]', 'folder / layout["x"]]')),
    *of("commands/plan.py", "test_stages.py -m 'not slow'",
        ("classes_file(folder), PUBLISHED]", "PUBLISHED]")),
    *of("engine/duplicates.py", "test_duplicates.py",
        ("2 * NEAR_SIGNS", "NEAR_SIGNS"), ("SAME_WORDS = 8 ", "SAME_WORDS = 2 "),
        ("low > np.median(low)", "low > np.mean(low)"),
        ("links = [copies, firsts[near_pairs(distinct)]]", "links = [copies]")),
    # Texts
    *of("engine/texts.py", "test_text.py",
        ('" ".join(split_words(text)).lower()', '" ".join(split_words(text))'),
        ("return text.translate(WINDOWS)", "return text"),
        ('text = TAG.sub(" ", text)', 'text = TAG.sub("", text)'),
        ("DECODINGS = 8 ", "DECODINGS = 1 ")),
    *of("helpers.py", "test_leaks.py -k nothing",
        ("model.fit(train, labels)", "model[0].fit([*train, *texts])\n"
         "    model[-1].fit(model[0].transform(train), labels)"),
        ('train, rest = text[text["part"] == "train"],',
         'train, rest = text[text["part"] != "test"],')),
    *of("helpers.py", "test_text.py test_scores.py",
        ("ngram_range=(1, 2)", "ngram_range=(1, 1)")),
    # Scores
    *of("engine/scores.py", "test_scores.py test_comparisons.py -m 'not slow'",
        ("labels=np.unique(truth)", "labels=np.arange(27)"),
        ('"macro_f1": float(f1(average="macro"))', '"macro_f1": float(f1(average="micro"))'),
        ('method="BCa" if len(rows) <= 2000 else "percentile"', 'method="percentile"'),
        ("f1.sum(1) / (true > 0).sum(1)", "f1.mean(1)"),
        ('f"{metric}_low": 100 * low', 'f"{metric}_low": 100 * value'),
        ("((first != truth) & (second == truth))", "((first != truth) & (second != truth))")),
    *of("engine/paper_tables.py", "test_scores.py",
        ('"other: accuracy": 100 * (second == truth)',
         '"other: accuracy": 100 * (first == truth)'),
        ('"text concat + final add": "concat-add"', '"text concat + final add": "concat-average"'),
        ('"IV": "80-20"', '"IV": "90-10"')),
    # Fine-tuning
    *of("helpers.py", "test_leaks.py -k nothing",
        ('training = text[text["part"] == "train"]', "training = text"),
        ('np.flatnonzero(text["part"] == part)',
         'np.flatnonzero(text["part"].isin([part, "test"]))'),
        ('places = np.flatnonzero(split["part"] == part)',
         'places = np.flatnonzero(split["part"].isin([part, "test"]))'),
        ('(text_rows(rows, text, part) for part in ("train", "val"))',
         '(text_rows(rows, text, part) for part in ("train", "test"))')),
    *of("engine/heads.py", "test_leaks.py -k frozen",
        ('learnt.mean(0), learnt.std(0)',
         'features.mean(0), features.std(0)')),
    *of("helpers.py", "test_finetune.py test_image_models.py -m 'not slow'",
        ("self.head(self.dropout(self.encoder(**inputs)))", "self.head(self.encoder(**inputs))")),
    *of("engine/heads.py", "test_finetune.py -m 'not slow'",
        ('curve["val_macro_f1"].idxmax()', 'curve["val_macro_f1"].idxmin()')),
    *of("engine/training.py", "test_finetune.py",
        ('lr_scheduler_type="linear"', 'lr_scheduler_type="constant"'),
        ("max_grad_norm=1.0", "max_grad_norm=0.1"),
        ("torch.randperm(self.rows, generator=random).tolist()", "list(range(self.rows))"),
        ("get_length_grouped_indices(self.lengths, self.batch, generator=random)",
         "list(range(self.rows))"),
        ("mixed_seed(self.seed, self.epoch)", "mixed_seed(self.seed)"),
        ("mixed_seed(self.seed, epoch, i)", "mixed_seed(self.seed, i)"),
        ("load_best_model_at_end=True", "load_best_model_at_end=False"),
        ("total / (last - first)", "total / last"),
        ("gradient_accumulation_steps=batch // group().num_processes // rows",
         "gradient_accumulation_steps=1")),
    *of("engine/vectors.py", "test_finetune.py test_text.py -m 'not slow'",
        ("features[rows] = vectors", "features[:len(rows)] = vectors")),
    # Text encoders
    *of("helpers.py", "test_text.py",
        ("return tokens[:, 0]", "return tokens[:, 1]"),
        ("/ mask.sum(1).clamp(min=1)", "/ mask.shape[1]")),
    *of("engine/text_checkpoints.py", "test_text_checkpoints.py test_tokens.py -m 'not slow'",
        ('tokenizer.padding_side = "right"', 'tokenizer.padding_side = "left"'),
        ("faithful = probe_ids(tokenizer) == wanted", "faithful = True"),
        ("    if not missing:\n        return", "    if True:\n        return"),
        ("positions -= padding + 1", "positions -= 0"),
        ("dtype=torch.float32, trust", "dtype=torch.bfloat16, trust")),
    *of("engine/text_models.py", "test_text.py",
        ("truncation=True, max_length=max_length", "truncation=False"),
        ("num_hidden_layers=layers", "num_hidden_layers=1")),
    # Pictures and regions
    *of("helpers.py", "test_image_models.py test_regions.py test_pictures.py -m 'not slow'",
        ("permute(0, 2, 4, 1, 3, 5)", "permute(0, 4, 2, 1, 3, 5)"),
        ("grid * grid, -1).mean(1)", "grid * grid, -1).amax(1)"),
        ('    if part == "train":\n        change', '    if part != "none":\n        change')),
    *of("engine/pictures.py", "test_pictures.py",
        ("picture = ImageOps.exif_transpose(picture)", "pass"),
        ("Resampling.BILINEAR", "Resampling.NEAREST"), ("numbers // 257", "numbers // 300"),
        ('layer.size, "white")', 'layer.size, "black")')),
    *of("engine/image_models.py", "test_image_models.py -m 'not slow'",
        ("(0.485, 0.456, 0.406)", "(0.485, 0.456, 0.4)"),
        ("(0.229, 0.224, 0.225)", "(0.229, 0.224, 0.2)")),
    *of("helpers.py", "test_pictures.py -m 'not slow'",
        ("v2.RandomRotation(15,", "v2.RandomRotation(0,"),
        ("        v2.RandomHorizontalFlip(),\n", ""),
        ("scale=(0.8, 1.0)", "scale=(0.2, 1.0)"),
        ("pictures.float() / 255 - mean", "pictures.float() / 255")),
    *of("engine/picture_cache.py", "test_pictures.py",
        ("            cache[i] = picture", "            cache[-1 - i] = picture"),
        ("pictures, path)\n        unchanged()", "pictures, path)")),
    *of("engine/stages.py", "test_catalogue.py",
        ("            refuse_changed_contents(run, name)", "            pass")),
    # Fusion
    *of("engine/fusions.py", "test_fusion.py -m 'not slow'",
        ("return sum(x) / len(x)", "return sum(x) / 3"),
        ("torch.cat(x, dim=-1)", "torch.cat(x[::-1], dim=-1)"),
        ("return torch.stack(x).amax(0)", "return torch.stack(x).amin(0)"),
        ("view_as(read).softmax(1)", "view_as(read).softmax(2)"),
        ("math.prod(factors).sum(1)", "math.prod(factors).mean(1)"),
        ("self.weigh(rows).softmax(1)", "self.weigh(rows).softmax(2)")),
    *of("engine/variants.py", "test_fusion.py -m 'not slow'",
        ('("P", (("T_f", "D_f"), ("T_c", "D_c"))),  # eq',
         '("P", (("T_f", "D_c"), ("T_c", "D_f"))),  # eq'),
        ('"flat": ("P", "T_f", "D_f", "T_c", "D_c")',
         '"flat": ("P", "T_f", "D_f", "T_c", "T_c")')),
    *of("engine/late_fusion.py", "test_late_fusion.py",
        ("probabilities[fit], labels[fit], probabilities[rest]",
         "probabilities, labels, probabilities[rest]"),
        ("(rows.mean(1), weighted,", "(weighted, weighted,")),
    *of("helpers.py", "test_leaks.py -k late",
        ("late_fusions(torch.stack(others, 1), val_labels, encoders)",
         "late_fusions(encoders, labels, encoders)")),
    *of("helpers.py", "test_scores.py",
        ("cross_fitted(encoders, labels)", "late_fusions(encoders, labels, encoders)")),
    *of("notebooks/09_analysis.ipynb", "test_leaks.py -k notebook",
        ("T = h.fit_temperature(val[model][:, 0], val_truth)",
         "T = h.fit_temperature(probabilities[model][:, 0], truth)")),
    *of("engine/scores.py", "test_comparisons.py -m 'not slow'",
        ("max(0.0, value.var(ddof=1) - of_rows) / seeds", "max(0.0, value.var(ddof=1)) / seeds"),
        ("variance += share ** 2 * seed_variance(seeds, found.drawn[model])", "pass"),
        ('multipletests(p, method="holm")[1]', "p")),
    *of("engine/claims.py", "test_comparisons.py -m 'not slow'",
        ('if row["p_holm"] >= level', 'if row["p"] >= level'),
        ('return best if gain["effect"] > gain["error"] else text', "return best")),
    *of("helpers.py", "test_fusion.py -m 'not slow'",
        ("nn.AdaptiveMaxPool1d", "nn.AdaptiveAvgPool1d"),
        ('first = [nn.Dropout(dropout)] if', "first = [nn.Dropout(0.0)] if"),
        ("more = [nn.Dropout(dropout), ", "more = ["),
        ("hidden &= ~hidden.all(1, keepdim=True)", "pass"),
        ("if self.training and self.hide:", "if self.hide:"),
        ("    if not keep_last:\n", "    if True:\n"),
        ("means[symbol].expand_as(x[symbol])", "x[symbol]"),
        ("torch.std_mean(columns[training], 0)", "torch.std_mean(columns, 0)"),
        ("torch.where(std > 1e-6, std", "torch.where(std > 1e-12, std"),
        ('(rows - getattr(self, f"mean_{name}"))', '(rows + getattr(self, f"mean_{name}"))'),
        ("    optimizer.zero_grad()\n", ""),
        ("torch.randperm(len(train), generator=shuffle)", "torch.arange(len(train))"),
        ('if scores["macro_f1"] > best[0]:', "if True:"),
        ("    model.eval()\n    batches", "    model.train()\n    batches")),
    *of("helpers.py", "test_leaks.py -k nothing",
        ('(torch.tensor(np.flatnonzero(split["part"] == part)) for part',
         '(torch.tensor(np.flatnonzero(split["part"].isin([part, "val"]))) for part'),
        ('read_text(run).iloc[rows.numpy()]', 'read_text(run).iloc[:len(rows)]'),
        ("model.fit_scale(x, train, scale", "model.fit_scale(x, scale")),
    # From stages to tables and new products
    *of("helpers.py", "test_scores.py test_classifier.py",
        ('("test", "predictions")', '("val", "predictions")'),
        ('"image_whole" if model == "seresnext"', '"image_regions" if model == "seresnext"'),
        ('encoder_texts(products, name.rpartition("_")[2], profile.texts)', 'products["title"]'),
        ("torch.where(absent, mean, rows)", "rows"),
        ("mean if symbol in gone else self", "self")),
    *of("engine/products.py", "test_classifier.py",
        ('.replace("-", "")', ""), ("range(1, len(rows) + 1)", "range(len(rows))")),
    *of("engine/tensors.py", "test_stages.py test_fusion.py -m 'not slow'",
        ("tensor[torch.as_tensor(rows)] for", "tensor for")),
    *of("engine/keys.py", "test_stages.py -m 'not slow'",
        ('"reads": {other: key_of(run, other) for other in info_of(run, name).reads}',
         '"reads": {}')),
]


def copy_with(mutant: Mutant | None, place: Path) -> None:
    """Copy the project, with the mutant's line changed."""
    for name in COPIED:
        source, target = ROOT / name, place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    if mutant:
        path = place / mutant.file
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")


def is_killed(mutant: Mutant | None, tests: str) -> bool:
    """Whether a test fails in a copy with this line changed."""
    with tempfile.TemporaryDirectory() as folder:
        copy_with(mutant, Path(folder))
        words = [word if not word.endswith(".py") else f"tests/{word}"
                 for word in shlex.split(tests)]
        process = SERVER.Process(target=run_tests, args=(folder, words))
        process.start()
        process.join()
        if process.exitcode not in (0, 1):
            said = (Path(folder) / "said").read_text()[-2000:]
            raise RuntimeError(f"pytest ended with {process.exitcode}: {said}")
        return process.exitcode == 1


def run_tests(folder: str, words: list[str]) -> None:
    """Run tests in a copy of the project, in this new process, until the first fails."""
    import pytest

    os.chdir(folder)
    said = os.open("said", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.path = [path for path in sys.path if Path(path).resolve() != ROOT / "tests"]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider",
                              "--rootdir", ".", "--basetemp", f"{folder}/pytest", *words])))


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--only", default="", help="mutants whose file or text holds this")
    words.add_argument("--at-a-time", type=int, default=2)
    chosen = words.parse_args()
    mutants = [mutant for mutant in MUTANTS if chosen.only in f"{mutant.file} {mutant.old}"]
    os.environ["OMP_NUM_THREADS"] = "1"
    SERVER.set_forkserver_preload(LIBRARIES)
    start, alive = time.monotonic(), []
    with ThreadPoolExecutor(chosen.at_a_time) as pool:
        sound = {tests: pool.submit(is_killed, None, tests)
                 for tests in dict.fromkeys(mutant.tests for mutant in mutants)}
        for tests, failed in sound.items():
            if failed.result():
                pool.shutdown(cancel_futures=True)
                print(f"the tests {tests} fail without any change")
                return 1
        killed = pool.map(lambda mutant: is_killed(mutant, mutant.tests), mutants)
        for mutant, dead in zip(mutants, killed):
            alive += [] if dead else [mutant]
            print(f"{'killed' if dead else 'LIVES '}  {mutant.file}: {mutant.old!r} -> "
                  f"{mutant.new!r}", flush=True)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants killed in "
          f"{time.monotonic() - start:.0f} s")
    return int(bool(alive))


if __name__ == "__main__":
    sys.exit(main())
