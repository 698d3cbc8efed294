"""Records identify the pixels, run, epoch and settings of a result; files that do not match are not combined."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import FILE, refuse, spoilt
from support import TRAIN, call, folders, succeed, write_blobs

from src.artifacts.io import read_checkpoint, read_json, write_checkpoint, write_json
from src.models import MODELS
from src.models.vit import ViT

N = 60
QUICK = ("--dataset=digits", "--model=small_mlp", "--batch_size=20", "--learning_rate=0.05")
READ = ("datasets", "models", "metrics")
RUN = "standard_small_mlp_over_digits_with_{}_sched_{}"


def pixels(base, *parts):
    """Change the pixels of some parts of the data set, but not the labels."""
    path = base / "datasets" / "digits.npz"
    arrays = dict(np.load(path))
    for part in parts:
        arrays[f"x_{part}"] = 255 - arrays[f"x_{part}"]
    np.savez(path, **arrays)


def train(base, *flags, script="train_full.py", optimizers=("sgd", "sam"), sched="const"):
    for optimizer in optimizers:
        succeed(script, *QUICK, "--epochs=2", f"--lr_sched={sched}", f"--optimizer={optimizer}", *flags,
                *folders(base, *TRAIN))  # fmt: skip


def scoring(base, *flags):
    return (*QUICK[:2], "--epochs=2", *flags, *folders(base, *READ))


def averaging(base, *flags):
    return (*QUICK[:2], "--seeds", 1, 2, *flags, *folders(base, "datasets", "metrics"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pair of models on a small data set with a catalog name; copy it before changing anything."""
    base = tmp_path_factory.mktemp("trained")
    (base / "datasets").mkdir()
    write_blobs(base / "datasets" / "digits.npz", n=N)
    train(base)
    return base


@pytest.fixture
def base(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "base")


# ------------------------------------------------------------------------------------------------------ the images

MEASURE = ("--epochs=2", "--lanczos_steps=5", "--trace_probes=0", "--top_n=1", "--tolerance=1", "--probes=1")
KERNELS = ("--seeds", 1, "--ntk_velocity_epoch", 1, "--m_samples=4", "--lower_index", 0)
SELECT = ("--coreset_func=el2n", "--coreset_fraction=0.5", "--coreset_pretrain_epochs=1", "--coreset_networks=1")
BY_SCORE = ("--coreset_func=min_sam-sgd-loss", "--coreset_fraction=0.5")
PRUNE = ("--coreset_epochs=1", *QUICK, "--lr_sched=const")
MPE = ("--dataset=digits", "--model=small_mlp", "--epochs=1", "--bs=20", "--bs_jacs=20", "--delta=1", "--name_exp=t")


def after_other_images(base):
    """Commands (script and flags) that read results for these images, and must refuse results for others."""
    rest = folders(base, *TRAIN)
    return {
        "resume": ("train_full.py", *QUICK, "--epochs=2", "--lr_sched=const", "--resume", *rest),
        "start": ("train_full.py", *QUICK, "--epochs=2", "--lr_sched=const", *rest),
        "pair": ("compute_sam_sgd.py", *scoring(base, "--overwrite")),
        "spectrum": ("compute_hessian_eigen.py", *QUICK[:2], *MEASURE, f"--hessian_folder={base / 'h'}",
                     *folders(base, *READ)),
        "kernels": ("compute_ntk.py", *QUICK[:2], *KERNELS, "--ntk_chosen_metric=samis_prob",
                    f"--ntk_folder={base / 'ntk'}", *folders(base, *READ)),
        "selection": ("select_coreset.py", *QUICK[:2], *SELECT, *rest),
        "stored score": ("select_coreset.py", *QUICK[:2], *BY_SCORE, *rest),
        "selection file": ("train_prune.py", f"--selection={base / 'selection.npz'}", *PRUNE, *rest),
        "images": ("plot_images.py", "--dataset=digits", "--modes", "samis_loss", f"--plots_folder={base / 'plots'}",
                   *folders(base, "datasets", "metrics")),
        "proxies": ("plot_proxies.py", "--dataset=digits", "--modes", "samis_loss",
                    *folders(base, "plots", "datasets", "metrics")),
        "iterations": ("examples/1_loo_iterations.py", *MPE, f"--pickles_folder={base / 'pickles'}",
                       *folders(base, "datasets", "models", "log", "resume_ckpts")),
    }  # fmt: skip


