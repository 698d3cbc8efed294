"""Reductions of recorded dynamics: published test vectors, closed forms, slow reference code, missing visits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from src.errors import ArgumentError
from src.metrics import SCORES, scores_from
from src.metrics import dynamics as ds
from src.training.dynamics import QUANTITIES

NAN = np.nan


def columns(*histories):
    """One column per string of 0, 1 and - (not visited)."""
    return np.array([[{"0": 0, "1": 1, "-": NAN}[c] for c in h] for h in histories], dtype=np.float32).T


def test_published_vectors():
    correct = columns("1111", "0000", "0101", "1011", "1110", "0111")
    np.testing.assert_array_equal(ds.forgetting_events(correct), [0, 0, 1, 1, 1, 0])
    np.testing.assert_array_equal(ds.epochs_to_learn(correct), [1, NAN, 4, 3, NAN, 2])
    np.testing.assert_array_equal(ds.epochs_to_learn(correct, "after_last"), [1, 5, 4, 3, 5, 2])
    assert ds.training_accuracy(correct) == 4 / 6
    assert ds.training_accuracy(columns("10", "11", "1-")) == 0.5  # of the visited examples


def test_epochs_without_a_visit_neither_forget_nor_learn():
    correct = columns("1-0", "1--", "0-1", "--1", "---", "10-", "-10", "01-")
    np.testing.assert_array_equal(ds.forgetting_events(correct), [1, 0, 0, 0, NAN, 1, 1, 0])
    np.testing.assert_array_equal(ds.epochs_to_learn(correct), [NAN, 1, 2, 1, NAN, NAN, NAN, 2])


@given(st.lists(st.text("01-", min_size=6, max_size=6), min_size=1, max_size=8))
def test_histories_against_a_loop(histories):
    correct = columns(*histories)
    for history, events, epochs in zip(
        histories, ds.forgetting_events(correct), ds.epochs_to_learn(correct), strict=True
    ):
        seen = history.replace("-", "")
        expected = seen.count("10") if seen else NAN
        np.testing.assert_equal(events, expected)
        np.testing.assert_equal(epochs, history.rfind("0") + 2.0 if seen.endswith("1") else NAN)
    after = ds.epochs_to_learn(correct, "after_last")
    expected = []
    for history in histories:
        seen = history.replace("-", "")
        expected.append(NAN if not seen else 7 if seen[-1] == "0" else history.rfind("0") + 2)
    np.testing.assert_array_equal(after, expected)


@pytest.fixture
def run():
    rng = np.random.default_rng(0)
    return rng.random((13, 5)).astype(np.float32)


def test_window_scores_against_loops(run):
    p, J = run.astype(np.float64), 10
    dual, unc = np.zeros(5), np.zeros(5)
    for k in range(13 - J + 1):
        for i in range(5):
            part = p[k : k + J, i]
            dual[i] += (1 - part.mean()) * part.std(ddof=1) / (13 - J + 1)
            unc[i] += part.std(ddof=1) / (13 - J + 1)
    np.testing.assert_allclose(ds.dual(run), dual, rtol=1e-6)
    np.testing.assert_allclose(ds.dyn_unc(run), unc, rtol=1e-6)


def test_tdds_against_a_loop(run):
    d, J, decay = run.astype(np.float64), 4, 0.9
    d[0] = NAN
    expected = np.zeros(5)
    for i in range(5):
        for end in range(J, 13):
            part = d[end - J + 1 : end + 1, i]
            expected[i] += decay * (1 - decay) ** (12 - end) * ((part - part.mean()) ** 2).sum()
    np.testing.assert_allclose(ds.tdds(d, J), expected, rtol=1e-10)


def test_a_short_run_shrinks_the_window_and_one_epoch_is_refused(run):
    short = run[:4]
    expected = (1 - short.mean(0)) * short.std(0, ddof=1)
    np.testing.assert_allclose(ds.dual(short), expected, rtol=1e-5)
    np.testing.assert_allclose(ds.el2n(short), short.mean(0), rtol=1e-6)
    for name, fewest in {"dual": 2, "dyn_unc": 2, "tdds": 3, "csl": 1}.items():
        recorded = dict.fromkeys(("probability", "divergence", "loss"), run[:fewest])
        assert np.isfinite(SCORES[name].from_dynamics(recorded)).all()
        with pytest.raises(ArgumentError, match=rf"^modes {name}: .* at least {fewest}"):
            SCORES[name].from_dynamics({key: values[: fewest - 1] for key, values in recorded.items()})


def test_sums_means_and_windows(run):
    np.testing.assert_allclose(ds.csl(run), run.sum(0), rtol=1e-6)
    np.testing.assert_allclose(ds.aum(run - 0.5), (run - 0.5).mean(0), rtol=1e-5)
    np.testing.assert_allclose(ds.el2n(run), run[:10].mean(0), rtol=1e-6)
    np.testing.assert_allclose(ds.el2n(run, (3, 5)), run[2:5].mean(0), rtol=1e-6)
    for first, last in ((0, 5), (6, 5), (14, 20)):
        with pytest.raises(ArgumentError, match="outside the run"):
            ds.el2n(run, (first, last))


def test_missing_visits_are_left_out_of_every_score(run):
    rare = np.full((13, 5), NAN, dtype=np.float32)
    rare[3, 0], rare[8, 0] = 1.0, 3.0
    np.testing.assert_allclose(ds.csl(rare)[0], 2.0 * 13)  # unvisited examples count as the mean
    assert ds.aum(rare)[0] == 2.0
    part = rare[:, :1]
    holes = [part[k : k + 10][~np.isnan(part[k : k + 10])] for k in range(4)]
    assert ds.dyn_unc(rare)[0] == pytest.approx(np.mean([h.std(ddof=1) for h in holes if len(h) > 1]))
    for score in (ds.csl, ds.aum, ds.dual, ds.dyn_unc, ds.el2n, ds.tdds, ds.forgetting_events, ds.epochs_to_learn):
        assert np.isnan(score(rare)[1:]).all()


def test_every_score_follows_its_example(run):
    order = np.array([3, 0, 4, 1, 2])
    correct = (run > 0.5).astype(np.float32)
    arrays = dict.fromkeys(QUANTITIES, run) | {"correct": correct}
    shared = {"class_test_loss": run, "labels": np.arange(5)}
    for name in scores_from("dynamics"):
        arrays |= shared
        permuted = {key: value[:, order] for key, value in arrays.items() if key in QUANTITIES}
        moved = SCORES[name].from_dynamics(permuted | shared | {"labels": order}, ds.Windows())
        expected = SCORES[name].from_dynamics(arrays)[order]
        np.testing.assert_allclose(moved, expected, rtol=1e-12, err_msg=name)


def test_late_scores_are_means_over_the_end_of_the_run(run):
    np.testing.assert_allclose(ds.late_mean(run), run[6:].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ds.late_mean(run, 20), run.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ds.late_mean(run, 2), run[-2:].mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(ds.csg(run), run.sum(axis=0), rtol=1e-6)


def test_cld_is_the_correlation_of_consecutive_differences(run):
    held_out, labels = np.random.default_rng(1).random((13, 3)), np.array([0, 1, 2, 0, 1])
    expected = [
        np.corrcoef(np.diff(run[:, i].astype(float)), np.diff(held_out[:, c]))[0, 1] for i, c in enumerate(labels)
    ]
    np.testing.assert_allclose(ds.cld(run, held_out, labels), expected, rtol=1e-9)
    missed = run.copy()
    missed[5, 0] = np.nan  # the two differences with this epoch are ignored
    known = [0, 1, 2, 3, *range(6, 12)]
    own, of_class = np.diff(run[:, 0].astype(float))[known], np.diff(held_out[:, 0])[known]
    found = ds.cld(missed, held_out, labels)
    assert found[0] == pytest.approx(np.corrcoef(own, of_class)[0, 1], rel=1e-9)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-9)
    missed[1:, 1] = np.nan
    assert np.isnan(ds.cld(missed, held_out, labels)[1])
    held_out[:, 2] = np.nan  # a class without test examples
    with pytest.raises(ArgumentError, match=r"cld: class 2 .* no test examples"):
        ds.cld(run, held_out, labels)
    unseen = np.where(np.arange(5) == 2, np.nan, run)  # no example of this class was visited
    np.testing.assert_allclose(np.delete(ds.cld(unseen, held_out, labels), 2), np.delete(expected, 2), rtol=1e-9)
