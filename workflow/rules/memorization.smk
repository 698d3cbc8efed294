# Ground-truth memorization: members in parts, each in a folder of its own, and one job that joins them.


def ranges(last, size, first=1):
    """Divide first..last into parts of ``size`` and a last one of half to one and a half times that, as pairs."""
    starts = [first + size * number for number in range(max(1, round((last - first + 1) / size)))]
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], last + 1])]


def member_parts(study):
    """The markers of all parts. Files of members grow while a part runs, so they cannot be outputs."""
    parts = ranges(part(study, "members"), part(study, "members_per_job"))
    return [folder(study, "parts", f"members_{first}-{last}.done") for first, last in parts]


def member_flags(study, **more):
    return flags(
        {name: part(study, name) for name in ("dataset", "model")},
        part(study).get("data"),
        part(study).get("memorization"),
        part(study, "training"),
        {"datasets_folder": DATA},
        **more,
    )


rule members:
    input:
        lambda wildcards: splits(wildcards.study, part(wildcards.study, "training")["seed"]),
    output:
        touch(folder("{study}", "parts", "members_{first}-{last}.done")),
    params:
        lambda wildcards: member_flags(
            wildcards.study,
            members=f"{wildcards.first}-{wildcards.last}",
            train_only=True,
            metrics_folder=folder(wildcards.study, "parts", f"members_{wildcards.first}-{wildcards.last}"),
        ),
    threads: needs("members", "cpus")
    resources:
        mem_mb=needs("members", "mem_mb"),
        runtime=needs("members", "minutes"),
        gpu=needs("members", "gpus"),
    shell:
        PREFIX + script("compute_memorization.py") + " {params}"


MEMBER_SCORES = ("mem", "mem_prob", "out_prob")


def member_scores(study):
    name = part(study, "dataset")
    return [folder(study, "metrics", "memorization", f"{score}_{name}.{suffix}")
            for score in MEMBER_SCORES for suffix in ("pkl", "json", "csv")]


rule memorization_scores:
    input:
        lambda wildcards: member_parts(wildcards.study),
    output:
        [folder("{study}", "metrics", "memorization", f"{score}_{{dataset}}.{suffix}")
         for score in MEMBER_SCORES for suffix in ("pkl", "json", "csv")],
    params:
        lambda wildcards: member_flags(
            wildcards.study,
            members=part(wildcards.study, "members"),
            metrics_folder=folder(wildcards.study, "metrics"),
            merge=[marker.removesuffix(".done") for marker in member_parts(wildcards.study)],
        ),
    threads: needs("summary", "cpus")
    resources:
        mem_mb=needs("summary", "mem_mb"),
        runtime=needs("summary", "minutes"),
        gpu=0,
    shell:
        PREFIX + script("compute_memorization.py") + " {params}"


TARGETS["memorization"] = member_scores
KEYS["memorization"] = ("dataset", "model", "members", "members_per_job", "training"), ("memorization", "data")
