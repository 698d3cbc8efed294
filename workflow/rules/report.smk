# The HTML page about a data set: the scores of several studies side by side, and their spectra and kernels.


def sources(study, *kinds):
    """The studies that a page shows, only those of some kinds if given."""
    return [name for name in part(study, "of") if not kinds or part(name, "kind") in kinds]


def page_flags(study):
    geometry = next(iter(sources(study, "geometry")), study)
    scored = [flags(scores_folder=folder(name, "metrics")) for name in sources(study)]
    return " ".join([
        flags(
            {"dataset": part(study, "dataset")},
            part(study).get("page"),
            folders(geometry, "hessian_folder", "ntk_folder"),
            models_folder=folder(study, "models"),
            metrics_folder=folder(study, "metrics"),
            plots_folder=folder(study, "plots"),
            out=folder(study, f"{part(study, 'dataset')}.html"),
        ),
        *scored,
    ])


rule page:
    input:
        lambda wildcards: [path for name in sources(wildcards.study) for path in TARGETS[part(name, "kind")](name)],
    output:
        folder("{study}", "{dataset}.html"),
    params:
        lambda wildcards: page_flags(wildcards.study),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("make_report.py") + " {params}"


TARGETS["report"] = lambda study: [folder(study, f"{part(study, 'dataset')}.html")]
KEYS["report"] = ("dataset", "of"), ("page",)
