r"""How well scores and label-error methods find planted label noise: precision and AUROC, in one table.

    python -m benchmarks.label_noise --out=runs/label_noise -- --model=small_mlp --epochs=20 --batch_size=32 \
        --learning_rate=0.05 --lr_sched=cosine
    python -m benchmarks.label_noise --dataset=cifar10 --examples=10000 --test=1000 --rates 10 --seeds 1 \
        --out=runs/cifar10_noise -- --model=resnet8 --epochs=12 --batch_size=128 --learning_rate=0.1 --lr_sched=cosine

For every kind of noise, rate and seed, writes the data set with noise to an npz file and runs the scripts on it: one
ordinary training run (all its scores) and five folds (out-of-sample probabilities). The flags after ``--`` configure
both. With --samis, also trains with SAM. A case that was interrupted continues, and a finished one is not repeated.
Writes label_noise.json and label_noise.md to --out. cleanlab is included if it is installed.

Symmetric noise gives a label to another class with equal probability; class-dependent noise moves class c to c + 1.
Exactly --rates percent of all labels are wrong. Precision is that of the most suspicious examples, as many as there
are wrong labels.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from src.artifacts.io import write_json, write_npz, write_text
from src.artifacts.paths import ROOT
from src.artifacts.store import read_record, read_scores
from src.datasets import DataConfig, parse_subset
from src.metrics import SCORES
from src.metrics.compare import auroc
from src.metrics.label_errors import FLOOR, audit, mean_rank, read_probabilities

NOISE = ("symmetric", "class_dependent")
FOLDS = 5
OWN, COMBINED = "label_error", "label_error and aum"


def plant(labels: np.ndarray, kind: str, rate: float, classes: int, seed: int) -> np.ndarray:
    """Give wrong labels to a share of the examples.

    Args:
        labels: ``(n,)``.
        kind: One of ``NOISE``.
        rate: Percentage of wrong labels.
        classes: C.
        seed: Seed of the noise.

    Returns:
        The labels with noise ``(n,)``.
    """
    generator = np.random.default_rng([seed, NOISE.index(kind), round(100 * rate)])
    wrong = generator.choice(len(labels), round(rate / 100 * len(labels)), replace=False)
    shift = generator.integers(1, classes, len(wrong)) if kind == "symmetric" else 1
    noisy = labels.copy()
    noisy[wrong] = (noisy[wrong] + shift) % classes
    return noisy


def write_noisy(path: Path, args: argparse.Namespace, kind: str, rate: float, seed: int) -> None:
    """Write the data set with noise, and the labels without it, to an npz file, unless it exists."""
    if path.exists():
        return
    import torch

    train, test = DataConfig(args.dataset).load(args.datasets_folder)
    labels = train.labels.numpy()
    arrays = {}
    for name, part, count in (("train", train, args.examples), ("test", test, args.test)):
        rows = np.arange(len(part)) if count is None else parse_subset(count, len(part), part.labels.numpy())
        arrays[f"x_{name}"] = part.fetch(torch.from_numpy(rows)).permute(0, 2, 3, 1).numpy()
        arrays[f"y_{name}"] = part.labels.numpy()[rows]
    arrays["clean"] = arrays["y_train"]
    arrays["y_train"] = plant(arrays["clean"], kind, rate, int(labels.max()) + 1, seed)
    write_npz(path, **arrays)


def run(script: str, *flags: str) -> None:
    """Run a script of this project, and stop if it fails."""
    subprocess.run([sys.executable, str(ROOT / script), *flags], check=True, stdout=subprocess.DEVNULL)


def measure(data: Path, folder: Path, args: argparse.Namespace, seed: int) -> None:
    """Train on a data set with noise and score its examples.

    Args:
        data: The npz file.
        folder: The folder of all results.
        args: This script's flags.
        seed: The seed of the training runs.
    """
    places = {name: f"--{name}_folder={folder / name}" for name in ("models", "metrics", "log", "resume_ckpts")}
    dataset, seeded = f"--dataset=npz:{data}", f"--seed={seed}"
    given = dict(flag.lstrip("-").split("=", 1) for flag in args.training if "=" in flag)
    usual = {name: f"--{name}={given[name]}" for name in ("model", "lr_sched", "epochs") if name in given}
    for optimizer in ("sgd", "sam") if args.samis else ("sgd",):
        proxies = ["--measure_proxies", "--input_gradients"] if optimizer == "sgd" else []
        run("train_full.py", dataset, seeded, f"--optimizer={optimizer}", *args.training, *proxies,
            "--save_epochs=last", "--resume", *places.values())  # fmt: skip
    average = ("average_scores.py", dataset, usual["model"], "--seeds", str(seed), "--overwrite", places["metrics"])
    if args.samis:
        pair = [flag for name, flag in usual.items() if name in ("model", "lr_sched", "epochs")]
        run("compute_sam_sgd.py", dataset, seeded, *pair, "--protocol=full", places["models"], places["metrics"])
        run(*average)
    run(*average, "--optimizer=sgd", *([usual["lr_sched"]] if "lr_sched" in usual else []))
    run("compute_memorization.py", dataset, seeded, *args.training, f"--folds={FOLDS}",
        f"--members={FOLDS * args.rounds}", "--ensemble=auto", places["metrics"])  # fmt: skip


def suspicions(
    metrics: Path, labels: np.ndarray, classes: int
) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]:
    """Score the examples in every way.

    Args:
        metrics: A metrics folder with scores of one data set.
        labels: The labels with noise ``(n,)``.
        classes: C.

    Returns:
        The scores, high for suspicious examples; their costs in epoch-equivalents; and the estimated numbers of wrong
        labels, by method.
    """
    found, costs = {}, {}
    for mode, score in SCORES.items():
        for path in (metrics / score.folder).glob(score.file.format(name=mode, dataset="*")):
            found[mode] = read_scores(path)
            costs[mode] = read_record(path).get("cost")
    (source,) = (metrics / "memorization").glob("out_of_sample_*.npz")
    p = read_probabilities(source, len(labels), classes, "")
    own = audit(p, labels)
    found[OWN], costs[OWN] = own.score, costs["out_prob"]
    estimates = {OWN: own.errors, "expected count": own.expected, "confident count": own.confident}
    found[COMBINED], costs[COMBINED] = mean_rank([own.score, found["aum"]]), costs["out_prob"] + costs["aum"]
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        print("cleanlab is not installed: its rows are left out", file=sys.stderr)
    else:
        p = np.clip(p, FLOOR, None)
        p /= p.sum(1, keepdims=True)
        for method in ("self_confidence", "normalized_margin", "confidence_weighted_entropy"):
            found[f"cleanlab {method}"] = -get_label_quality_scores(labels, p, method=method)
        ranked = find_label_issues(labels, p, return_indices_ranked_by="normalized_margin", n_jobs=1)
        issues = found["cleanlab normalized_margin"].copy()  # the selected examples first, then the others
        issues[ranked] = issues.max() + np.arange(len(ranked), 0, -1)
        found["cleanlab find_label_issues"] = issues
        costs |= {name: costs["out_prob"] for name in found if name.startswith("cleanlab")}
        estimates["cleanlab find_label_issues"] = len(ranked)
    return found, costs, estimates


def precision(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The expected share of wrong labels among the examples with the highest scores, if ties are broken at random.

    Args:
        scores: ``(n,)``.
        wrong: Which labels are wrong, bool ``(n,)``. As many examples are considered.
    """
    count = np.count_nonzero(wrong)
    limit = np.sort(scores)[-count]
    above, tied = scores > limit, scores == limit
    return float((wrong[above].sum() + (count - above.sum()) * wrong[tied].mean()) / count)


