"""Label errors from out-of-sample probabilities: planted truth, exact small cases, and cleanlab."""

import sys

import numpy as np
import pytest

from src.artifacts.io import label_hash
from src.errors import ArgumentError, FileError, MeasurementError
from src.metrics.compare import auroc
from src.metrics.label_errors import (
    AuditConfig,
    audit,
    cleanlab_issues,
    common_mistakes,
    confident_count,
    fit_noise,
    mean_rank,
    read_probabilities,
    sharpened,
)

RNG = np.random.default_rng
NOISE = np.array([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.1, 0.0, 0.9]])  # P(label | true class)


def simulated(n, seed=0):
    """Probabilities of the true class, true classes that follow them, and labels with ``NOISE``."""
    generator = RNG(seed)
    p = generator.dirichlet(np.full(3, 0.3), n)
    true = (generator.random((n, 1)) > p.cumsum(1)).sum(1).clip(0, 2)
    labels = (generator.random((n, 1)) > NOISE[true].cumsum(1)).sum(1).clip(0, 2)
    return p, true, labels


def test_the_noise_matrix_is_recovered():
    p, _, labels = simulated(40_000)
    np.testing.assert_allclose(fit_noise(sharpened(p, 1), labels, 1.0), NOISE, atol=0.02)
    uniform = fit_noise(sharpened(p, 1), labels, 1e9)  # the prior alone: equal rates at the overall rate
    rate = (1 - uniform.diagonal()).mean()
    np.testing.assert_allclose(uniform[~np.eye(3, dtype=bool)], rate / 2, rtol=1e-3)
    assert 0.05 < rate < 0.2


def test_the_score_is_the_log_odds_of_the_posterior():
    p, true, labels = simulated(3000)
    found = audit(p, labels)
    wrong = []
    for i in range(3000):
        joint = np.maximum(p[i], 2.0**-17) ** found.exponent * found.noise[:, labels[i]]
        posterior = joint / joint.sum()
        others = np.delete(np.arange(3), labels[i])
        wrong.append(posterior[others].sum())
        assert found.score[i] == pytest.approx(np.log(wrong[-1] / posterior[labels[i]]))
        assert found.suggested[i] == others[posterior[others].argmax()]
        assert found.probability[i] == pytest.approx(posterior[others].max())
    assert found.expected == pytest.approx(sum(wrong))
    assert found.expected == pytest.approx((true != labels).sum(), rel=0.1)
    assert found.errors**2 == pytest.approx(found.expected * found.confident)
    assert found.exponent == 1  # the probabilities are exact
    # 30 % of class 0 is labeled 1, and none the other way around: no single score of an example's p can know that
    assert auroc(found.score, true != labels) > auroc(-p[np.arange(3000), labels], true != labels) + 0.02
    assert common_mistakes(found, labels)[0][:2] == (0, 1)


def test_the_confident_count():
    """Worked by hand."""
    p = np.array([0.9, 0.6, 0.65, 0.65, 0.1, 0.4, 0.7, 0.7])
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    one = 1 - p
    thresholds = p[labels == 0].mean(), one[labels == 1].mean()
    assert thresholds == (pytest.approx(0.58), pytest.approx(0.4))
    # label 0: all count (0.9, 0.6, 0.65, 0.65 as 0, 0.1 as 1); label 1: 0.4 counts as 1, both 0.7 as 0
    assert confident_count(np.stack([p, one], 1), labels) == pytest.approx(5 * 1 / 5 + 3 * 2 / 3)
    p[1:3], p[5:] = 0.5, 0.2  # the thresholds become 0.53 and 0.8, so these two examples do not count
    assert confident_count(np.stack([p, 1 - p], 1), labels) == pytest.approx(5 * 1 / 3)


