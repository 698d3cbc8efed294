"""Selection and training on the selection, as users run them: every method, both modes, per class and over all."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from support import TRAIN, Forked, call, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_json, read_npz, write_json, write_pickle
from src.coresets import METHODS
from src.datasets import load_dataset
from src.metrics import SCORES

N, CLASSES = 90, 3
PRETRAIN = ("--coreset_pretrain_epochs=4", "--coreset_pretrain_lr=0.05", "--coreset_pretrain_batch_size=32",
            "--coreset_networks=2")  # fmt: skip
DOWNSTREAM = ("--coreset_epochs=2", "--batch_size=16", "--learning_rate=0.05", "--lr_sched=const")
STATIC = [name for name, method in METHODS.items() if not method.dynamic]


class Place:
    """A data set in the format of users' own data, a file for every stored score, and shared folders."""

    def __init__(self, base):
        self.base = base
        data = write_blobs(base / "blobs.npz", n=N, classes=CLASSES)
        self.data = f"--dataset=npz:{data}"
        self.train = load_dataset(f"npz:{data}", base)[0]
        self.name = self.train.entry.name
        self.scores = np.random.default_rng(0).random(N)
        for method in METHODS.values():
            if method.needs.stored == "mem":
                path = SCORES["mem"].published_path(base / "metrics", self.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, tr_mem=self.scores)
            elif method.needs.stored:
                write_pickle(
                    SCORES[method.needs.stored].path(base / "metrics", self.name), dict(enumerate(self.scores))
                )

    def flags(self, func, *more):
        return (self.data, "--model=small_mlp", f"--coreset_func={func}", *PRETRAIN, *more)

    def train_flags(self, func, *more, base=None):
        base = base or self.base
        own = [f"--metrics_folder={self.base / 'metrics'}"] if base != self.base else []
        return (*self.flags(func, *more), *DOWNSTREAM, *folders(base, *TRAIN), *own)

    def folder(self, func, share, mode="large", base=None):
        run = f"{func}_static_coreset_{mode}_{share}_small_mlp_over_{self.name}"
        return (base or self.base) / "models" / run / "seed_1"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("pruning"))


def chosen(place, func, share, **where):
    return read_npz(place.folder(func, share, **where) / "selection.npz")


@pytest.mark.parametrize("func", STATIC)
def test_every_method_selects_and_trains(place, func):
    result = succeed("train_prune.py", *place.train_flags(func, "--coreset_fraction=0.31"))
    assert "test accuracy" in result.out
    selection = chosen(place, func, 0.31)
    indices, weights = selection["indices"], selection["weights"]
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert np.bincount(indices % CLASSES).tolist() == [10] * CLASSES  # ceil(0.31 * 30) of each class
    assert np.isfinite(weights).all()
    assert (weights >= 0).all()
    if not METHODS[func].weighted:
        assert (weights == 1).all()
    results = read_json(place.folder(func, 0.31) / "results.json")
    assert results["finished"]
    assert [record["epoch"] for record in results["history"]] == [1, 2]
    assert all(0 <= record["test_accuracy"] <= 1 for record in results["history"])
    assert results["settings"]["examples"] == len(indices)
    assert (place.folder(func, 0.31) / "last.pt").exists()


@pytest.mark.parametrize("func", STATIC)
def test_over_all_classes_at_once_and_few_shot(place, func):
    flags = place.flags(func, "--coreset_fraction=0.25", "--per_class=0", "--coreset_mode=few_shot")
    result = succeed("select_coreset.py", *flags, *folders(place.base, *TRAIN))
    assert f"of {N} examples selected by {func}" in result.out
    assert len(chosen(place, func, 0.25, mode="few_shot")["indices"]) == 23  # 22.5, rounded half up
    assert ("has no effect" in result.err) == ("coreset_mode" not in METHODS[func].option_names)


def test_modes_keep_opposite_ends(place):
    for mode, end in (("large", slice(-5, None)), ("few_shot", slice(0, 5))):
        flags = place.flags("min_sam-sgd-loss", "--shots=5", f"--coreset_mode={mode}")
        succeed("select_coreset.py", *flags, *folders(place.base, *TRAIN))
        indices = chosen(place, "min_sam-sgd-loss", "shots_5", mode=mode)["indices"]
        for label in range(CLASSES):
            members = np.arange(label, N, CLASSES)
            wanted = members[np.argsort(place.scores[members], kind="stable")[end]]
            assert set(indices[indices % CLASSES == label]) == set(wanted)


