"""Style: helpers.py, the notebooks and the README keep the rules of the study; each rule is checked in code."""
import ast
import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
HELPERS = (ROOT / "helpers.py").read_text(encoding="utf-8")
TREE = ast.parse(HELPERS)
CELL_LINES, DUPLICATE_LINES, FUNCTION_LINES, NOTEBOOK_BYTES = 15, 4, 50, 500_000
PARAMETERS = ["PROFILE", "SPLIT", "SEED", "SETTINGS"]
ALLOWED_TAGS = {"parameters", "nbval-check-output", "nbval-skip", "nbval-ignore-output", "raises-exception"}


# --- helpers.py ---------------------------------------------------------------------------------------
def definitions() -> dict[str, ast.AST]:
    """Top-level names of helpers.py and where each is defined; imports apart."""
    found = {}
    for node in TREE.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
        for target in targets:
            found.update({name.id: node for name in ast.walk(target) if isinstance(name, ast.Name)})
    return found


def words(tree: ast.AST) -> set[str]:
    """Names and attributes that the code mentions; in annotations that are text, too."""
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


PUBLIC = {name: node for name, node in definitions().items()
          if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not name.startswith("_")}


def test_sections_are_in_order_and_the_table_at_the_top_lists_them():
    banners = re.findall(r"^# =+\n# (\d+)  ([^\n:]+?)(?::.*)?\n# =+$", HELPERS, re.M)
    table = re.findall(r"^    (\d+) +(.+?)  +\S.*$", ast.get_docstring(TREE, clean=False), re.M)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1)) and len(banners) > 10
    assert table == banners


def test_a_section_uses_only_itself_and_those_above():
    starts = [HELPERS[:match.start()].count("\n") + 1 for match in re.finditer(r"^# \d+  ", HELPERS, re.M)]
    section = {name: sum(start <= node.lineno for start in starts) for name, node in definitions().items()}
    late = [f"{name} (section {section[name]}) uses {word} (section {section[word]})"
            for name, node in definitions().items()
            for word in {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            if section.get(word, 0) > section[name]]
    assert late == []


def test_no_function_is_longer_than_50_lines():
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: lines for name, lines in long.items() if lines > FUNCTION_LINES} == {}


def test_public_functions_and_classes_have_docstrings():
    assert [name for name, node in PUBLIC.items() if not ast.get_docstring(node)] == []


def test_public_functions_have_type_hints():
    bare = [name for name, node in PUBLIC.items() if isinstance(node, ast.FunctionDef)
            for argument in (*node.args.args, *node.args.kwonlyargs)
            if argument.annotation is None and argument.arg not in ("ax", "fig", "tokenizer")]
    assert bare == []


