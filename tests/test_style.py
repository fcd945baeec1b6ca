"""Style: the rooms, the notebooks and the README keep the rules of the study, checked in code."""
import ast
import json
import re
import subprocess
import sys
from collections import Counter
from functools import lru_cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from mutants import MUTANTS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
ROOMS = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
         for path in (ROOT / "helpers.py", ROOT / "run.py", *sorted(ROOT.glob("engine/*.py")),
                      *sorted(ROOT.glob("commands/*.py")))}
HELPERS = ROOMS["helpers"]
TREE = ast.parse(HELPERS)
TREES = {room: ast.parse(source) for room, source in ROOMS.items()}
WIDTH, ROOM_LINES, HELPERS_LINES, FUNCTION_LINES = 100, 300, 1300, 40
CELL_LINES, DUPLICATE_LINES, NOTEBOOK_BYTES = 15, 4, 500_000
FOR_STUDENTS = {"compare"}  # what an exercise asks them to call
PARAMETERS = ["PROFILE", "SPLIT", "SEED", "SETTINGS"]
ALLOWED_TAGS = {"parameters", "nbval-check-output", "nbval-skip", "nbval-ignore-output",
                "raises-exception"}
SLIDE_TYPES = {"slide", "subslide", "fragment", "skip", "notes"}
# These answer in the first second, so what they import does too.
LIGHT = ["commands.plan", "commands.store", "engine.settings", "engine.runs", "engine.files",
         "engine.progress", "engine.fingerprint", "engine.catalogue", "engine.rows",
         "engine.texts", "engine.tables", "engine.pictures", "engine.picture_cache"]


# --- rooms and arrows -----------------------------------------------------------------------------
def imports_of(tree: ast.AST) -> set[str]:
    """Our rooms that a room imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(ROOMS)


ARROWS = {room: imports_of(tree) for room, tree in TREES.items()}
BELOW = {"run": {"commands", "helpers", "engine"}, "commands": {"commands", "helpers", "engine"},
         "helpers": {"engine"}, "engine": {"engine"}}


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_downward(room):
    floors = {other.partition(".")[0] for other in ARROWS[room]}
    assert floors <= BELOW[room.partition(".")[0]]


def test_there_is_no_circle():
    TopologicalSorter(ARROWS).prepare()  # CycleError names one


def test_carriers_of_results_stand_on_no_room_that_decides_them():
    from engine import fingerprint

    carriers, known = fingerprint.CARRIERS, fingerprint.ROOMS
    assert set(carriers) < set(known) == {room for room in ROOMS
                                          if room.startswith(("engine.", "helpers"))
                                          and room != "engine.__init__"}
    for room in carriers:
        assert ARROWS[room] <= {*carriers, "engine.settings", "engine", "engine.__init__"}, room


def test_light_rooms_import_no_torch():
    code = f"import sys, {', '.join(LIGHT)}; print({{'torch', 'transformers'}} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.strip() == "set()", ended.stdout + ended.stderr


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_too_large_and_no_line_too_wide(room):
    lines = ROOMS[room].splitlines()
    assert len(lines) <= (HELPERS_LINES if room == "helpers" else ROOM_LINES)
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("path", sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("data/*.py")]),
                         ids=lambda path: path.name)
def test_no_line_of_tests_and_data_is_too_wide(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_function_is_longer_than_40_lines(room):
    functions = [node for node in ast.walk(TREES[room]) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_no_comprehension_stands_in_another(room):
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    nested = [ast.unparse(node) for node in ast.walk(TREES[room]) if isinstance(node, kinds)
              for child in ast.walk(node) if isinstance(child, kinds) and child is not node]
    assert nested == []


# --- definitions ----------------------------------------------------------------------------------
def definitions(tree: ast.Module) -> dict[str, ast.AST]:
    """Top-level names of a room and where each is defined; imports apart."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        single = [node.target] if isinstance(node, ast.AnnAssign) else []
        for target in getattr(node, "targets", single):
            names = (name.id for name in ast.walk(target) if isinstance(name, ast.Name))
            found.update(dict.fromkeys(names, node))
    return found


