"""A run that is killed and resumed is bit-identical to an uninterrupted run."""

import io
import json
import os
import threading
from contextlib import suppress

import pytest
import torch
from training_tools import assert_same

from src.artifacts.io import read_checkpoint, write_checkpoint, write_json
from src.errors import FileError
from src.training import RunFiles, run_training

KILLED = 99
DESCRIPTION = {"format": "network-1", "model": "tiny"}
RATES = {"sgd": 0.05, "adam": 0.003, "adamw": 0.003, "sam": 0.05, "iblr": 0.05}


class KilledError(Exception):
    pass


def run(trainer, folder, **kwargs):
    files = RunFiles(folder / "ckpts", folder / "resume")
    settings = {**trainer.config.as_dict()}
    run_training(trainer, files, settings, DESCRIPTION, **kwargs)
    return files


def kill_at(step):
    def after(trainer, epoch, now):
        if now == step:
            raise KilledError

    return (after,)


@pytest.mark.parametrize("optimizer", RATES)
def test_resumed_run_is_bit_identical(make_trainer, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "learning_rate": RATES[optimizer]}
    whole = make_trainer(**settings)
    run(whole, tmp_path / "whole")
    for step in (10, 13):  # in the third epoch, then in the fourth
        with pytest.raises(KilledError):
            run(make_trainer(after_step=kill_at(step), **settings), tmp_path / "killed", resume=True)
    resumed = make_trainer(**settings)
    files = run(resumed, tmp_path / "killed", resume=True)
    assert_same(whole, resumed)
    assert len(resumed.history) == 4
    first, second = (read_checkpoint(f / "ckpts" / "last.pt") for f in (tmp_path / "whole", tmp_path / "killed"))
    for name, value in first["model_state"].items():
        assert torch.equal(value, second["model_state"][name])
    assert files.states() == [4, 3]
    assert json.loads(files.results.read_text())["finished"]


@pytest.mark.parametrize(("first", "then"), [("ivon-opt", "own"), ("own", "ivon-opt")])
def test_a_run_of_one_iblr_backend_is_continued_by_the_other(make_trainer, tmp_path, first, then):
    """A result's settings do not name the backend, as in an older version that had only ivon-opt."""
    settings = {"optimizer": "iblr", "learning_rate": RATES["iblr"]}
    whole = make_trainer(**settings)
    run(whole, tmp_path / "whole")
    with pytest.raises(KilledError):
        run(make_trainer(after_step=kill_at(10), iblr_backend=first, **settings), tmp_path / "killed")
    resumed = make_trainer(iblr_backend=then, **settings)
    files = run(resumed, tmp_path / "killed", resume=True)
    for ours, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    results = json.loads(files.results.read_text())
    assert "iblr_backend" not in results["settings"]
    assert results["machine"]["iblr_backend"] == then


@pytest.mark.parametrize("damage", ["truncated", "foreign", "row"])
def test_a_damaged_state_is_named_and_the_one_before_is_used(make_trainer, tmp_path, caplog, damage):
    whole = make_trainer()
    files = run(whole, tmp_path)
    newest = files.state(4)
    if damage == "truncated":
        newest.write_bytes(newest.read_bytes()[:500])
    elif damage == "foreign":
        torch.save({"epoch": 4}, newest)
    else:
        newest = files.row(4)
        newest.write_bytes(b"")
    again = make_trainer()
    run(again, tmp_path, resume=True)
    assert_same(whole, again)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert "using the previous state" in lines[0]


def test_resume_under_other_settings_is_refused_by_name(make_trainer, tmp_path):
    run(make_trainer(), tmp_path)
    with pytest.raises(FileError, match=r"made with different settings: learning_rate \(0.05 vs. 0.1"):
        run(make_trainer(learning_rate=0.1), tmp_path, resume=True)


def test_overwriting_replaces_a_state_of_other_settings(make_trainer, tmp_path):
    run(make_trainer(), tmp_path)
    other = make_trainer(learning_rate=0.1)
    run(other, tmp_path, resume=True, overwrite=True)
    whole = make_trainer(learning_rate=0.1)
    whole.fit()
    assert_same(whole, other)


def test_more_epochs_only_where_the_schedule_allows_it(make_trainer, tmp_path):
    run(make_trainer(lr_sched="const", epochs=2), tmp_path / "const")
    longer = make_trainer(lr_sched="const", epochs=4)
    run(longer, tmp_path / "const", resume=True)
    whole = make_trainer(lr_sched="const", epochs=4)
    whole.fit()
    assert_same(whole, longer)
    run(make_trainer(lr_sched="cosine", epochs=2), tmp_path / "cosine")
    with pytest.raises(FileError, match=r"different settings: epochs \(2 vs. 4\)"):
        run(make_trainer(lr_sched="cosine", epochs=4), tmp_path / "cosine", resume=True)
    with pytest.raises(FileError, match=r"different settings: epochs \(4 vs. 3\)"):
        run(make_trainer(lr_sched="const", epochs=3), tmp_path / "const", resume=True)