def table(cases: list[dict]) -> str:
    """Format the results as Markdown: means over seeds of precision and AUROC, best mean precision first."""
    keys = list(dict.fromkeys((case["noise"], case["rate"]) for case in cases))
    names = list(dict.fromkeys(name for case in cases for name in case["scores"]))
    rows = []
    for name in names:
        cells = [
            np.mean([[case["scores"][name][kind] for kind in ("precision", "auroc")]
                     for case in cases if (case["noise"], case["rate"]) == key and name in case["scores"]], axis=0)
            for key in keys
        ]  # fmt: skip
        cost = next(case["scores"][name]["cost"] for case in cases if name in case["scores"])
        rows.append((name, cells, cost))
    rows.sort(key=lambda row: -np.mean([cell[0] for cell in row[1]]))
    header = ["score", *(f"{noise.replace('_', '-')} {rate:g} %" for noise, rate in keys), "mean", "cost (epochs)"]
    lines = [f"| {' | '.join(header)} |", f"|---{'|---:' * (len(header) - 1)}|"]
    for name, cells, cost in rows:
        values = [f"{cell[0]:.3f} / {cell[1]:.3f}" for cell in (*cells, np.mean(cells, axis=0))]
        lines.append(f"| {name} | {' | '.join(values)} | {'unknown' if cost is None else f'{cost:.0f}'} |")
    lines += ["", f"| estimated number of wrong labels, share of the true one | {' | '.join(header[1:-2])} |"]
    lines.append(f"|---{'|---:' * len(keys)}|")
    for name in cases[0]["estimates"]:
        shares = [
            np.mean([case["estimates"][name] / case["wrong"]
                     for case in cases if (case["noise"], case["rate"]) == key])
            for key in keys
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    seeds = sorted({case["seed"] for case in cases})
    return "\n".join([*lines, "", f"Precision / AUROC, mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}.", ""])


def main() -> None:
    """Plant noise, train, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--examples", type=int, help="training examples to use (default: all)")
    parser.add_argument("--test", type=int, help="test examples to use (default: all)")
    parser.add_argument("--noise", nargs="+", choices=NOISE, default=NOISE)
    parser.add_argument("--rates", nargs="+", type=float, default=[5, 10, 20], help="percent of wrong labels")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--rounds", type=int, default=1, help="rounds of five folds")
    parser.add_argument("--samis", action="store_true", help="also train with SAM, for the scores of a pair")
    parser.add_argument("--datasets_folder", type=Path, default=ROOT / "data")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "label_noise")
    parser.add_argument("training", nargs="+", help="flags of train_full.py and compute_memorization.py, after --")
    args = parser.parse_args()
    cases = []
    for kind in args.noise:
        for rate in args.rates:
            for seed in args.seeds:
                data = args.out / f"{args.dataset}_{kind}_{rate:g}_{seed}.npz"
                record = data.with_suffix(".json")
                settings = {"training": args.training, "rounds": args.rounds, "samis": args.samis}
                if not record.exists():
                    write_noisy(data, args, kind, rate, seed)
                    folder, began = data.with_suffix(""), time.perf_counter()
                    measure(data, folder, args, seed)
                    arrays = np.load(data)
                    labels, clean = arrays["y_train"], arrays["clean"]
                    found, costs, estimates = suspicions(folder / "metrics", labels, int(clean.max()) + 1)
                    wrong = labels != clean
                    scores = {
                        name: {
                            "precision": precision(values, wrong),
                            "auroc": auroc(values, wrong),
                            "cost": costs[name],
                        }
                        for name, values in found.items()
                    }
                    facts = {
                        "noise": kind,
                        "rate": rate,
                        "seed": seed,
                        "wrong": int(wrong.sum()),
                        "estimates": estimates,
                    }
                    seconds = time.perf_counter() - began
                    write_json(record, {**facts, "settings": settings, "seconds": seconds, "scores": scores})
                cases.append(json.loads(record.read_text()))
                if cases[-1]["settings"] != settings:
                    parser.error(f"{record} was made with {cases[-1]['settings']}; choose another --out")
    text = table(cases)
    write_json(args.out / "label_noise.json", cases)
    write_text(args.out / "label_noise.md", text)
    print(text)


if __name__ == "__main__":
    main()
