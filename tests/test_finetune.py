"""Fine-tuning: learns, keeps the best epoch, repeats itself, goes on after a kill where it was."""
import os
import signal
import struct
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from tensorboardX.proto import event_pb2
from torch.utils.data import default_collate
from transformers import TrainerState, set_seed

import elsewhere
import helpers as h
from engine.checkpoints import last_checkpoint, seal_checkpoint
from engine.files import read_json, write_json
from engine.processes import processes_for
from engine.runs import runs_folder
from engine.settings import make_profile
from engine.stages import UNTIL_WHOLE
from engine.training import (
    EpochSampler,
    RowDataset,
    StudyCallback,
    learning_curve,
    memory_explained,
    rows_at_a_time,
    training_arguments,
)
from engine.vectors import encode, encode_rows

CLASSES = 3
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Identity(torch.nn.Module):
    """An encoder that learns one scale: its vectors are its inputs."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.modes = set()

    def forward(self, points):
        self.modes.add(self.training)
        return points * self.scale


def cloud(n: int, seed: int, noise: float) -> RowDataset:
    """Points around three corners, labelled by their corner."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    points = np.eye(4)[labels] * 3 + noise * rng.normal(size=(n, 4))
    points = torch.tensor(points, dtype=torch.float32)
    return RowDataset(lambda i: {"points": points[i]}, labels)


def train(folder: Path, seed: int = 0, epochs: int = 4, noise: float = 0.5, lr: float = 0.1,
          keep: bool = False, **settings):
    """(the model, its curve, the validation rows) of a small separable problem."""
    set_seed(seed)
    model, val = h.Classifier(Identity(), 4, CLASSES), cloud(40, 2, noise)
    curve = h.finetune(
        model, cloud(64, 1, noise), val, folder, make_profile("sample", settings),
        collate=default_collate, epochs=epochs, batch=8, lr=lr, weight_decay=0.01, seed=seed)
    if not keep:
        for file in UNTIL_WHOLE:  # as `stage` does
            (folder / file).unlink()
    return model, curve, val


def val_scores(model, val) -> tuple[float, float]:
    """(macro-F1, loss) of the model on the validation rows, without the Trainer."""
    model.eval()
    rows = [val[i] for i in range(len(val))]
    with torch.no_grad():
        logits = model(points=torch.stack([row["points"] for row in rows]))["logits"]
    truth = torch.tensor([row["labels"] for row in rows])
    loss = torch.nn.functional.cross_entropy(logits, truth).item()
    return f1_score(truth, logits.argmax(-1), average="macro"), loss


def test_loss_falls_and_the_curve_has_one_row_an_epoch(tmp_path):
    model, curve, _ = train(tmp_path)
    assert list(curve) == ["epoch", "train_loss", "val_loss", "val_accuracy", "val_macro_f1"]
    assert curve["epoch"].tolist() == [1, 2, 3, 4]
    assert curve["train_loss"].iloc[-1] < 0.5 * curve["train_loss"].iloc[0]
    assert curve["val_loss"].iloc[-1] < curve["val_loss"].iloc[0]
    assert curve["val_macro_f1"].max() > 0.9
    assert model.encoder.modes == {True, False}  # train mode to learn, eval mode to score
    assert [path.name for path in tmp_path.iterdir()] == ["curve.csv"]  # no checkpoints left


def test_report_to_logs_the_curve_while_it_trains_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "runs"))
    folder = tmp_path / "camembert_title-0123.partial"
    folder.mkdir()
    curve = train(folder, epochs=3, report_to="tensorboard")[1]
    assert [path.name for path in folder.iterdir()] == ["curve.csv"]
    (log,) = (tmp_path / "runs" / "logs" / "camembert_title-0123").iterdir()
    logged = scalars(log)
    for name, column in (("train/loss", "train_loss"), ("eval/macro_f1", "val_macro_f1"),
                         ("eval/cross_entropy", "val_loss")):
        assert logged[name] == pytest.approx(curve[column].tolist(), rel=1e-3), name
    (tmp_path / "silent").mkdir()
    assert_frame_equal(train(tmp_path / "silent", epochs=3)[1], curve)
    assert len(list((tmp_path / "runs" / "logs").iterdir())) == 1  # off by default


