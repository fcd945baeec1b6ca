"""Stages: made once, made again when something they depend on changed, never half there, never silently damaged."""
import ast
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import helpers as h

ROOT = Path(__file__).resolve().parents[1]


def write_one(run, built):
    def build(out):
        """Write a number."""
        built.append(run.profile.clean)
        (out / "number.txt").write_text(str(1))
        return {"number": 1}
    return build


def write_one_explained(run, built):
    def build(out):
        """Another docstring."""
        built.append(run.profile.clean)  # a comment

        (out / "number.txt").write_text(str(1))
        return {"number": 1}
    return build


def write_two(run, built):
    def build(out):
        """Write a number."""
        built.append(run.profile.clean)
        (out / "number.txt").write_text(str(2))
        return {"number": 1}
    return build


def clean_something(built):
    def build(out):
        built.append(h.clean_text("<b>A</b>"))
    return build


def fail_halfway(out):
    (out / "half.txt").write_text("half")
    raise RuntimeError("the power went")


def test_stage_is_built_once_and_its_manifest_says_how(run):
    built = []
    folder = h.stage(run, "text", write_one(run, built))
    assert h.stage(run, "text", write_one(run, built)) == folder == run.folder / "text" and len(built) == 1
    manifest = h.read_manifest(run, "text")
    assert manifest["metrics"] == {"number": 1} and manifest["settings"] == {"clean": "paper"}
    assert manifest["split"] == "90-10" and manifest["seed"] == 0 and manifest["seconds"] >= 0
    assert list(manifest["files"]) == ["number.txt"] and manifest["peak_memory_gb"] > 0.01
    assert manifest["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_changed_code_builds_again(run):
    built = []
    h.stage(run, "text", write_one(run, built))
    folder = h.stage(run, "text", write_two(run, built))
    assert (folder / "number.txt").read_text() == "2" and len(built) == 2


def test_comments_and_docstrings_do_not_count(run):
    built = []
    h.stage(run, "text", write_one(run, built))
    h.stage(run, "text", write_one_explained(run, built))
    assert len(built) == 1


def test_changed_helper_builds_again_even_if_it_is_called_by_another(run, monkeypatch):
    built, definitions = [], h._definitions()
    h.stage(run, "text", clean_something(built))
    other = ast.parse("def strip_html(text):\n    return text.upper()").body[0]  # clean_text calls it
    monkeypatch.setattr(h, "_definitions", lambda: {**definitions, "strip_html": other})
    h.stage(run, "text", clean_something(built))
    assert len(built) == 2
    unrelated = ast.parse("def fuse(how, a, b):\n    return a").body[0]
    monkeypatch.setattr(h, "_definitions", lambda: {**definitions, "strip_html": other, "fuse": unrelated})
    h.stage(run, "text", clean_something(built))
    assert len(built) == 2


def test_constants_that_decide_a_result_are_part_of_the_code():
    assert {"LAYOUTS", "IMAGENET_MEAN", "TABLE_VARIANTS"} <= h._definitions().keys()
    assert {"SPLITS", "VALIDATION_SHARE", "REPRESENTATIONS"} <= h._definitions().keys()


def test_setting_that_is_read_builds_again_and_another_does_not(make_run):
    built = []
    h.stage(make_run(), "text", write_one(make_run(), built))
    h.stage(make_run(text_epochs=7), "text", write_one(make_run(text_epochs=7), built))
    assert built == ["paper"]
    h.stage(make_run(clean="light"), "text", write_one(make_run(clean="light"), built))
    assert built == ["paper", "light"]


def test_seed_and_split_have_their_own_stages(make_run):
    built, runs = [], [make_run(), make_run(seed=1), make_run(split="80-20")]
    folders = {h.stage(run, "text", write_one(run, built)) for run in runs}
    keys = {h.read_manifest(run, "text")["key"] for run in runs}
    assert len(built) == len(folders) == len(keys) == 3


def test_changed_content_of_an_earlier_stage_or_an_input_builds_again(run):
    built = []
    for earlier, times in ((write_one, 1), (write_one_explained, 1), (write_two, 2)):
        h.stage(run, "splits", earlier(run, []))
        h.stage(run, "text", write_one(run, built), reads=["splits"])
        assert len(built) == times
    for value, times in (("a", 3), ("a", 3), ("b", 4)):
        h.stage(run, "text", write_one(run, built), reads=["splits"], inputs={"catalogue": value})
        assert len(built) == times


def test_failed_build_leaves_only_the_partial_folder_and_the_old_stage(run):
    with pytest.raises(RuntimeError, match="power"):
        h.stage(run, "text", fail_halfway)
    assert sorted(path.name for path in run.folder.iterdir()) == [".text.lock", "text.partial"]
    with pytest.raises(FileNotFoundError):
        h.read_stage(run, "text")
    folder = h.stage(run, "text", write_one(run, []))
    assert sorted(path.name for path in run.folder.iterdir()) == [".text.lock", "text"]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "number.txt"]  # nothing of the other
    with pytest.raises(RuntimeError, match="power"):
        h.stage(run, "text", fail_halfway)
    assert h.read_stage(run, "text") == folder and (folder / "number.txt").read_text() == "1"


