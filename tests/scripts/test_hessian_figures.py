"""plot_hessian.py as users run it, on spectra of the shared models and on files from other programs."""

import csv
import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import FILE, FLAG, refuse, spoilt
from support import folders, succeed

from src.curvature.plots import _FLOOR, spectrum_figure, width
from src.curvature.results import SpectrumGroup, StoredSpectrum, csv_table, markdown_table

SCRIPT = "plot_hessian.py"


@pytest.fixture(scope="module")
def spectra(world, tmp_path_factory):
    """A folder of spectra: both optimizers and seeds, and examples with low and high scores."""
    base = tmp_path_factory.mktemp("spectra")
    flags = (world.dataset, "--model=small_mlp", "--epochs=3", f"--hessian_folder={base / 'h'}", "--lanczos_steps=20",
             "--trace_probes=4", *folders(world.base, "datasets", "models", "metrics"))  # fmt: skip
    for optimizer in ("sgd", "sam"):
        for seed in (1, 2):
            succeed("compute_hessian_eigen.py", *flags, f"--optimizer={optimizer}", f"--seed={seed}")
    for side in ("low", "high"):
        succeed("compute_hessian_eigen.py", *flags, f"--high_low_spec=samis_loss:{side}:0.3")
    return base / "h"


@pytest.fixture
def data_flags(world, spectra, tmp_path):
    return (world.dataset, f"--hessian_folder={spectra}", f"--plots_folder={tmp_path}",
            *folders(world.base, "datasets"))  # fmt: skip


@pytest.fixture
def flags(data_flags):
    return (*data_flags, "--model=small_mlp")


@pytest.fixture
def changed(spectra, tmp_path):
    """A copy of the spectra, and a function that changes settings in one's record."""
    folder = tmp_path / "changed"
    shutil.copytree(spectra, folder)

    def change(optimizer, seed, **settings):
        (path,) = folder.glob(f"train_all_*_with_{optimizer}_*/{seed}/epoch_3/*.json")
        record = json.loads(path.read_text())
        record["settings"] |= settings
        path.write_text(json.dumps(record))

    return folder, change


def test_two_optimisers(world, flags, spectra, tmp_path):
    result = succeed(SCRIPT, *flags)
    stem = tmp_path / "hessian" / world.name / "small_mlp_sgd_sam_train_epoch_3_lanczos"
    for kind in ("png", "pdf", "csv", "md", "json"):
        assert str(stem.with_name(f"{stem.name}.{kind}")) in result.out
    assert min(Image.open(stem.with_suffix(".png")).size) > 900
    assert stem.with_suffix(".pdf").stat().st_size < 400_000
    rows = {row["run"]: row for row in csv.DictReader(stem.with_suffix(".csv").read_text().splitlines())}
    assert set(rows) == {"SGD", "SAM"}
    records = [json.loads(p.read_text()) for p in spectra.glob("train_all_*_sgd_*/*/epoch_3/*.json")]
    tops = [record["eigenvalues"][0] for record in records]
    assert rows["SGD"]["seeds"] == "2"
    assert float(rows["SGD"]["largest"]) == pytest.approx(np.mean(tops))
    assert float(rows["SGD"]["largest_sd"]) == pytest.approx(np.std(tops, ddof=1))
    assert float(rows["SGD"]["trace"]) == pytest.approx(np.mean([record["trace"] for record in records]))
    assert float(rows["SGD"]["loss"]) == pytest.approx(np.mean([record["loss"] for record in records]))
    assert stem.with_suffix(".md").read_text() in result.out
    kept = json.loads(stem.with_suffix(".json").read_text())["runs"]
    assert [(run["run"], len(run["spectra"])) for run in kept] == [("SGD", 2), ("SAM", 2)]
    assert [one["settings"]["seed"] for one in kept[0]["spectra"]] == [1, 2]
    record = Path(kept[1]["spectra"][0]["file"]).with_suffix(".json")
    assert json.loads(record.read_text())["settings"] == kept[1]["spectra"][0]["settings"]
    succeed(SCRIPT, *flags, "--optimizers", "sgd", "--seeds", "2", "--lr_sched=const")
    assert stem.with_name("small_mlp_sgd_train_epoch_3_lanczos_sched_const_seeds_2.csv").exists()