def test_each_imported_name_is_used():
    imported = {(alias.asname or alias.name).split(".")[0]: node.lineno for node in ast.walk(TREE)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    rest = ast.Module([node for node in TREE.body if not isinstance(node, (ast.Import, ast.ImportFrom))], [])
    used = words(rest)
    assert [name for name in imported if name not in used and name != "annotations"] == []


def test_every_helper_is_used():
    inside, unused = definitions(), []
    outside = words_outside()
    for name in inside:
        others = [node for other, node in inside.items() if node is not inside[name]]
        if name not in outside and not any(name in words(node) for node in others):
            unused.append(name)
    assert unused == []


@lru_cache
def words_outside() -> frozenset[str]:
    """What notebooks, run.py and the tests say as h.<name>, or import from helpers."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "run.py", *(ROOT / "tests").glob("*.py"))]
    sources += ["\n".join(code_of(path)) for path in NOTEBOOKS]
    return frozenset(word for source in sources for word in re.findall(r"\bh\.(\w+)", source))


# --- "Used in 03" is true -----------------------------------------------------------------------------
def numbers_in(text: str) -> set[str]:
    """{"03", "04", "05"} of "03 to 05" or "03, 04 and 05"."""
    found = set(re.findall(r"\b\d\d\b", text))
    for first, last in re.findall(r"\b(\d\d) to (\d\d)\b", text):
        found |= {f"{number:02}" for number in range(int(first), int(last) + 1)}
    return found


def stated(docstring: str, verb: str) -> set[str]:
    """The notebooks that a docstring names after "Used in" or "Shown in", to the end of its sentence."""
    text = " ".join(docstring.split())
    return set().union(*(numbers_in(part) for part in re.findall(rf"\b{verb} in (.*?)(?:\.(?:\s|$)|;|$)", text, re.I)))


def mentions(path: Path) -> tuple[set[str], set[str]]:
    """(helpers that a notebook uses, helpers that it shows by h.show)."""
    used, shown = set(), set()
    for source in code_of(path):
        tree = ast.parse(source)
        in_show = {id(child) for node in ast.walk(tree) if isinstance(node, ast.Call)
                   and ast.unparse(node.func) == "h.show" for argument in node.args for child in ast.walk(argument)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "h":
                (shown if id(node) in in_show else used).add(node.attr)
    return used, shown


def test_used_in_and_shown_in_are_true_in_both_directions():
    found = {path.name[:2]: mentions(path) for path in NOTEBOOKS}
    wrong = []
    for name, node in PUBLIC.items():
        docstring = ast.get_docstring(node) or ""
        says_used, says_shown = stated(docstring, "Used"), stated(docstring, "Shown")
        if "every notebook" in docstring:
            says_used |= set(found) if "(through" not in docstring else set()
        used = {number for number, (uses, _) in found.items() if name in uses}
        shown = {number for number, (_, shows) in found.items() if name in shows}
        if says_shown != shown:
            wrong.append(f"{name}: says shown in {sorted(says_shown)}, is shown in {sorted(shown)}")
        if not says_used <= used or not used <= says_used | says_shown:
            wrong.append(f"{name}: says used in {sorted(says_used)}, is used in {sorted(used)}")
    assert not wrong, "\n".join(wrong)


def test_statements_are_read_as_they_are_meant():
    assert stated("Rows. Used in 03, 06 and 08.\nMore in 11.", "Used") == {"03", "06", "08"}
    assert stated("Used in 02 to\n05 and, for the rest, in 08 alone.", "Used") == {"02", "03", "04", "05", "08"}
    assert stated("A thing; shown in 07. Used in 01.", "Shown") == {"07"}


# --- notebooks ----------------------------------------------------------------------------------------
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
    plan = next(ast.literal_eval(node.value) for node in ast.parse((ROOT / "run.py").read_text()).body
                if isinstance(node, ast.Assign) and node.targets[0].id == "NOTEBOOKS")
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
        assert re.search(r"#\s*\S+ \S+", lines[node.end_lineno - 1]), f"no comment: {lines[node.end_lineno - 1]}"


@each
def test_parameters_are_the_ones_that_the_plan_leaves_out(path):
    """run.py injects what differs from its DEFAULTS, so the notebooks' own defaults must be the same."""
    defaults = next(ast.literal_eval(node.value) for node in ast.parse((ROOT / "run.py").read_text()).body
                    if isinstance(node, ast.Assign) and node.targets[0].id == "DEFAULTS")
    body = ast.parse(source_of(parameters_of(path))).body
    found = {node.targets[0].id: ast.literal_eval(node.value) for node in body}
    assert {name: found[name] for name in defaults} == defaults


@each
def test_tags_are_known_ones(path):
    found = Counter(tag for cell in read(path)["cells"] for tag in tags(cell))
    assert set(found) <= ALLOWED_TAGS and found["parameters"] == 1


@each
def test_code_cells_have_at_most_15_lines(path):
    assert [source for source in code_of(path) if len(source.splitlines()) > CELL_LINES] == []


@each
def test_at_most_two_code_cells_in_a_row(path):
    """The parameters cell apart, which papermill replaces."""
    kinds = "".join(cell["cell_type"][0] for cell in read(path)["cells"] if "parameters" not in tags(cell))
    assert "ccc" not in kinds


@each
def test_all_imports_are_in_one_cell(path):
    importing = [source for source in code_of(path)
                 if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(ast.parse(source)))]
    assert len(importing) == 1 and "import helpers as h" in importing[0]


