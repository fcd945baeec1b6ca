"""What teachers use: the plans, the quiz, slides, the class kit, and places other than `make`."""
import json
import re
import tomllib
import zipfile

import nbformat
import pytest

import colab_check
from commands import plan as plans
from commands import slides
from commands.kit import write_kit
from conftest import ROOT, SMALL
from engine.files import write_json
from engine.keys import key_of
from test_style import NOTEBOOKS, read

DOCS = sorted((ROOT / "docs").glob("*.md"))
QUIZ = (ROOT / "docs" / "quiz.md").read_text(encoding="utf-8")
TEACHING = (ROOT / "docs" / "teaching.md").read_text(encoding="utf-8")
NUMBERS = [f"{number:02}" for number in range(1, 13)]
PINS = colab_check.pins(ROOT / "requirements.txt") | colab_check.pins(ROOT / "constraints.txt")


# --- pages ----------------------------------------------------------------------------------------
def test_the_quiz_asks_five_questions_on_each_notebook_and_answers_them():
    questions, answers = QUIZ.split("\n## Answers\n")
    asked = re.split(r"^## (\d\d)  .+$", questions, flags=re.M)[1:]
    answered = re.split(r"^\*\*(\d\d)  .+\*\*$", answers, flags=re.M)[1:]
    assert asked[::2] == answered[::2] == NUMBERS
    for question, answer in zip(asked[1::2], answered[1::2]):
        assert re.findall(r"^(\d)\. ", question, re.M) == list("12345")
        assert re.findall(r"^(\d)\. ", answer, re.M) == list("12345")


def test_the_plans_take_their_time_and_leave_no_notebook_out():
    two_hours, weeks = TEACHING.split("\n## Six weeks\n")
    minutes = [int(found) for found in re.findall(r"^\| (\d+) \| ", two_hours, re.M)]
    assert sum(minutes) == 120
    labs = " ".join(re.findall(r"^- Lab: (.+)$", weeks, re.M))
    assert sorted(re.findall(r"\b(\d\d)\b", labs)) == NUMBERS
    assert len(re.findall(r"^\*\*Objectives\.\*\* ", weeks, re.M)) == 6


def test_the_plan_names_sections_that_there_are():
    for number, said in re.findall(r"notebook (\d\d), ((?:\"[^\"]+\"(?: and |, )?)+)", TEACHING):
        (path,) = [path for path in NOTEBOOKS if path.stem.startswith(number)]
        text = "\n".join("".join(cell["source"]) for cell in read(path)["cells"])
        for heading in re.findall(r'"([^"]+)"', said):
            assert re.search(rf"^#+ (?:\d+  )?{re.escape(heading)}", text, re.M), (number, heading)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_links_of_a_page_lead_to_files(path):
    for link in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (path.parent / link).exists(), link


# --- slides ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_notebook_has_5_to_20_slides(path):
    marks = [cell["metadata"].get("slideshow", {}) for cell in read(path)["cells"]]
    kinds = [mark.get("slide_type") for mark in marks]
    assert kinds[0] == "slide" and 5 <= kinds.count("slide") <= 20


def test_slides_need_no_network_and_show_figures_without_their_code(tmp_path, monkeypatch):
    monkeypatch.setattr(slides, "copy_reveal", lambda target: target.mkdir(parents=True))
    new, slide = nbformat.v4, {"slideshow": {"slide_type": "slide"}}
    drawn = new.new_output("display_data", {"image/png": "AA=="})
    book = new.new_notebook(cells=[
        new.new_markdown_cell(r"# 01  Title $x_1 \tag{1}$", metadata=slide),
        new.new_code_cell("kept = 1", metadata=slide),
        new.new_code_cell("plot_it()", outputs=[drawn], metadata=slide),
        new.new_code_cell("gone()", metadata={"slideshow": {"slide_type": "skip"}})])
    nbformat.write(book, tmp_path / "01_title.ipynb")
    folder = slides.write_slides(tmp_path / "slides", [tmp_path / "01_title.ipynb"])
    page = (folder / "01_title.html").read_text(encoding="utf-8")
    body = page[page.index("<body"):]
    assert body.count("<section") == 2 * 3 and "<math" in body and "image/png" in body
    assert "kept" in body and "plot_it" not in body and "gone" not in body
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:|reveal\.js/)', page) == []
    assert not re.search(r"@import|from 'http|require\(", page)


