"""What the unit tests share: 60 invented products in both public layouts, a run on them, and stages
with a content of the test's own.
"""
import functools
import inspect
import os
import resource
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the network
# Test processes share the cores: more threads, here and in what they start, only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's `&` has Ctrl-C ignored, here and in what is started; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import helpers as h
from engine import fingerprint, keys, rows

# The same cases each time; a slow machine is no failure.
settings.register_profile("study", deadline=None, derandomize=True, database=None)
settings.load_profile("study")

# Twelve invented titles and some description sentences of five classes; the first description is
# missing.
PRODUCTS = {
    10: (["Le Phare oublié - Anne Marlot", "Les Racines du vent, roman",
          "Contes d'Armorique (poche)", "Le Dernier Wagon - Paul Vesne",
          "Carnets d'un botaniste", "La Maison des brumes", "Histoire d'un moulin",
          "L'Atlas des îles perdues", "Poèmes du soir - édition 1962", "Un Été à Kerlouan",
          "La Lettre sous l'escalier", "Mémoires d'un libraire"],
         ["Livre d'occasion, couverture un peu usée.", "Roman broché de 212 pages, bon état.",
          "Exemplaire de bibliothèque ; tampon en page de garde."]),
    1280: (["Ours en peluche Nono 30 cm", "Train en bois 18 pièces", "Poupée Lila et sa valise",
            "Puzzle des animaux 48 pièces", "Camion de pompiers à friction", "Toupie lumineuse",
            "Dinette en métal 22 pièces", "Cubes empilables bébé", "Château fort à monter",
            "Marionnettes à doigts", "Yoyo en hêtre", "Arche et ses animaux"],
           ["Jouet pour enfant dès 3 ans.", "Couleurs vives, peinture sans danger.",
            "Idéal pour l'éveil."]),
    2583: (["Pompe de filtration 6 m³/h", "Bâche à bulles ronde Ø 3,6 m",
            "Échelle de piscine 3 marches", "Robot nettoyeur Aquavif", "Liner 75/100 bleu",
            "Skimmer blanc", "Projecteur LED de bassin", "Épuisette de surface",
            "Chlore lent 5 kg", "Tuyau flottant 9 m", "Piscine tubulaire 4 x 2 m",
            "Thermomètre de piscine canard"],
           ["Pour piscine hors sol ou enterrée.", "Débit de filtration élevé, raccord 38 mm.",
            "Garantie 2 ans."]),
    40: (["Rallye Vosges 4 - PC", "Chevaliers de l'Aube PS2", "Mystère au manoir, jeu vidéo",
          "Astro Moto Turbo", "Pixel Golf deluxe", "Les Bâtisseurs du Nil", "Ligue Foot 98 Mega",
          "Dragons & Donjonnets", "Sous-marin Abysse", "Karting des neiges", "Zombies à Paris",
          "Simulateur de tracteur"],
         ["Jeu complet avec notice.", "Version européenne, boîte d'origine.",
          "Fonctionne sur console française."]),
    1560: (["Table basse en chêne", "Étagère murale 5 niveaux", "Chaise scandinave x4",
            "Bureau d'angle Milo", "Commode 3 tiroirs", "Tabouret de bar noir",
            "Buffet en pin massif", "Lit gigogne 90 x 190", "Meuble TV industriel",
            "Console d'entrée", "Armoire 2 portes", "Banc de lit en velours"],
           ["Meuble livré à plat, notice incluse.", "Dimensions : L 80 x P 40 x H 75 cm.",
            "Bois et métal."]),
}
# (place in the catalogue, column, text): what real texts hold and a table format must carry.
ODD_TEXTS = [
    (5, "title", 'Le "Grand" Livre, tome 1'),
    (17, "description", "<p>Jouet &agrave; tirer<br />bois &amp; m&eacute;tal</p>"),
    (18, "description", "Âge\tconseillé :\t3 ans"),
    (29, "description", "d < 5 cm, h > 2 cm"),
    (30, "description", "Filtre ; sable, \"20 kg\""),
    (41, "description", "&lt;b&gt;Jeu&lt;/b&gt;&nbsp;rare"),
    (42, "description", "ligne 1\nligne 2"),
    (53, "title", "NA"),
    (54, "description", "null"),
]
COLOURS = {10: (150, 90, 40), 1280: (230, 60, 60), 2583: (40, 120, 220), 40: (60, 200, 80),
           1560: (210, 190, 120)}