def test_one_seed_one_optimiser_parts_of_the_data(world, flags, tmp_path):
    succeed(SCRIPT, *flags, "--optimizers", "sgd", "--seeds", "1", "--epochs=3", "--lr_sched=const", "--name=parts",
            "--high_low_specs", "all", "samis_loss:low:0.3", "samis_loss:high:0.30")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "hessian" / world.name / "parts.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["SGD, all", "SGD, samis_loss:low:0.3", "SGD, samis_loss:high:0.3"]
    assert all(row["largest_sd"] == "" for row in rows)


def test_files(world, data_flags, spectra, tmp_path):
    flags = data_flags
    ours = sorted(spectra.glob("train_all_*/1/*/*.pkl"))
    theirs = tmp_path / "pyhessian_eigen_lanczos.pkl"  # without a record
    theirs.write_bytes(pickle.dumps({**pickle.loads(ours[0].read_bytes()), "trace": []}))
    succeed(SCRIPT, *flags, "--files", *ours, theirs, "--labels", "a", "b", "c")
    folder = tmp_path / "hessian" / "several"
    rows = list(csv.DictReader((folder / "spectra.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["a", "b", "c"]
    assert rows[2]["trace"] == rows[2]["loss"] == ""
    assert rows[2]["largest"] == rows[0]["largest"]
    result = succeed(SCRIPT, *flags, "--files", ours[0], "--name=mine")
    assert str(tmp_path / "hessian" / world.name / "mine.png") in result.out


@pytest.mark.parametrize(
    ("more", "status", "says"),
    [
        (("--seeds", "1", "7"), FILE, ("no spectrum of small_mlp", "seed 7", "compute_hessian_eigen.py .*--seed=7")),
        (("--optimizers", "adam"), FILE, ("with adam", "create it with: python compute_hessian_eigen.py")),
        (("--epochs=9",), FILE, ("epoch 9", "--epochs=9")),
        (("--high_low_specs", "forg:low:0.3"), FILE, ("forg:low:0.3", "--high_low_spec=forg:low:0.3")),
        (("--high_low_specs", "forg"), FLAG, ("'forg' is not metric:low|high:fraction",)),
        (("--operator=ggn",), FILE, ("no spectrum",)),
        (("--labels", "a"), FLAG, ("--labels: got 1 for 0 --files",)),
        (("--files", "/none.pkl"), FLAG, ("--model: has no effect with --files",)),
        (("--name=a/b",), FLAG, ("--name: 'a/b' is not a file name",)),
    ],
)
def test_bad_input(flags, tmp_path, more, status, says):
    refuse(SCRIPT, *flags, *more, status=status, says=says, keep=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command_for_a_missing_spectrum_makes_it(world, data_flags, spectra, tmp_path):
    """The command runs in a shell as printed, except for the folders."""
    wanted = ("--model=small_mlp", "--optimizers", "sam", "--seeds", "1", "--epochs=3", "--lr_sched=const",
              "--eigen_split=test", "--operator=ggn", f"--hessian_folder={tmp_path / 'h'}")  # fmt: skip
    line = refuse(SCRIPT, *data_flags, *wanted, status=FILE, says=("create it with: python compute_",))
    words = shlex.split(re.search("create it with: (.*)", line)[1])
    succeed(*words[1:], f"--hessian_folder={tmp_path / 'h'}", "--lanczos_steps=5", "--trace_probes=2",
            *folders(world.base, "datasets", "models"))  # fmt: skip
    succeed(SCRIPT, *data_flags, *wanted)


def test_seeds_are_averaged_over_one_kind_of_run(flags, changed):
    folder, change = changed
    flags = (*flags, f"--hessian_folder={folder}")
    shutil.copytree(next(folder.glob("train_all_*_sgd_*/1")), next(folder.glob("train_all_*_sgd_*")) / "old")
    assert not succeed(SCRIPT, *flags).err.strip()
    change("sgd", 2, tolerance=0.5)
    assert re.search("WARNING .*the spectra differ in tolerance: 0.001, 0.5", succeed(SCRIPT, *flags).err)
    for name, value in (("examples", 30), ("example_hash", "x"), ("subset", "x")):
        folder, change = changed
        (path,) = folder.glob("train_all_*_with_sgd_*/2/epoch_3/*.json")
        whole = path.read_text()
        change("sgd", 2, **{name: value})
        says = (
            r"/2/epoch_3/.*: measures something different from .*/1/epoch_3/",
            rf"{name} \(.* vs. {value}",
            "--seeds",
        )
        refuse(SCRIPT, *flags, status=FILE, says=says)
        path.write_text(whole)


def test_groups_of_different_epochs_schedules_and_examples(flags, changed):
    folder, change = changed
    flags = (*flags, f"--hessian_folder={folder}")
    (run,) = folder.glob("train_all_*_with_sam_*")
    run = run.rename(run.with_name(run.name.replace("const", "cosine")))
    for seed in (1, 2):
        change("sam", seed, experiment=run.name.removeprefix("train_all_").removesuffix("_nobn"))
    assert "the spectra differ in lr_sched: const, cosine" in succeed(SCRIPT, *flags).err
    for seed in (1, 2):
        change("sam", seed, examples=30)
    says = (r"examples \(60 vs. 30\); measure both with the same --subset",)
    refuse(SCRIPT, *flags, status=FILE, says=says)
    for seed in (1, 2):
        change("sam", seed, epoch=5)
        (run / str(seed) / "epoch_3").rename(run / str(seed) / "epoch_5")
    refuse(SCRIPT, *flags, status=FLAG, says=(r"--epochs: .* different epochs: 3 \(SGD\), 5 \(SAM\); choose one",))


def test_bad_files_and_several_epochs(world, data_flags, spectra, tmp_path):
    flags = (*data_flags, "--model=small_mlp")
    refuse(SCRIPT, *data_flags, "--files", "/none.pkl", status=FILE, says=(r"/none\.pkl: file not found",))
    for flag in ("--optimizers", "--seeds", "--epochs"):
        value = "sgd" if flag == "--optimizers" else "1"
        refuse(SCRIPT, *data_flags, "--files", "x.pkl", flag, value, status=FLAG, says=(f"{flag}: has no effect",))
    for content in (b"junk", pickle.dumps([1]), pickle.dumps({"eigenvals": [1.0], "trace": [], "density_eigen": [],
                                                              "density_weight": []})):  # fmt: skip
        (tmp_path / "x.pkl").write_bytes(content)
        refuse(SCRIPT, *data_flags, "--files", tmp_path / "x.pkl", status=FILE, says=(r"x\.pkl: ", "again|recreate"))
    folder = next(spectra.glob("train_all_*_sgd_*/1"))
    record = next(folder.rglob("*.json"))
    for name, value in (
        ("loss", "low"),
        ("loss", None),
        ("trace", [1]),
        ("settings", 1),
        ("settings", {"operator": ["a"]}),
        ("settings", {"eigen_split": "7"}),
        ("settings", {"examples": "all"}),
    ):
        with spoilt(record, json.dumps({**json.loads(record.read_text()), name: value}).encode()):
            refuse(SCRIPT, *flags, status=FILE, says=(rf"{record.name}: ", name))
    (folder / "epoch_4").mkdir()
    for path in (folder / "epoch_3").iterdir():
        (folder / "epoch_4" / path.name).write_bytes(path.read_bytes())
    try:
        refuse(SCRIPT, *flags, status=FLAG, says=("--epochs: found spectra for 2 values; choose one of 3, 4",))
    finally:
        for path in (folder / "epoch_4").iterdir():
            path.unlink()
        (folder / "epoch_4").rmdir()


def measured(eigenvalues, nodes, weights, record=None):
    return StoredSpectrum("x", eigenvalues, nodes, weights, [], record or {})


def test_what_is_drawn():
    one = measured([60.0, 3.0], [[-2.0, 0.0, 60.0]], [[0.1, 0.8, 0.1]], {"trace": 90.0})
    two = measured([50.0, 3.0], [[0.0, 50.0]], [[0.9, 0.1]], {"trace": 60.0})
    figure = spectrum_figure([SpectrumGroup("SGD", [one, two]), SpectrumGroup("SAM", [two])], "title")
    assert len(figure.axes) == 2
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    low, high = axes.get_xlim()
    assert -4 < low < -2.1
    assert 60.1 < high < 62
    x, y = axes.lines[0].get_data()
    assert y.min() == _FLOOR
    for outlier, weight in ((-2.0, 0.05), (50.0, 0.05), (60.0, 0.05)):
        height = y[np.argmin(np.abs(x - outlier))]
        assert height > 0.9 * weight / (width(-2, 60) * (2 * np.pi) ** 0.5), "every outlier is seen"
    assert "55.0 ± 7.1" in axes.texts[0].get_text()
    assert "trace = 75.0 ± 21" in axes.texts[0].get_text()
    assert "SE" not in axes.texts[0].get_text()  # no record has one
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "Density, mean over seeds",
        r"Largest eigenvalue $\lambda_1$ of each seed",
    ]


def test_the_standard_error_of_the_trace():
    """From the record if it has the trace, otherwise from the probes."""
    spectra = [
        measured([1.0], [[0.0, 1.0]], [[0.5, 0.5]], {"trace": 90.0, "trace_standard_error": 3.0}),
        StoredSpectrum("x", [1.0], [[0.0, 1.0]], [[0.5, 0.5]], [1.0, 3.0, 5.0, 7.0], {}),
    ]
    assert spectra[1].trace_error == pytest.approx(np.std([1, 3, 5, 7], ddof=1) / 2)
    figure = spectrum_figure([SpectrumGroup(label, [one]) for label, one in zip("ab", spectra, strict=True)], "title")
    assert "trace = 90.0 (SE 3)" in figure.axes[0].texts[0].get_text()
    assert "trace = 4.00 (SE 1.3)" in figure.axes[1].texts[0].get_text()
    assert figure.legends[0].get_title().get_text() == "SE: standard error of one estimate of the trace"


def test_measures():
    spectrum = measured([10.0, 2.0], [[-1.0, 0.01, 10.0], [-0.05, 0.0, 9.0]], [[0.2, 0.7, 0.1], [0.5, 0.4, 0.1]],
                        {"trace": 30.0, "loss": 0.5})  # fmt: skip
    found = spectrum.measures()
    assert found == pytest.approx({"largest": 10, "last": 2, "trace": 30, "effective": 3, "flat": 0.8,
                                   "negative": 0.1, "loss": 0.5})  # fmt: skip
    group = SpectrumGroup("SGD", [spectrum])
    assert "| SGD | 1     | 10 " in markdown_table([group])
    assert csv_table([group]).splitlines()[1].startswith("SGD,1,10.0,,2.0,,30.0,,3.0,")
    assert np.isnan(measured([1.0], [[1.0]], [[1.0]]).measures()["trace"])


def test_a_spectrum_must_be_what_its_path_says(changed, flags):
    folder, _ = changed
    sgd, sam = (next(folder.glob(f"train_all_*_with_{optimizer}_*")) for optimizer in ("sgd", "sam"))
    where = ("plot_hessian.py", *flags, f"--hessian_folder={folder}", "--optimizers", "sgd")
    for other, says in ((sgd / "1", r"seed \(1 vs. 2\)"), (sam / "2", "experiment .*_sam_")):
        shutil.rmtree(sgd / "2")
        shutil.copytree(other, sgd / "2")
        refuse(*where, status=FILE, says=("/2/", says))
