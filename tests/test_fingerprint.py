"""The fingerprint of a stage: what decides its result makes it again, and nothing else does."""
import ast
import functools

import pytest

import helpers as h
from conftest import SMALL, isolate, write_ens
from engine import fingerprint, keys
from engine.fingerprint import CARRIERS, ROOMS, SOURCES
from engine.looks import one_look
from engine.settings import FROZEN_STAGES, STAGES, TABLE_FUSIONS, TEXT_STAGES

IMPORTED = dict(SOURCES)
DECIDING = [room for room in ROOMS if room not in CARRIERS]
FUSIONS = {f"fusion-{name}" for name in TABLE_FUSIONS}
EVERY_STAGE = frozenset(STAGES) - {"fusion"} | FUSIONS

# Stages that stand on one another, as the tests below name them.
ON_SCORES = {"scores", "claims"}
ON_FUSION = FUSIONS | {"scores", "claims"}
ON_IMAGES = {"seresnext", "image_regions", "image_whole"} | ON_FUSION
ON_TEXT_ENCODERS = {*TEXT_STAGES} | ON_FUSION
ON_ENCODERS = ON_TEXT_ENCODERS | ON_IMAGES
ON_TEXT = {"text", "baselines"} | ON_TEXT_ENCODERS
ON_SPLITS = EVERY_STAGE - {"text"}
AVERAGED = {name for name in FUSIONS if "average" in name} | ON_SCORES
NOTHING = set()


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """As conftest's `make_run`, on one catalogue for all tests here: they make no stage."""
    folder = tmp_path_factory.mktemp("fingerprint")
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, folder, write_ens(folder / "ens"))
        yield lambda **settings: h.open_run("paper", "90-10", 0, {**SMALL, **settings})


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


def all_keys(run, names) -> dict[str, str]:
    """The key of each stage of a run; nothing is made."""
    with one_look():
        return {name: keys.key_of(run, name) for name in names}