def test_results_of_other_settings_are_kept_unless_overwritten(make_trainer, tmp_path):
    files = run(make_trainer(epochs=4), tmp_path)
    with pytest.raises(FileError, match=r"was made with different settings: epochs \(4 vs. 2\)"):
        run(make_trainer(epochs=2), tmp_path)
    assert (files.epoch(4)).exists()
    run(make_trainer(epochs=2), tmp_path, overwrite=True)
    assert not files.epoch(4).exists(), "a checkpoint of the old settings must not stay among the new"
    assert files.states() == [2, 1]


def test_save_epochs(make_trainer, tmp_path):
    kept = {"all": [1, 2, 3, 4], "last": [], "list": [2, 3]}
    for name, epochs in kept.items():
        files = run(make_trainer(), tmp_path / name, save_epochs=[2, 3] if name == "list" else name)
        assert sorted(int(p.stem[6:]) for p in files.checkpoints.glob("epoch_*.pt")) == epochs
        assert (files.checkpoints / "last.pt").exists()
        best = read_checkpoint(files.checkpoints / "best.pt")
        history = json.loads(files.results.read_text())["history"]
        accuracies = [record["test_accuracy"] for record in history]
        assert best["epoch"] == 1 + accuracies.index(max(accuracies))


def test_a_kill_between_state_and_checkpoints_is_mended(make_trainer, tmp_path):
    files = run(make_trainer(), tmp_path)
    for path in files.checkpoints.glob("*.pt"):
        if path.name in ("last.pt", "epoch_4.pt"):
            path.unlink()
    run(make_trainer(), tmp_path, resume=True)
    assert files.epoch(4).exists()
    assert (files.checkpoints / "last.pt").exists()


def test_a_run_that_starts_anew_is_not_resumed_from_the_states_it_replaces(make_trainer, tmp_path):
    run(make_trainer(), tmp_path)
    with pytest.raises(KilledError):
        run(make_trainer(after_step=kill_at(10)), tmp_path)  # in the third epoch
    assert RunFiles(tmp_path / "ckpts", tmp_path / "resume").states() == [2, 1]


def test_states_of_other_settings_are_not_replaced_when_checkpoints_are_elsewhere(make_trainer, tmp_path):
    files = run(make_trainer(), tmp_path)
    elsewhere = RunFiles(tmp_path / "other", files.resume)
    trainer = make_trainer(learning_rate=0.01)
    with pytest.raises(FileError, match="learning_rate"):
        run_training(trainer, elsewhere, trainer.config.as_dict(), DESCRIPTION)
    assert files.states() == [4, 3]
    run_training(trainer, elsewhere, trainer.config.as_dict(), DESCRIPTION, overwrite=True)
    assert read_checkpoint(files.state(4))["settings"]["learning_rate"] == 0.01


def test_without_results_a_start_goes_by_the_newest_readable_state(make_trainer, tmp_path):
    files = run(make_trainer(), tmp_path)
    files.state(4).write_bytes(b"damaged")
    files.results.unlink()
    with pytest.raises(FileError, match="learning_rate"):
        run(make_trainer(learning_rate=0.1), tmp_path)
    for overwrite in (False, True):
        with pytest.raises(KilledError):
            run(make_trainer(after_step=kill_at(1)), tmp_path, overwrite=overwrite)
        assert files.states() == [4, 3]
        assert files.epoch(4).exists(), "what was made with the same settings is not removed"
        files.results.unlink()
    files.state(3).write_bytes(b"damaged")
    run(make_trainer(), tmp_path)


def test_overwriting_removes_nothing_where_no_settings_were_read(make_trainer, tmp_path):
    checkpoint = RunFiles(tmp_path / "ckpts", tmp_path / "resume").epoch(9)
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"of another run")
    run(make_trainer(), tmp_path, overwrite=True)
    assert checkpoint.exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"history": "none"},
        {"history": [{"epoch": 1, "seconds": 1.0}]},
        {"history": [{"epoch": 2, "seconds": 1.0, "test_accuracy": 0.5}]},
        {"history": [{"epoch": 1, "seconds": "1", "test_accuracy": 0.5}]},
        {"best_test_accuracy": "0.5"},
        {"seconds": [1.0]},
    ],
)
def test_damaged_results_are_named(tmp_path, damage):
    files = RunFiles(tmp_path, tmp_path / "resume")
    results = {"settings": {}, "history": [{"epoch": 1, "seconds": 1.0, "test_accuracy": 0.5}]}
    write_json(files.results, results)
    assert files.read_results() == results
    write_json(files.results, {**results, **damage})
    with pytest.raises(FileError, match="is damaged"):
        files.read_results()


def test_an_epoch_is_one_file_under_all_its_names(make_trainer, tmp_path):
    files = run(make_trainer(), tmp_path)
    last = files.checkpoints / "last.pt"
    assert os.path.samefile(files.epoch(4), last)
    assert os.path.samefile(files.weights(4), last)
    best = files.checkpoints / "best.pt"
    assert os.path.samefile(best, files.epoch(read_checkpoint(best)["epoch"]))
    assert sorted(path.name for path in files.resume.glob("weights*")) == ["weights_epoch=3.pt", "weights_epoch=4.pt"]


