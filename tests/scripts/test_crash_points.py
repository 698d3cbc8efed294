"""Runs killed between any two file changes: rerunning the command gives the same result as an uninterrupted run.

Each run is a forked process that is killed without cleanup before its k-th rename or removal of a file.
"""

import json
import os
import shutil
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from support import TRAIN, call, folders, write_blobs

from src.artifacts.io import read_checkpoint, read_json, read_npz, read_pickle

KILLED = 99
MOST = int(os.environ.get("CRASH_POINTS", "3"))  # crash points tested per script, evenly spaced, out of up to 60
READERS = {".json": read_json, ".npz": read_npz, ".pkl": read_pickle, ".pt": read_checkpoint, ".tar": read_checkpoint}
DATA = ("datasets", "models", "metrics")
NETWORK = ("--model=small_mlp", "--epochs=2", "--batch_size=20", "--learning_rate=0.05", "--lr_sched=const")
EXPERIMENT = ("--model=small_mlp", "--epochs=2", "--bs=20", "--lr=0.01", "--lrmin=0", "--name_exp=small", "--resume")
SPECTRUM = ("--model=small_mlp", "--epochs=2", "--top_n=1", "--lanczos_steps=4", "--max_steps=4", "--trace_probes=2")
KERNELS = ("--model=small_mlp", "--ntk_chosen_metric=samis_loss", "--m_samples=3", "--lower_index", "0", "30",
           "--ntk_velocity_epoch", "1", "--seeds", "1")  # fmt: skip
SCRIPTS = {
    "train_full.py": (*NETWORK, "--seed=2", "--measure_proxies", "--resume"),
    "train_full.py again": (*NETWORK, "--seed=2"),
    "train_split.py": (*NETWORK, "--samis_validation_split_index=2", "--resume"),
    "compute_sam_sgd.py": ("--model=small_mlp", "--epochs=2"),
    "average_scores.py": ("--model=small_mlp", "--seeds", "1", "--overwrite"),
    "select_coreset.py": ("--model=small_mlp", "--coreset_func=grand", "--coreset_networks=2",
                          "--coreset_pretrain_epochs=1"),
    "train_prune.py": (*NETWORK[:1], *NETWORK[2:], "--coreset_epochs=2", "--coreset_func=csl",
                       "--coreset_fraction=0.5",
                       "--coreset_pretrain_epochs=2", "--resume"),
    "compute_hessian_eigen.py": (*SPECTRUM, "--save_every=2", "--resume"),
    "compute_hessian_eigen.py again": (*SPECTRUM, "--save_every=2"),
    "compute_ntk.py": KERNELS,
    "examples/1_loo_iterations.py": (*EXPERIMENT, "--delta=1", "--write_scores"),
    "examples/2_loo_l2reg.py": (*EXPERIMENT, "--n_exp=2"),
    "examples/3_validation_sensitivities.py": (*EXPERIMENT, "--delta=1", "--n_retrain=2", "--epochs_retrain=1"),
    "examples/4_evolving_sensitivities.py": (*EXPERIMENT, "--delta=1"),
    "examples/5_loco.py": (*EXPERIMENT, "--delta=1", "--epochs_retrain=1"),
    "examples/6_group_removal.py": (*EXPERIMENT, "--classes", "0", "2", "--delta=1", "--epochs_retrain=1",
                                    "--n_groups=3", "--group_size=4"),
    "examples/7_von_logistic.py": ("--bs=20", "--updates=4", "--checkpoints", "2", "3", "4", "--name_exp=small",
                                   "--resume"),
}  # fmt: skip


def flags_of(name, base):
    """A script's flags. Each script uses separate folders, except for the shared ones."""
    script = name.split()[0]
    if script.startswith("examples/"):
        where = folders(base, "datasets", "models", "log", "resume_ckpts", "pickles")
        where += folders(base, "metrics") if "--write_scores" in SCRIPTS[name] else []
    elif script.startswith("compute_"):
        kind = {"compute_hessian_eigen.py": ("hessian",), "compute_ntk.py": ("ntk",)}.get(script, ())
        where = folders(base, *(DATA[:2] if kind == ("hessian",) else DATA), *kind)
    else:
        where = folders(base, *(TRAIN if script != "average_scores.py" else ("datasets", "metrics")))
    return script, (f"--dataset=npz:{base / 'blobs.npz'}", *SCRIPTS[name], *where)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """Shared files: data, a trained pair and its averaged scores."""
    base = tmp_path_factory.mktemp("ground") / "here"
    base.mkdir()
    data, note = f"--dataset=npz:{write_blobs(base / 'blobs.npz', n=60)}", base.with_name("note")
    where = folders(base, "datasets", "metrics")
    for script, *flags in (
        ("train_full.py", *NETWORK, "--optimizer=sgd", *folders(base, *TRAIN)),
        ("train_full.py", *NETWORK, "--optimizer=sam", *folders(base, *TRAIN)),
        ("compute_sam_sgd.py", "--model=small_mlp", "--epochs=2", *where, f"--models_folder={base / 'models'}"),
        ("average_scores.py", "--model=small_mlp", "--seeds", "1", *where),
    ):
        assert run(script, (data, *flags), note) == 0, note.read_text()
    shutil.copytree(base, base.with_name("kept"))
    return base


def reset(base):
    """Restore the shared files, always in the same folder, because results contain its path."""
    shutil.rmtree(base)
    shutil.copytree(base.with_name("kept"), base)


def run(script, flags, note, die_at=None):
    """Run a script in a forked process that is killed before its ``die_at``-th rename or removal.

    Returns:
        Its exit status. ``note`` then contains the number of changes and the standard error output.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        changes = 0

        def counting(change):
            def counted(*args, **kwargs):
                nonlocal changes
                changes += 1
                if changes == die_at:
                    os._exit(KILLED)
                return change(*args, **kwargs)

            return counted

        for name in ("link", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, counting(getattr(os, name)))
        os.fsync = lambda descriptor: None  # only a process is killed here, not the machine
        result = call(script, *flags)
        note.write_text(json.dumps([changes, result.err]))
        status = result.status
    except BaseException:
        note.write_text(json.dumps([0, traceback.format_exc()]))
    finally:
        os._exit(status)


def content(base):
    """The contents of all files, except times."""
    found = {}
    for path in sorted(base.rglob("*")):
        if path.is_file() and path.suffix not in (".log", ".lock"):
            read = READERS.get(path.suffix, Path.read_bytes)
            found[str(path.relative_to(base))] = _plain(read(path))
    return found


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items() if "seconds" not in str(key) and key not in SESSION}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.detach().numpy())
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), value.tobytes()
    return repr(value)


SESSION = ("resumed", "products")  # of a measurement: repeated work is counted


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_command_again(ground, tmp_path, name):
    script, flags = flags_of(name, ground)
    note = tmp_path / "note"
    reset(ground)
    assert run(script, flags, note) == 0, note.read_text()
    changes, whole = json.loads(note.read_text())[0], content(ground)
    assert changes
    failures = []
    for die_at in sorted({round(k) for k in np.linspace(1, changes, min(MOST, changes))}):
        reset(ground)
        assert run(script, flags, note, die_at) == KILLED
        status = run(script, flags, note)
        if status:
            failures.append(f"{die_at} of {changes}: status {status}: {json.loads(note.read_text())[1][-600:]}")
        elif (after := content(ground)) != whole:
            differ = [path for path in whole.keys() | after.keys() if after.get(path) != whole.get(path)]
            failures.append(f"{die_at} of {changes}: {differ}")
    assert not failures, "\n".join(failures)