def scalars(log: Path) -> dict[str, list[float]]:
    """{name: its values in order} of a file of TensorBoard's events."""
    found, raw = {}, log.read_bytes()
    while raw:  # length, its checksum, an event, its checksum
        (length,) = struct.unpack("<Q", raw[:8])
        event = event_pb2.Event.FromString(raw[12:12 + length])
        raw = raw[12 + length + 4:]
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append(value.simple_value)
    return found


def test_model_that_is_left_is_the_best_epochs(tmp_path):
    # Noisy and restless: the last epoch is not the best.
    model, curve, val = train(tmp_path, noise=2.5, lr=1.5, epochs=6)
    best = curve.loc[curve["val_macro_f1"].idxmax()]
    assert best["val_macro_f1"] > curve["val_macro_f1"].iloc[-1]
    kept = (best["val_macro_f1"], best["val_loss"])
    assert val_scores(model, val) == pytest.approx(kept, rel=1e-5)
    assert h.curve_metrics(curve) == {
        "best_epoch": best["epoch"], "val_accuracy": best["val_accuracy"],
        "val_macro_f1": best["val_macro_f1"]}


@pytest.mark.slow
def test_same_seed_same_numbers_other_seed_others(tmp_path):
    (first, a, _), (second, b, _), (_, other, _) = (
        train(tmp_path, seed=seed) for seed in (1, 1, 2))
    assert_frame_equal(a, b, rtol=1e-6)
    for name, weight in first.state_dict().items():
        assert torch.allclose(weight, second.state_dict()[name], rtol=1e-6), name
    assert not np.allclose(a["train_loss"], other["train_loss"], rtol=1e-3)


def test_first_step_is_adamws(tmp_path):
    """AdamW's first step is lr * sign(gradient): the rate shows in the weights, not the loss."""
    model = h.Classifier(Identity(), 4, CLASSES, dropout=0.0)
    torch.nn.init.zeros_(model.head.weight)
    before = model.head.weight.detach().clone()
    rows = cloud(8, 1, 0.5)
    h.finetune(model, rows, rows, tmp_path, make_profile("sample"), collate=default_collate,
               epochs=1, batch=8, lr=0.01, weight_decay=0.0, seed=0)
    step = (model.head.weight - before).abs()
    assert torch.allclose(step, torch.full((CLASSES, 4), 0.01), rtol=1e-3)