@pytest.fixture(scope="module")
def everything(trained, tmp_path_factory):
    """The pair, and one result of every kind computed from it."""
    base = shutil.copytree(trained, tmp_path_factory.mktemp("everything") / "base")
    train(base, "--seed=2")
    for seed in (1, 2):
        succeed("compute_sam_sgd.py", *scoring(base, f"--seed={seed}"))
    succeed("average_scores.py", *averaging(base))
    prob = (
        base / "metrics" / "sam_sgd" / "samis_prob_digits.json"
    )  # a score in the format of older versions, for the kernels
    record = read_json(prob)
    write_json(prob, {name: value for name, value in record.items() if name != "data_hash"})
    commands = after_other_images(base)
    for kind in ("selection", "stored score", "iterations"):
        succeed(*commands[kind])
    selection = next(path for path in base.rglob("selection.npz") if "el2n" in str(path))
    shutil.copy(selection, base / "selection.npz")
    return base


@pytest.mark.parametrize("kind", after_other_images(Path()))
@pytest.mark.parametrize("part", ["train", "test"])
def test_results_go_with_their_images_only(everything, tmp_path, kind, part):
    base = shutil.copytree(everything, tmp_path / "base")
    pixels(base, part)
    done = call(*after_other_images(base)[kind])
    assert done.status == FILE
    assert re.search(r"images \(|data_hash \(|data hash|its images differ", done.complaint), done.err


def test_results_of_older_versions_which_do_not_know_their_images_match(base):
    for path in base.rglob("results.json"):
        record = read_json(path)
        del record["settings"]["images"]
        record["settings"] |= {"rho": 0.3, "adaptive": True, "hess_init": 0.2, "lr_min": 0.0}  # without effect on sgd
        write_json(path, record)
    for path in base.rglob("*.pt"):
        state = read_checkpoint(path)
        del state["settings"]["images"], state["data_hash"], state["decoding"]
        write_checkpoint(path, state)
    shutil.rmtree(base / "resume_ckpts")
    pixels(base, "train")
    succeed("compute_sam_sgd.py", *scoring(base))
    results = base / "models" / RUN.format("sgd", "const") / "seed_1" / "results.json"
    assert read_json(results)["settings"]["rho"] == 0.3
    train(base, optimizers=["sgd"])  # not refused
    settings = read_json(results)["settings"]
    assert "images" in settings
    assert not settings.keys() & {"rho", "adaptive", "hess_init", "lr_min"}, "settings without an effect"


def test_starting_weights_of_older_versions_are_other_settings(base):
    path = base / "models" / RUN.format("sgd", "const") / "seed_1" / "results.json"
    record = read_json(path)
    write_json(path, {**record, "settings": {**record["settings"], "initialization": "default"}})
    command = after_other_images(base)["start"]
    refuse(*command, status=FILE, says=("initialization",))


def test_images_as_older_versions_decoded_them_are_other_images(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(4):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 4), dtype=np.uint8))  # transparent
                image.save(tmp_path / "photos" / part / name / f"{number}.png")
    data = (f"--dataset=folder:{tmp_path / 'photos'}", "--model=small_mlp", "--epochs=1")
    command = ("train_full.py", *data, *folders(tmp_path, *TRAIN))
    for optimizer in ("sgd", "sam"):
        succeed(*command, f"--optimizer={optimizer}")
    succeed(*command)  # repeat
    succeed("compute_sam_sgd.py", *data, *folders(tmp_path, *READ))
    for path in tmp_path.rglob("results.json"):
        record = read_json(path)
        assert record["settings"].pop("decoding") == "alpha"
        write_json(path, record)
    for path in tmp_path.rglob("*.pt"):
        state = read_checkpoint(path)
        assert state.pop("decoding") == state["settings"].pop("decoding") == "alpha"
        write_checkpoint(path, state)
    refuse(*command, status=FILE, says=("decoding",))
    refuse("compute_sam_sgd.py", *data, *folders(tmp_path, *READ), "--overwrite", status=FILE, says=("decod",))


