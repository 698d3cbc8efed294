# The grid of pruning runs: one job for each method, fraction and seed, and the table and figure that compare them.


def stored_scores(study):
    """The scores by which min_* methods select: final files of other studies."""
    return [path for source in part(study).get("scores_of", ()) for path in TARGETS[part(source, "kind")](source)]


def selection_flags(study, funcs):
    ranks = any(func.startswith("min_") for func in funcs)
    searched = [flags(scores_folder=folder(source, "metrics")) for source in part(study).get("scores_of", ()) if ranks]
    return " ".join([flags(
        {name: part(study, name) for name in ("dataset", "model")},
        part(study).get("data"),
        part(study, "selection"),
        part(study, "training"),
        folders(study, *TRAINING),
    ), *searched])


def cells(study):
    """All runs of the grid, with the full training set as the reference if "full" is set."""
    chosen = [(func, fraction) for func in part(study, "funcs") for fraction in part(study, "fractions")]
    if part(study).get("full") and ("random", 1.0) not in chosen:
        chosen.append(("random", 1.0))
    mode, end = part(study, "selection").get("coreset_mode", "large"), f"{part(study, 'model')}_over_{part(study, 'dataset')}"
    return [folder(study, "models", f"{func}_static_coreset_{mode}_{float(fraction)}_{end}", f"seed_{seed}", "last.pt")
            for func, fraction in chosen for seed in part(study, "seeds")]


rule pruning_run:
    input:
        lambda wildcards: splits(wildcards.study, wildcards.seed),
        lambda wildcards: stored_scores(wildcards.study) if wildcards.func.startswith("min_") else [],
    output:
        update(folder("{study}", "models", "{func}_static_coreset_{mode}_{fraction}_{setup}", "seed_{seed}", "last.pt")),
    params:
        lambda wildcards: selection_flags(wildcards.study, [wildcards.func])
        + " "
        + flags(
            coreset_func=wildcards.func,
            coreset_fraction=wildcards.fraction,
            seed=wildcards.seed,
            save_epochs="last",
            resume=True,
        ),
    wildcard_constraints:
        mode="large|few_shot",
        fraction=r"[0-9.]+",
    threads: needs("training", "cpus")
    resources:
        mem_mb=needs("training", "mem_mb"),
        runtime=needs("training", "minutes"),
        gpu=needs("training", "gpus"),
    shell:
        PREFIX + script("train_prune.py") + " {params}"


def comparison(study):
    stem = folder(study, "plots", "pruning", f"{part(study, 'model')}_over_{part(study, 'dataset')}", "comparison")
    return [f"{stem}.{suffix}" for suffix in ("csv", "json", "md", "png", "pdf")]


rule pruning_table:
    input:
        lambda wildcards: cells(wildcards.study),
    output:
        [folder("{study}", "plots", "pruning", "{setup}", f"comparison.{suffix}")
         for suffix in ("csv", "json", "md", "png", "pdf")],
    params:
        lambda wildcards: selection_flags(wildcards.study, part(wildcards.study, "funcs"))
        + " "
        + flags(
            {name: part(wildcards.study, name) for name in ("funcs", "fractions", "seeds")},
            {"full": part(wildcards.study).get("full") or None},
            table_only=True,
            plots_folder=folder(wildcards.study, "plots"),
        ),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("compare_pruning.py") + " {params}"


TARGETS["pruning"] = comparison
KEYS["pruning"] = (
    ("dataset", "model", "funcs", "fractions", "seeds", "selection", "training"), ("full", "scores_of", "data")
)
