"""Settings: a wrong name or value is refused with the name and what is allowed, before anything
starts. Runs: what is another run has another folder.
"""
import dataclasses
import re
import shutil

import pytest

import helpers as h
from engine import catalogue
from engine.settings import (
    IN_FOLDER,
    SPEED_ONLY,
    choices,
    make_profile,
    parse_settings,
    setting_names,
)

WITH_CHOICES = [name for name in setting_names() if choices(name)]


def refused(*arguments, **settings) -> str:
    with pytest.raises(ValueError) as error:
        h.open_run(*arguments, settings or None)
    return str(error.value)


def folder_of(**settings) -> str:
    """The name of the folder of a run with these settings."""
    return h.open_run("paper", "90-10", 0, settings).folder.name


# --- what is refused ------------------------------------------------------------------------------
def test_unknown_profile_is_named_with_the_known_ones():
    message = refused("papier", "90-10", 0)
    assert "'papier'" in message and "sample" in message and "paper" in message


@pytest.mark.parametrize("split", ["70-30", "90/10", None, 90])
def test_unknown_split_is_named_with_the_known_ones(split):
    message = refused("sample", split, 0)
    assert repr(split) in message and "90-10" in message and "80-20" in message


@pytest.mark.parametrize("seed", [-1, 1.0, "0", True, None])
def test_seed_is_a_whole_number_from_0(seed):
    message = refused("sample", "90-10", seed)
    assert "seed" in message and repr(seed) in message and "from 0" in message


def test_unknown_setting_is_named_with_all_settings():
    message = refused("sample", "90-10", 0, epochs=3)
    assert "'epochs'" in message
    for field in dataclasses.fields(h.Profile):
        if field.name != "name":
            assert field.name in message


@pytest.mark.parametrize("name, value, kind", [
    ("text_epochs", True, "int"),
    ("text_epochs", 2.0, "int"),
    ("text_epochs", "2", "int"),
    ("text_lr", "1e-3", "float"),
    ("text_lr", False, "float"),
    ("project", 1, "bool"),
    ("clean", 3, "str"),
    ("max_length", None, "int"),
])
def test_ill_typed_value_is_named_with_the_type(name, value, kind):
    message = refused("sample", "90-10", 0, **{name: value})
    assert name in message and repr(value) in message and kind in message


def test_whole_number_is_accepted_for_a_float():
    rate = make_profile("sample", {"text_lr": 1}).text_lr
    assert rate == 1 and type(rate) is float  # so that 1 and 1.0 are one run


@pytest.mark.parametrize("name", WITH_CHOICES)
def test_choice_outside_the_list_is_named_with_the_list(name):
    message = refused("sample", "90-10", 0, **{name: "rather"})
    assert name in message and "'rather'" in message
    for choice in choices(name):
        assert choice in message
        assert getattr(make_profile("sample", {name: choice}), name) == choice


def test_settings_with_a_list_of_choices():
    assert WITH_CHOICES == ["rows", "bad_rows", "clean", "texts", "pooling", "regions",
                            "fusion_rows", "encoder_mode", "precision", "compile", "report_to"]
    assert choices("rows") == ("described", "all") and choices("camembert") == ()


@pytest.mark.parametrize("name, value", [
    ("text_epochs", 0), ("text_batch", -4), ("image_lr", 0.0), ("dropout", -0.1), ("grid", 0)])
def test_size_or_rate_that_is_not_positive_is_refused(name, value):
    message = refused("sample", "90-10", 0, **{name: value})
    assert name in message and repr(value) in message


@pytest.mark.parametrize("name, value", [
    ("text_lr", float("nan")), ("image_lr", float("inf")), ("dropout", 1.5)])
def test_number_that_no_run_can_use_is_refused(name, value):
    assert name in refused("sample", "90-10", 0, **{name: value})