# -------------------------------------------------------------------------------------- renamed files


def checkpoint(base, optimizer, epoch, seed=1):
    return base / "models" / RUN.format(optimizer, "const") / f"seed_{seed}" / f"epoch_{epoch}.pt"


def test_a_checkpoint_must_be_what_its_name_says(base):
    train(base, "--seed=2", optimizers=["sgd"])
    own = checkpoint(base, "sgd", 2)
    hessian = ("compute_hessian_eigen.py", *QUICK[:2], *MEASURE, f"--hessian_folder={base / 'h'}",
               *folders(base, *READ))  # fmt: skip
    for other, setting in (
        (checkpoint(base, "sam", 2), r"optimizer \(sam vs. sgd\)"),
        (checkpoint(base, "sgd", 1), r"epoch \(1 vs. 2\)"),
        (checkpoint(base, "sgd", 2, seed=2), r"seed \(2 vs. 1\)"),
    ):
        with spoilt(own, other.read_bytes()):
            for script, *flags in (("compute_sam_sgd.py", *scoring(base)), hessian):
                refuse(script, *flags, status=FILE, says=(f"{own.name}: ", setting))
    assert not list((base / "metrics").glob("digits/**/*.npz"))
    succeed(*hessian)


def test_a_pretrained_model_must_be_what_its_name_says(base):
    select = after_other_images(base)["selection"]
    succeed(*select)
    (last,) = (base / "models" / "pretrain").rglob("last.pt")
    last.write_bytes(checkpoint(base, "sgd", 2).read_bytes())
    for path in [*base.rglob("selection.npz"), *last.parent.glob("*.npz")]:
        path.unlink()
    refuse(*select, status=FILE, says=("last.pt: ", r"epoch \(2 vs. 1\)"))


def test_seeds_must_be_what_their_names_say(base):
    succeed("compute_sam_sgd.py", *scoring(base))
    seeds = base / "metrics" / "digits" / "small_mlp"
    shutil.copytree(seeds / "1", seeds / "2")
    refuse("average_scores.py", *averaging(base), status=FILE, says=("/2/", r"seed \(1 vs. 2\)"))


def test_scores_must_be_what_their_names_say(base):
    succeed("compute_sam_sgd.py", *scoring(base))
    prob = base / "metrics" / "digits" / "small_mlp" / "1" / "nn_prob_diff_score.npz"
    one = (*QUICK[:2], "--seeds", 1, *folders(base, "datasets", "metrics"))
    with spoilt(prob, prob.with_name("nn_loss_diff_score.npz").read_bytes()):
        refuse("average_scores.py", *one, status=FILE, says=(f"{prob.name}: ", r"score \(loss vs. prob\)"))
    succeed("average_scores.py", *one)
    folder = base / "metrics" / "sam_sgd"
    for kind in ("pkl", "json"):
        shutil.copy(folder / f"samis_loss_digits.{kind}", folder / f"samis_prob_digits.{kind}")
    command = ("plot_proxies.py", "--dataset=digits", "--modes", "samis_prob",
               *folders(base, "plots", "datasets", "metrics"))  # fmt: skip
    refuse(*command, status=FILE, says=("samis_prob_digits.pkl: ", "samis_loss scores, not samis_prob"))


def test_both_models_of_a_pair_are_trained_on_the_same_examples(base):
    train(base, "--subset=30", "--overwrite", optimizers=["sam"])
    for more in ((), ("--subset=30",)):
        refuse("compute_sam_sgd.py", *scoring(base, *more), status=FILE, says=("different subset of digits",))


def test_a_damaged_average_does_not_spoil_the_scoring_of_a_seed(base):
    (base / "metrics" / "sam_sgd").mkdir(parents=True)
    for content in ('{"seeds": 3}', "{"):
        (base / "metrics" / "sam_sgd" / "samis_loss_digits.json").write_text(content)
        assert "average_scores.py" in succeed("compute_sam_sgd.py", *scoring(base)).out


