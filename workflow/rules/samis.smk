# SAMIS: pairs of models trained with SGD and SAM, by ten splits (out of sample) or prematurely (in sample), and their
# scores averaged over seeds.
#
# Snakemake deletes the outputs of a job before it runs it again, and after it fails. It must not delete models: the
# outputs of trainings are marked with update().

SPLITS = range(1, 11)


def run_name(study, optimizer, split=None):
    """The name of a training run in paths; see src/artifacts/paths.py."""
    kind, end = ("standard", "") if split is None else ("split", f"_val_split_{split}")
    setup = f"{part(study, 'model')}_over_{part(study, 'dataset')}_with_{optimizer}"
    return f"{kind}_{setup}_sched_{part(study, 'training', 'lr_sched')}{end}"


def trained(study, optimizer, seed, split=None):
    """The last checkpoint of a run, which is written once, after the last epoch."""
    return folder(study, "models", run_name(study, optimizer, split), f"seed_{seed}", "last.pt")


def training_flags(wildcards, **more):
    study = wildcards.study
    return flags(
        {name: part(study, name) for name in ("dataset", "model")},
        part(study).get("data"),
        part(study, "training"),
        part(study).get(wildcards.optimizer),
        folders(study, *TRAINING),
        optimizer=wildcards.optimizer,
        seed=wildcards.seed,
        resume=True,
        **more,
    )


rule train_split:
    input:
        lambda wildcards: splits(wildcards.study, wildcards.seed),
    output:
        update(folder("{study}", "models", "split_{setup}_with_{optimizer}_{sched}_val_split_{split}", "seed_{seed}",
                      "last.pt")),
    params:
        lambda wildcards: training_flags(wildcards, samis_validation_split_index=wildcards.split),
    threads: needs("training", "cpus")
    resources:
        mem_mb=needs("training", "mem_mb"),
        runtime=needs("training", "minutes"),
        gpu=needs("training", "gpus"),
    shell:
        PREFIX + script("train_split.py") + " {params}"


rule train_full:
    input:
        lambda wildcards: splits(wildcards.study, wildcards.seed),
    output:
        update(folder("{study}", "models", "standard_{setup}_with_{optimizer}_{sched}", "seed_{seed}", "last.pt")),
    params:
        lambda wildcards: training_flags(wildcards),
    threads: needs("training", "cpus")
    resources:
        mem_mb=needs("training", "mem_mb"),
        runtime=needs("training", "minutes"),
        gpu=needs("training", "gpus"),
    shell:
        PREFIX + script("train_full.py") + " {params}"


def pairs(wildcards):
    """All models that the scores of a seed need."""
    study = wildcards.study
    chosen = SPLITS if part(study, "protocol") == "split" else [None]
    return [trained(study, optimizer, wildcards.seed, split) for optimizer in ("sgd", "sam") for split in chosen]


rule samis_seed:
    input:
        pairs,
    output:
        [folder("{study}", "metrics", "{dataset}", "{model}", "{seed}", f"nn_{which}_diff_score.npz")
         for which in ("loss", "prob")],
    params:
        lambda wildcards: flags(
            {name: part(wildcards.study, name) for name in ("dataset", "model", "protocol")},
            part(wildcards.study).get("data"),
            folders(wildcards.study, "models_folder", "metrics_folder"),
            seed=wildcards.seed,
            epochs=part(wildcards.study, "training", "epochs"),
            lr_sched=part(wildcards.study, "training", "lr_sched"),
        ),
    threads: needs("scoring", "cpus")
    resources:
        mem_mb=needs("scoring", "mem_mb"),
        runtime=needs("scoring", "minutes"),
        gpu=needs("scoring", "gpus"),
    shell:
        PREFIX + script("compute_sam_sgd.py") + " {params}"


def seed_scores(study):
    name, model = part(study, "dataset"), part(study, "model")
    return [folder(study, "metrics", name, model, seed, "nn_loss_diff_score.npz") for seed in part(study, "seeds")]


PAIR_SCORES = ("sam_sgd/samis_loss", "sam_sgd/samis_prob", "sam_sgd/mean_loss")


def samis_scores(study):
    return [folder(study, "metrics", f"{score}_{part(study, 'dataset')}.{suffix}")
            for score in PAIR_SCORES for suffix in ("pkl", "json", "csv")]


rule samis_average:
    input:
        lambda wildcards: seed_scores(wildcards.study),
    output:
        [folder("{study}", "metrics", f"{score}_{{dataset}}.{suffix}")
         for score in PAIR_SCORES for suffix in ("pkl", "json", "csv")],
    params:
        lambda wildcards: flags(
            {name: part(wildcards.study, name) for name in ("dataset", "model", "seeds")},
            folders(wildcards.study, "metrics_folder"),
        ),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("average_scores.py") + " {params}"


TARGETS["samis"] = samis_scores
KEYS["samis"] = ("protocol", "dataset", "model", "seeds", "training"), ("data", "sgd", "sam")