@each
def test_code_is_clean(path):
    for source in code_of(path):
        assert not re.search(r"^\s*[!%]|warnings\.(filterwarnings|simplefilter)", source, re.M)
        for line in re.findall(r"^\s*# ?(.*)$", source, re.M):  # commented-out code
            assert not re.match(r"(import |from \w+ import|\w+ = |\w+\(.*\)$|for .*:$|if .*:$)", line), line


@each
def test_executed_top_to_bottom(path):
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_outputs_hold_no_errors_warnings_or_widgets(path):
    assert "widgets" not in read(path)["metadata"]
    for cell in cells(path, "code"):
        for output in cell["outputs"]:
            assert output["output_type"] != "error" and output.get("name") != "stderr", source_of(cell)
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


@each
def test_nothing_says_where_it_was_run(path):
    for cell in read(path)["cells"]:
        texts = [source_of(cell)]
        for output in cell.get("outputs", []):
            texts.append("".join(output.get("text", "")))
            texts += ["".join(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
        for text in texts:
            assert not re.search(r"(?<![\w.:/])/(home|work|root|tmp|Users)\b|\b[A-Z]:\\", text), text[:300]
    assert set(read(path)["metadata"]) <= {"kernelspec", "language_info"}


@each
def test_notebook_is_under_500_kb(path):
    assert path.stat().st_size < NOTEBOOK_BYTES


@each
def test_closing_cells_are_summary_written_and_next(path):
    texts = [source_of(cell) for cell in cells(path, "markdown")]
    headings = re.findall(r"^(?:#+ +|\*\*)([^*\n]+)", "\n".join(texts), re.M)
    assert [heading.strip(" :.") for heading in headings[-3:]] == ["Summary", "Written by this notebook", "Next"]
    place = NOTEBOOKS.index(path)
    target = NOTEBOOKS[place + 1].stem if place + 1 < len(NOTEBOOKS) else "README"
    after = texts[-1].rpartition("Next")[2]
    assert target in after or (path.stem.startswith("08") and "README" in after)
    assert 3 <= len(re.findall(r"^- ", "\n".join(texts).partition("# Summary")[2].partition("\n#")[0], re.M)) <= 5


def test_long_cells_occur_in_one_notebook_only():
    where = {}
    for path in NOTEBOOKS:
        for cell in cells(path, "code"):
            lines = [line.strip() for line in source_of(cell).splitlines() if line.strip()]
            if len(lines) > DUPLICATE_LINES and "parameters" not in tags(cell) and "import helpers as h" not in lines:
                where.setdefault("\n".join(lines), set()).add(path.stem)
    assert {cell: names for cell, names in where.items() if len(names) > 1} == {}


# --- README -------------------------------------------------------------------------------------------
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:`|^\s*\$? ?)make ([a-z][\w-]*)", readme(), re.M))
    assert named and named - targets == set()


def test_every_file_in_backticks_in_the_readme_exists():
    quoted = set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", readme()))
    paths = {text for text in quoted if re.fullmatch(r"[\w./-]+(\.\w+|/)", text) and not text.startswith(("http", "/"))
             and re.search(r"/|\.(py|md|txt|csv|ipynb|toml|yml|svg|png|json)$", text)}
    made = ("runs/", "data/raw", "data/sample", "data/cache")  # what a user or a run puts there
    stages = tuple(re.findall(r'"(\w+)": "\d\d_', HELPERS))
    missing = [path for path in paths if not path.startswith(made) and not (ROOT / path).exists()
               and not path.startswith(stages) and f'"{path}"' not in HELPERS]  # what a stage writes
    assert paths and missing == []