def test_without_hard_links_an_epoch_is_copied(make_trainer, tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    files = run(make_trainer(), tmp_path)
    last = files.checkpoints / "last.pt"
    assert last.read_bytes() == files.epoch(4).read_bytes() == files.weights(4).read_bytes()
    assert not os.path.samefile(files.weights(4), last)


def test_removed_checkpoints_do_not_hinder_a_resume(make_trainer, tmp_path):
    whole = make_trainer()
    whole.fit()
    with pytest.raises(KilledError):
        run(make_trainer(after_step=kill_at(10)), tmp_path)
    for path in (tmp_path / "ckpts").glob("*.pt"):
        path.unlink()
    resumed = make_trainer()
    run(resumed, tmp_path, resume=True)
    assert_same(whole, resumed)


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another epoch"])
def test_weights_that_a_state_does_not_refer_to_are_not_used(make_trainer, tmp_path, caplog, damage):
    whole = make_trainer()
    files = run(whole, tmp_path)
    path, content = files.weights(4), files.weights(4).read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:500] if damage == "truncated" else files.weights(3).read_bytes())
    again = make_trainer()
    run(again, tmp_path, resume=True)
    assert_same(whole, again)
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(path) in line
    assert "using the previous state" in line


def test_a_state_of_an_earlier_version_is_continued(make_trainer, tmp_path):
    whole = make_trainer()
    whole.fit()
    with pytest.raises(KilledError):
        run(make_trainer(after_step=kill_at(10)), tmp_path)  # in the third epoch
    files = RunFiles(tmp_path / "ckpts", tmp_path / "resume")
    state = files.read_state(2)
    del state["weights"]
    write_checkpoint(files.state(2), {**state, "format": "resume-1"})
    for path in (*files.resume.glob("weights*"), files.epoch(2)):
        path.unlink()
    resumed = make_trainer()
    run(resumed, tmp_path, resume=True)
    assert_same(whole, resumed)
    assert read_checkpoint(files.epoch(2))["epoch"] == 2


def test_a_write_that_fails_ends_the_run_after_the_next_epoch(make_trainer, tmp_path, monkeypatch):
    written = []

    def full(path, state):
        assert threading.current_thread() is not threading.main_thread()
        written.append(path)
        raise FileError(f"{path}: could not be written (No space left on device)")

    monkeypatch.setattr("src.training.run.write_checkpoint", full)
    trainer = make_trainer()
    with pytest.raises(FileError, match="No space left"):
        run(trainer, tmp_path)
    assert len(written) == 1
    assert trainer.epoch == 2
    assert not list(tmp_path.rglob("*.pt"))


def test_what_is_written_is_the_epoch_that_was_saved(make_trainer, tmp_path, monkeypatch):
    """Writing an epoch is delayed until the next one has been trained."""
    trained = threading.Event()

    def late(path, state):
        assert trained.wait(60)
        return write_checkpoint(path, state)

    def after(trainer, epoch, step):
        if epoch == 2 and step == 8:
            trained.set()

    monkeypatch.setattr("src.training.run.write_checkpoint", late)
    files = run(make_trainer(after_step=(after,)), tmp_path / "late")
    monkeypatch.undo()
    plain = run(make_trainer(), tmp_path / "plain")
    one, two = (read_checkpoint(each.epoch(1))["model_state"] for each in (files, plain))
    assert all(torch.equal(one[name], value) for name, value in two.items())


@pytest.mark.parametrize(
    "killed_in", ["weights of epoch 1", "state of epoch 1", "weights of epoch 3", "state of epoch 3"]
)
def test_a_run_that_is_killed_in_the_middle_of_a_file_is_continued(make_trainer, tmp_path, monkeypatch, killed_in):
    """The process dies in the background thread after writing half of a file."""
    whole = make_trainer()
    files = run(whole, tmp_path / "whole")
    child = os.fork()
    if not child:
        saved, save = [], torch.save

        def half(state, file):
            saved.append(f"{'weights' if 'model_state' in state else 'state'} of epoch {state['epoch']}")
            if saved[-1] == killed_in:
                assert threading.current_thread() is not threading.main_thread()
                content = io.BytesIO()
                save(state, content)
                file.write(content.getvalue()[: content.tell() // 2])
                file.flush()
                os._exit(KILLED)
            save(state, file)

        monkeypatch.setattr(torch, "save", half)
        with suppress(BaseException):
            run(make_trainer(), tmp_path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    (part,) = (tmp_path / "resume").glob(".*.part")
    assert part.stat().st_size
    again = make_trainer()
    run(again, tmp_path, resume=True)
    assert_same(whole, again)
    assert not list(tmp_path.rglob("*.part"))
    for name in ("epoch_1.pt", "epoch_3.pt", "best.pt", "last.pt"):
        assert (tmp_path / "ckpts" / name).read_bytes() == (files.checkpoints / name).read_bytes()