def test_another_image_size_is_named(tmp_path):
    data = f"npz:{write_blobs(tmp_path / 'blobs.npz', n=N)}"
    flags = (f"--dataset={data}", "--model=small_mlp", "--epochs=1")
    for optimizer in ("sgd", "sam"):
        succeed("train_full.py", *flags, "--lr_sched=const", f"--optimizer={optimizer}", *folders(tmp_path, *TRAIN))
    line = refuse("compute_sam_sgd.py", *flags, "--image_size=12", *folders(tmp_path, *READ), status=FILE,
                  says=(r"image_size \(8 vs. 12\)", "image_size=8"))  # fmt: skip
    assert "--dataset" not in line


# ---------------------------------------------------------------------------------- files that cannot be combined


@pytest.fixture(scope="module")
def splits(trained, tmp_path_factory):
    """Twenty models trained on splits."""
    base = shutil.copytree(trained, tmp_path_factory.mktemp("splits") / "base")
    shutil.rmtree(base / "models")
    train(base, "--samis_validation_split_index=all", script="train_split.py")
    return base


def test_splits_of_other_settings_are_not_mixed(splits, tmp_path):
    base = shutil.copytree(splits, tmp_path / "base")
    succeed("compute_sam_sgd.py", *scoring(base))
    more = ("--samis_validation_split_index=3", "--batch_size=16", "--overwrite")
    train(base, *more, script="train_split.py", optimizers=["sam"])
    refuse("compute_sam_sgd.py", *scoring(base, "--overwrite"), status=FILE,
           says=("with_sam.*split_3.*was trained differently from", r"batch_size \(20 vs. 16\)"))  # fmt: skip
    train(base, *more, script="train_split.py", optimizers=["sgd"])
    refuse(
        "compute_sam_sgd.py",
        *scoring(base, "--overwrite"),
        status=FILE,
        says=("with_sgd.*split_3.*was trained differently from",),
    )
    for split in {*range(1, 11)} - {3}:
        train(base, *more, f"--samis_validation_split_index={split}", script="train_split.py", optimizers=["sgd"])
    refuse(
        "compute_sam_sgd.py",
        *scoring(base, "--overwrite"),
        status=FILE,
        says=("with_sam.*split_3.*was trained differently from",),
    )


def test_a_model_on_everything_is_not_that_of_a_split(splits, trained, tmp_path):
    base = shutil.copytree(splits, tmp_path / "base")
    (split,) = (base / "models").glob("split_*sgd*_val_split_4/seed_1/epoch_2.pt")
    split.write_bytes(checkpoint(trained, "sgd", 2).read_bytes())
    refuse("compute_sam_sgd.py", *scoring(base), status=FILE, says=(r"validation_split \(None vs. 4\)|split 4",))


def test_seeds_in_which_sgd_alone_differs_are_not_mixed(base):
    train(base, "--seed=2", "--batch_size=10", optimizers=["sgd"])
    train(base, "--seed=2", optimizers=["sam"])
    for seed in (1, 2):
        done = succeed("compute_sam_sgd.py", *scoring(base, f"--seed={seed}"))
        assert ("differ in settings besides the optimi" in done.err) == (seed == 2)
    refuse("average_scores.py", *averaging(base), status=FILE, says=("training_sgd_batch_size",))


@pytest.mark.parametrize("sched", ["const", "cosine"])
def test_the_length_of_training_counts_where_the_schedule_depends_on_it(base, sched):
    shutil.rmtree(base / "models")
    for seed, epochs in ((1, 2), (2, 4)):
        train(base, f"--seed={seed}", f"--epochs={epochs}", sched=sched)
        succeed("compute_sam_sgd.py", *scoring(base, f"--seed={seed}"))
    if sched == "const":
        succeed("average_scores.py", *averaging(base))
    else:
        refuse("average_scores.py", *averaging(base), status=FILE, says=(r"training_epochs \(2 vs. 4\)",))