def test_build_that_goes_on_finds_what_it_left(run):
    def build(out):
        found.append((out / "begun.txt").exists())
        (out / "begun.txt").write_text("")
        if len(found) == 1:
            raise KeyboardInterrupt

    found = []
    with pytest.raises(KeyboardInterrupt):
        h.stage(run, "text", build)
    h.stage(run, "text", build)
    assert found == [False, True] and not (run.folder / "text.partial").exists()


@pytest.mark.parametrize("damage", [lambda file: file.write_text("7"), lambda file: file.unlink()])
def test_damaged_file_is_named_and_refused(run, damage):
    folder = h.stage(run, "text", write_one(run, []))
    damage(folder / "number.txt")
    for use in (lambda: h.read_stage(run, "text"), lambda: h.stage(run, "text", write_one(run, [])),
                lambda: h.stage(run, "baselines", write_one(run, []), reads=["text"])):
        with pytest.raises(h.DamagedStage) as error:
            use()
        assert str(folder / "number.txt") in str(error.value) and "02_text_preprocessing" in str(error.value)


def test_damaged_manifest_is_named_and_refused(run):
    folder = h.stage(run, "text", write_one(run, []))
    (folder / "manifest.json").write_text('{"key": "')
    with pytest.raises(h.DamagedStage, match="manifest.json"):
        h.read_stage(run, "text")


def test_missing_stage_names_notebook_and_command(make_run):
    run = make_run(split="80-20", seed=3)
    with pytest.raises(FileNotFoundError) as error:
        h.read_stage(run, "fusion-average-average")
    message = str(error.value)
    assert "fusion-average-average" in message and "07_hierarchical_fusion" in message
    command = "python run.py study --profile paper --split 80-20 --seed 3"
    assert command in message and "--only 07" in message


def test_command_for_a_missing_stage_repeats_the_changed_settings(make_run):
    """Without them the command makes the stage of another run."""
    with pytest.raises(FileNotFoundError, match=r"--set '?text_epochs=1"):
        h.read_stage(make_run(), "text")