def test_classifier_gives_logits_and_with_labels_the_cross_entropy():
    model = h.Classifier(Identity(), 4, CLASSES).eval()
    points, labels = torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    out = model(points=points, labels=labels)
    by_hand = points @ model.head.weight.T + model.head.bias
    assert torch.allclose(out["logits"], by_hand, atol=1e-6)
    assert "loss" not in model(points=points)
    expected = -torch.log_softmax(by_hand, 1)[range(5), labels].mean()
    assert out["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


class Flat(Identity):
    """A picture's pixels as its vector."""

    def forward(self, pixels):
        return super().forward(pixels.flatten(1))


def test_encode_freezes_the_encoder():
    encoder, profile = Flat().train(), make_profile("sample", {"image_size": 2, "image_batch": 2})
    vectors = h.whole_vectors(encoder, profile, lambda side: np.ones((3, 1, side, side), np.uint8))
    assert encoder.modes == {False} and not encoder.training
    assert vectors.tolist() == [[1.0] * 4] * 3 and not vectors.requires_grad
    assert not encode(encoder, {"pixels": torch.ones(2, 4)}).requires_grad


# --- batches --------------------------------------------------------------------------------------
def test_an_epoch_holds_every_row_in_whole_batches_and_seed_and_epoch_decide_the_order():
    sampler = EpochSampler(rows=21, batch=8, seed=3)
    first, again = list(sampler), list(sampler)
    assert first == again and len(first) == len(sampler) == 24
    assert sorted(first[:21]) == [(0, row) for row in range(21)] and first[21:] == first[:3]
    sampler.epoch = 1
    second = list(sampler)  # draws name their epoch, so that each is augmented differently
    assert sorted(second[:21]) == [(1, row) for row in range(21)]
    assert rows_of(second) != rows_of(first)
    assert list(EpochSampler(rows=21, batch=8, seed=4)) != first


def rows_of(draws: list[tuple[int, int]]) -> list[int]:
    return [row for _, row in draws]


def test_batches_hold_rows_of_similar_length():
    lengths = np.random.default_rng(0).integers(5, 200, 400).tolist()

    def padded(sampler: EpochSampler) -> float:
        batches = np.array(lengths)[rows_of(list(sampler))].reshape(-1, 8)
        return batches.max(1).sum() * 8 / batches.sum()

    assert padded(EpochSampler(400, 8, 0, lengths)) < 1.1 < 1.5 < padded(EpochSampler(400, 8, 0))


def test_a_rows_draw_leaves_all_generators_as_they_are(monkeypatch):
    """A GPU's too, which decides the dropout of the step that the row is for."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    RowDataset(lambda i: {"noise": torch.rand(3)}, [0], seed=5)[(0, 0)]
    assert not seeded and torch.equal(torch.get_rng_state(), before)


def test_a_draw_decides_what_is_random_in_a_row():
    rows = RowDataset(lambda i: {"noise": torch.rand(3)}, [0, 1, 2], seed=5)
    first, again, later = (rows[draw]["noise"] for draw in ((0, 1), (0, 1), (1, 1)))
    assert torch.equal(first, again) and rows[1, 1]["labels"] == 1
    assert torch.equal(rows[1]["noise"], first)  # a row alone is of epoch 0
    assert not torch.equal(first, later)  # the same row, one epoch later
    other = RowDataset(rows.row, [0, 1, 2], seed=6)
    assert not torch.equal(other[1, 1]["noise"], later)
    torch.manual_seed(0)
    rows[1, 1]
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1))  # and what comes after is not disturbed


class Narrow(Identity):
    """An encoder on a device whose memory holds `room` rows at a time."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.batches = room, []

    def forward(self, points):
        if self.training:
            self.batches.append(len(points))
        if self.training and len(points) > self.room:
            raise RuntimeError(OUT_OF_MEMORY)
        return super().forward(points)


def train_exactly(folder: Path, encoder: torch.nn.Module, **settings):
    """A short training in which nothing is random but the order of the rows."""
    torch.manual_seed(0)
    model = h.Classifier(encoder, 4, CLASSES, dropout=0.0)
    curve = h.finetune(
        model, cloud(64, 1, 1.0), cloud(40, 2, 1.0), folder, make_profile("sample", settings),
        collate=default_collate, epochs=3, batch=8, lr=0.05, weight_decay=0.01, seed=0)
    for file in UNTIL_WHOLE:
        (folder / file).unlink()
    return model, curve


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(the model, its curve) of that training, with no setting changed."""
    return train_exactly(tmp_path_factory.mktemp("plain"), Identity())


@pytest.mark.slow
def test_fewer_rows_at_a_time_give_the_same_training(plain, tmp_path):
    whole, curve = plain
    parts, same = train_exactly(tmp_path, Identity(), device_batch=2)
    assert_frame_equal(curve, same, rtol=1e-5)
    assert torch.allclose(whole.head.weight, parts.head.weight, atol=1e-5)


@pytest.mark.slow
def test_out_of_memory_halves_the_rows_at_a_time_and_nothing_else(plain, tmp_path):
    _, curve = plain
    narrow, narrow_curve = train_exactly(tmp_path, Narrow(room=3))
    assert narrow.encoder.batches[:3] == [8, 4, 2] and set(narrow.encoder.batches[2:]) == {2}
    assert_frame_equal(curve, narrow_curve, rtol=1e-5)
    with pytest.raises(ValueError, match="out of memory with 1 row.s. on a device at a time; set a "
                                         "smaller max_length"):
        train_exactly(tmp_path, Narrow(room=0))


@pytest.mark.slow
@pytest.mark.parametrize("settings, tolerance", [
    ({"compile": "eager"}, 1e-5), ({"precision": "bf16"}, 3e-2), ({"loader_workers": 2}, 1e-6),
    ({"checkpoint_steps": 3}, 1e-6)])
def test_a_way_of_computing_changes_no_more_than_rounding(plain, tmp_path, settings, tolerance):
    _, curve = plain
    _, other = train_exactly(tmp_path, Identity(), **settings)
    losses = ["train_loss", "val_loss"]
    assert_frame_equal(curve[losses], other[losses], rtol=tolerance)
    assert (curve["val_loss"] != other["val_loss"]).any() == ("precision" in settings)


@pytest.mark.slow
def test_early_stopping_waits_for_its_patience(tmp_path):
    _, curve, _ = train(tmp_path, noise=2.5, lr=1.5, epochs=12, early_stopping=2)
    best = curve["val_macro_f1"].idxmax()
    assert len(curve) == best + 1 + 2 < 12


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_early_stopping_has_waited_as_long_after_a_stop(tmp_path, monkeypatch, seed):
    how = {"noise": 2.5, "lr": 1.5, "epochs": 12, "early_stopping": 2, "seed": seed}
    _, whole, _ = train(tmp_path, **how)
    begin = StudyCallback.on_epoch_begin

    def stop(self, args, state, control, **more):
        if state.global_step == 8 * (len(whole) - 1):  # as its last epoch begins
            raise Killed
        begin(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StudyCallback, "on_epoch_begin", stop)
        train(tmp_path, **how)
    assert_frame_equal(train(tmp_path, **how)[1], whole, rtol=1e-6)


@pytest.mark.slow
def test_a_training_that_stopped_early_is_over_after_a_stop_too(tmp_path, monkeypatch):
    how = {"noise": 2.5, "lr": 1.5, "epochs": 12, "early_stopping": 2, "seed": 0}
    model, whole, _ = train(tmp_path / "whole", **how)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StudyCallback, "on_train_end", stop_now)  # its last checkpoint is whole
        train(tmp_path / "stopped", **how)
    steps = steps_at("on_step_end", monkeypatch)
    again, curve, _ = train(tmp_path / "stopped", **how)
    assert steps == [] and len(curve) < 12
    assert_frame_equal(curve, whole)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def stop_now(*args: object, **more: object) -> None:
    raise Killed


def test_batch_that_fits_no_memory_is_encoded_by_halves():
    class Full(Identity):
        def forward(self, points):
            if len(points) > 3:
                raise RuntimeError(OUT_OF_MEMORY)
            return super().forward(points)

    points = torch.rand(11, 4)
    halves, whole = (encode(encoder.eval(), {"points": points}) for encoder in (Full(), Identity()))
    assert torch.equal(halves, whole)

    class Broken(Identity):
        def forward(self, points):
            raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        encode(Broken(), {"points": points})


def test_rows_at_a_time_are_divisors_of_a_processs_share(monkeypatch):
    assert rows_at_a_time(12, 0) == [12, 6, 4, 3, 2, 1]
    assert rows_at_a_time(12, 5) == [4, 3, 2, 1]
    monkeypatch.setattr("engine.training.group", lambda: SimpleNamespace(num_processes=3))
    assert rows_at_a_time(12, 0) == [4, 2, 1]
    with pytest.raises(ValueError, match="a batch of 8 rows cannot be shared by 3 processes alike"):
        rows_at_a_time(8, 0)


def test_out_of_memory_in_one_of_several_processes_ends_it_with_the_remedy(monkeypatch):
    monkeypatch.setattr("engine.training.group", lambda: SimpleNamespace(num_processes=2))
    remedy = "out of memory with 8 row.s. on a device at a time; set device_batch=4 or"
    with pytest.raises(ValueError, match=remedy), memory_explained(8):
        raise RuntimeError(OUT_OF_MEMORY)
    with pytest.raises(RuntimeError, match="shapes"), memory_explained(8):
        raise RuntimeError("shapes differ")


def test_processes_are_as_many_gpus_as_can_share_the_batches(monkeypatch):
    for gpus, expected in ((0, 1), (1, 1), (2, 2), (3, 2), (8, 8), (12, 8)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert processes_for(make_profile("paper")) == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="processes=4, but this machine has 2 GPU"):
        processes_for(make_profile("paper", {"processes": 4}))


def test_one_process_never_spreads_a_batch_over_several_gpus(tmp_path):
    arguments = training_arguments(make_profile("sample"), tmp_path, 8, 4)
    assert arguments.n_gpu <= 1
    assert arguments.train_batch_size == arguments.per_device_train_batch_size == 4
    assert arguments.gradient_accumulation_steps == 2


def test_a_process_without_rows_of_its_own_gets_the_vectors_too(monkeypatch):
    """Two processes, one group of rows: what the second computes does not count, and it is sent
    the first one's.
    """
    rows, found = torch.arange(12.0).reshape(3, 4), []
    monkeypatch.setattr("engine.vectors.reduce", lambda x, how: found.append((x, how)) or x)
    for index in (0, 1):
        monkeypatch.setattr("engine.vectors.group", lambda index=index: SimpleNamespace(
            num_processes=2, process_index=index))
        encode_rows(Identity(), [2, 0, 1], lambda places: {"points": rows[places]}, 3,
                    torch.float32, "test")
    (first, how), (second, _) = found
    assert how == "sum" and torch.equal(first, rows) and second.abs().sum() == 0


def test_vectors_come_back_in_the_order_of_rows_whatever_order_they_are_taken_in():
    rows, batches = torch.arange(20.0).reshape(5, 4), []

    def inputs(places):
        batches.append(list(places))
        return {"points": rows[places]}

    found = encode_rows(Identity(), [4, 0, 3, 1, 2], inputs, 2, torch.float32, "test")
    assert torch.equal(found, rows) and batches == [[4, 0], [3, 1], [2]]


def test_head_of_a_frozen_encoder_is_a_logistic_regression():
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 4, 300)) * 2  # classes 0, 2, 4, 6: others have no row
    features = np.eye(8)[labels] * 3 + rng.normal(size=(300, 8))
    features = torch.tensor(features, dtype=torch.float32) * 5 + 2
    parts, head = np.array(["train", "val", "train"] * 100), torch.nn.Linear(8, 9)
    curve = h.fit_head(head, features, labels, parts)
    train_rows = features[parts == "train"]

    def scaled(x: torch.Tensor) -> np.ndarray:
        return ((x - train_rows.mean(0)) / train_rows.std(0)).numpy()

    reference = LogisticRegression(max_iter=300)
    reference.fit(scaled(train_rows), labels[parts == "train"])
    probabilities = torch.softmax(head(features), -1).detach().numpy()
    expected = reference.predict_proba(scaled(features))
    assert np.allclose(probabilities[:, reference.classes_], expected, atol=1e-4)
    assert probabilities[:, [1, 3, 5, 7, 8]].max() < 1e-6
    guess, truth = reference.predict(scaled(features[parts == "val"])), labels[parts == "val"]
    assert curve["epoch"].tolist() == [0]
    assert curve["val_accuracy"].item() == pytest.approx((guess == truth.numpy()).mean())


# --- after a kill ---------------------------------------------------------------------------------
EPOCHS = {"text_epochs": 4, "text_batch": 4, "checkpoint_steps": 3}
STEPS = 11  # an epoch: 44 rows in batches of 4


def partials() -> list[Path]:
    return list((runs_folder() / "stages").glob("*.partial"))


def checkpoint_within_an_epoch() -> bool:
    """Whether a checkpoint of an epoch's middle, not of the first, is whole."""
    sealed = (runs_folder() / "stages").glob("*.partial/checkpoints/checkpoint-*/hashes.json")
    steps = [int(path.parent.name.partition("-")[2]) for path in sealed]
    return any(step > STEPS and step % STEPS for step in steps)


def kill_within_an_epoch(run) -> None:
    """Make the stage in a process of its own, and kill that once such a checkpoint is whole."""
    process = elsewhere.start(h.stage, run, "camembert_title")
    elsewhere.wait_for(checkpoint_within_an_epoch, process)
    process.kill()
    assert elsewhere.ended(process) == -signal.SIGKILL and len(partials()) == 1


@pytest.fixture
def prepared(make_run):
    """A run whose text is there, for the stage that is going to be killed."""
    run = make_run(**EPOCHS)
    h.stage(run, "splits")
    h.stage(run, "text")
    return run


def features_of(run) -> tuple[torch.Tensor, pd.DataFrame]:
    folder = h.read_stage(run, "camembert_title")
    ids = h.read_split(run)["product_id"]
    features = h.load_tensors(folder / "features.safetensors", ids)["features"]
    return features, pd.read_csv(folder / "curve.csv")


def steps_at(moment: str, monkeypatch) -> list[int]:
    """A list that gets the number of the step at each such moment of a training from now on."""
    steps, call = [], getattr(StudyCallback, moment)

    def note(self, args, state, control, **more):
        steps.append(state.global_step)
        call(self, args, state, control, **more)

    monkeypatch.setattr(StudyCallback, moment, note)
    return steps


@pytest.mark.slow
def test_stage_killed_within_an_epoch_ends_where_an_uninterrupted_one_does(prepared, tmp_path,
                                                                           monkeypatch):
    kill_within_an_epoch(prepared)
    steps = steps_at("on_step_end", monkeypatch)
    folder = h.stage(prepared, "camembert_title")
    resumed, curve = features_of(prepared)
    assert steps[0] > STEPS and steps[0] % STEPS != 1  # it goes on within an epoch
    assert steps[-1] == 4 * STEPS and curve["epoch"].tolist() == [1, 2, 3, 4]
    assert not partials() and not list(folder.rglob("checkpoints"))

    monkeypatch.setenv("STUDY_RUNS", str(tmp_path / "uninterrupted"))
    steps.clear()
    for name in ("splits", "text", "camembert_title"):
        h.stage(prepared, name)
    whole, whole_curve = features_of(prepared)
    assert steps[0] == 1
    assert_frame_equal(curve, whole_curve, rtol=1e-6, atol=1e-6)  # training losses too
    assert torch.allclose(resumed, whole, atol=1e-6)


@pytest.mark.slow
def test_checkpoint_cut_off_in_mid_write_does_not_stop_the_study(tmp_path, monkeypatch):
    """The Trainer writes weights first and trainer_state.json last; a kill between them leaves
    only the weights.
    """
    def cut(self, path):
        if path.endswith("checkpoint-16/trainer_state.json"):
            raise Killed
        save(self, path)

    save = TrainerState.save_to_json
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TrainerState, "save_to_json", cut)
        train(tmp_path)
    assert (tmp_path / "checkpoints" / "checkpoint-16").is_dir()
    _, curve, _ = train(tmp_path)
    assert curve["epoch"].tolist() == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pd.DataFrame:
    """The curve of a training that nothing stops."""
    return train(tmp_path_factory.mktemp("whole"))[1]


