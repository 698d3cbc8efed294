#!/usr/bin/env python3
"""Record what one small run of every script writes, to compare two commits.

  python tests/golden_record.py record CHECKOUT OUT.json    (runs every script of that checkout on digits)
  python tests/golden_record.py compare BEFORE.json AFTER.json

A record holds, per command: exit status, standard output (numbers of seconds and paths of the run removed), and for
every file a digest of its content (arrays, tensors, plain values, pixels; not time stamps, seconds or the machine).
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VOLATILE = {
    "seconds",
    "train_seconds",
    "machine",
    "total_seconds",
    "time",
    "times",
    "written",
    "elapsed",
    "selection_selection_file",
}
DATA = ["--dataset=digits"]
TRAIN = ["--epochs=3", "--batch_size=64", "--learning_rate=0.05", "--lr_sched=const"]
FOLDERS = {
    "datasets": "data",
    "models": "ckpts",
    "metrics": "metrics",
    "log": "logs",
    "resume_ckpts": "resume",
    "hessian": "hessian",
    "ntk": "ntks",
    "plots": "plots",
    "pickles": "pickles",
}


def where(*names):
    return [f"--{name}_folder={FOLDERS[name]}" for name in names]


RUN = where("datasets", "models", "metrics", "log", "resume_ckpts")
MPE = [
    "--dataset=digits",
    "--model=small_mlp",
    "--bs=64",
    "--delta=2",
    "--lr=0.02",
    "--epochs=2",
    "--name_exp=x",
    *where("datasets", "models", "log", "resume_ckpts", "pickles"),
]
PRUNE = [
    "--dataset=digits",
    "--model=lenet",
    "--coreset_pretrain_epochs=3",
    "--coreset_pretrain_lr=0.05",
    "--coreset_networks=2",
    *RUN,
]
DOWN = ["--coreset_epochs=1", "--batch_size=64", "--learning_rate=0.05", "--lr_sched=const"]

# chains run in parallel; within a chain, each command reads the files of the previous ones
CHAINS = {
    "samis": [
        *(
            [
                "train_full.py",
                *DATA,
                "--model=lenet",
                f"--optimizer={o}",
                f"--seed={s}",
                *TRAIN,
                "--measure_proxies",
                "--data_augmentation",
                *RUN,
            ]
            for s in (1, 2)
            for o in ("sgd", "sam")
        ),
        *(
            [
                "compute_sam_sgd.py",
                *DATA,
                "--model=lenet",
                f"--seed={s}",
                "--epochs=3",
                *where("datasets", "models", "metrics"),
            ]
            for s in (1, 2)
        ),
        ["average_scores.py", *DATA, "--model=lenet", "--seeds", "1", "2", *where("datasets", "metrics")],
        [
            "average_scores.py",
            *DATA,
            "--model=lenet",
            "--seeds",
            "1",
            "2",
            "--optimizer=sgd",
            "--window=2",
            "--el2n_epochs",
            "1",
            "2",
            *where("datasets", "metrics"),
        ],
        [
            "plot_images.py",
            *DATA,
            "--modes",
            "samis_loss",
            "csl",
            "--scores_folder=metrics",
            *where("datasets", "plots"),
        ],
        [
            "plot_proxies.py",
            *DATA,
            "--modes",
            "samis_loss",
            "csl",
            "--scores_folder=metrics",
            *where("datasets", "plots"),
        ],
        [
            "compute_hessian_eigen.py",
            *DATA,
            "--model=lenet",
            "--epochs=3",
            "--optimizer=sgd",
            "--subset=100",
            "--lanczos_steps=8",
            "--probes=1",
            "--trace_probes=2",
            "--top_n=2",
            "--max_steps=12",
            *where("datasets", "models", "metrics", "hessian"),
        ],
        [
            "plot_hessian.py",
            *DATA,
            "--model=lenet",
            "--optimizers",
            "sgd",
            "--epochs=3",
            *where("datasets", "hessian", "plots"),
        ],
        [
            "compute_ntk.py",
            *DATA,
            "--model=lenet",
            "--ntk_chosen_metric=samis_loss",
            "--m_samples=4",
            "--ntk_velocity_epoch",
            "1",
            "--seeds",
            "1",
            "2",
            *where("datasets", "models", "metrics", "ntk"),
        ],
        ["plot_ntk.py", *DATA, "--model=lenet", "--metrics", "samis_loss", *where("ntk", "plots")],
        ["train_prune.py", *PRUNE, *DOWN, "--coreset_func=min_sam-sgd-loss", "--coreset_fraction=0.3"],
        ["fetch_scores.py", "--dataset=digits"],
    ],
    "splits": [
        *(
            [
                "train_split.py",
                *DATA,
                "--model=small_mlp",
                f"--optimizer={optimizer}",
                "--samis_validation_split_index=all",
                "--epochs=1",
                "--batch_size=128",
                "--learning_rate=0.1",
                "--lr_sched=step",
                "--save_epochs=last",
                *RUN,
            ]
            for optimizer in ("sgd", "sam")
        ),
        [
            "compute_sam_sgd.py",
            *DATA,
            "--model=small_mlp",
            "--epochs=1",
            "--protocol=split",
            *where("datasets", "models", "metrics"),
        ],
    ],
    "pruning": [
        *(
            ["train_prune.py", *PRUNE, *DOWN, f"--coreset_func={f}", "--coreset_fraction=0.3"]
            for f in (
                "random",
                "craig",
                "glister",
                "gradmatch",
                "forget",
                "grand",
                "el2n",
                "infobatch",
                "graph_cut",
                "ccs",
                "moderate",
                "d2",
                "k_center",
                "herding",
                "infobatch_dynamic",
            )
        ),
        *(
            ["train_prune.py", *PRUNE, *DOWN, f"--coreset_func={f}", "--coreset_fraction=0.3", "--score_window=2"]
            for f in ("dual", "tdds")
        ),
        [
            "select_coreset.py",
            *DATA,
            "--model=lenet",
            "--coreset_func=craig",
            "--coreset_mode=few_shot",
            "--shots=5",
            "--coreset_pretrain_epochs=3",
            "--coreset_pretrain_lr=0.05",
            "--out=craig.npz",
            *where("datasets", "models", "metrics", "log", "resume_ckpts"),
        ],
        ["train_prune.py", *DATA, "--model=lenet", "--selection=craig.npz", *DOWN, *RUN],
        [
            "compare_pruning.py",
            *DATA,
            "--model=lenet",
            "--funcs",
            "random",
            "forget",
            "--fractions",
            "0.1",
            "0.3",
            "--seeds",
            "1",
            "--full",
            "--coreset_pretrain_epochs=3",
            "--coreset_pretrain_lr=0.05",
            *DOWN,
            *RUN,
            *where("plots"),
        ],
    ],
    "mpe": [
        [
            "examples/1_loo_iterations.py",
            *MPE,
            "--optim_var",
            "--optimizer=iblr",
            "--write_scores",
            *where("metrics"),
        ],
        ["examples/plot_loo_iterations.py", "--name_exp=x", *where("pickles", "plots")],
        [
            "examples/2_loo_l2reg.py",
            *[w for w in MPE if w != "--delta=2"],
            "--n_exp=3",
            "--deltas_start=0",
            "--deltas_stop=2",
        ],
        ["examples/plot_loo_l2reg.py", "--name_exp=x", "--window=2", *where("pickles", "plots")],
        [
            "examples/3_validation_sensitivities.py",
            *MPE,
            "--n_retrain=4",
            "--n_spread=4",
            "--epochs_retrain=1",
            "--class_cov=full",
        ],
        ["examples/plot_validation_sensitivities.py", "--name_exp=x", *where("pickles", "plots")],
        ["examples/4_evolving_sensitivities.py", *MPE],
        ["examples/plot_evolving_sensitivities.py", "--name_exp=x", *where("pickles", "plots")],
        ["examples/5_loco.py", *MPE, "--epochs_retrain=1"],
        ["examples/plot_loco.py", "--names_exp", "x", *where("pickles", "plots")],
        ["examples/6_group_removal.py", *MPE, "--n_groups=4", "--group_size=5", "--epochs_retrain=1"],
        ["examples/plot_group_removal.py", "--name_exp=x", *where("pickles", "plots")],
        [
            "examples/7_von_logistic.py",
            *(flag for flag in MPE if not flag.startswith(("--model=", "--epochs="))),
            "--updates=20",
        ],
        ["examples/plot_von_logistic.py", "--name_exp=x", *where("pickles", "plots")],
    ],
}
BAD = [
    ["train_full.py", "--dataset=nope"],
    ["train_full.py", "--model=nope"],
    ["train_full.py", "--epochs=0"],
    ["train_full.py", "--learning_rate=-1"],
    ["train_full.py", "--dataset=npz:missing.npz"],
    ["train_full.py", "--nope"],
    ["train_split.py", "--samis_validation_split_index=11"],
    ["train_prune.py", "--coreset_func=nope"],
    ["train_prune.py", "--coreset_func=random", "--coreset_fraction=2"],
    ["compute_sam_sgd.py", "--dataset=digits", "--models_folder=none"],
    ["average_scores.py", "--dataset=digits", "--seeds", "1", "1"],
    ["average_scores.py", "--dataset=digits", "--seeds", "1", "--metrics_folder=none"],
    ["compute_ntk.py", "--dataset=digits", "--models_folder=none"],
    ["compute_hessian_eigen.py", "--dataset=digits", "--models_folder=none"],
    ["plot_hessian.py", "--dataset=digits", "--hessian_folder=none"],
    ["plot_ntk.py", "--dataset=digits", "--ntk_folder=none"],
    ["plot_images.py", "--dataset=digits", "--modes", "nope"],
    ["plot_proxies.py", "--dataset=digits", "--modes", "nope"],
    ["examples/1_loo_iterations.py", "--lr=0"],
    ["examples/plot_loco.py", "--name_exp=none"],
    ["compare_pruning.py", "--funcs", "nope"],
    ["select_coreset.py", "--coreset_func=nope"],
    ["fetch_scores.py", "--dataset=nope"],
]


def clean(text, *paths):
    for path in paths:
        text = text.replace(str(path), "BASE")
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    text = re.sub(r"[\d.]+ (s|ms|min|MiB|KiB|GiB|MB|KB|B|it/s|seconds|minutes)\b", r"N \1", text)
    text = re.sub(r"selection_[0-9a-f]{8}", "selection_HASH", text)  # the file contains times in seconds
    return re.sub(r"[ \t]+", " ", text)


def plain(value):
    """Convert a value to JSON, with arrays and tensors as digests and without volatile keys."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().numpy() if value.dtype != torch.bfloat16 else value.float().numpy()
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "US" and value.ndim == 0:
            try:
                return plain(json.loads(str(value)))
            except ValueError:
                return str(value)
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]}"
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, dict):
        if len(value) > 200 and all(isinstance(v, float) for v in value.values()):
            return plain(np.array(sorted((int(k), v) for k, v in value.items())))
        return {str(k): plain(v) for k, v in value.items() if k not in VOLATILE and "seconds" not in str(k)}
    if isinstance(value, list | tuple):
        if len(value) > 50 and all(isinstance(v, float) for v in value):
            return plain(np.array(value))
        return [plain(v) for v in value]
    if isinstance(value, float | int | str | bool | type(None)):
        return value
    if hasattr(value, "__dict__"):
        return plain(vars(value))
    return repr(value)