@functools.cache
def imported_keys(run, names) -> dict[str, str]:
    """The same, of the code as it was imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "SOURCES", IMPORTED)
        return all_keys(run, names)


def stale(run, edit, names=EVERY_STAGE) -> set[str]:
    """The stages whose keys `edit()` changes."""
    edit()
    after = all_keys(run, names)
    return {name for name, key in imported_keys(run, names).items() if after[name] != key}


@pytest.fixture
def change(monkeypatch):
    """change(room, old, new): put `new` in the place of `old`, which stands there once."""
    def change(room: str, old: str, new: str) -> None:
        assert SOURCES[room].count(old) == 1, f"{old!r} stands {SOURCES[room].count(old)} times"
        monkeypatch.setitem(SOURCES, room, SOURCES[room].replace(old, new))

    return change


@pytest.fixture
def add(monkeypatch):
    """add(room, name, line): put a line at the beginning of a function's or method's body."""
    def add(room: str, name: str, line: str) -> None:
        tree = ast.parse(SOURCES[room])
        node = tree
        for part in name.split("."):
            node = next(child for child in node.body if getattr(child, "name", "") == part)
        node.body[:0] = ast.parse(line).body
        monkeypatch.setitem(SOURCES, room, ast.unparse(tree))

    return add


# --- what changes nothing ------------------------------------------------------------------------
@pytest.mark.parametrize("room, old, new", [
    ("engine.pictures", "cannot be read (", "is not to be read ("),  # an error
    ("engine.texts", '"""Plain text: entities decoded', '"""Only text: entities decoded'),
    ("helpers", "# AdamW without decay: Adam", "# which is Adam"),
    ("engine.fusions", "def add(*x: Tensor) -> Tensor:", "def add(*x):"),
    ("engine.fusions", '@fusion(r"x_1 + x_2", PAPER)', '@fusion("their sum", PAPER)'),
    ("engine.texts", 'how: str = "paper") -> str:', 'how: object = "paper") -> object:'),
    ("engine.variants", 'text_fusion: str\n', 'text_fusion: "one of FUSIONS"\n'),  # a field's type
    ("engine.processes", "timedelta(hours=6)", "timedelta(hours=7)"),
    ("engine.processes", "seconds: float = 120", "seconds: float = 240"),
    ("engine.progress", "every: float = 0.5", "every: float = 0.6"),
    ("engine.training", "import timm\n", "import timm\nimport this\n"),
    ("engine.figures", "COLUMN, PAGE = 3.5, 7.2", "COLUMN, PAGE = 3.4, 7.2"),  # of figures
    ("helpers", "assert split[", "assert 1 and split["),
])
def test_what_decides_nothing_changes_no_key(run, change, room, old, new):
    assert stale(run, lambda: change(room, old, new)) == NOTHING


class Reword(ast.NodeTransformer):
    """Other errors, docstrings and type hints everywhere; parsing has dropped the comments."""

    def visit_Raise(self, node):
        class Words(ast.NodeTransformer):
            def visit_Constant(self, constant):
                said = isinstance(constant.value, str)
                return ast.Constant(f"{constant.value} (reworded)") if said else constant

        return Words().visit(node)

    def visit_FunctionDef(self, node):
        node.returns = ast.Name("object")
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = ast.Name("object")
        return self.visit_ClassDef(node)

    def visit_ClassDef(self, node):
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        node.body.insert(0, ast.Expr(ast.Constant("Another docstring.")))
        return self.generic_visit(node)


def test_all_errors_docstrings_and_type_hints_may_change(run, monkeypatch):
    def edit():
        for room, text in list(SOURCES.items()):
            tree = Reword().visit(ast.parse(text))
            monkeypatch.setitem(SOURCES, room, ast.unparse(ast.fix_missing_locations(tree)))

    assert stale(run, edit) == NOTHING
    texts = SOURCES["engine.texts"]
    assert texts.count("Another docstring.") == texts.count("def ") > 0
    assert "(reworded)" in SOURCES["engine.pictures"] and "-> object" in SOURCES["helpers"]


@pytest.mark.parametrize("room, name", [
    (room, node.name) for room in DECIDING for node in ast.parse(SOURCES[room]).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith(fingerprint.REFUSE)])
def test_a_function_that_only_refuses_changes_no_key_and_gives_nothing(run, add, room, name):
    assert stale(run, lambda: add(room, name, "changed = 1")) == NOTHING
    function = next(node for node in ast.parse(SOURCES[room]).body
                    if getattr(node, "name", "") == name)
    assert not [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]


@pytest.mark.parametrize("room", CARRIERS)
def test_a_room_that_carries_results_changes_no_key(run, add, room):
    functions = [node.name for node in ast.parse(SOURCES[room]).body
                 if isinstance(node, ast.FunctionDef | ast.ClassDef)]

    def edit():
        for name in functions:
            add(room, name, "changed = 1")

    assert functions and stale(run, edit) == NOTHING


@pytest.mark.parametrize("room, name", [
    ("engine.rows", "select_rows"), ("engine.catalogue", "load_catalogue"),
    ("engine.catalogue", "read_products"), ("engine.rows", "chosen_texts"),
    ("engine.duplicates", "duplicate_groups"), ("engine.duplicates", "near_pairs")])
def test_what_chooses_rows_counts_by_the_rows_that_it_chooses(make_run, add, room, name):
    run = make_run(grouped=True)
    assert stale(run, lambda: add(room, name, "changed = 1")) == NOTHING


# --- what changes something ----------------------------------------------------------------------
BROKEN = [
    ("engine.texts", "clean_text", ON_TEXT),
    ("engine.texts", "strip_html", ON_TEXT),  # clean_text calls it
    ("engine.pictures", "decode_picture", ON_IMAGES),
    ("engine.picture_cache", "DecodedPictures.__getitem__", ON_IMAGES),
    ("engine.tables", "split_rows", NOTHING),
    ("engine.duplicates", "text_key", NOTHING),
    ("engine.catalogue", "first_fault", NOTHING),
    ("engine.rows", "select_rows", NOTHING),
    ("engine.training", "EpochSampler.__iter__", ON_ENCODERS),
    ("engine.training", "rows_at_a_time", ON_ENCODERS),
    ("engine.vectors", "encode_rows", ON_ENCODERS - {"seresnext"}),
    ("engine.text_models", "small_text_model", ON_TEXT_ENCODERS),
    ("engine.text_checkpoints", "load_checkpoint", ON_TEXT_ENCODERS),
    ("engine.image_models", "SmallSENet.__init__", ON_IMAGES),
    ("engine.image_models", "fit_weights", ON_IMAGES),
    ("helpers", "make_split", ON_SPLITS),
    ("helpers", "tfidf_baseline", {"baselines", *ON_SCORES}),
    ("helpers", "TextEncoder.forward", ON_TEXT_ENCODERS),
    ("helpers", "finetune", ON_ENCODERS),
    ("helpers", "augmentation", ON_IMAGES),
    ("helpers", "split_regions", {"image_regions"} | ON_FUSION),
    ("engine.fusions", "average", AVERAGED),
    ("engine.fusions", "Fusion.make", ON_FUSION),
    ("engine.fusions", "Gated.forward", ON_SCORES),  # which stand on all variants
    ("engine.variants", "named_variant", ON_FUSION),
    ("helpers", "Join.forward", ON_FUSION),
    ("helpers", "train_step", ON_FUSION),
    ("helpers", "HierarchicalFusion.forward", ON_FUSION),
    ("engine.scores", "score", ON_ENCODERS),  # their best epoch is chosen by it
    ("engine.scores", "score_row", ON_SCORES),
    ("engine.scores", "bootstrap", ON_SCORES),
    ("engine.scores", "contrast", {"claims"}),
    ("engine.claims", "recommend", {"claims"}),
    ("engine.late_fusion", "stack", ON_SCORES),
    ("engine.cuts", "cut_rows", ON_SPLITS),
    ("engine.analysis", "reliability", NOTHING),
    ("engine.exercises", "same", NOTHING),
    ("engine.paper_tables", "paper_table", ON_SCORES),
    ("engine.paper_tables", "compare", NOTHING),
    ("engine.heads", "curve_metrics", ON_ENCODERS),
    ("helpers", "load_classifier", NOTHING),
    ("engine.products", "cleaned_products", NOTHING),
    ("engine.exports", "parts_of_run", NOTHING),
    ("engine.figures", "plot_scores", NOTHING),
]


@pytest.mark.parametrize("room, name, expected", BROKEN, ids=[place[1] for place in BROKEN])
def test_a_line_makes_stale_what_stands_on_it_and_nothing_else(run, add, room, name, expected):
    assert stale(run, lambda: add(room, name, "changed = 1")) == expected


@pytest.mark.parametrize("room, old, new, expected", [
    ("engine.settings", "VALIDATION_SHARE = 0.10", "VALIDATION_SHARE = 0.11", ON_SPLITS),
    ("engine.settings", '"90-10": 0.10', '"90-10": 0.11', ON_SPLITS),
    ("engine.texts", 'language="french"', 'language="english"', ON_TEXT),
    ("engine.image_models", "(0.485, 0.456, 0.406)", "(0.484, 0.456, 0.406)", ON_IMAGES),
    ("engine.image_models", "planes // 4", "planes // 2", ON_IMAGES),  # the small network's width
    ("engine.training", "max_grad_norm=1.0", "max_grad_norm=2.0", ON_ENCODERS),
    ("engine.fusions", "return sum(x) / len(x)", "return sum(x) / 3", AVERAGED),
    ("engine.paper_tables", 'OUR_MODEL = {', 'OUR_MODEL = {"x": "y",', ON_SCORES),
])
def test_a_number_makes_stale_what_it_decides_and_nothing_else(run, change, room, old, new,
                                                               expected):
    assert stale(run, lambda: change(room, old, new)) == expected


def test_every_room_that_decides_results_has_such_a_test():
    asking = {room for room in DECIDING if room.startswith("engine.checks")}
    assert {place[0] for place in BROKEN} | {"engine.settings"} == {*DECIDING} - asking


VECTORS = {name for name in FROZEN_STAGES if name.startswith("vectors-")}
TEXT_VECTORS = {f"vectors-{name}" for name in TEXT_STAGES}


@pytest.mark.parametrize("room, name, expected", [
    ("helpers", "build_frozen", ON_TEXT_ENCODERS | {"seresnext", *ON_SCORES}),
    ("engine.image_models", "SmallSENet.__init__", VECTORS - TEXT_VECTORS | ON_IMAGES),
    ("engine.text_checkpoints", "load_checkpoint", TEXT_VECTORS | ON_TEXT_ENCODERS),
    ("engine.vectors", "encode_rows", VECTORS | ON_ENCODERS),
    ("helpers", "make_split", ON_SPLITS - {"image_regions", "image_whole"})])
def test_frozen_encoders_stand_on_their_vectors_alone(make_run, add, room, name, expected):
    run = make_run(freeze_encoders=True, camembert="nobody/a", flaubert="nobody/b")
    assert stale(run, lambda: add(room, name, "changed = 1"), EVERY_STAGE | VECTORS) == expected


# --- how names are followed ----------------------------------------------------------------------
@pytest.fixture
def room(monkeypatch):
    """room(name, text): a room of this study that holds this text."""
    return lambda name, text: monkeypatch.setitem(SOURCES, f"engine.{name}", text)


def code(name: str) -> str:
    return fingerprint.code_of_words("engine.caller", (name,)).hash


def test_another_function_under_the_same_name_changes_the_hash(room):
    room("callee", "def first(x):\n    return x + 1\n\ndef second(x):\n    return x + 2\n")
    call = "\n\ndef call(x):\n    return first(x) - second(x)\n"
    found = set()
    for line in ("from engine.callee import first, second",
                 "from engine.callee import first, first as second",
                 "from engine.callee import first as second, second as first",
                 "from math import floor as first, ceil as second",
                 "from math import ceil as first, floor as second"):
        room("caller", line + call)
        found.add(code("call"))
    assert len(found) == 5


@pytest.mark.parametrize("room, old, new, expected", [
    ("helpers", "import LogisticRegression", "import RidgeClassifier as LogisticRegression",
     {"baselines", *ON_SCORES}),
    ("engine.heads", "import LogisticRegression",
     "import RidgeClassifier as LogisticRegression", ON_ENCODERS),
    ("engine.image_models", "import SENet, SEResNeXtBottleneck",
     "import SENet, SEBottleneck as SEResNeXtBottleneck", ON_IMAGES),  # within a `with`
    ("engine.pictures", "from PIL import Image", "from pillow_simd import Image", ON_IMAGES)])
def test_another_library_under_the_same_name_changes_the_key(run, change, room, old, new,
                                                             expected):
    assert stale(run, lambda: change(room, old, new)) == expected


@pytest.mark.parametrize("line, call", [
    ("from engine.callee import clean", "clean"),
    ("from engine.callee import clean as tidy", "tidy"),
    ("from engine import callee", "callee.clean"), ("from engine import callee as c", "c.clean"),
    ("import engine.callee as c", "c.clean")])
def test_a_name_is_followed_through_an_import_and_through_a_module(room, line, call):
    room("caller", f"{line}\n\ndef build(x):\n    return {call}(x)\n")
    found = set()
    for number in (1, 2):
        room("callee", "def clean(x):\n    return strip(x)\n\n"
                       f"def strip(x):\n    return x[{number}:]\n\ndef other():\n    pass\n")
        found.add(code("build"))
    room("callee", SOURCES["engine.callee"].replace("pass", "return 3"))
    found.add(code("build"))
    assert len(found) == 2


def test_a_name_that_is_handed_on_is_followed_to_where_it_is_defined(room):
    room("caller", "from engine.middle import clean\n\ndef build(x):\n    return clean(x)\n")
    room("middle", "from engine.callee import strip as clean\n")
    found = set()
    for number in (1, 2):
        room("callee", f"def strip(x):\n    return x[{number}:]\n")
        found.add(code("build"))
    assert len(found) == 2


def test_settings_are_seen_in_what_is_called(room):
    room("caller", "from engine.callee import c\n\ndef build(run):\n"
                   "    return run.profile.grid, c(run.profile), run.seed\n")
    room("callee", "def c(profile):\n    return profile.text_lr\n\n"
                   "def d(profile):\n    return profile.dropout\n")
    found = fingerprint.code_of_words("engine.caller", ("build",))
    assert found.settings == ("grid", "seed", "text_lr") and found.contents == ()


@pytest.mark.parametrize("room", DECIDING)
def test_the_imports_and_names_of_a_room_are_such_that_they_can_be_followed(room):
    """No star, no relative import, no `import engine.x`, none within a function; a name once."""
    tree = ast.parse(SOURCES[room])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.names[0].name != "*", ast.unparse(node)
        if isinstance(node, ast.Import):
            assert all(alias.asname or not alias.name.startswith("engine.")
                       for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            within = (child for child in ast.walk(node) if isinstance(child, ast.ImportFrom))
            assert not [ast.unparse(child) for child in within if "engine" in child.module]
    names = [name for node in tree.body for name in names_of(node)]
    assert len(names) == len(set(names))


def names_of(node: ast.AST) -> list[str]:
    """What a statement at the top of a module names."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [child.id for target in targets if target for child in ast.walk(target)
            if isinstance(child, ast.Name)]


