# What all rules share: reading the configuration, building commands, and the data of each study.

import re
import shlex

from snakemake.exceptions import WorkflowError

STUDIES = config["studies"]
RUNS = config["runs_folder"]
DATA = config["datasets_folder"]
PYTHON = str(ROOT / config["python"]) if "/" in str(config["python"]) else config["python"]  # a path, or on PATH
TARGETS = {}  # kind of study -> function of its name that returns its final files
KEYS = {}  # kind of study -> the keys that a study must have, and those that it may have

# Scripts find the project by their own path. One thread per core that a job is given. If a job needs GPUs, the wrapper
# reserves free ones.
PREFIX = (
    "export OMP_NUM_THREADS={threads}; "
    + shlex.quote(str(ROOT / "workflow" / "on_gpus"))
    + " {resources.gpu} "
    + shlex.quote(PYTHON)
    + " "
)


wildcard_constraints:
    study=r"\w+",
    seed=r"\d+",
    split=r"\d+",
    first=r"\d+",
    last=r"\d+",
    optimizer="sgd|sam",


def flags(*groups, **more):
    """Write settings as flags: a list as several values, True as the bare flag, False as --no-flag; None is left out."""
    words = []
    for name, value in [pair for group in groups for pair in (group or {}).items()] + list(more.items()):
        if value is True or value is False:
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return shlex.join(words)


def script(name):
    """A script of this project, by path."""
    return shlex.quote(str(ROOT / name))


def folder(study, *parts):
    """A path in the folder of a study."""
    return "/".join([RUNS, study, *map(str, parts)])


def folders(study, *names):
    """The flags of a study's folders; data sets and splits are shared by all studies."""
    own = {name: folder(study, name.removesuffix("_folder")) for name in names}
    return {"datasets_folder": DATA, **own}


TRAINING = ("models_folder", "metrics_folder", "log_folder", "resume_ckpts_folder")


def part(study, *keys):
    """A section of a study's configuration."""
    found = STUDIES[study]
    for key in keys:
        found = found[key]
    return found


def needs(job, resource):
    """A resource of a kind of job: the study's own, else the default of workflow/config/resources.yaml."""

    def look_up(wildcards):
        own = STUDIES[wildcards.study].get("resources", {}) if hasattr(wildcards, "study") else {}
        return {**config["resources"]["default"], **config["resources"].get(job, {}), **own.get(job, {})}[resource]

    return look_up


def check(name, study):
    """Refuse a study with missing keys, or with keys that no rule reads: a misspelled key would leave its settings out."""

    def refuse(text):
        raise WorkflowError(f"study {name}: {text}")

    def known(where, keys, allowed):
        for key in keys:
            if key not in allowed:
                refuse(f"{where}{key}: is not read; choose from {', '.join(sorted(allowed))}")

    if not re.fullmatch(r"\w+", name):
        refuse("use only letters, digits and underscores in the name")
    if study.get("kind") not in KEYS:
        refuse(f"kind: {study.get('kind')}: choose from {', '.join(KEYS)}")
    needed, optional = KEYS[study["kind"]]
    known("", study, {"kind", "resources", *needed, *optional})
    if missing := [key for key in needed if key not in study]:
        refuse(f"needs {', '.join(missing)}")
    jobs = set(config["resources"]) - {"default", "data"}
    for job, own in study.get("resources", {}).items():
        known("resources: ", [job], jobs)
        known(f"resources: {job}: ", own, set(config["resources"]["default"]))
    if study.get("protocol", "split") not in ("split", "full"):
        refuse(f"protocol: {study['protocol']}: choose from split, full")
    for one in [study, *study.get("experiments", {}).values()]:
        if not re.fullmatch(r"[a-z0-9_]+", str(one.get("dataset", "digits"))):
            refuse(f"dataset: {one['dataset']}: give the name of a built-in data set, in lower case")
    if study["kind"] == "mpe":
        divided = study["script"] == RETRAINS_EXAMPLES
        if divided != ("retrain_per_job" in study):
            refuse(f"retrain_per_job: {'is needed' if divided else 'is not read'} with {study['script']}")
        for key in ("dataset", "n_retrain") if divided else ("dataset",):
            if not all(key in experiment for experiment in study["experiments"].values()):
                refuse(f"experiments: {key} is needed")
    for source in (*study.get("of", ()), *study.get("scores_of", ())):
        if STUDIES.get(source, {}).get("kind") not in ("samis", "memorization", "geometry"):
            refuse(f"{source}: is not a study that computes scores")


def splits(study, seed):
    """The last of the ten files of validation splits. They depend only on data set and seed, so their age is ignored."""
    return ancient(f"{DATA}/splits/{part(study, 'dataset')}/seed_{seed}/val_10.txt")


# Downloads the data set on first use and creates the splits, before any job that trains on them.
rule data:
    output:
        f"{DATA}/splits/{{dataset}}/seed_{{seed}}/val_10.txt",
    params:
        lambda wildcards: flags(
            dataset=wildcards.dataset, seed=wildcards.seed, samis_validation_split_index="none", datasets_folder=DATA
        ),
    threads: needs("data", "cpus")
    resources:
        mem_mb=needs("data", "mem_mb"),
        runtime=needs("data", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("train_split.py") + " {params}"