def content(path):
    import numpy as np
    import torch
    from PIL import Image

    kind = path.name.rsplit(".", 1)[-1]
    if path.name.endswith((".pt", ".pth.tar")):
        return plain(torch.load(path, map_location="cpu", weights_only=True))
    if kind == "npz":
        with np.load(path) as file:
            return plain({name: file[name] for name in sorted(file.files)})
    if kind == "json":
        return plain(json.loads(path.read_text()))
    if kind == "pkl":
        return plain(pickle.loads(path.read_bytes()))
    if kind == "png":
        return plain(np.asarray(Image.open(path)))
    if kind in ("txt", "md"):
        return hashlib.sha256(clean(path.read_text()).encode()).hexdigest()[:16]
    return "there"  # logs, locks, pdf, tables with seconds


def scrub(value, *paths):
    text = json.dumps(value)
    for path in paths:
        text = text.replace(str(path), "BASE")
    return json.loads(text)


def run(checkout, base, command):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, str(checkout / command[0]), *command[1:]], cwd=base, env=env, capture_output=True, text=True
    )
    error = done.stderr.strip().splitlines()
    return {
        "status": done.returncode,
        "out": clean(done.stdout, base, checkout),
        "last": clean(error[-1], base, checkout) if error and done.returncode else "",
    }