def test_constants_that_decide_a_result_are_part_of_the_code():
    found = {name for room in DECIDING
             for name in fingerprint._room(room, SOURCES[room]).definitions}
    assert {"LAYOUTS", "IMAGENET_MEAN", "TABLE_VARIANTS"} <= found
    assert {"SPLITS", "VALIDATION_SHARE", "REPRESENTATIONS"} <= found


# --- the file and what was imported ---------------------------------------------------------------
@pytest.fixture
def edited(monkeypatch, tmp_path):
    """edited(room): the room's file, with another line at its end, under this very process."""
    def edit(room: str):
        path = tmp_path / ROOMS[room].name
        path.write_text(SOURCES[room] + "# another line\n", encoding="utf-8")
        monkeypatch.setitem(ROOMS, room, path)

    return edit


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_that_has_changed_since_it_was_imported_is_named(edited, room):
    fingerprint.refuse_changed_code()
    edited(room)
    with pytest.raises(RuntimeError, match=f"{ROOMS[room].name} has changed since it was imported: "
                                           "restart the kernel"):
        fingerprint.refuse_changed_code()


def test_an_edit_under_an_open_kernel_stops_what_is_made_and_not_what_is_read(make_run, edited):
    run = make_run(limit=50)
    folder = h.stage(run, "splits")
    table, before = h.read_split(run), {*folder.parent.iterdir()}
    edited("engine.texts")
    with pytest.raises(RuntimeError, match="texts.py has changed since it was imported: restart"):
        h.stage(run, "text")
    assert {*folder.parent.iterdir()} == before
    assert h.stage(run, "splits") == folder and h.read_split(run).equals(table)


def test_an_edit_under_an_open_kernel_starts_no_processes(make_run, edited, monkeypatch):
    run = make_run(processes=2, limit=50)
    h.stage(run, "splits")
    h.stage(run, "text")
    monkeypatch.setattr("engine.stages.launch", lambda *_: pytest.fail("started processes"))
    edited("helpers")
    with pytest.raises(RuntimeError, match="helpers.py has changed"):
        h.stage(run, "camembert_title")