def test_seeds_of_the_papers_code_are_averaged(base):
    rng = np.random.default_rng(0)
    values = {}
    for seed in (1, 2):
        folder = base / "metrics" / "digits" / "small_mlp" / str(seed)
        folder.mkdir(parents=True)
        for which in ("loss", "prob"):
            values[seed, which] = rng.random(N).astype(np.float32)
            np.savez(folder / f"nn_{which}_diff_score.npz", values[seed, which])
    modes = ("--modes", "samis_loss", "samis_prob")
    done = succeed("average_scores.py", *averaging(base, *modes))
    assert "does not record how it was made" in done.err
    from src.metrics import Proxy

    mean = (values[1, "prob"].astype(np.float64) + values[2, "prob"]) / 2
    scores = Proxy("samis_prob", "digits", folder=base / "metrics").scores
    np.testing.assert_allclose(scores, (mean - mean.min()) / np.ptp(mean), atol=1e-12)
    refuse("average_scores.py", *averaging(base, "--overwrite", "--modes", "mean_loss"), status=FILE,
           says=("mean_loss",))  # fmt: skip
    refuse("compute_sam_sgd.py", *scoring(base), status=FILE, says=("does not record the settings", "--overwrite"))
    succeed("compute_sam_sgd.py", *scoring(base, "--overwrite"))  # seed 1 is now recorded, seed 2 is not
    done = succeed("average_scores.py", *averaging(base, "--overwrite", *modes))
    assert "averaged with those that do" in done.err
    record = read_json(base / "metrics" / "sam_sgd" / "samis_loss_digits.json")
    assert (record["protocol"], record["unrecorded_seeds"]) == ("full", [2])
    (base / "metrics" / "digits" / "small_mlp" / "2" / "nn_loss_diff_score.npz").unlink()
    np.savez(base / "metrics" / "digits" / "small_mlp" / "2" / "nn_loss_diff_score.npz", np.full(N, np.nan))
    refuse("average_scores.py", *averaging(base, "--modes", "samis_loss"), status=FILE, says=("finite",))


def test_splits_that_changed_after_training_are_noticed(splits, tmp_path):
    base = shutil.copytree(splits, tmp_path / "base")
    one, two = ((base / "datasets" / "splits" / "digits" / "seed_1" / f"val_{i}.txt") for i in (1, 2))
    content = one.read_bytes(), two.read_bytes()
    one.write_bytes(content[1])
    two.write_bytes(content[0])
    refuse("compute_sam_sgd.py", *scoring(base), status=FILE, says=("val_split_1/", "held_out"))


def test_models_of_seeds_trained_otherwise_are_not_averaged(base):
    train(base, "--seed=2", "--batch_size=10", optimizers=["sgd"])
    kernels = ("compute_ntk.py", *QUICK[:2], *KERNELS, "--ntk_chosen_metric=mem", f"--ntk_folder={base / 'ntk'}",
               *folders(base, *READ))  # fmt: skip
    (base / "metrics" / "memorization").mkdir(parents=True)
    np.savez(base / "metrics" / "memorization" / "digits_infl_matrix.npz", tr_mem=np.linspace(0, 1, N))
    says = (r"seed_2/epoch_1\.pt: ", r"batch_size \(20 vs. 10\)")
    refuse(*kernels, "--seeds", 1, 2, status=FILE, says=says)
    for seed in (1, 2):
        succeed(*kernels, "--seeds", seed)
        succeed("compute_hessian_eigen.py", *QUICK[:2], *MEASURE, f"--seed={seed}", f"--hessian_folder={base / 'h'}",
                *folders(base, *READ))  # fmt: skip
    figure = (f"--plots_folder={base / 'plots'}", *folders(base, "datasets"))
    refuse("plot_ntk.py", *QUICK[:2], "--metrics", "mem", f"--ntk_folder={base / 'ntk'}", *figure, status=FILE,
           says=("batch_size",))  # fmt: skip
    refuse("plot_hessian.py", *QUICK[:2], "--optimizers", "sgd", f"--hessian_folder={base / 'h'}", *figure,
           status=FILE, says=("batch_size",))  # fmt: skip