def chain(checkout, name):
    base = Path(tempfile.mkdtemp(prefix=f"golden-{name}-"))
    record = {}
    for number, command in enumerate(CHAINS[name]):
        key = f"{number:02d} " + " ".join(word for word in command if "_folder=" not in word)
        record[key] = run(checkout, base, command)
        if record[key]["status"]:
            print(name, key, record[key]["last"], file=sys.stderr)
    record["files"] = {
        clean(str(path.relative_to(base))): scrub(content(path), base, checkout)
        for path in sorted(base.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
    shutil.rmtree(base)
    return record


def make(checkout, out):
    checkout = Path(checkout).resolve()
    scripts = sorted(
        p.relative_to(checkout).as_posix() for p in [*checkout.glob("*.py"), *checkout.glob("examples/*.py")]
    )
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(2) as pool:
        helps = pool.map(lambda s: run(checkout, Path(base), [s, "--help"]), scripts)
        record = {"help": dict(zip(scripts, helps, strict=True))}
        record["bad"] = {
            " ".join(c): r for c, r in zip(BAD, pool.map(lambda c: run(checkout, Path(base), c), BAD), strict=True)
        }
        record["chains"] = dict(zip(CHAINS, pool.map(lambda n: chain(checkout, n), CHAINS), strict=True))
    Path(out).write_text(json.dumps(record, indent=1, sort_keys=True))


def differing(before, after, path=""):
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted(before.keys() | after.keys()):
            if key not in before or key not in after:
                yield f"{path}/{key}: only {'before' if key in before else 'after'}"
            else:
                yield from differing(before[key], after[key], f"{path}/{key}")
    elif before != after:
        yield f"{path}: {str(before)[:300]!r} -> {str(after)[:300]!r}"


if __name__ == "__main__":
    if sys.argv[1] == "record":
        make(sys.argv[2], sys.argv[3])
    else:
        lines = list(differing(*(json.loads(Path(p).read_text()) for p in sys.argv[2:4])))
        print(*lines, sep="\n")
        print(f"{len(lines)} differences")