def stopped_after_three_epochs(folder: Path, monkeypatch) -> Path:
    """The folder of checkpoints of a training that was stopped there."""
    begin = StudyCallback.on_epoch_begin

    def stop(self, args, state, control, **more):
        if state.global_step == 24:
            raise Killed
        begin(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StudyCallback, "on_epoch_begin", stop)
        train(folder)
    return folder / "checkpoints"


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES = {"a bit": flip_a_bit, "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
           "empty": lambda path: os.truncate(path, 0), "missing": Path.unlink}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "scheduler.pt",
                                  "rng_state.pth", "trainer_state.json", "hashes.json"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(
        uninterrupted, tmp_path, monkeypatch, file, damage):
    checkpoints = stopped_after_three_epochs(tmp_path, monkeypatch)
    DAMAGES[damage](checkpoints / "checkpoint-24" / file)
    steps = steps_at("on_train_begin", monkeypatch)
    unsealed = (file, damage) == ("hashes.json", "missing")  # as a stop leaves it: no damage
    said = nullcontext() if unsealed else pytest.warns(
        UserWarning, match="checkpoint-24/.* is damaged: damaged-checkpoint-24 is set aside")
    with said:
        _, curve, _ = train(tmp_path)
    assert steps == [8]  # the best epoch so far and the last one are kept
    assert_frame_equal(curve, uninterrupted, rtol=1e-6)