def test_all_that_is_wrong_is_told_at_once():
    message = refused("sample", "90-10", 0, text_epochs=0, epochs=3, clean="rather", grid="16",
                      text_lr=1e-4, speed="high")
    told = message.split("; ")
    assert told[0] == "unknown setting clean 'rather'" and told[1] == "choose from: paper, light"
    assert told[2:4] == ["setting text_epochs must be above 0 and finite, got 0",
                         "setting grid must be int, got '16'"]
    assert told[4] == "unknown setting 'epochs', 'speed'"
    assert "text_lr must" not in message  # which is right


def test_a_profiles_name_is_no_setting():
    """It names the folder under runs/, so it must stay one of the profiles."""
    assert "name" in refused("sample", "90-10", 0, name="../elsewhere")


def test_no_dropout_is_allowed():
    assert make_profile("paper", {"dropout": 0.0}).dropout == 0


# --- profiles -------------------------------------------------------------------------------------
def test_settings_replace_only_what_they_name():
    changed = dataclasses.asdict(make_profile("paper", {"text_epochs": 3}))
    assert changed.pop("text_epochs") == 3
    assert changed.items() <= dataclasses.asdict(h.PROFILES["paper"]).items()
    assert h.PROFILES["paper"].text_epochs == 10  # the profile itself is not touched


def test_paper_profile_is_the_papers_size():
    paper = make_profile("paper")
    assert (paper.text_width, paper.max_length, paper.text_batch) == (768, 256, 32)
    assert (paper.text_epochs, paper.text_lr) == (10, 2e-5)
    assert (paper.image_size, paper.region_size, paper.grid) == (224, 224, 16)
    assert (paper.image_epochs, paper.image_batch, paper.image_lr) == (20, 32, 1e-3)


# --- on the command line --------------------------------------------------------------------------
def test_values_are_read_as_python_and_json_write_them():
    pairs = ["text_epochs=3", "text_lr=1e-4", "grouped=True", "project=false", "clean=light",
             "data=a=b", "camembert=2024"]
    assert parse_settings(pairs) == {
        "text_epochs": 3, "text_lr": 1e-4, "grouped": True, "project": False, "clean": "light",
        "data": "a=b", "camembert": "2024"}
    with pytest.raises(ValueError, match="--set wants name=value, got 'grouped'"):
        parse_settings(["grouped"])


@pytest.mark.parametrize("name", setting_names())
def test_a_runs_options_name_the_same_run(name):
    run = h.open_run("paper", "80-20", 3, {name: other_value(name)})
    words = run.options
    assert words[:6] == ["--profile", "paper", "--split", "80-20", "--seed", "3"]
    assert words[6] == "--set" and len(words) == 8
    assert h.open_run("paper", "80-20", 3, parse_settings(words[7:])) == run
    assert run.command.startswith("python run.py study --profile paper --split 80-20 --seed 3")


# --- folders of runs ------------------------------------------------------------------------------
def test_each_profile_split_and_seed_has_its_own_folder():
    folders = set()
    for profile in h.PROFILES:
        for split in h.SPLITS:
            for seed in (0, 1):
                for rows in choices("rows"):
                    folders.add(h.open_run(profile, split, seed, {"rows": rows}).folder)
    assert len(folders) == 8 * len(h.PROFILES)


def test_runs_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "elsewhere"))
    folder = h.open_run("paper", "80-20", 7).folder
    assert folder == tmp_path / "elsewhere" / "paper" / "described" / "80-20" / "seed7"


def test_changed_settings_name_the_folder_in_the_order_of_the_profile():
    assert folder_of() == "seed0"
    assert folder_of(text_epochs=3) == "seed0+text_epochs=3"
    assert folder_of(text_lr=1e-4, clean="light") == "seed0+clean=light+text_lr=0.0001"
    assert folder_of(clean="paper", text_epochs=10) == "seed0"  # the profile's own values


def other_value(name: str) -> object:
    """Another value for a setting than the paper's profile has."""
    value = getattr(h.PROFILES["paper"], name)
    if isinstance(value, bool):
        return not value
    if choices(name):
        return next(choice for choice in choices(name) if choice != value)
    if isinstance(value, str):
        return f"{value}-2"
    return value + 1 if isinstance(value, int) else value / 2