def tiny_products() -> pd.DataFrame:
    """60 rows [title, description, product_id, image_id, code], not in the order of their ids."""
    rng, rows = np.random.default_rng(5), []
    for code, (titles, sentences) in PRODUCTS.items():
        for i, title in enumerate(titles):
            chosen = [sentences[(i + k) % len(sentences)] for k in range(1 + i % 3)]
            text = " ".join(chosen) if i else ""
            rows.append({"title": title, "description": text, "code": code})
    table = pd.DataFrame(rows)
    for place, column, text in ODD_TEXTS:
        table.loc[place, column] = text
    table["product_id"] = 4_000_000 + rng.permutation(len(table)) * 37
    table["image_id"] = 900_000 + np.arange(len(table)) * 11
    return table.sample(frac=1, random_state=5, ignore_index=True)


def draw_pictures(products: pd.DataFrame, folder: Path) -> None:
    """One JPEG of 80 x 80 pixels a product: the class's colour, a darker square somewhere on it."""
    folder.mkdir(parents=True)
    for row in products.itertuples():
        rng = np.random.default_rng(row.image_id)
        pixels = np.full((80, 80, 3), COLOURS[row.code]) + rng.integers(-12, 13, (80, 80, 3))
        top, left = rng.integers(5, 40, 2)
        pixels[top:top + 30, left:left + 30] //= 2
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"image_{row.image_id}_product_{row.product_id}.jpg", quality=90)


def write_ens(folder: Path) -> Path:
    """The products as challengedata.ens.fr lays them out."""
    products = tiny_products()
    draw_pictures(products, folder / "images" / "image_train")
    names = {"title": "designation", "description": "description", "product_id": "productid",
             "image_id": "imageid"}
    x = products[list(names)].rename(columns=names)
    x.to_csv(folder / "X_train_update.csv")
    y = products[["code"]].rename(columns={"code": "prdtypecode"})
    y.to_csv(folder / "Y_train_CVw08PX.csv")
    return folder


def write_sigir(folder: Path) -> Path:
    """The same products as the SIGIR eCom 2020 challenge laid them out."""
    products = tiny_products().rename_axis("Integer_id")
    draw_pictures(products, folder / "image_training")
    names = {"title": "Title", "description": "Description", "image_id": "Image_id",
             "product_id": "Product_id"}
    x = products[list(names)].rename(columns=names)
    x.to_csv(folder / "X_train.tsv", sep="\t")
    y = products[["code"]].rename(columns={"code": "Prdtypecode"})
    y.to_csv(folder / "Y_train.tsv", sep="\t")
    return folder


@pytest.fixture
def tiny_ens(tmp_path):
    return write_ens(tmp_path / "ens")


@pytest.fixture
def tiny_sigir(tmp_path):
    return write_sigir(tmp_path / "sigir")


def make_bert(folder: Path, **size: float) -> tuple[BertTokenizer, BertModel]:
    """A BERT of this size with random weights, and its tokenizer, which knows the titles' words."""
    words = sorted({word for title in tiny_products()["title"] for word in title.lower().split()})
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "words.txt").write_text("\n".join([*marks, *words]))
    tokenizer = BertTokenizer(vocab=str(folder / "words.txt"))
    return tokenizer, BertModel(BertConfig(vocab_size=len(tokenizer), **size))


