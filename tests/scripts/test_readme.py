"""The commands in README.md and docs/ run as written, except on few images, for one epoch, with a small model."""

import re
import shlex

import numpy as np
import pytest
from support import ROOT, TRAIN, folders, succeed

README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in (ROOT / "docs").glob("*.md")}
SMALL = "--model=resnet8"  # resnet50 differs only in size
SHORT = {
    "train_split.py": ["--epochs=1", "--save_epochs=last", SMALL],
    "train_full.py": ["--epochs=1", "--save_epochs=last", SMALL],
    "compute_sam_sgd.py": ["--epochs=1", SMALL],
    "average_scores.py": [SMALL],
    "train_prune.py": ["--coreset_epochs=1", "--coreset_pretrain_epochs=1", "--save_epochs=last", SMALL],
}


def section(title, page=README):
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def snippet(text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def commands(text):
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("python ") and "..." not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with a CIFAR-100 of 200 training images from all classes."""
    base = tmp_path_factory.mktemp("readme")
    (base / "datasets").mkdir()
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 200), ("test", 100)):
        arrays[f"x_{part}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = (np.arange(n) % 100)[:, None]
    np.savez(base / "datasets" / "cifar100.npz", **arrays)
    return base


def test_the_papers_commands(folder):
    """The two protocols share run names only for runs of the same kind, so their order does not matter."""
    found = commands(section("The SAMIS paper's commands", PAGES["reproducing"]))
    scripts = [command[0] for command in found]
    assert scripts == ["train_split.py"] * 2 + ["compute_sam_sgd.py"] + ["train_full.py"] * 2 + [
        "compute_sam_sgd.py", "average_scores.py", "plot_images.py", "plot_proxies.py"
    ]  # fmt: skip
    need = {"train": ("datasets", "models", "metrics", "log", "resume_ckpts"),
            "compute": ("datasets", "models", "metrics"), "average": ("datasets", "metrics"),
            "plot": ("datasets", "metrics", "plots")}  # fmt: skip
    for script, *flags in found[3:]:
        more = ["--modes", "samis_loss", "--classes", "apple"] if script == "plot_images.py" else []
        succeed(script, *flags, *SHORT.get(script, []), *folders(folder, *need[script.split("_")[0]]), *more)
    assert (folder / "plots" / "images" / "cifar100" / "lowest_samis_loss_5" / "apple.png").exists()


def test_the_core_commands_print_what_the_readme_shows(tmp_path):
    """Numbers are not compared, since these runs have one epoch, nor are the lines that the README leaves out."""
    need = {"train": TRAIN, "compute": TRAIN[:3], "average": ("datasets", "metrics"), "plot": ("datasets", "plots")}
    printed, shown = {}, {}
    for line in section("The core commands").splitlines():
        if line.startswith("python "):
            script, *flags = shlex.split(line)[1:]
            epochs = [flag.split("=")[0] + "=1" for flag in flags if "epochs=" in flag]
            where = folders(tmp_path, *need[script.split("_")[0]])
            if script in ("plot_images.py", "train_prune.py"):
                where.append(f"--scores_folder={tmp_path / 'metrics'}")
            quick = ["--only_overview"] if script == "plot_images.py" else []
            printed[line] = succeed(script, *flags, *epochs, *quick, *where).out.replace(f"{tmp_path}/", "")
            shown[line] = []
        elif line.startswith("# "):
            shown[list(printed)[-1]].append(line[2:])
    assert [command.split()[1] for command, lines in shown.items() if lines] == [
        "train_full.py", "compute_sam_sgd.py", "average_scores.py", "plot_images.py", "train_prune.py"
    ]  # fmt: skip
    for command, lines in shown.items():
        found = [masked(line) for line in printed[command].splitlines()]
        assert [line for line in lines if masked(line) not in found] == [], printed[command]


def masked(line):
    """The line with every number replaced, in any notation."""
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "0", line)


def test_a_command_of_the_split_protocol(folder):
    script, *flags = commands(section("The SAMIS paper's commands", PAGES["reproducing"]))[1]
    # two examples per class are too few for ten splits: all but the last are empty, which the script reports
    from support import call

    result = call(
        script,
        *flags,
        *SHORT[script],
        *folders(folder, "datasets", "models", "metrics", "log", "resume_ckpts"),
        "--samis_validation_split_index=1",
    )
    assert result.status in (1, 2)
    assert "split" in result.complaint
    succeed(
        script,
        *flags,
        *SHORT[script],
        *folders(folder, "datasets", "models", "metrics", "log", "resume_ckpts"),
        "--samis_validation_split_index=10",
        "--dataset=digits",
        "--model=mlp",
    )


def test_the_pruning_commands(folder, tmp_path):
    """The paper's command, then selection only and training on its file, then a grid."""
    found = commands(PAGES["pruning"])
    assert [command[0].split("_")[0] for command in found] == [
        "train", "train", "fetch", "train", "select", "train", "compare", "compare"
    ]  # fmt: skip
    large, few_shot, _, paper, select, train, compare, _ = found  # the last takes hours
    where = folders(tmp_path, "datasets", "models", "metrics", "log", "resume_ckpts")
    memorization = tmp_path / "metrics" / "memorization" / "cifar100_infl_matrix.npz"
    memorization.parent.mkdir(parents=True)
    np.savez(memorization, tr_mem=np.linspace(0, 1, 200))
    data = f"--datasets_folder={folder / 'datasets'}"
    shipped = f"--scores_folder={ROOT / 'src' / 'metrics'}"  # the commands as written do not set a folder
    succeed(*large, "--coreset_epochs=1", *where, shipped)
    succeed(*few_shot, "--coreset_epochs=1", *where, shipped)
    succeed(*paper, *SHORT["train_prune.py"], *where, data)
    (run,) = (tmp_path / "models").glob("min_mem_static_coreset_large_0.8_resnet8_over_cifar100/seed_1234")
    assert (run / "selection.npz").exists()
    succeed(*select, "--coreset_pretrain_epochs=1", f"--out={tmp_path / 'craig.npz'}", *where)
    succeed(*train, f"--selection={tmp_path / 'craig.npz'}", "--coreset_epochs=1", *where)
    short = ("--fractions", "0.1", "--seeds", "1", "--coreset_epochs=1", "--coreset_pretrain_epochs=1")
    succeed(*compare, *short, *where, shipped, *folders(tmp_path, "plots"))
    assert (tmp_path / "plots" / "pruning" / "lenet_over_digits" / "comparison.png").exists()


def test_the_geometry_commands(tmp_path):
    """Training, spectra and kernels for few examples, and both figures."""
    found = commands(PAGES["geometry"].split("\n## ")[0])
    assert [command[0] for command in found] == [
        "train_full.py", "train_full.py", "compute_hessian_eigen.py", "compute_hessian_eigen.py", "plot_hessian.py",
        "compute_ntk.py", "plot_ntk.py"
    ]  # fmt: skip
    need = {"train_full.py": ("datasets", "models", "metrics", "log", "resume_ckpts"),
            "compute_hessian_eigen.py": ("datasets", "models", "hessian"), "plot_hessian.py": ("hessian", "plots"),
            "compute_ntk.py": ("datasets", "models", "ntk"), "plot_ntk.py": ("ntk", "plots")}  # fmt: skip
    less = {"train_full.py": ("--subset=200",),
            "compute_hessian_eigen.py": ("--subset=20", "--lanczos_steps=8", "--max_steps=8", "--trace_probes=2"),
            "compute_ntk.py": ("--subset=200", "--m_samples=2", "--lower_index", "0", "100", "198")}  # fmt: skip
    for script, *flags in found:
        succeed(script, *flags, *less.get(script, ()), *folders(tmp_path, *need[script]))
    assert len(list((tmp_path / "plots").rglob("*.png"))) == 2


def test_the_python_example():
    names = {}
    exec(snippet(PAGES["scores"]), names)
    assert len(names["proxy"].get_sorted_indices()[-10:]) == 10


def test_the_readme_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(snippet(README), names := {})
    listed = capsys.readouterr().out
    assert all(str(index) in listed for index in names["found"].most_sensitive(10))


def test_the_library_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet(PAGES["mpe"]), names)
    scores = names["found"].scores
    assert len(scores) == 1438
    assert scores[names["found"].most_sensitive(10)].min() >= scores[names["found"].least_sensitive(10)].max()
    assert (tmp_path / "metrics" / "mpe" / "mpe_digits.pkl").exists()
    drawn = succeed("plot_images.py", "--dataset=digits", "--modes", "mpe", "--only_overview",
                    *folders(tmp_path, "metrics", "plots"))  # fmt: skip
    assert "overview_mpe_5.png" in drawn.out


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_every_file_that_a_page_names_exists(path):
    text = path.read_text()
    for name, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", text):
        target = path.parent / name if name else path
        assert target.exists(), name
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor[1:] in [
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings
        ]
    for name in re.findall(r"`([a-z_]+\.py)`", text):
        assert any((ROOT / folder / name).exists() for folder in ("", "src", "examples", "src/metrics")), name


def test_every_page_is_one_click_from_the_readme():
    assert [name for name in PAGES if f"](docs/{name}.md)" not in README] == []