@pytest.mark.parametrize("func", [func for func in STATIC if not func.startswith("min_")] + ["min_csl"])
def test_shots_up_to_keep_all_of_a_smaller_class(place, tmp_path, func):
    """Three examples of class 0, and all examples of the other classes."""
    keep = np.sort(np.r_[np.arange(0, N, CLASSES)[:3], [i for i in range(N) if i % CLASSES]])
    (tmp_path / "subset.txt").write_text("\n".join(map(str, keep)))
    flags = (*place.flags(func), f"--subset={tmp_path / 'subset.txt'}", *folders(tmp_path, *TRAIN))
    flags += (f"--metrics_folder={place.base / 'metrics'}",)
    refused = call("select_coreset.py", *flags, "--shots=4")
    assert (refused.status, "shots_up_to=4" in refused.complaint) == (2, True)
    succeed("select_coreset.py", *flags, "--shots_up_to=4")
    indices = chosen(place, func, "shots_up_to_4", base=tmp_path)["indices"]
    assert np.bincount(indices % CLASSES).tolist() == [3, *[4] * (CLASSES - 1)]
    assert set(indices) <= set(keep)


def test_shots_up_to_equal_shots_where_all_classes_are_large_enough(place, tmp_path):
    flags = (*place.flags("random"), *folders(tmp_path, *TRAIN))
    succeed("train_prune.py", *flags, "--coreset_epochs=1", "--shots=5")
    succeed("train_prune.py", *flags, "--coreset_epochs=1", "--shots_up_to=5")
    first, second = (
        chosen(place, "random", share, base=tmp_path)["indices"] for share in ("shots_5", "shots_up_to_5")
    )
    assert np.array_equal(first, second)


def test_pretraining_is_shared_and_keyed(place, tmp_path):
    where = folders(tmp_path, *TRAIN)
    for func in ("el2n", "forget", "ccs"):
        succeed("select_coreset.py", *place.flags(func, "--coreset_fraction=0.5"), *where)
    runs = list((tmp_path / "models" / "pretrain").glob("*/small_mlp/*/seed_*"))
    keys = {path.parent.name for path in runs}
    assert len(keys) == 1  # the same settings for every method
    assert {path.name for path in runs} == {"seed_1", "seed_6"}  # independent models of el2n and grand
    states = [read_checkpoint(path / "last.pt")["model_state"] for path in runs]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    before = {path: path.stat().st_mtime_ns for path in runs[0].glob("last.pt")}
    succeed("select_coreset.py", *place.flags("craig", "--coreset_fraction=0.5"), *where)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    flags = ("--coreset_pretrain_lr=0.06", "--coreset_fraction=0.6")
    succeed("select_coreset.py", *place.flags("craig", *flags), *where)
    assert len(list((tmp_path / "models" / "pretrain").glob("*/small_mlp/*"))) == 2


def test_everything_kept_trains_as_train_full(place, tmp_path):
    full = ("train_full.py", place.data, "--model=small_mlp", "--epochs=2", *DOWNSTREAM[1:], "--data_augmentation")
    succeed(*full, *folders(tmp_path, *TRAIN))
    (path,) = (tmp_path / "models").glob("standard_*/seed_1/last.pt")
    theirs = read_checkpoint(path)["model_state"]
    for func in (name for name in STATIC if not METHODS[name].weighted):
        succeed("train_prune.py", *place.train_flags(func, "--coreset_fraction=1.0", "--data_augmentation"))
        ours = read_checkpoint(place.folder(func, 1.0) / "last.pt")["model_state"]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), func


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_other_precisions(place, tmp_path, precision):
    for func, more in (("craig", ()), ("grand", ("--grand_gradient=full",))):
        flags = place.flags(func, "--coreset_fraction=0.3", f"--precision={precision}", *more)
        succeed("train_prune.py", *flags, *DOWNSTREAM, *folders(tmp_path, *TRAIN))
        assert len(chosen(place, func, 0.3, base=tmp_path)["indices"]) == 27


def test_a_subset_without_a_class(place, tmp_path):
    (tmp_path / "subset.txt").write_text("\n".join(str(index) for index in range(N) if index % CLASSES))
    for func in ("craig", "glister", "moderate", "ccs"):
        flags = (*place.flags(func, "--shots=4"), f"--subset={tmp_path / 'subset.txt'}")
        succeed("train_prune.py", *flags, *DOWNSTREAM, *folders(tmp_path, *TRAIN))
        indices = chosen(place, func, "shots_4", base=tmp_path)["indices"]
        assert np.bincount(indices % CLASSES).tolist() == [0, 4, 4]


