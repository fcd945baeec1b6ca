"""The fusion models by name: which Z, joining what with what, with which head."""
from __future__ import annotations

from dataclasses import dataclass, replace

from engine.fusions import FUSIONS
from engine.runs import Run
from engine.settings import OTHER_FUSIONS, REPRESENTATIONS, TABLE_FUSIONS

HEADS = ("basic", "dropout", "layers", "linear")
# What Z joins with what, from the inside out: ("P", (...)) is Z(P, Z(...)).
STRUCTURES = {
    "encoders": ("P", (("T_f", "D_f"), ("T_c", "D_c"))),  # equation (1): each encoder's texts first
    "fields": ("P", (("T_f", "T_c"), ("D_f", "D_c"))),  # both titles first
    "image": ((("P", "T_f"), ("P", "D_f")), (("P", "T_c"), ("P", "D_c"))),  # the picture first
    "titles": ("P", ("T_f", "T_c")),  # no descriptions
    "flat": ("P", "T_f", "D_f", "T_c", "D_c"),  # one level
    "text": (("T_f", "D_f"), ("T_c", "D_c")),  # no picture
}


@dataclass(frozen=True)
class Variant:
    """One fusion model: Z of the inner levels, Z of the outer level, the classifier's head, what is
    joined with what (a key of STRUCTURES, or symbols with + between, in one level), which picture
    is P, whether modalities are hidden while it is trained, and whether its last epoch is kept
    instead of its best.
    """
    text_fusion: str
    final_fusion: str
    head: str = "basic"
    standardise: bool = True
    structure: str = "encoders"
    picture: str = "regions"
    hide: bool = False
    last: bool = False

    @property
    def name(self) -> str:
        words = {self.head: "basic", self.structure: "encoders", self.picture: "regions",
                 "hidden" if self.hide else "": "", "last" if self.last else "": "",
                 "" if self.standardise else "raw": ""}
        more = [word for word, usual in words.items() if word != usual]
        return "-".join([self.text_fusion, self.final_fusion, *more])

    @property
    def tree(self) -> tuple:
        """What Z joins with what."""
        return STRUCTURES.get(self.structure) or tuple(self.structure.split("+"))

    @property
    def symbols(self) -> list[str]:
        """The representations that it reads."""
        return [symbol for symbol in REPRESENTATIONS if symbol in _leaves(self.tree)]


def _leaves(tree: tuple | str) -> list[str]:
    """The representations that a tree joins."""
    return [tree] if isinstance(tree, str) else [leaf for part in tree for leaf in _leaves(part)]


def named_variant(name: str) -> Variant:
    """The variant of that name, such as "concat-add" or "average-average-dropout"; ValueError for a
    name that is none. Whether its Z are known, `fusion_of` says.
    """
    options = {"raw": {"standardise": False}, "whole": {"picture": "whole"},
               "hidden": {"hide": True}, "last": {"last": True}}
    options |= {head: {"head": head} for head in HEADS}
    options |= {structure: {"structure": structure} for structure in STRUCTURES}
    names, words, choice = name.split("-")[:2], name.split("-")[2:], {}
    for word in words:
        subset = {*word.split("+")} <= {*REPRESENTATIONS}
        choice |= options.get(word, {"structure": word} if subset else {"head": "?"})
    variant = Variant(*names, **choice) if len(names) == 2 else None
    if variant is None or variant.name != name:
        raise ValueError(f"unknown variant {name!r}; a variant is <Z of texts>-<Z with the "
                         f"picture>[-<option>], such as concat-add; Z: {', '.join(FUSIONS)}; "
                         f"options: {', '.join([*HEADS[1:], *list(STRUCTURES)[1:]])}, whole, "
                         "hidden, last, raw, or representations such as T_c+P")
    return variant


def text_level(variant: Variant) -> Variant | None:
    """The fusion of the four texts alone by the Z of the variant's inner levels; None where the
    variant does not join each encoder's texts first, as equation (1) does.
    """
    if variant.structure != "encoders":
        return None
    return replace(variant, final_fusion=variant.text_fusion, structure="text", picture="regions")


ENCODER_NAMES = {
    "camembert_title": "CamemBERT title", "camembert_description": "CamemBERT description",
    "flaubert_title": "FlauBERT title", "flaubert_description": "FlauBERT description",
    "seresnext": "SE-ResNeXt"}
OPTION_NAMES = {"fields": "fields first", "image": "picture first", "titles": "titles alone",
                "text": "no picture", "dropout": "with dropout", "layers": "with more layers",
                "linear": "one linear layer", "whole": "whole picture",
                "hidden": "modality dropout", "raw": "not standardised", "last": "last epoch"}


def display_name(model: str) -> str:
    """How tables and figures call a model: "CamemBERT title" for camembert_title, "text concat +
    final add" for concat-add, as the paper does. Other names stay.
    """
    if " " in model:  # "TF-IDF title" is no fusion called TF and IDF
        return model
    if model in ENCODER_NAMES:
        return ENCODER_NAMES[model]
    try:
        variant = named_variant(model)
    except ValueError:
        return model
    if variant.structure == "flat":
        name = f"{variant.final_fusion} of all five"
    elif variant.structure not in STRUCTURES:
        name = f"{variant.final_fusion} of {variant.structure.replace('+', ', ')}"
    else:
        name = f"text {variant.text_fusion} + final {variant.final_fusion}"
    options = [OPTION_NAMES[word] for word in model.split("-")[2:] if word in OPTION_NAMES]
    return ", ".join([name, *options])


# The variants of Tables II, III and V.
TABLE_VARIANTS = tuple(map(named_variant, TABLE_FUSIONS))
OTHER_VARIANTS = tuple(map(named_variant, OTHER_FUSIONS))
# The same without standardising, which notebook 07 compares.
RAW_VARIANTS = tuple(named_variant(f"{pair}-raw") for pair in ("concat-concat", "average-average"))
TRAINED_VARIANTS = (*TABLE_VARIANTS, *OTHER_VARIANTS, *RAW_VARIANTS)  # and one's own


def own_variants(run: Run) -> list[Variant]:
    """(Z, Z) of each Z in the file that the setting `fusions` names."""
    return [named_variant(f"{name}-{name}") for name in run.own_fusions]


def scored_variants(run: Run) -> list[Variant]:
    """All fusion models that the test part scores: the tables', the others, one's own."""
    return [*TABLE_VARIANTS, *OTHER_VARIANTS, *own_variants(run)]