@pytest.mark.parametrize("name", setting_names())
def test_each_setting_but_those_of_speed_has_another_folder(name):
    value = other_value(name)
    changed = h.open_run("paper", "90-10", 0, {name: value})
    assert changed.changed == {name: value}
    same = changed.folder == h.open_run("paper", "90-10", 0).folder
    assert same == (name in SPEED_ONLY)
    # Once: what the protocol says stands in its own part of the path.
    assert (changed.suffix == "") == (name in (*SPEED_ONLY, *IN_FOLDER))


@pytest.mark.parametrize("value", ["a/b", "../a", "my model", "a:b", "a\\b", "é*", "a+grid=3"])
def test_value_that_is_no_folders_name_gets_digits(value):
    name = folder_of(camembert=value)
    assert re.fullmatch(r"seed0\+camembert=[\w.-]+(=3)?~[0-9a-f]{8}", name)


@pytest.mark.parametrize("one, other", [
    ({"camembert": "a/b"}, {"camembert": "a b"}),
    ({"camembert": "a/b"}, {"camembert": "a-b"}),
    ({"camembert": "a", "flaubert": "b"}, {"camembert": "a+flaubert=b"}),
    ({"camembert": 90 * "a" + "1"}, {"camembert": 90 * "a" + "2"}),
])
def test_two_values_that_would_have_one_name_do_not_collide(one, other):
    names = [folder_of(**settings) for settings in (one, other)]
    assert names[0] != names[1] and all(len(name) <= 100 for name in names)
    assert names[0] == folder_of(**one)  # and each has always the same


def test_a_protocol_stands_for_settings():
    released = h.open_run("paper", "90-10", 0, {"protocol": "as-released"})
    assert released.changed == {"texts": "joined", "image_weights": "none", "encoder_mode": "train"}
    assert h.open_run("paper", "90-10", 0, {"protocol": "as-described"}).changed == {}
    own = {"protocol": "as-released", "texts": "apart"}
    assert h.open_run("paper", "90-10", 0, own).profile.texts == "apart"
    assert "choose from: as-described, as-released" in refused("paper", "90-10", 0, protocol="mine")


def test_a_notebooks_settings_may_be_json():
    asked = h.open_run("sample", "90-10", 0, '{"text_epochs": 3, "clean": "light"}')
    assert asked == h.open_run("sample", "90-10", 0, {"text_epochs": 3, "clean": "light"})
    for wrong in ("text_epochs=3", "[1]", 3):
        with pytest.raises(ValueError, match="SETTINGS must be a dictionary"):
            h.open_run("sample", "90-10", 0, wrong)


def test_what_is_synthetic_follows_the_data_and_not_the_profile():
    assert h.open_run("sample", "90-10", 0).synthetic
    own = h.open_run("sample", "90-10", 0, {"data": "data/raw"})
    assert not own.synthetic and "synthetic" not in h.data_note(own)
    assert not h.open_run("paper", "90-10", 0).synthetic
    assert h.open_run("paper", "90-10", 0, {"data": "data/sample"}).synthetic


@pytest.mark.parametrize("named", ["data", "RAKUTEN_DATA"])
def test_the_sample_is_synthetic_wherever_it_lies(named, tmp_path, monkeypatch):
    """Its numbers would else stand beside the paper's as Rakuten's."""
    folder = catalogue.catalogue_folder(h.open_run("sample", "90-10", 0))
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("images"))
    monkeypatch.setenv("RAKUTEN_DATA", str(tmp_path / "copy" if named == "RAKUTEN_DATA" else ""))
    for place in (folder, tmp_path / "copy", f"{tmp_path}/./copy/"):
        changes = {"data": str(place)} if named == "data" else {}
        run = h.open_run("paper", "90-10", 0, changes)
        assert run.synthetic and "synthetic" in h.data_note(run)
        assert "other data" in run.unlike_the_paper
        assert catalogue.catalogue_folder(run) == run.data_folder
