"""Settings: a wrong name or value is refused with the name and what is allowed, before anything starts."""
import dataclasses

import pytest

import helpers as h


def refused(*arguments, **settings) -> str:
    with pytest.raises(ValueError) as error:
        h.open_run(*arguments, settings or None)
    return str(error.value)


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
    ("text_epochs", True, "int"), ("text_epochs", 2.0, "int"), ("text_epochs", "2", "int"),
    ("text_lr", "1e-3", "float"),
    ("text_lr", False, "float"), ("project", 1, "bool"), ("clean", 3, "str"), ("max_length", None, "int")])
def test_ill_typed_value_is_named_with_the_type(name, value, kind):
    message = refused("sample", "90-10", 0, **{name: value})
    assert name in message and repr(value) in message and kind in message


def test_whole_number_is_accepted_for_a_float():
    assert h.make_profile("sample", {"text_lr": 1}).text_lr == 1


@pytest.mark.parametrize("name", list(h.CHOICES))
def test_choice_outside_the_list_is_named_with_the_list(name):
    message = refused("sample", "90-10", 0, **{name: "rather"})
    assert name in message and "'rather'" in message
    for choice in h.CHOICES[name]:
        assert choice in message
        assert getattr(h.make_profile("sample", {name: choice}), name) == choice


@pytest.mark.parametrize("name, value", [
    ("text_epochs", 0), ("text_batch", -4), ("image_lr", 0.0), ("dropout", -0.1), ("grid", 0)])
def test_size_or_rate_that_is_not_positive_is_refused(name, value):
    message = refused("sample", "90-10", 0, **{name: value})
    assert name in message and repr(value) in message


@pytest.mark.parametrize("name, value", [("text_lr", float("nan")), ("image_lr", float("inf")), ("dropout", 1.5)])
def test_number_that_no_run_can_use_is_refused(name, value):
    assert name in refused("sample", "90-10", 0, **{name: value})


def test_a_profiles_name_is_no_setting():
    """It names the folder under runs/, so it must stay one of the profiles."""
    assert "name" in refused("sample", "90-10", 0, name="../elsewhere")


def test_no_dropout_is_allowed():
    assert h.make_profile("paper", {"dropout": 0.0}).dropout == 0


def test_settings_replace_only_what_they_name():
    changed = dataclasses.asdict(h.make_profile("paper", {"text_epochs": 3}))
    assert changed.pop("text_epochs") == 3
    assert changed.items() <= dataclasses.asdict(h.PROFILES["paper"]).items()
    assert h.PROFILES["paper"].text_epochs == 10  # the profile itself is not touched


def test_paper_profile_is_the_papers_size():
    paper = h.make_profile("paper")
    assert (paper.text_width, paper.max_length, paper.text_batch) == (768, 256, 32)
    assert (paper.text_epochs, paper.text_lr) == (10, 2e-5)
    assert (paper.image_size, paper.region_size, paper.grid) == (224, 224, 16)
    assert (paper.image_epochs, paper.image_batch, paper.image_lr) == (20, 32, 1e-3)


def test_each_profile_split_and_seed_has_its_own_folder():
    folders = {h.open_run(profile, split, seed, {"rows": rows}).folder
               for profile in h.PROFILES for split in h.SPLITS for seed in (0, 1) for rows in h.CHOICES["rows"]}
    assert len(folders) == 16


def test_runs_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "elsewhere"))
    folder = h.open_run("paper", "80-20", 7).folder
    assert folder == tmp_path / "elsewhere" / "paper" / "described" / "80-20" / "seed7"
