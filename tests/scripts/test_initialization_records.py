"""Results of a network whose starting weights changed are not mixed with those of the earlier version."""

import json
from dataclasses import replace

import pytest
from refusals import FILE, refuse
from support import TRAIN, call, folders, succeed, write_blobs

from src.models import MODELS
from src.models.vit import ViT

SHORT = ("--epochs=1", "--batch_size=10", "--lr_sched=const")
MPE = ("datasets", "models", "log", "resume_ckpts", "pickles")


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs") / "blobs.npz", n=20, classes=2)


def results(base):
    (path,) = base.rglob("results.json")
    return path, json.loads(path.read_text())


def test_a_run_of_the_earlier_version_is_another_run(blobs, tmp_path):
    flags = (f"--dataset=npz:{blobs}", "--model=resnet18", *SHORT, *folders(tmp_path, *TRAIN))
    succeed("train_full.py", *flags)
    path, content = results(tmp_path)
    assert content["settings"].pop("initialization") == "default"
    path.write_text(json.dumps(content))
    refuse("train_full.py", *flags, status=FILE, says=("initialization", "--overwrite"))


def test_networks_that_start_as_before_record_nothing_new(blobs, tmp_path):
    succeed("train_full.py", f"--dataset=npz:{blobs}", "--model=resnet8", *SHORT, *folders(tmp_path, *TRAIN))
    assert "initialization" not in results(tmp_path)[1]["settings"]


def test_pre_training_is_kept_apart_from_that_of_the_earlier_version(blobs, tmp_path, monkeypatch):
    flags = (
        f"--dataset=npz:{blobs}", "--model=small_mlp", "--coreset_func=el2n", "--coreset_networks=1",
        "--coreset_pretrain_epochs=1", "--coreset_pretrain_batch_size=10", "--coreset_fraction=0.5",
        *folders(tmp_path, *TRAIN),
    )  # fmt: skip
    succeed("select_coreset.py", *flags, f"--out={tmp_path / 'old.npz'}")
    old, content = results(tmp_path)
    assert "initialization" not in content["settings"]
    monkeypatch.setitem(MODELS, "small_mlp", replace(MODELS["small_mlp"], initialization="default"))
    succeed("select_coreset.py", *flags, f"--out={tmp_path / 'new.npz'}")
    (new,) = set(tmp_path.rglob("results.json")) - {old}
    assert json.loads(new.read_text())["settings"]["initialization"] == "default"


def test_an_experiment_records_it_too(blobs, tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "small_mlp", replace(MODELS["small_mlp"], initialization="default"))
    flags = (f"--dataset=npz:{blobs}", "--model=small_mlp", "--epochs=1", "--bs=10", "--name_exp=short")
    succeed("examples/1_loo_iterations.py", *flags, *folders(tmp_path, *MPE))
    assert results(tmp_path)[1]["settings"]["initialization"] == "default"
    monkeypatch.undo()
    refused = call("examples/1_loo_iterations.py", *flags, *folders(tmp_path, *MPE))
    assert refused.status == FILE
    assert "initialization" in refused.complaint


def test_a_vision_transformer_says_that_it_starts_from_random_weights(blobs, tmp_path, monkeypatch):
    small = replace(MODELS["vit"], build=lambda *sizes: ViT(*sizes, layers=1, heads=2, width=8, mlp_width=12))
    monkeypatch.setitem(MODELS, "vit", small)
    flags = (f"--dataset=npz:{blobs}", *SHORT, *folders(tmp_path, *TRAIN))
    said = succeed("train_full.py", "--model=vit", *flags).err
    assert said.count("random weights") == 1
    assert "--pretrained" in said
    assert "random weights" not in succeed("train_full.py", "--model=mlp", *flags).err