@pytest.mark.parametrize("func", ["random", "craig", "gradmatch", "ccs", "dual", "infobatch", "glister"])
def test_a_seed_gives_the_same_bits(place, func, tmp_path):
    flags = place.flags(func, "--coreset_fraction=0.4")
    succeed("select_coreset.py", *flags, *folders(place.base, *TRAIN))
    succeed("select_coreset.py", *flags, *folders(tmp_path, *TRAIN), f"--out={tmp_path / 'again.npz'}")
    first, second = chosen(place, func, 0.4), read_npz(tmp_path / "again.npz")
    np.testing.assert_array_equal(first["indices"], second["indices"])
    np.testing.assert_array_equal(first["weights"], second["weights"])


def test_a_new_selection_leaves_no_table_of_the_old_one(place, tmp_path):
    flags = place.flags("random", "--coreset_fraction=0.3")
    succeed("select_coreset.py", *flags, *folders(tmp_path, *TRAIN))
    table = place.folder("random", 0.3, base=tmp_path) / "selection.csv"
    assert table.exists()
    succeed("train_prune.py", *flags, *DOWNSTREAM, "--subset=60", "--overwrite", *folders(tmp_path, *TRAIN))
    assert not table.exists()


def test_selections_of_anyones_making(place, tmp_path):
    np.savez(tmp_path / "mine.npz", indices=np.array([50, 3, 4, 8, 20, 21, 1, 0]))
    flags = (place.data, "--model=small_mlp", f"--selection={tmp_path / 'mine.npz'}", *DOWNSTREAM)
    succeed("train_prune.py", *flags, *folders(tmp_path, *TRAIN))
    (run,) = (tmp_path / "models").glob("selection_*_static_coreset_large_8_small_mlp_over_*/seed_1/results.json")
    assert read_json(run)["settings"]["examples"] == 8