def test_finished_stage_is_reported_to_the_plan(run, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_EVENTS", str(tmp_path / "events"))
    h.stage(run, "text", write_one(run, []))
    event = h.json.loads((tmp_path / "events").read_text())
    stage = str(run.folder.relative_to(h.runs_folder()) / "text")
    assert event == {"stage": stage, "key": h.read_manifest(run, "text")["key"]}


# --- the study's own stages ---------------------------------------------------------------------------
@pytest.fixture
def recipes(run, monkeypatch):
    """{stage: (settings its code reads, what it reads)} of all stages, without making them."""
    found = {}

    def note(run, name, build, reads=(), inputs=None, together=False):
        found[name] = (set(h.code_and_settings(build)[1]), {*reads, *(inputs or {})})

    monkeypatch.setattr(h, "stage", note)
    for make in (h.split_stage, h.text_stage, h.baseline_stage, h.image_encoder_stage, h.score_stage):
        make(run)
    for encoder in h.TEXT_ENCODERS:
        for field in h.FIELDS:
            h.text_encoder_stage(run, encoder, field)
    for name in ("image_regions", "image_whole"):
        h.image_features_stage(run, name)
    for variant in h.TABLE_VARIANTS:
        h.fusion_stage(run, variant)
    return found


def test_every_stage_has_a_notebook_that_makes_it(recipes):
    assert {name.split("-")[0] for name in recipes} == set(h.MADE_IN)


def test_stages_depend_on_the_settings_that_decide_them(recipes):
    text = {"max_length", "pooling", "text_epochs", "text_batch", "text_lr", "text_width", "text_layers", "vocabulary"}
    needed = {"splits": {"rows"}, "text": {"clean"}, "camembert_title": text,
              "flaubert_description": text,
              "seresnext": {"seresnext", "image_size", "image_epochs", "image_batch", "image_lr"},
              "image_regions": {"seresnext", "regions", "region_size", "grid"}, "image_whole": {"image_size"},
              "fusion-concat-add": {"fusion_epochs", "fusion_batch", "fusion_lr", "dropout", "project"},
              "scores": {"bootstrap"}}
    for name, settings in needed.items():
        assert settings <= recipes[name][0], name
    for name in ("camembert_title", "seresnext"):
        assert {"freeze_encoders", "precision", "compile", "early_stopping", "device_batch"} <= recipes[name][0], name
    for name in ("camembert_title", "flaubert_description"):  # the checkpoint of this encoder, not of the other
        assert "encoder" in recipes[name][1] and not recipes[name][0] & {"camembert", "flaubert"}


def test_stages_do_not_depend_on_other_encoders_settings(recipes):
    for name, (settings, _) in recipes.items():
        kind = name.split("_")[0].split("-")[0]
        if kind in h.TEXT_ENCODERS:
            other = {"camembert": "flaubert", "flaubert": "camembert"}[kind]
            assert not settings & {other, "seresnext", "image_size", "image_lr", "grid", "fusion_lr"}, name
        elif kind in ("seresnext", "image"):
            assert not settings & {"camembert", "flaubert", "text_lr", "max_length", "clean", "fusion_lr"}, name
        elif kind == "fusion":
            assert not settings & {"text_lr", "text_epochs", "image_lr", "clean", "bootstrap"}, name


def test_every_setting_is_read_somewhere():
    sources = [ROOT / "helpers.py", ROOT / "run.py", *(ROOT / "notebooks").glob("*.ipynb")]
    read = set(re.findall(r"profile\.(\w+)", "\n".join(path.read_text(encoding="utf-8") for path in sources)))
    settings = {field.name for field in h.dataclasses.fields(h.Profile)}
    unread = settings - read
    assert unread == set()


def test_changed_text_of_the_catalogue_reaches_the_text_stage(run, tiny_ens):
    h.split_stage(run)
    h.text_stage(run)
    file = tiny_ens / "X_train_update.csv"
    file.write_text(file.read_text(encoding="utf-8").replace("Chaise scandinave", "Fauteuil danois"), encoding="utf-8")
    h.split_stage(run)
    h.text_stage(run)
    titles = h.read_text(run)["title"]
    assert titles.str.contains("fauteuil danois").sum() == 1 and not titles.str.contains("scandinave").any()


def test_changed_picture_reaches_the_image_features(run, tiny_ens):
    def build(out):
        torch.manual_seed(0)
        h.save_file(h.ImageEncoder("small").state_dict(), out / "encoder.safetensors")

    h.split_stage(run)
    h.stage(run, "seresnext", build)
    ids = h.read_split(run)["product_id"]
    before = h.load_tensors(h.image_features_stage(run, "image_whole") / "features.safetensors", ids)["features"]
    picture = Path(h.load_catalogue(tiny_ens).set_index("product_id").loc[ids[7], "picture"])
    h.Image.new("RGB", (90, 70), (255, 0, 255)).save(picture)
    h.split_stage(run)
    after = h.load_tensors(h.image_features_stage(run, "image_whole") / "features.safetensors", ids)["features"]
    assert (before != after).any(1).nonzero().flatten().tolist() == [7]


# --- tensors keyed by product id ----------------------------------------------------------------------
def test_tensors_come_back_in_the_order_that_is_asked_for(tmp_path):
    ids = [30, 10, 20]
    h.save_tensors(tmp_path / "x.safetensors", ids, a=np.array([[3.0], [1.0], [2.0]], np.float32),
                   b=torch.tensor([300, 100, 200]))
    found = h.load_tensors(tmp_path / "x.safetensors", [10, 20, 30, 10])
    assert found.keys() == {"a", "b"}
    assert found["a"].tolist() == [[1], [2], [3], [1]] and found["b"].tolist() == [100, 200, 300, 100]
    assert found["a"].dtype == torch.float32 and found["b"].dtype == torch.int64


def test_order_of_saving_does_not_matter(tmp_path):
    table = pd.DataFrame({"id": np.random.default_rng(0).permutation(50), "x": np.arange(50.0)})
    for name, rows in (("a", table), ("b", table.sample(frac=1, random_state=2))):
        h.save_tensors(tmp_path / name, rows["id"], x=rows["x"].to_numpy())
    a, b = (h.load_tensors(tmp_path / name, np.arange(50))["x"] for name in "ab")
    assert torch.equal(a, b)


def test_view_that_is_not_contiguous_is_saved_right(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    h.save_tensors(tmp_path / "x", [1, 2, 3], x=x.T)
    assert torch.equal(h.load_tensors(tmp_path / "x", [1, 2, 3])["x"], x.T)


def test_missing_id_is_named_with_the_number_of_missing_ones(tmp_path):
    h.save_tensors(tmp_path / "x.safetensors", [1, 2], x=torch.zeros(2))
    with pytest.raises(ValueError, match=r"x\.safetensors.*product 77.*2 of 3"):
        h.load_tensors(tmp_path / "x.safetensors", [1, 77, 78])


def test_mismatched_rows_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 product ids.*'x': 3"):
        h.save_tensors(tmp_path / "x", [1, 2], x=torch.zeros(3), y=torch.zeros(2))
    assert not (tmp_path / "x").exists()
