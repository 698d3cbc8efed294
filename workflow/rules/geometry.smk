# Figures 2 and 4 of the SAMIS paper: tangent kernels and Hessian spectra of models trained with SGD and SAM. The rules
# of samis.smk train the pairs and average their scores, by which the kernels' examples are ordered.


def geometry_flags(study, *names, **more):
    return flags(
        {name: part(study, name) for name in ("dataset", "model")},
        part(study).get("data"),
        folders(study, *names),
        lr_sched=part(study, "training", "lr_sched"),
        **more,
    )


# The spectrum's path depends on whether the model has BatchNorm, so a marker is the output.
rule spectrum:
    input:
        lambda wildcards: trained(wildcards.study, wildcards.optimizer, wildcards.seed),
    output:
        touch(folder("{study}", "done", "spectrum_{optimizer}_{seed}")),
    params:
        lambda wildcards: geometry_flags(wildcards.study, "models_folder", "metrics_folder", "hessian_folder")
        + " "
        + flags(
            part(wildcards.study).get("spectrum"),
            optimizer=wildcards.optimizer,
            seed=wildcards.seed,
            epochs=part(wildcards.study, "training", "epochs"),
            resume=True,
        ),
    threads: needs("scoring", "cpus")
    resources:
        mem_mb=needs("scoring", "mem_mb"),
        runtime=needs("scoring", "minutes"),
        gpu=needs("scoring", "gpus"),
    shell:
        PREFIX + script("compute_hessian_eigen.py") + " {params}"


rule kernels:
    input:
        lambda wildcards: trained(wildcards.study, "sgd", wildcards.seed),
        lambda wildcards: samis_scores(wildcards.study),
    output:
        touch(folder("{study}", "done", "kernels_{seed}")),
    params:
        lambda wildcards: geometry_flags(wildcards.study, "models_folder", "metrics_folder", "ntk_folder")
        + " "
        + flags(part(wildcards.study, "kernels"), seeds=[wildcards.seed]),
    threads: needs("scoring", "cpus")
    resources:
        mem_mb=needs("scoring", "mem_mb"),
        runtime=needs("scoring", "minutes"),
        gpu=needs("scoring", "gpus"),
    shell:
        PREFIX + script("compute_ntk.py") + " {params}"


rule spectrum_figure:
    input:
        lambda wildcards: [folder(wildcards.study, "done", f"spectrum_{optimizer}_{seed}")
                           for optimizer in ("sgd", "sam") for seed in part(wildcards.study, "seeds")],
    output:
        touch(folder("{study}", "done", "spectrum_figure")),
    params:
        lambda wildcards: flags(
            {name: part(wildcards.study, name) for name in ("dataset", "model", "seeds")},
            folders(wildcards.study, "hessian_folder", "plots_folder"),
            lr_sched=part(wildcards.study, "training", "lr_sched"),
            epochs=part(wildcards.study, "training", "epochs"),
        ),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("plot_hessian.py") + " {params}"


rule kernel_figure:
    input:
        lambda wildcards: [folder(wildcards.study, "done", f"kernels_{seed}") for seed in part(wildcards.study, "seeds")],
    output:
        touch(folder("{study}", "done", "kernel_figure")),
    params:
        lambda wildcards: flags(
            {name: part(wildcards.study, name) for name in ("dataset", "model", "seeds")},
            folders(wildcards.study, "ntk_folder", "plots_folder"),
            lr_sched=part(wildcards.study, "training", "lr_sched"),
            metrics=[part(wildcards.study, "kernels", "ntk_chosen_metric")],
            log=True,
        ),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("plot_ntk.py") + " {params}"


TARGETS["geometry"] = lambda study: [folder(study, "done", f"{name}_figure") for name in ("spectrum", "kernel")]
KEYS["geometry"] = (*KEYS["samis"][0], "kernels"), (*KEYS["samis"][1], "spectrum")
