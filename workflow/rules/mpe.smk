# The experiments of the Memory-Perturbation Equation. Their result files are rewritten while they run, so a marker that
# is written after a job is its output.

RETRAINS_EXAMPLES = "3_validation_sensitivities.py"  # its retraining is divided into parts
EXPERIMENT = ("models_folder", "log_folder", "resume_ckpts_folder", "pickles_folder")


def experiment_flags(wildcards, **more):
    experiment = part(wildcards.study, "experiments", wildcards.experiment)
    return flags(
        {"name_exp": wildcards.experiment}, experiment, folders(wildcards.study, *EXPERIMENT), resume=True, **more
    )


def experiment_data(wildcards):
    experiment = part(wildcards.study, "experiments", wildcards.experiment)
    return ancient(f"{DATA}/splits/{experiment['dataset']}/seed_{experiment.get('seed', 1)}/val_10.txt")


def retrained(wildcards):
    """The markers of all parts: models 0 (the control) to the number of examples left out."""
    study, experiment = wildcards.study, part(wildcards.study, "experiments", wildcards.experiment)
    last = experiment["n_retrain"] + experiment.get("n_spread", 0)
    parts = ranges(last, part(study, "retrain_per_job"), first=0)
    return [folder(study, "done", f"{wildcards.experiment}.models_{first}-{last}") for first, last in parts]


def prerequisite(wildcards):
    """What an experiment waits for: its retrained parts, or only the data."""
    divided = part(wildcards.study, "script") == RETRAINS_EXAMPLES
    return retrained(wildcards) if divided else experiment_data(wildcards)


# The base model and the estimates, on which all parts depend.
rule base_model:
    input:
        experiment_data,
    output:
        touch(folder("{study}", "done", "{experiment}.base")),
    params:
        lambda wildcards: experiment_flags(wildcards, retrain_part="none"),
    threads: needs("experiment", "cpus")
    resources:
        mem_mb=needs("experiment", "mem_mb"),
        runtime=needs("experiment", "minutes"),
        gpu=needs("experiment", "gpus"),
    shell:
        PREFIX + script(f"examples/{RETRAINS_EXAMPLES}") + " {params}"


rule retrained_models:
    input:
        folder("{study}", "done", "{experiment}.base"),
    output:
        touch(folder("{study}", "done", "{experiment}.models_{first}-{last}")),
    params:
        lambda wildcards: experiment_flags(wildcards, retrain_part=f"{wildcards.first}-{wildcards.last}"),
    threads: needs("retraining", "cpus")
    resources:
        mem_mb=needs("retraining", "mem_mb"),
        runtime=needs("retraining", "minutes"),
        gpu=needs("retraining", "gpus"),
    shell:
        PREFIX + script(f"examples/{RETRAINS_EXAMPLES}") + " {params}"


# One experiment, or the parts of one joined.
rule experiment:
    input:
        prerequisite,
    output:
        touch(folder("{study}", "done", "{experiment}.result")),
    params:
        lambda wildcards: experiment_flags(wildcards),
        script=lambda wildcards: script(f"examples/{part(wildcards.study, 'script')}"),
    threads: needs("experiment", "cpus")
    resources:
        mem_mb=needs("experiment", "mem_mb"),
        runtime=needs("experiment", "minutes"),
        gpu=needs("experiment", "gpus"),
    shell:
        PREFIX + "{params.script} {params[0]}"


def figure(wildcards):
    """The flags of one of the study's figures, without the script."""
    keys = dict(part(wildcards.study, "figures")[int(wildcards.number)])
    return script(f"examples/{keys.pop('script')}"), keys


rule experiment_figure:
    input:
        lambda wildcards: [folder(wildcards.study, "done", f"{name}.result")
                           for name in part(wildcards.study, "experiments")],
    output:
        touch(folder("{study}", "done", "figure_{number}")),
    params:
        lambda wildcards: flags(
            figure(wildcards)[1],
            pickles_folder=folder(wildcards.study, "pickles"),
            plots_folder=folder(wildcards.study, "plots"),
        ),
        script=lambda wildcards: figure(wildcards)[0],
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + "{params.script} {params[0]}"


TARGETS["mpe"] = lambda study: [folder(study, "done", f"figure_{number}") for number in range(len(part(study, "figures")))]
KEYS["mpe"] = ("script", "experiments", "figures"), ("retrain_per_job",)