def test_reveal_that_is_not_installed_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(slides.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make slides"):
        slides.copy_reveal(tmp_path)


# --- the class kit --------------------------------------------------------------------------------
def build(run, name, folder):
    (folder / "text.txt").write_text(name)


@pytest.fixture
def first_six(make_run, fake_stage):
    """The plan of a run whose notebooks 01 to 06 are done, each stage a text of its own."""
    run, plan = make_run(), plans.make_plan("paper", ["90-10"], [0], SMALL)
    plans.catalogue_hash.cache_clear()
    for name in plans.stage_names(run):
        if plans.notebook_of(run, name) < "07":
            fake_stage(name, build)
    import helpers as h
    for step in plan[:6]:
        names = [name for name in plans.stage_names(run)
                 if plans.notebook_of(run, name) == step.notebook]
        for name in names:
            h.stage(run, name)
        step.output.parent.mkdir(parents=True, exist_ok=True)
        step.output.write_text("{}")
        write_json(step.manifest, {"key": plans.step_key(step),
                                   "stages": {key_of(run, name): name for name in names}})
    return plan


def test_a_kit_unpacked_elsewhere_has_six_notebooks_done(first_six, tmp_path, monkeypatch):
    kit = write_kit(first_six, False, tmp_path / "build" / "kit.zip")
    with zipfile.ZipFile(kit) as archive:
        archive.extractall(tmp_path / "clone")
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "clone" / "runs"))
    plans._state_of_stages.cache_clear()
    assert [plans.state(step) for step in first_six] == ["done"] * 6 + ["missing"] * 6
    about = (tmp_path / "clone" / "runs" / "CLASS_KIT.md").read_text(encoding="utf-8")
    assert "07_hierarchical_fusion is the first notebook that is not" in about
    known = json.loads((first_six[0].run.folder / "stages.json").read_text(encoding="utf-8"))
    assert set(known) >= {"splits", "camembert_title", "image_whole"}


def test_a_kit_of_what_is_not_done_is_refused(first_six, tmp_path):
    with pytest.raises(ValueError, match="07_hierarchical_fusion .* is missing"):
        write_kit(first_six, True, tmp_path / "kit.zip")
    first_six[2].manifest.unlink()
    with pytest.raises(ValueError, match="03_finetune_camembert .* is missing"):
        write_kit(first_six, False, tmp_path / "kit.zip")
    assert not (tmp_path / "kit.zip").exists()


# --- other places ---------------------------------------------------------------------------------
def test_the_container_is_described_in_plain_json_and_made_by_make():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["image"].endswith(":3.12")
    targets = re.findall(r"make (\S+)", container["postCreateCommand"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets == ["cpu", ".venv/installed"]
    assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in targets)


def test_what_is_installed_elsewhere_is_what_colab_lacks_and_as_pinned():
    elsewhere = colab_check.pins(colab_check.ELSEWHERE)
    there = colab_check.pins(colab_check.VERSIONS)
    assert colab_check.lacking() <= set(elsewhere) and not set(elsewhere) & set(there)
    lines = colab_check.ELSEWHERE.read_text(encoding="utf-8").splitlines()
    for line in lines:  # another version than the pinned one has its reason behind it
        name, _, version = line.partition("#")[0].strip().partition("==")
        assert not name or version == PINS[colab_check.plain(name)] or "  # not " in line, line
    assert {"torch", "transformers", "numpy", "pandas", "scikit-learn"} <= set(there)


def test_colabs_versions_have_a_source_and_a_date():
    head = colab_check.VERSIONS.read_text(encoding="utf-8").partition("\naccelerate")[0]
    assert re.search(r"googlecolab/backend-info .* commit [0-9a-f]{40}", head)
    assert re.search(r"[Rr]ead in \w+ 20\d\d", head)


def test_an_address_of_the_repository_stands_in_one_place():
    """CITATION.cff says `repository-code`, once there is one; links to it are made from that."""
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    own = re.findall(r"^repository-code: \"?([^\"\s]+)", citation, re.M)
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *DOCS))
    badges = re.findall(r"colab\.research\.google\.com/(github/[^<\s]+?)/blob", texts)
    clones = re.findall(r"git clone (?:--\S+ \S+ )?(https?://\S+)", texts)
    assert {f"https://{badge.replace('github', 'github.com', 1)}" for badge in badges} <= set(own)
    assert set(clones) <= set(own)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "urls" not in project