def test_a_scaler_that_is_left_out_is_no_damage_to_those_who_want_one(tmp_path):
    """A GPU of another precision does without it; a later one in fp16 goes on from there."""
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    write_json(checkpoint / "trainer_state.json", {"best_model_checkpoint": None})
    (checkpoint / "scaler.pt").write_bytes(b"scale")
    seal_checkpoint(checkpoint)
    for half, kept in ((True, True), (False, False), (True, False)):
        assert last_checkpoint(tmp_path, half) == str(checkpoint)
        assert (checkpoint / "scaler.pt").exists() == kept


@pytest.mark.slow
def test_without_the_best_epochs_checkpoint_training_starts_again(uninterrupted, tmp_path,
                                                                  monkeypatch):
    """Else its end would be the last epoch, by a line in the library's log alone."""
    checkpoints = stopped_after_three_epochs(tmp_path, monkeypatch)
    for checkpoint in checkpoints.iterdir():
        state = read_json(checkpoint / "trainer_state.json")
        write_json(checkpoint / "trainer_state.json",
                   {**state, "best_model_checkpoint": str(checkpoints / "checkpoint-8")})
        seal_checkpoint(checkpoint)
    _, curve, _ = train(tmp_path)
    assert_frame_equal(curve, uninterrupted, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_end_of_a_training_is_not_used(tmp_path, damage):
    _, curve, _ = train(tmp_path, keep=True)
    trained = tmp_path / "trained.safetensors"
    whole = trained.read_bytes()
    DAMAGES[damage](trained)
    with pytest.warns(UserWarning, match="trained.safetensors is damaged; the training is done "):
        _, again, _ = train(tmp_path, keep=True)
    assert_frame_equal(again, curve)
    assert trained.read_bytes() == whole


@pytest.mark.slow
@pytest.mark.parametrize("place", ["helpers.text_vectors", "engine.stages.peak_memory_gb"])
def test_stop_after_the_last_epoch_loses_no_training(make_run, monkeypatch, place):
    def stop(*_):
        raise Killed

    run = make_run()
    for name in ("splits", "text"):
        h.stage(run, name)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, stop)
        h.stage(run, "camembert_title")
    (folder,) = partials()
    trained = h.load_file(folder / "trained.safetensors")
    curve = pd.read_csv(folder / "curve.csv")
    monkeypatch.setattr(h, "StudyTrainer", lambda *_, **__: pytest.fail("trained again"))
    h.stage(run, "camembert_title")
    features, again = features_of(run)
    assert_frame_equal(curve, again)
    model, _ = h.load_checkpoint(str(h.read_stage(run, "camembert_title") / "encoder"), 32)
    assert torch.equal(model.embeddings.word_embeddings.weight,
                       trained["encoder.model.embeddings.word_embeddings.weight"])
    assert not list(runs_folder().rglob("trained.*")) and features.std() > 0


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(self, *args, **more):
        self.touch()
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "recipe.json", {"old": 1})
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no room is left for a file in"):
        write_json(tmp_path / "recipe.json", {"new": 2})
    assert read_json(tmp_path / "recipe.json") == {"old": 1}


def test_gradients_are_clipped_at_1_and_the_rate_falls_linearly(tmp_path):
    arguments = training_arguments(make_profile("sample"), tmp_path, 8, 8)
    assert arguments.max_grad_norm == 1.0 and arguments.lr_scheduler_type == "linear"


def test_an_epochs_loss_is_the_mean_of_its_own_steps():
    scores = {"eval_cross_entropy": 1.0, "eval_accuracy": 0.5, "eval_macro_f1": 0.4}
    history = [{"loss": 3.0, "step": 2}, {"loss": 1.0, "step": 4}, {**scores, "step": 4},
               {"loss": 0.5, "step": 8}, {**scores, "step": 8}]
    assert learning_curve(history)["train_loss"].tolist() == [2.0, 0.5]