def words(tree: ast.AST) -> set[str]:
    """Names and attributes that code mentions."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


PUBLIC = {(room, name): node for room, tree in TREES.items()
          for name, node in definitions(tree).items()
          if isinstance(node, ast.FunctionDef | ast.ClassDef) and not name.startswith("_")}
HANDED_ON = {alias.asname or alias.name for node in TREE.body if isinstance(node, ast.ImportFrom)
             and (node.module or "").startswith("engine") for alias in node.names}


def test_sections_are_in_order_and_the_table_at_the_top_lists_them():
    banners = re.findall(r"^# =+\n# (\d+) +([^\n]+)\n# =+$", HELPERS, re.M)
    docstring = ast.get_docstring(TREE, clean=False)
    table = re.findall(r"^    (\d+) +(\S+(?: \S+)*)(?:  .*)?$", docstring, re.M)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))
    assert table == banners and len(banners) > 8


def test_the_table_says_from_which_rooms_names_are_handed_on():
    docstring = ast.get_docstring(TREE, clean=False)
    named = set(re.findall(r"\b(\w+)(?=,|$)", "\n".join(
        line[37:] for line in docstring.splitlines() if re.match(r"    \d+ ", line)), re.M))
    rooms = {node.module.partition(".")[2] for node in TREE.body
             if isinstance(node, ast.ImportFrom) and node.module.startswith("engine.")
             and {alias.name for alias in node.names} & used_by_notebooks() - {"Run", "open_run"}}
    assert named - {""} >= rooms - {"files", "processes", "runs", "settings"}


def test_a_section_uses_only_itself_and_those_above():
    starts = [HELPERS[:match.start()].count("\n") + 1
              for match in re.finditer(r"^# \d+ ", HELPERS, re.M)]
    inside = definitions(TREE)
    section = {name: sum(start <= node.lineno for start in starts)
               for name, node in inside.items()}
    late = [f"{name} ({section[name]}) uses {word} ({section[word]})"
            for name, node in inside.items() for word in words(node) & set(inside)
            if section[word] > section[name]]
    assert late == []


def test_public_functions_and_classes_have_docstrings():
    undocumented = [place for place, node in PUBLIC.items() if not ast.get_docstring(node)]
    assert undocumented == []


def test_public_functions_have_type_hints():
    bare = [(place, argument.arg) for place, node in PUBLIC.items()
            if isinstance(node, ast.FunctionDef)
            for argument in (*node.args.args, *node.args.kwonlyargs)
            if argument.annotation is None and argument.arg not in ("ax", "fig", "tokenizer")]
    assert bare == []


def test_every_definition_is_used():
    """Somewhere else than in itself; a test alone is no use."""
    said = Counter()
    for tree in TREES.values():
        for node in tree.body:
            said.update(words(node))
    unused = []
    for room, tree in TREES.items():
        for name, node in definitions(tree).items():
            own = sum(name in words(other) for other in tree.body if other is node)
            marks = [ast.unparse(mark) for mark in getattr(node, "decorator_list", [])]
            by_mark = any(mark.startswith(("makes", "exercise(")) for mark in marks)
            if said[name] <= own and name not in used_by_notebooks() and not by_mark \
                    and name not in FOR_STUDENTS:
                unused.append((room, name))
    assert unused == []


def test_each_name_that_helpers_hands_on_is_used():
    rest = ast.Module([node for node in TREE.body
                       if not isinstance(node, ast.Import | ast.ImportFrom)], [])
    by_commands = {word for source in ROOMS.values() for word in re.findall(r"\bh\.(\w+)", source)}
    assert HANDED_ON - words(rest) - used_by_notebooks() - by_commands == FOR_STUDENTS


@lru_cache
def used_by_notebooks() -> frozenset[str]:
    """What notebooks say as h.<name>."""
    return frozenset(word for path in NOTEBOOKS for source in code_of(path)
                     for word in re.findall(r"\bh\.(\w+)", source))


def test_each_name_of_a_notebook_is_defined_in_helpers_or_handed_on_by_it():
    assert used_by_notebooks() - set(definitions(TREE)) - HANDED_ON == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_notebook_imports_helpers_and_nothing_else_of_ours(path):
    modules = set()
    for source in code_of(path):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
    ours = {"engine", "commands", "run", "helpers", "sample_catalogue"}
    assert {module.partition(".")[0] for module in modules} & ours == {"helpers"}


# --- "Shown in 03" is true ------------------------------------------------------------------------
def numbers_in(text: str) -> set[str]:
    """{"03", "04", "05"} of "03 to 05" or "03, 04 and 05"."""
    found = set(re.findall(r"\b\d\d\b", text))
    for first, last in re.findall(r"\b(\d\d) to (\d\d)\b", text):
        found |= {f"{number:02}" for number in range(int(first), int(last) + 1)}
    return found


def stated(docstring: str) -> set[str]:
    """The notebooks that a docstring names after "Shown in", to the end of its sentence."""
    text = " ".join(docstring.split())
    parts = re.findall(r"\bShown in (.*?)(?:\.(?:\s|$)|;|$)", text, re.I)
    return set().union(*map(numbers_in, parts))


def shown_by(path: Path) -> set[str]:
    """What a notebook shows by h.show, as h.<name>."""
    calls = [node for source in code_of(path) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call) and ast.unparse(node.func) == "h.show"]
    arguments = (ast.unparse(argument) for call in calls for argument in call.args)
    return {name.removeprefix("h.") for name in arguments if name.startswith("h.")}


def test_shown_in_is_true_in_both_directions():
    shown = {path.name[:2]: shown_by(path) for path in NOTEBOOKS}
    wrong = []
    for (room, name), node in PUBLIC.items():
        says = stated(ast.get_docstring(node) or "")
        truth = {number for number, names in shown.items() if name in names}
        if says != truth and (room == "helpers" or says or name in HANDED_ON):
            wrong.append(f"{name}: says {sorted(says)}, is shown in {sorted(truth)}")
    assert not wrong, "\n".join(wrong)


def test_statements_are_read_as_they_are_meant():
    assert stated("Rows. Shown in 03, 06 and 08.\nMore in 11.") == {"03", "06", "08"}
    assert stated("Shown in 02 to\n05 and, for the rest, in 08 alone.") == {
        "02", "03", "04", "05", "08"}
    assert stated("A thing; shown in 07. Used in 01.") == {"07"}


# --- notebooks ------------------------------------------------------------------------------------
@lru_cache
def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: dict) -> str:
    return "".join(cell["source"])


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]


def code_of(path: Path) -> list[str]:
    return [source_of(cell) for cell in cells(path, "code")]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def parameters_of(path: Path) -> dict:
    (cell,) = [cell for cell in cells(path, "code") if "parameters" in tags(cell)]
    return cell


each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def test_notebooks_are_those_of_the_plan_numbered_from_01():
    from commands.plan import NOTEBOOKS as plan

    assert [path.stem for path in NOTEBOOKS] == plan
    assert [name[:2] for name in plan] == [f"{number:02}" for number in range(1, len(plan) + 1)]


@each
def test_first_cell_is_the_heading_with_the_notebooks_number(path):
    first = read(path)["cells"][0]
    heading = source_of(first).splitlines()[0]
    assert first["cell_type"] == "markdown" and re.match(rf"# {path.stem[:2]}\b", heading), heading


@each
def test_first_code_cell_holds_the_parameters(path):
    cell = parameters_of(path)
    assert cell is cells(path, "code")[0]
    body = ast.parse(source_of(cell)).body
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in body)
    for node in body:
        ast.literal_eval(node.value)  # ValueError if it is no literal
    names = [node.targets[0].id for node in body]
    assert names[:4] == PARAMETERS and all(name.isupper() for name in names)
    lines = source_of(cell).splitlines()
    for node in body:
        last = lines[node.end_lineno - 1]
        assert re.search(r"#\s*\S+ \S+", last), f"no comment: {last}"


@each
def test_parameters_are_the_ones_that_the_plan_leaves_out(path):
    """run.py injects what differs from DEFAULTS, so the notebooks' own must be the same."""
    from commands.plan import DEFAULTS as defaults

    body = ast.parse(source_of(parameters_of(path))).body
    found = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    assert {name: found[name] for name in defaults} == defaults