def write_bert(folder: Path, **size: float) -> Path:
    """A checkpoint's folder with that BERT, the same each time."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for part in make_bert(folder, **size):
        part.save_pretrained(folder)
    return folder


SMALL = {"camembert": "small", "flaubert": "small", "seresnext": "small", "text_width": 16,
         "text_layers": 1, "vocabulary": 200, "max_length": 32, "text_epochs": 1, "text_lr": 1e-3,
         "image_epochs": 1, "image_size": 64, "region_size": 64, "fusion_epochs": 2,
         "fusion_seeds": 2, "bootstrap": 50}


def isolate(patch: pytest.MonkeyPatch, folder: Path, catalogue_folder: Path) -> None:
    """Let everything that a run writes, decoded pictures included, go below `folder`, and let the
    runs of the paper's profile read the catalogue there.
    """
    patch.setenv("STUDY_RUNS", str(folder / "runs"))
    patch.setenv("STUDY_CACHE", str(folder / "cache"))
    patch.setenv("RAKUTEN_DATA", str(catalogue_folder))
    patch.delenv("STUDY_EVENTS", raising=False)
    rows._chosen.cache_clear()
    rows._digest.cache_clear()


def made_undisturbed(place: Path, settings: dict, names: Sequence[str]) -> dict[str, dict]:
    """{stage: the hashes of its files} of stages made in this process, in a place of their own."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, place, write_ens(place / "ens"))
        run = h.open_run("paper", "90-10", 0, settings)
        for name in names:
            h.stage(run, name)
        return {name: h.read_manifest(run, name)["files"] for name in names}


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Within, the system refuses to write a file beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def make_run(tmp_path, tiny_ens, monkeypatch):
    """make_run(split="90-10", seed=0, **settings): a run of the paper's profile, made small, on
    the tiny catalogue.
    """
    isolate(monkeypatch, tmp_path, tiny_ens)

    def make(split: str = "90-10", seed: int = 0, **settings: object) -> h.Run:
        return h.open_run("paper", split, seed, {**SMALL, **settings})

    return make


@pytest.fixture
def run(make_run):
    return make_run()


@pytest.fixture
def fake_stage(monkeypatch):
    """fake_stage(name, build): until the test ends, stage `name` is made by the test's own
    `build(run, name, folder) -> metrics`, a function written with `def`, anywhere in the test's
    file.

        def build(run, name, folder):
            (folder / "number.txt").write_text("1")
            return {"number": 1}

        fake_stage("text", build)
        folder = h.stage(run, "text")

    Everything else is the engine's: what the stage reads, its notebook, its key. The key holds the
    text of `build` and of all that it calls, in the test's file, the engine and helpers.py, as for
    a real stage; what a nested `build` takes from the function around it does not count. So the
    same text twice is one stage, another text another one. A name such as "fusion-concat-add" is
    faked alone, without the other variants. A fake is always made in this one process.
    """
    def fake(name: str, build: Callable[[h.Run, str, Path], dict | None]) -> None:
        room = f"fake.{name}"
        around = inspect.getsource(inspect.getmodule(build))
        own = textwrap.dedent(inspect.getsource(build))  # last, so that it is what its name means

        @functools.wraps(build)
        def maker(*arguments: object) -> dict | None:
            return build(*arguments)

        maker.__module__, maker.__qualname__ = room, build.__name__
        monkeypatch.setitem(fingerprint.SOURCES, room, f"{around}\n\n{own}")
        monkeypatch.setitem(keys.MAKERS, name, maker)
        together.discard(name)

    together = set(keys.TOGETHER)
    monkeypatch.setattr("engine.stages.TOGETHER", together)
    return fake


class ByFile(LoadScopeScheduling):
    """What shares costly fixtures is run by one process: each file, and the chain with the
    committed notebooks, which find its stages.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "chain" if path.endswith((".ipynb", "test_chain.py")) else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log) -> ByFile:
    config.option.loadscopereorder = False  # the longest first, as below, not the most tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebooks come after the chain, and are slow; the longest files come first."""
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker(pytest.mark.slow)
    longest = ("test_chain.py", "test_full_scale.py", "test_processes.py", "test_stops.py",
               "test_kills.py", "test_hostile.py", "test_leaks.py")
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else 9)
