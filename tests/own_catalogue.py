"""A made catalogue in English, as somebody's own: one table, pictures beside it."""
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

# What is sold: words of its titles, words of its descriptions, the colour of its picture.
KINDS = {
    "Garden tools": (["rake", "spade", "pruning shears", "hose", "watering can"],
                     ["for beds and borders", "ash handle", "hardened steel"], (60, 140, 60)),
    "Kitchenware": (["saucepan", "whisk", "chopping board", "colander", "paring knife"],
                    ["dishwasher safe", "stainless", "fits all hobs"], (200, 120, 40)),
    "Board games": (["strategy game", "card game", "puzzle", "dominoes", "chess set"],
                    ["two to four players", "with rule book", "from eight years"], (150, 60, 160)),
    "Lighting": (["floor lamp", "pendant", "desk lamp", "LED strip", "lantern"],
                 ["warm white", "dimmable", "E27 socket"], (235, 215, 90)),
    "Bicycle parts": (["chain", "brake pads", "pedal", "saddle", "inner tube"],
                      ["for road bikes", "28 inch", "anodised"], (70, 90, 200)),
    "Stationery": (["notebook", "fountain pen", "stapler", "envelope set", "ruler"],
                   ["recycled paper", "set of ten", "A5"], (120, 120, 120)),
    "Pet supplies": (["dog lead", "cat tree", "food bowl", "aquarium filter", "brush"],
                     ["for large breeds", "easy to clean", "chew proof"], (190, 60, 60)),
}


def make_products(folder: Path, rows: int, kinds: int = 7, side: int = 64,
                  without_picture: float = 0.0) -> pd.DataFrame:
    """[name, details, photo, category] of made products, their pictures written below `folder`;
    every eighth has no details.
    """
    rng, table = np.random.default_rng(3), []
    (folder / "photos").mkdir(parents=True)
    for i in range(rows):
        category = list(KINDS)[i % kinds]
        words, details, colour = KINDS[category]
        title = f"{rng.choice(['Oak', 'Nordic', 'Classic', 'Mini'])} {rng.choice(words)} {i}"
        text = ", ".join(rng.choice(details, 2)) if i % 8 else ""
        photo = f"photos/{i}.png" if rng.random() >= without_picture else "-"
        if photo != "-":
            picture = Image.new("RGB", (side, side), "white")
            left, top = rng.integers(0, side // 2, 2)
            ImageDraw.Draw(picture).rectangle((left, top, left + side // 2, top + side // 2),
                                              fill=colour)
            picture.save(folder / photo)
        table.append({"name": title, "details": text, "photo": photo, "category": category})
    return pd.DataFrame(table)