@each
def test_tags_are_known_ones(path):
    found = Counter(tag for cell in read(path)["cells"] for tag in tags(cell))
    assert set(found) <= ALLOWED_TAGS and found["parameters"] == 1


@each
def test_a_cell_says_its_tags_and_its_place_among_the_slides_and_nothing_else(path):
    for cell in read(path)["cells"]:
        assert set(cell["metadata"]) <= {"tags", "slideshow"}
        kind = cell["metadata"].get("slideshow", {"slide_type": "skip"})
        assert set(kind) == {"slide_type"} and kind["slide_type"] in SLIDE_TYPES


@each
def test_code_cells_have_at_most_15_lines_of_100_characters(path):
    assert [source for source in code_of(path) if len(source.splitlines()) > CELL_LINES] == []
    lines = [line for source in code_of(path) for line in source.splitlines()]
    parameters = source_of(parameters_of(path)).splitlines()
    assert [line for line in lines if len(line) > WIDTH and line not in parameters] == []


@each
def test_at_most_two_code_cells_in_a_row(path):
    """The parameters cell apart, which papermill replaces."""
    kinds = "".join(cell["cell_type"][0] for cell in read(path)["cells"]
                    if "parameters" not in tags(cell))
    assert "ccc" not in kinds


@each
def test_all_imports_are_in_one_cell(path):
    imports = (ast.Import, ast.ImportFrom)
    importing = [source for source in code_of(path)
                 if any(isinstance(node, imports) for node in ast.walk(ast.parse(source)))]
    assert len(importing) == 1 and "import helpers as h" in importing[0]