def test_resume_states_and_rows_must_be_what_their_names_say(base):
    train(base, "--measure_proxies", "--overwrite", optimizers=["sgd"])
    states = base / "resume_ckpts" / RUN.format("sgd", "const") / "seed_1"
    flags = ("train_full.py", *QUICK, "--epochs=2", "--lr_sched=const", "--measure_proxies", "--resume",
             *folders(base, *TRAIN))  # fmt: skip
    one, two = (states / f"epoch={epoch}.pth.tar" for epoch in (1, 2))
    with spoilt(two, one.read_bytes()):
        done = succeed(*flags)
        assert f"{two}: contains the resume state of epoch 1" in done.err
        assert "continuing after epoch 1 of 2" in done.err
    rows = [states / f"dynamics_epoch={epoch}.npz" for epoch in (1, 2)]
    rows[1].write_bytes(rows[0].read_bytes())
    assert f"{rows[1]}: contains the dynamics of epoch 1" in succeed(*flags).err


def test_names_of_pretrained_models_stay(base):
    """Pretraining results of older versions are found: their names include neither the images nor unused settings."""
    select = after_other_images(base)["selection"]
    succeed(*select)
    (folder,) = (base / "models" / "pretrain").glob("digits/small_mlp/*")
    assert folder.name == "f665fcce2a78908f"


def test_scores_of_a_run_must_be_that_runs(tmp_path):
    """Dynamics or scores of a different optimizer or seed, copied to this run's name."""
    (tmp_path / "datasets").mkdir()
    write_blobs(tmp_path / "datasets" / "digits.npz", n=N)
    train(tmp_path, "--measure_proxies")
    train(tmp_path, "--measure_proxies", "--seed=2", optimizers=("sgd",))
    average = (
        *QUICK[:2],
        "--optimizer=sgd",
        "--modes",
        "forg",
        "csl",
        "flat",
        *folders(tmp_path, "datasets", "metrics"),
    )
    succeed("average_scores.py", *average, "--seeds", 1)
    sgd, sam = (tmp_path / "metrics" / RUN.format(name, "const") for name in ("sgd", "sam"))
    for name, other in (("dynamics.npz", sam / "seed_1"), ("hessian_flat_train.pkl", sgd / "seed_2")):
        with spoilt(sgd / "seed_1" / name, (other / name).read_bytes()):
            refuse("average_scores.py", *average, "--seeds", 1, "--overwrite", status=FILE, says=(name,))
    (sgd / "seed_1" / "end_of_training.json").unlink()  # missing in files of older versions
    succeed("average_scores.py", *average, "--seeds", 1)


def test_settings_of_a_checkpoint_are_plain_values(base):
    path = base / "models" / RUN.format("sam", "const") / "seed_1" / "epoch_2.pt"
    state = read_checkpoint(path)
    state["settings"]["rho"] = state["model_state"]
    with spoilt(path, path.read_bytes()):
        write_checkpoint(path, state)
        refuse("compute_sam_sgd.py", *scoring(base), status=FILE, says=("epoch_2.pt", "settings"))


# ------------------------------------------------------------- changed initial weights

SHORT = ("--epochs=1", "--batch_size=10", "--lr_sched=const")
MPE_FOLDERS = ("datasets", "models", "log", "resume_ckpts", "pickles")


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
    succeed("examples/1_loo_iterations.py", *flags, *folders(tmp_path, *MPE_FOLDERS))
    assert results(tmp_path)[1]["settings"]["initialization"] == "default"
    monkeypatch.undo()
    refused = call("examples/1_loo_iterations.py", *flags, *folders(tmp_path, *MPE_FOLDERS))
    assert refused.status == FILE
    assert "initialization" in refused.complaint


def test_a_vision_transformer_says_that_it_starts_from_random_weights(blobs, tmp_path, monkeypatch):
    small = replace(MODELS["vit"], build=lambda *sizes: ViT(*sizes, layers=1, heads=2, width=8, mlp_width=12))
    monkeypatch.setitem(MODELS, "vit", small)
    flags = (f"--dataset=npz:{blobs}", *SHORT, *folders(tmp_path, *TRAIN))
    said = succeed("train_full.py", "--model=vit", *flags).err
    assert said.count("initialized randomly") == 1
    assert "--pretrained" in said
    assert "initialized randomly" not in succeed("train_full.py", "--model=mlp", *flags).err