def test_perfect_separation():
    true = np.arange(200) % 4
    labels = true.copy()
    labels[:12] = (labels[:12] + 1 + np.arange(12) % 3) % 4
    found = audit(np.eye(4)[true], labels)
    assert auroc(found.score, true != labels) == 1
    assert found.errors == pytest.approx(12, abs=0.5)
    np.testing.assert_array_equal(found.suggested[:12], true[:12])
    assert (found.probability[:12] > 0.99).all()


def test_examples_without_probabilities_are_left_out():
    p, _, labels = simulated(300)
    rows = RNG(1).choice(300, 40, replace=False)
    holes = p.copy()
    holes[rows] = np.nan
    found, kept = audit(holes, labels), np.delete(np.arange(300), rows)
    alone = audit(p[kept], labels[kept])
    np.testing.assert_array_equal(found.score[kept], alone.score)
    assert np.isnan(found.score[rows]).all()
    assert (found.suggested[rows] == -1).all()
    with pytest.raises(MeasurementError, match="only 4 examples"):
        audit(np.where(np.arange(300)[:, None] < 4, p, np.nan), labels)


def test_mean_rank():
    nan = np.nan
    found = mean_rank([np.array([0.1, 5.0, nan, 3.0, 3.0]), np.array([10.0, -1.0, 4.0, 2.0, 3.0])])
    np.testing.assert_allclose(found, [(1 + 4) / 8, (4 + 1) / 8, nan, (2.5 + 2) / 8, (2.5 + 3) / 8])


def test_agreement_with_cleanlab():
    """Its self-confidence is ``out_prob`` negated, and its ranking that of the margin of the given label."""
    rank_module = pytest.importorskip("cleanlab.rank")
    p, true, labels = simulated(2000)
    rows = np.arange(2000)
    quality = rank_module.get_label_quality_scores(labels, p, method="self_confidence")
    np.testing.assert_allclose(quality, p[rows, labels])
    p[7] = np.nan
    rank, issue = cleanlab_issues(p, labels)
    others = p.copy()
    others[rows, labels] = -1
    margin = p[rows, labels] - others.max(1)
    known = np.delete(rows, 7)
    assert sorted(rank[known]) == list(range(1, 2000))
    assert np.diff(margin[known[np.argsort(rank[known])]]).min() > -1e-4  # tiny probabilities are raised
    assert (rank[7], issue[7]) == (0, False)
    assert 0.5 < issue.sum() / (true != labels).sum() < 2


def test_without_cleanlab(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(ArgumentError, match=r"requirements-audit\.txt"):
        cleanlab_issues(np.eye(3), np.arange(3))


def test_files_of_probabilities(tmp_path):
    p, _, labels = simulated(50)
    digest = label_hash(labels)
    np.save(tmp_path / "p.npy", p.astype(np.float32))
    np.testing.assert_allclose(read_probabilities(tmp_path / "p.npy", 50, 3, digest), p, atol=1e-6)
    p[3] = np.nan
    np.savez(tmp_path / "p.npz", probabilities=p.astype(np.float16), label_hash=digest, other=np.zeros(2))
    found = read_probabilities(tmp_path / "p.npz", 50, 3, digest)
    np.testing.assert_allclose(found, p, atol=1e-3)

    def refused(values, says, name="bad.npy", **changes):
        np.save(tmp_path / "bad.npy", values)
        with pytest.raises(FileError, match=says):
            read_probabilities(tmp_path / name, **{"total": 50, "classes": 3, "labels": digest, **changes})

    refused(p[:49], r"shape \(49, 3\)")
    refused(p, r"needs \(50, 4\)", classes=4)
    refused(p * 2, r"row 0 is not a list of probabilities \(its sum is 2\)")
    refused(np.where(np.arange(3) < 1, p, np.nan), "row 0 is not")
    refused(np.log(p), "row 0 is not")
    refused(p * np.nan, "all rows are NaN")
    refused(p, "different labels", name="p.npz", labels=label_hash(labels + 1))
    with pytest.raises(ArgumentError, match="top"):
        AuditConfig(top=0)