def test_a_stored_selection_trains_as_its_method(place, tmp_path):
    out = tmp_path / "craig.npz"
    flags = place.flags("craig", "--coreset_fraction=0.31", f"--out={out}")
    succeed("select_coreset.py", *flags, *folders(place.base, *TRAIN))
    succeed("train_prune.py", place.data, "--model=small_mlp", f"--selection={out}", *DOWNSTREAM,
            *folders(tmp_path, *TRAIN))  # fmt: skip
    (path,) = (tmp_path / "models").glob("selection_*/seed_1/last.pt")
    succeed("train_prune.py", *place.train_flags("craig", "--coreset_fraction=0.31"))
    ours, theirs = (read_checkpoint(p)["model_state"] for p in (path, place.folder("craig", 0.31) / "last.pt"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_subset_keeps_original_indices(place, tmp_path):
    subset = np.arange(30, 90)
    (tmp_path / "subset.txt").write_text("\n".join(map(str, subset)))
    flags = (*place.flags("forget", "--coreset_fraction=0.5"), f"--subset={tmp_path / 'subset.txt'}")
    succeed("train_prune.py", *flags, *DOWNSTREAM, *folders(tmp_path, *TRAIN))
    indices = chosen(place, "forget", 0.5, base=tmp_path)["indices"]
    assert len(indices) == 30
    assert indices.min() >= 30


def test_dynamic_infobatch_visits_fewer_and_ends_on_all(place, tmp_path):
    flags = ("--coreset_fraction=0.3", "--infobatch_delta=0.75")
    epochs = ("--coreset_epochs=8", *DOWNSTREAM[1:])
    succeed("train_prune.py", *place.flags("infobatch_dynamic", *flags), *epochs, *folders(tmp_path, *TRAIN))
    (path,) = (tmp_path / "models").glob("infobatch_dynamic_static_coreset_large_0.3_*/seed_1/results.json")
    visited = [record["examples"] for record in read_json(path)["history"]]
    assert visited[0] == N  # nothing is known yet
    assert max(visited[1:6]) < N
    assert visited[6:] == [N, N]


def test_interrupted_pretraining_goes_on(place, tmp_path):
    """A run killed after epoch 2 continues with epoch 3, and selects the same examples as an uninterrupted run."""
    flags = place.flags("forget", "--coreset_fraction=0.5", "--coreset_pretrain_epochs=40")
    succeed("select_coreset.py", *flags, *folders(tmp_path / "whole", *TRAIN))
    process = Forked("select_coreset.py", *flags, *folders(tmp_path / "killed", *TRAIN))
    states = tmp_path / "killed" / "resume_ckpts" / "pretrain"
    while process.poll() is None and not list(states.rglob("epoch=2.pth.tar")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    result = succeed("select_coreset.py", *flags, *folders(tmp_path / "killed", *TRAIN))
    assert "continuing after epoch" in result.err
    whole, killed = (chosen(place, "forget", 0.5, base=tmp_path / name) for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole["indices"], killed["indices"])


def test_a_folder_of_images(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for label in ("cat", "dog"):
            (tmp_path / "pets" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "pets" / part / label / f"{number}.png")
    flags = (f"--dataset=folder:{tmp_path / 'pets'}", "--model=small_mlp", "--coreset_func=k_center", "--shots=3",
             "--coreset_pretrain_epochs=1", *DOWNSTREAM)  # fmt: skip
    succeed("train_prune.py", *flags, *folders(tmp_path, *TRAIN))
    (path,) = (tmp_path / "models").glob("k_center_static_coreset_large_shots_3_*/seed_1/selection.npz")
    assert np.bincount(read_npz(path)["indices"] // 12).tolist() == [3, 3]


def test_resume_goes_on_with_the_same_selection(place, tmp_path):
    flags = place.train_flags("infobatch", "--coreset_fraction=0.6", base=tmp_path)
    succeed("train_prune.py", *flags)
    whole = read_checkpoint(place.folder("infobatch", 0.6, base=tmp_path) / "last.pt")["model_state"]
    resume = tmp_path / "resume_ckpts" / place.folder("infobatch", 0.6).parent.name / "seed_1"
    (resume / "epoch=2.pth.tar").unlink()
    result = succeed("train_prune.py", *flags, "--resume")
    assert "selection: loaded from" in result.err
    assert "continuing after epoch 1" in result.err
    again = read_checkpoint(place.folder("infobatch", 0.6, base=tmp_path) / "last.pt")["model_state"]
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_scores_of_a_subset_serve_that_subset_alone(place, tmp_path):
    path = SCORES["csl"].path(tmp_path / "metrics", place.name)
    write_pickle(path, {index: float(index) for index in range(60)})
    write_json(path.with_suffix(".json"), {"n": 60, "total": N})
    (tmp_path / "subset.txt").write_text("\n".join(map(str, range(60))))
    flags = place.flags("min_csl", "--coreset_fraction=0.5", f"--scores_folder={tmp_path / 'metrics'}")
    refused = call("select_coreset.py", *flags, *folders(tmp_path, *TRAIN))
    assert refused.status == 1
    assert "has scores for 60 of 90 examples" in refused.complaint
    succeed("select_coreset.py", *flags, f"--subset={tmp_path / 'subset.txt'}", *folders(tmp_path, *TRAIN))
    assert chosen(place, "min_csl", 0.5, base=tmp_path)["indices"].tolist() == list(range(30, 60))


def test_selection_files_say_how_they_were_made(place, tmp_path):
    succeed("select_coreset.py", *place.flags("el2n", "--coreset_fraction=0.31"), *folders(tmp_path, *TRAIN))
    selection = chosen(place, "el2n", 0.31, base=tmp_path)
    settings = json.loads(str(selection["settings"]))
    assert settings["coreset_func"] == "el2n"
    assert settings["coreset_networks"] == 2
    assert int(selection["total"]) == N


def test_subsampling_is_recorded_and_older_selections_count_as_exact(place, tmp_path):
    def select(*more):
        return call("select_coreset.py", *place.flags("graph_cut", *more), f"--out={tmp_path / 's.npz'}",
                    *folders(tmp_path, *TRAIN))  # fmt: skip

    assert select().status == 0
    exact = read_npz(tmp_path / "s.npz")
    settings = json.loads(str(exact["settings"]))
    assert settings.pop("selection_subsample") == "exact"  # the value of auto for this few examples
    np.savez(tmp_path / "s.npz", **{**exact, "settings": json.dumps(settings)})  # of an older version
    assert "selection: loaded from" in select().err
    assert "loaded from" in select("--selection_subsample=exact").err
    refused = select("--selection_subsample=0.5")
    assert refused.status == 1
    assert "selection_subsample (exact vs. 0.5)" in refused.complaint
    assert "subsampling with epsilon 0.5" in select("--selection_subsample=0.5", "--overwrite").err
    near = read_npz(tmp_path / "s.npz")
    assert json.loads(str(near["settings"]))["selection_subsample"] == 0.5
    assert len(near["indices"]) == len(exact["indices"])
    assert near["indices"].tolist() != exact["indices"].tolist()
