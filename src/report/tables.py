"""The numbers of the page: findings, tables and curves, computed from what :mod:`src.report.collect` has read.

Shapes: n training examples, C classes. Scores are high for atypical examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from src.formatting import duration
from src.metrics.compare import bootstrap, spearman, spearman_within_class, top_overlap
from src.metrics.duplicates import EXACT
from src.metrics.label_errors import confident_classes
from src.metrics.registry import SENSITIVITY
from src.metrics.score import LEARNED
from src.report.collect import Contents

LISTED = 200  # rows of the tables of label errors and duplicates
BINS = 48
_TOP = 0.01  # the most atypical examples, whose classes are counted
_AGREED = 0.05  # an example in the top 5 % of half of the scores is suspicious by all of them
_CHANCE = 0.01  # largest probability that a class leads the most atypical examples by chance
_RESAMPLES, _FEWEST = 200, 50  # of the intervals of agreement, and their number for very large sets
_RESAMPLED = 10**7  # examples in all resamples together, about


MEANINGS = {
    "mem": "accuracy on the example of models trained on it, minus that of models that were not",
    "mem_prob": "probability of the label by models trained on the example, minus that by models that were not",
    "out_prob": "probability of the label by models that were not trained on the example",
    "samis_loss": "absolute difference of the losses of an SGD-trained and a SAM-trained model",
    "samis_prob": "L1 distance of the probabilities predicted by an SGD-trained and a SAM-trained model",
    "mean_loss": "mean loss of the SGD-trained and the SAM-trained model",
    "csl": "sum of the example's losses over all epochs",
    "aum": "mean margin over the epochs (logit of the label minus the largest other logit)",
    "el2n": "mean length of the error vector in the first epochs",
    "forg": "how often the example goes from correct to wrong during training",
    "etl": "the epoch from which the example stays correct",
    "mpe": "prediction error times predictive variance: how much the model would change without the example",
    "label_error": "log odds that the label is wrong",
}
"""What a score measures. Scores that are not listed are described by their titles."""


class LabelIssue(NamedTuple):
    """One row of the table of likely label errors."""

    example: int
    suggested: int  # the likely class; -1 if unknown
    given_probability: float
    suggested_probability: float
    confident: bool | None  # whether the confident joint counts it as another class; None if unknown
    cleanlab: str  # "yes", "no", or "" if cleanlab was not run


def title(found: Contents, mode: str) -> str:
    """The name of a score, and whether its sign was changed so that high is atypical."""
    name, negated = found.entries[mode].title, found.records[mode].get("negated", found.entries[mode].negated)
    return f"{name} (negated)" if negated is True and "negated" not in name else name


def meaning(found: Contents, mode: str) -> str:
    """A few sentences about a score, for its tooltip."""
    entry, record = found.entries[mode], found.records[mode]
    text = f"{title(found, mode)}: {MEANINGS[mode]}" if mode in MEANINGS else title(found, mode)
    text += ". High is atypical."
    if record.get("negated", entry.negated) is True:
        text += " The sign was changed for that."
    low, high = record.get("raw_min"), record.get("raw_max")
    if str(record.get("scaling", "")).startswith("min-max") and all(isinstance(v, int | float) for v in (low, high)):
        text += f" Scaled to [0, 1]; before, {low:.3g} to {high:.3g}."
    elif entry.share_of_epochs:
        text += " Divided by the number of epochs."
    return f"{text} Source: {entry.paper}."


def unlearned(found: Contents) -> tuple[list[str], float]:
    """The scores that can have the wrong sign because a model had not learned most examples, and its accuracy."""
    lowest = {}
    for mode, record in found.records.items():
        known = [value for value in record.get("training_accuracy") or () if isinstance(value, int | float)]
        if found.entries[mode].assumes_learned and min(known, default=1.0) < LEARNED:
            lowest[mode] = min(known)
    return list(lowest), min(lowest.values(), default=1.0)


def likely_errors(found: Contents) -> tuple[list[LabelIssue], str]:
    """The examples whose labels are most likely wrong, most suspicious first, and how they were found.

    With out-of-sample probabilities, examples are ranked by the stored audit (``label_error``) if there is one,
    otherwise by the margin between the label and the most probable other class. With recorded dynamics only, they are
    ranked by the area under the margin (Pleiss et al. 2020), and there is no likely class.
    """
    labels, rows = found.labels, np.arange(len(found.labels))
    if found.probabilities is not None:
        known = np.flatnonzero(np.isfinite(found.probabilities).all(1))
        p = found.probabilities[known]
        given = p[np.arange(len(known)), labels[known]]
        others = p.copy()
        others[np.arange(len(known)), labels[known]] = -1
        counted = confident_classes(p, labels[known])
        margin = others.max(1) - given
        how = "by the margin between the most probable other class and the label"
        suspicion = margin
        if "label_error" in found.scores:
            how = "by the log odds of the audit (audit_labels.py)"
            suspicion = np.nan_to_num(found.scores["label_error"][known], nan=-np.inf)
        order = np.argsort(-suspicion, kind="stable")
        wanted = max(20, round(found.audit.get("estimated_errors", 0)), len(confident_errors(found)))
        issues = []
        for k in order[: min(LISTED, wanted)].tolist():
            row = found.issues.get(int(known[k]), {})
            decided = {"1": "yes", "0": "no"}.get(row.get("cleanlab issue", ""), "")
            confident = bool(counted[k] >= 0 and counted[k] != labels[known[k]])
            suggested = _suggested(found, row, int(others[k].argmax()))
            issues.append(
                LabelIssue(int(known[k]), suggested, float(given[k]), float(p[k, suggested]), confident, decided)
            )
        return issues, f"The {len(issues)} most suspicious by out-of-sample probabilities, ranked {how}."
    if found.dynamics is not None:
        suspicion = np.nan_to_num(-found.dynamics.margin, nan=-np.inf)
        wrong = found.dynamics.margin < 0  # on average another class had the largest logit
        count = min(LISTED, max(20, int(wrong.sum())))
        issues = [
            LabelIssue(int(i), -1, float(found.dynamics.probability[i]), np.nan, None, "")
            for i in rows[np.argsort(-suspicion, kind="stable")][:count]
        ]
        how = (
            f"The {count} most suspicious by the recorded dynamics of {found.dynamics.name}, ranked by the mean "
            f"margin over all epochs, lowest first; of all examples, {wrong.sum():,} have a negative one. "
            "The dynamics do not record which other class was predicted, so there is no likely class; "
            "compute_memorization.py --folds 5 --members 5 makes out-of-sample probabilities."
        )
        return issues, how
    return [], ""


def _suggested(found: Contents, row: Mapping[str, str], otherwise: int) -> int:
    """The class that the audit suggests; otherwise the most probable other class."""
    names = list(found.class_names)
    text = row.get("suggested label")
    return names.index(text) if text in names else otherwise


def common_pairs(found: Contents, issues: Sequence[LabelIssue], count: int = 6) -> list[tuple[int, int, list[int]]]:
    """The most common pairs of given and likely class among likely label errors, with their examples."""
    pairs: dict[tuple[int, int], list[int]] = {}
    for one in issues:
        if one.suggested >= 0:
            pairs.setdefault((int(found.labels[one.example]), one.suggested), []).append(one.example)
    ordered = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(given, likely, indices) for (given, likely), indices in ordered[:count] if len(indices) > 1]


def confident_errors(found: Contents) -> np.ndarray:
    """The indices of the examples that the confident joint counts as another class than their label."""
    if found.probabilities is None:
        return np.empty(0, np.int64)
    known = np.flatnonzero(np.isfinite(found.probabilities).all(1))
    counted = confident_classes(found.probabilities[known], found.labels[known])
    return known[(counted >= 0) & (counted != found.labels[known])]


def top(values: np.ndarray, fraction: float) -> np.ndarray:
    """The indices of the highest ``fraction`` of the scored examples, highest first.

    Examples that are tied at the limit are left out: which of them belong to the top is arbitrary.
    """
    order = np.argsort(-values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # NaN is last
    k = max(1, round(fraction * len(order)))
    chosen = order[:k]
    return chosen if k >= len(order) else chosen[values[chosen] > values[order[k]]]


class Finding(NamedTuple):
    """A sentence, and the examples that it is about (empty if it is about none in particular)."""

    text: str
    examples: list[int]


def findings(found: Contents, count: int = 3) -> list[Finding]:
    """Describe the data set in a few sentences made from the numbers, the most useful first."""
    from scipy.special import bdtrc  # takes a quarter of a second to import

    n, names = len(found.used), found.class_names
    several: list[Finding] = []
    wrong = confident_errors(found)
    if "estimated_errors" in found.audit:
        errors = found.audit["estimated_errors"]
        verb = "is" if round(errors) == 1 else "are"
        text = f"About {errors:,.0f} of {n:,} labels ({percent(errors / n)}) {verb} probably wrong"
        common = found.audit.get("most_common") or []
        if common and common[0]["examples"] > 1:
            first = common[0]
            text += (
                f"; most often, {_quoted(first['suggested label'])} is labeled {_quoted(first['given label'])} "
                f"({_count(first['examples'], 'example')})"
            )
        several.append(
            Finding(f"{text}.", [issue.example for issue in likely_errors(found)[0][: max(1, round(errors))]])
        )
    elif found.probabilities is not None and len(wrong):
        known = np.isfinite(found.probabilities).all(1)
        accuracy = float((found.probabilities[known].argmax(1) == found.labels[known]).mean())
        text = f"Models that were not trained on an example confidently disagree with {_count(len(wrong), 'label')}"
        text += f" of {n:,} ({percent(len(wrong) / n)}); they classify {percent(accuracy)} correctly"
        several.append(Finding(f"{text}.", wrong.tolist()))
    if found.duplicates:
        exact = sum(row["found by"] == EXACT for row in found.duplicates)
        leaked = sum(row["in"] == "test" for row in found.duplicates)
        one = len(found.duplicates) == 1
        text = (
            f"{_count(len(found.duplicates), 'training example')} {'is an' if one else 'are'} exact ({exact:,}) or "
        )
        text += f"near ({len(found.duplicates) - exact:,}) duplicate{'' if one else 's'} of another example, "
        text += f"{leaked:,} of them of a test example" if leaked else "none of them of a test example"
        several.append(Finding(f"{text}.", [int(row["index"]) for row in found.duplicates]))
    several += _about_sensitivities(found)
    mode = next(iter(found.scores))
    scored = ~np.isnan(found.scores[mode])
    most = top(found.scores[mode], max(_TOP, 20 / scored.sum()))
    shares = np.bincount(found.labels[scored], minlength=len(names)) / scored.sum()
    inside = np.bincount(found.labels[most], minlength=len(names))
    chance = np.where(inside > 0, bdtrc(inside - 1.0, len(most), shares), 1.0)  # of at least so many examples
    leader = int(np.argmin(chance))
    if chance[leader] * len(names) < _CHANCE:
        text = (
            f"Of the {len(most):,} examples with the highest score by {title(found, mode)}, {inside[leader]:,} are "
            f"labeled {_quoted(names[leader])}, {inside[leader] / len(most) / shares[leader]:.1f} times its share of "
            "all examples"
        )
        chosen = most[found.labels[most] == leader].tolist()
        several.append(Finding(f"{text}.", chosen))
    if len(found.scores) > 2:
        counts = np.zeros(len(found.labels), np.int64)
        for values in found.scores.values():
            counts[top(values, _AGREED)] += 1
        agreed = np.flatnonzero(counts * 2 >= len(found.scores))
        agreed = agreed[np.argsort(-counts[agreed], kind="stable")]
        text = (
            f"{_count(len(agreed), 'example')} {'is' if len(agreed) == 1 else 'are'} among the top 5 % of at least "
            f"half of the {len(found.scores)} scores ({percent(len(agreed) / n)})"
        )
        several.append(Finding(f"{text}.", agreed.tolist()))
    several += _about_predictions(found)
    if len(found.scores) > 1:
        first, second, rho = _extreme_pair(found)
        pair = f"{title(found, first)} and {title(found, second)}"
        value = f"{rho:.2f}".replace("-", "−")
        if np.isfinite(rho) and len(found.scores) == 2:
            several.append(Finding(f"Spearman’s correlation of {pair} is {value}.", []))
        elif np.isfinite(rho):
            text = f"Of all scores, {pair} agree least in rank (Spearman’s correlation {value})."
            several.append(Finding(text, []))
    if found.dynamics is not None:
        final = found.dynamics.accuracy[-1]
        worst = int(np.argmin(np.nan_to_num(final, nan=2.0)))
        text = f"At the end of training, {_quoted(names[worst])} has the lowest training accuracy of all classes"
        several.append(Finding(f"{text} ({percent(float(final[worst]))}).", []))
    if len(most) and not chance[leader] * len(names) < _CHANCE:
        text = (
            f"No class is clearly more common than by chance among the {len(most):,} examples with the highest score "
        )
        several.append(Finding(f"{text}by {title(found, mode)}.", most.tolist()))
    return several[:count]


def _about_predictions(found: Contents) -> list[Finding]:
    """How many examples are predicted to be another class than their label, and the most common such pair."""
    if found.predictions is None:
        return []
    known = np.flatnonzero(np.isfinite(found.predictions).all(1))
    predicted, labels = found.predictions[known].argmax(1), found.labels[known]
    wrong = predicted != labels
    text = f"{_count(int(wrong.sum()), 'example')} of {len(known):,} ({percent(float(wrong.mean()))}) "
    text += f"{'is' if wrong.sum() == 1 else 'are'} classified wrongly by "
    text += found.predictor.replace("the example", "them")
    if wrong.any():
        classes = len(found.class_names)
        pairs = np.bincount(labels[wrong] * classes + predicted[wrong], minlength=classes**2)
        given, other = divmod(int(pairs.argmax()), classes)
        names = _quoted(found.class_names[given]), _quoted(found.class_names[other])
        text += f"; most often, {names[0]} is taken for {names[1]} ({pairs.max():,})"
    return [Finding(f"{text}.", known[wrong].tolist())]


def _about_sensitivities(found: Contents) -> list[Finding]:
    """How well the estimates of a sensitivity experiment agree with retraining and with the test loss."""
    experiment, several, n = found.sensitivity, [], len(found.used)
    if experiment is not None and len(experiment.retrained) > 2:
        rho = spearman(experiment.estimated, experiment.deviations)
        count = _count(len(experiment.retrained), "example")
        text = f"Spearman’s correlation between the estimated sensitivities of {count} and the deviations after "
        text += f"retraining without each of them is {rho:.2f}."
        several.append(Finding(text, experiment.retrained.tolist()))
    if experiment is not None and SENSITIVITY.name in found.scores:
        values = np.nan_to_num(found.scores[SENSITIVITY.name])
        most = top(found.scores[SENSITIVITY.name], _TOP)
        if len(most):
            share = float(values[most].sum() / values.sum())
            text = f"The {_count(len(most), 'most sensitive example')} ({percent(len(most) / n)}) "
            text += f"{'has' if len(most) == 1 else 'have'} {percent(share)} of the total sensitivity."
            several.append(Finding(text, most.tolist()))
    if experiment is not None and len(experiment.epochs):
        epoch = int(experiment.epochs[-1])
        text = f"After epoch {epoch}, the leave-one-out estimate is {experiment.estimates[-1]:.3g} and the test loss "
        several.append(Finding(f"{text}{experiment.test_nlls[epoch - 1]:.3g}.", []))
    return several


def _quoted(name: str) -> str:
    """A class name in quotes. Right-to-left text in it does not change the order of the text around it."""
    return f"“\u2068{name}\u2069”"


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _extreme_pair(found: Contents) -> tuple[str, str, float]:
    """The two scores whose rank correlation is lowest."""
    modes, matrix = correlations(found)
    pairs = [(matrix[i][j], i, j) for i in range(len(modes)) for j in range(i) if not np.isnan(matrix[i][j])]
    rho, i, j = min(pairs, default=(np.nan, 1, 0))
    return modes[j], modes[i], rho


def correlations(found: Contents) -> tuple[list[str], list[list[float]]]:
    """Spearman's rank correlation of all pairs of scores, NaN if one is constant, and the scores' names."""
    modes = list(found.scores)
    values = [[1.0] * len(modes) for _ in modes]
    for i, first in enumerate(modes):
        for j in range(i):
            values[i][j] = values[j][i] = spearman(found.scores[first], found.scores[modes[j]])
    return modes, values


class Histogram(NamedTuple):
    """A distribution, as the points of an SVG path in a box of 100 by 40."""

    low: float
    median: float
    high: float
    logarithmic: bool
    path: str


def histogram(values: np.ndarray) -> Histogram:
    """The distribution of a score; counts are logarithmic if one bin has more than half of the examples."""
    known = values[~np.isnan(values)]
    counts, _ = np.histogram(known, bins=BINS)
    logarithmic = bool(counts.max() > len(known) / 2)
    heights = np.log1p(counts) if logarithmic else counts
    heights = 40 * heights / heights.max()
    steps = "".join(f"V{40 - height:.1f}H{100 * (k + 1) / BINS:.2f}" for k, height in enumerate(heights))
    return Histogram(
        float(known.min()), float(np.median(known)), float(known.max()), logarithmic, f"M0 40{steps}V40Z"
    )


def class_rows(found: Contents) -> list[dict[str, Any]]:
    """One row per class: its size, its share of the top 1 % of the first score, its accuracy and its test loss."""
    classes, mode = len(found.class_names), next(iter(found.scores))
    values = found.scores[mode]
    known = ~np.isnan(values)
    sizes = np.bincount(found.labels[found.used], minlength=classes)
    sums = np.bincount(found.labels[known], values[known], minlength=classes)
    scored = np.bincount(found.labels[known], minlength=classes)
    inside = np.bincount(found.labels[top(values, _TOP)], minlength=classes)
    rows = []
    for label in range(classes):
        row: dict[str, Any] = {
            "label": label,
            "size": int(sizes[label]),
            "mean": sums[label] / scored[label] if scored[label] else np.nan,
        }
        row["top"] = int(inside[label])
        if found.probabilities is not None:
            mine = found.labels == label
            p = found.probabilities[mine]
            usable = np.isfinite(p).all(1)
            row["out_of_sample"] = float((p[usable].argmax(1) == label).mean()) if usable.any() else np.nan
        if found.dynamics is not None:
            row["accuracy"] = float(found.dynamics.accuracy[-1, label])
            row["test_loss"] = float(found.dynamics.test_loss[-1, label])
        if found.kept is not None:
            row["kept"] = int((found.kept[found.labels == label] > 0).sum())
        rows.append(row)
    return rows


def agreement(found: Contents) -> tuple[str, list[dict[str, Any]]]:
    """How well each score agrees with the ground truth: planted label noise, or memorization if it was estimated.

    Returns:
        What the truth is (empty if there is none), and one row per score, best first. Its ``interval`` is the AUROC,
        or Spearman's correlation, with a bootstrap interval.
    """
    truth = next((mode for mode in ("mem", "mem_prob") if mode in found.scores), "")
    others = {mode: values for mode, values in found.scores.items() if mode not in ("mem", "mem_prob")}
    rows: list[dict[str, Any]] = []
    resamples = max(_FEWEST, min(_RESAMPLES, _RESAMPLED // len(found.labels)))
    if found.planted is not None:
        measured = bootstrap(list(found.scores.values()), found.planted, resamples=resamples)
        for (mode, values), one in zip(found.scores.items(), measured, strict=True):
            rows.append({"mode": mode, "interval": one["auroc"], "precision": _precision(values, found.planted)})
    elif truth and others:
        reference = found.scores[truth]
        measured = bootstrap(list(others.values()), reference, resamples=resamples)
        for (mode, values), one in zip(others.items(), measured, strict=True):
            within = spearman_within_class(values, reference, found.labels)
            both = np.count_nonzero(~np.isnan(values + reference))
            overlap = top_overlap(values, reference, 0.1) if both else np.nan
            rows.append({"mode": mode, "interval": one["spearman"], "within": within, "top": overlap})
    name = "" if not rows else "planted label noise" if found.planted is not None else title(found, truth)
    return name, sorted(rows, key=lambda row: -np.nan_to_num(row["interval"].value, nan=-2))


def _precision(values: np.ndarray, planted: np.ndarray) -> float:
    """The share of wrong labels among as many of the highest scores; its mean over all orders of tied examples."""
    known = ~np.isnan(values)
    values, planted = values[known], planted[known]
    wrong = np.count_nonzero(planted)
    if not wrong:
        return float("nan")
    limit = np.sort(values)[-wrong]
    above, tied = values > limit, values == limit
    return float((planted[above].sum() + (wrong - above.sum()) * planted[tied].mean()) / wrong)


def score_rows(found: Contents) -> list[dict[str, str]]:
    """One row per score: its model, its number of seeds or of models on subsets, and its cost, where recorded."""
    rows = []
    for mode in found.scores:
        record = found.records[mode]
        seeds, members, cost = record.get("seeds"), record.get("members"), record.get("cost")
        rows.append(
            {
                "mode": mode,
                "model": str(record.get("model") or ""),
                "seeds": str(len(seeds)) if isinstance(seeds, list) else str(members or ""),
                "cost": f"{cost:,.4g}" if isinstance(cost, int | float) else "–",
                "needs": found.entries[mode].cost,
            }
        )
    return rows


def run_rows(found: Contents) -> list[dict[str, str]]:
    """One row per trained run on this data set, from its ``results.json``."""
    rows = []
    for name, results in found.runs.items():
        settings, history = results["settings"], results["history"]
        if not history:
            continue
        last = history[-1]
        rows.append(
            {
                "name": name.rsplit("/", 1)[0],
                "seed": name.rsplit("_", 1)[1],
                "model": str(settings.get("model", "")),
                "optimizer": str(settings.get("optimizer", "")).upper(),
                "epochs": f"{len(history)}",
                "rate": f"{settings.get('learning_rate', '')}, {settings.get('lr_sched', '')}",
                "batch": str(settings.get("batch_size", "")),
                "examples": f"{settings.get('examples', len(found.labels)):,}",
                "train": percent(last.get("train_accuracy")),
                "test": percent(last.get("test_accuracy")),
                "time": duration(results.get("seconds") or 0.0),
                "device": str((results.get("machine") or {}).get("device", "")),
            }
        )
    return rows


def best_accuracy(found: Contents) -> float | None:
    """The highest test accuracy after the last epoch of any run; None without runs."""
    last = [results["history"][-1].get("test_accuracy") for results in found.runs.values() if results["history"]]
    return max((value for value in last if isinstance(value, int | float)), default=None)


def percent(value: Any) -> str:
    """Format a fraction as a percentage; a dash if it is not a number."""
    return f"{100 * value:.1f} %" if isinstance(value, int | float) and np.isfinite(value) else "–"


def shown_examples(found: Contents, limit: int, seed: int = 0) -> np.ndarray:
    """The indices of the examples on the page, ascending: all, or the extremes of each class and a uniform sample.

    Of a larger data set, at most half of the page are the listed label errors and duplicates. Half of the rest are
    the highest and the lowest examples of each class by each score, as many as fit: first the most extreme ones by
    all scores, then the second ones, and so on. The others are drawn uniformly from all other examples.

    Args:
        found: What was read.
        limit: The largest number of examples.
        seed: Seed of the sample.
    """
    n, used = len(found.labels), found.used
    if len(used) <= limit:
        return used
    listed = [issue.example for issue in likely_errors(found)[0]]
    for row in (found.duplicates or [])[:LISTED]:
        listed += [int(row["index"])] + [int(row["duplicate of"])] * (row["in"] == "train")
    chosen = np.zeros(n, bool)
    chosen[list(dict.fromkeys(listed))[: limit // 2]] = True
    depth = np.full(
        n, np.inf
    )  # fewest examples of the class between the example and an end of a score; first scores first
    for k, values in enumerate(found.scores.values()):
        known = used[~np.isnan(values[used])]
        order = known[np.lexsort((values[known], found.labels[known]))]
        sizes = np.bincount(found.labels[known], minlength=len(found.class_names))
        place = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        from_the_top = np.repeat(sizes, sizes) - 1 - place
        depth[order] = np.minimum(depth[order], np.minimum(place, from_the_top) + k / len(found.scores))
    extremes = np.argsort(depth, kind="stable")[: np.count_nonzero(np.isfinite(depth))]
    chosen[extremes[: (limit - np.count_nonzero(chosen)) // 2]] = True
    others = used[~chosen[used]]
    chosen[np.random.default_rng(seed).choice(others, limit - np.count_nonzero(chosen), replace=False)] = True
    return np.flatnonzero(chosen)


def selection_settings(settings: Mapping[str, Any]) -> str:
    """Describe how a selection was made, from its settings."""
    names: Sequence[str] = ("coreset_func", "coreset_mode", "coreset_fraction", "shots", "shots_up_to", "seed")
    given = [f"{name.removeprefix('coreset_')} {settings[name]}" for name in names if settings.get(name) is not None]
    return ", ".join(given)