@each
def test_code_is_clean(path):
    for source in code_of(path):
        assert not re.search(r"^\s*[!%]|warnings\.(filterwarnings|simplefilter)", source, re.M)
        for line in re.findall(r"^\s*# ?(.*)$", source, re.M):  # commented-out code
            code = r"(import |from \w+ import|\w+ = |\w+\(.*\)$|for .*:$|if .*:$)"
            assert not re.match(code, line), line


@each
def test_executed_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_outputs_hold_no_errors_warnings_or_widgets(path):
    assert "widgets" not in read(path)["metadata"]
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", source_of(cell)
            assert output.get("name") != "stderr", source_of(cell)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each
def test_nothing_says_where_it_was_run(path):
    for cell in read(path)["cells"]:
        texts = [source_of(cell)]
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("text", "")))
            texts += ["".join(value) for kind, value in output.get("data", {}).items()
                      if kind.startswith("text/")]
        for text in texts:
            places = r"(?<![\w.:/])/(home|work|root|tmp|Users)\b|\b[A-Z]:\\"
            assert not re.search(places, text), text[:300]
    assert set(read(path)["metadata"]) <= {"kernelspec", "language_info"}


@each
def test_notebook_is_under_500_kb(path):
    assert path.stat().st_size < NOTEBOOK_BYTES


@each
def test_closing_cells_are_summary_written_and_next(path):
    texts = [source_of(cell) for cell in cells(path, "markdown")]
    headings = re.findall(r"^(?:#+ +|\*\*)([^*\n]+)", "\n".join(texts), re.M)
    assert [heading.strip(" :.") for heading in headings[-3:]] == [
        "Summary", "Written by this notebook", "Next"]
    place = NOTEBOOKS.index(path)
    target = NOTEBOOKS[place + 1].stem if place + 1 < len(NOTEBOOKS) else "README"
    after = texts[-1].rpartition("Next")[2]
    assert target in after or (path.stem.startswith("08") and "README" in after)
    summary = "\n".join(texts).partition("# Summary")[2].partition("\n#")[0]
    assert 3 <= len(re.findall(r"^- ", summary, re.M)) <= 5


def test_long_cells_occur_in_one_notebook_only():
    where = {}
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            lines = [line.strip() for line in source_of(cell).splitlines() if line.strip()]
            apart = "parameters" in tags(cell) or "import helpers as h" in lines
            if len(lines) > DUPLICATE_LINES and not apart:
                where.setdefault("\n".join(lines), set()).add(path.stem)
    assert {cell: names for cell, names in where.items() if len(names) > 1} == {}


# --- README ---------------------------------------------------------------------------------------
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_in_the_readme_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.M))
    named = set(re.findall(r"(?:`|^\s*\$? ?)make ([a-z][\w-]*)", readme(), re.M))
    assert named and named - targets == set()


def test_every_file_in_backticks_in_the_readme_exists():
    quoted = set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", readme()))
    paths = {text for text in quoted if re.fullmatch(r"[\w./-]+(\.\w+|/)", text)
             and not text.startswith(("http", "/"))
             and re.search(r"/|\.(py|md|txt|csv|ipynb|toml|yml|svg|png|json)$", text)}
    made = ("runs/", "data/raw", "data/sample", "data/cache")  # what a user or a run puts there
    stages = tuple(re.findall(r'^    "(\w+)": StageInfo', ROOMS["engine.settings"], re.M))
    written = "\n".join(ROOMS.values())  # what a stage or a run writes stands in a room
    missing = [path for path in paths
               if not path.startswith((*made, *stages)) and not (ROOT / path).exists()
               and f'"{path}"' not in written]
    assert paths and stages and missing == []


# --- mutants --------------------------------------------------------------------------------------
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.old[:40]}")
def test_a_mutant_changes_one_place_and_its_tests_are_there(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    files = [word for word in mutant.tests.split() if word.endswith(".py")]
    assert files and all((ROOT / "tests" / file).is_file() for file in files)
