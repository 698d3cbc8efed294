"""The figures: positions of artists, and no overlaps."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from scipy.stats import pearsonr, spearmanr

from mpe.estimates import FEWEST_PAIRS, Correlation, correlation_intervals, correlation_text
from mpe.plots import (
    Decimals,
    LeaveClassOut,
    evolving,
    loco,
    loo_iterations,
    loo_l2reg,
    moving_average,
    place_labels,
    ranked_bins,
    validation,
)
from src.figures import BLUE, COLUMN, GRAY


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def overlap(figure, axes, artist):
    """The number of points of the axes' lines that are inside an artist."""
    figure.draw_without_rendering()
    box = artist.get_window_extent()
    count = 0
    for line in axes.lines:
        x, y = line.get_xydata().T
        at = np.linspace(x[0], x[-1], 400) if len(x) > 1 else x
        points = axes.transData.transform(np.column_stack([at, np.interp(at, x, y)]))
        count += np.count_nonzero((points > box.min).all(axis=1) & (points < box.max).all(axis=1))
    return count


def test_iterations_draw_all_epochs_and_estimates_at_theirs():
    test_nlls, epochs = np.linspace(0.8, 0.3, 7), np.array([1, 2, 5])
    figure = loo_iterations(epochs, {"diag": np.array([0.9, 0.8, 0.5])}, test_nlls)
    drawn = lines(figure.axes[0])
    assert np.array_equal(drawn["Test NLL"].get_xydata(), np.column_stack([np.arange(1, 8), test_nlls]))
    assert drawn["LOO estimate"].get_xdata().tolist() == [1, 2, 5]
    assert figure.get_size_inches()[0] == COLUMN
    assert len(figure.axes[0].get_yticks()) > 3


@pytest.mark.parametrize("values", [(0.2, 0.9), (0.9, 0.2), (0.9, 0.9)])
def test_a_legend_covers_no_curve(values):
    epochs, curve = np.arange(1, 31), np.linspace(*values, 30)
    figure = loo_iterations(epochs, {"diag": curve, "full": curve - 0.1, "woodbury": curve - 0.05}, curve)
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "Test NLL", "LOO estimate, diag", "LOO estimate, full", "LOO estimate, woodbury"
    ]  # fmt: skip
    assert overlap(figure, axes, axes.get_legend()) == 0


def test_moving_average_is_trailing():
    values = np.array([3.0, 1.0, 5.0, 7.0, 2.0])
    assert moving_average(values, 3).tolist() == [3.0, 13 / 3, 14 / 3]
    assert moving_average(values, 1).tolist() == values.tolist()


def test_l2reg_marks_the_minima_of_the_smoothed_curves():
    deltas = np.logspace(0, 3, 31)
    estimated, test_nlls = (np.abs(np.log10(deltas) - best) for best in (1.0, 2.0))
    axes = loo_l2reg(deltas, estimated, test_nlls, window=1).axes[0]
    stems = {line.get_color(): line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2}
    assert np.allclose(stems[BLUE], 10)
    assert np.allclose(stems[GRAY], 100)
    assert lines(axes)["LOO estimate"].get_xdata().tolist() == deltas.tolist()

    axes = loo_l2reg(deltas, estimated, test_nlls, window=4).axes[0]
    drawn = lines(axes)["LOO estimate"]
    assert np.array_equal(drawn.get_xdata(), deltas[3:])
    assert np.allclose(drawn.get_ydata(), [estimated[i - 3 : i + 1].mean() for i in range(3, 31)])


def test_l2reg_overlays_the_error_in_percent_on_its_own_axis():
    deltas, nll = np.logspace(0, 3, 9), np.linspace(1, 2, 9)
    errors = np.linspace(0.02, 0.04, 9)
    figure = loo_l2reg(deltas, nll, nll, window=3, test_errors=errors)
    left, right = figure.axes
    assert np.allclose(lines(right)["Test error"].get_ydata(), 100 * moving_average(errors, 3))
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["Test NLL", "LOO estimate", "Test error"]
    for axes in (left, right):
        assert overlap(figure, axes, right.get_legend()) == 0


def test_validation_draws_points_and_an_identity_line_that_moves_no_limits():
    true, estimated = np.array([0.0, 0.1, 0.2, 0.3]), np.array([0.0, 0.02, 0.01, 0.04])
    axes = validation(true, estimated, "n = 4").axes[0]
    points = next(c for c in axes.collections if isinstance(c, PathCollection))
    assert np.array_equal(points.get_offsets(), np.column_stack([true, estimated]))
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [2, 2]]
    assert axes.get_xlim()[1] < 0.4
    assert axes.get_ylim()[1] < 0.1
    assert [text.get_text() for text in axes.texts] == ["n = 4"]
    assert not validation(true, estimated).axes[0].texts


@pytest.mark.parametrize("count", [10, 12, 40])
def test_correlations_and_intervals_agree_with_resampling_one_by_one(count):
    rng = np.random.default_rng(count)
    x = np.round(rng.random(count), 1)  # with ties
    y = np.round(x**3 + 0.4 * rng.random(count), 2)
    found = correlation_intervals(x, y, resamples=150, seed=5)
    draws = np.random.default_rng(5).integers(count, size=(150, count))
    varied = [draw for draw in draws if np.ptp(x[draw]) > 0 and np.ptp(y[draw]) > 0]
    for name, function in (("Spearman", spearmanr), ("Pearson", pearsonr)):
        ends = np.quantile([function(x[draw], y[draw]).statistic for draw in varied], (0.025, 0.975))
        assert np.allclose(found[name], [function(x, y).statistic, *ends], rtol=0, atol=1e-12)


def test_resamples_are_drawn_by_a_seed():
    x, y = np.random.default_rng(0).random((2, 30))
    whole = correlation_intervals(x, y)
    assert whole == correlation_intervals(x, y)
    assert whole != correlation_intervals(x, y, seed=1)


def test_correlations_where_all_is_known():
    x = np.array([0.0, 1.0, 2.0])
    assert correlation_intervals(x, np.array([0.0, 2.0, 1.0]))["Spearman"].value == pytest.approx(0.5)
    assert correlation_intervals(1e-200 * x, 1e200 * x)["Pearson"].value == pytest.approx(1)


def test_an_interval_that_says_nothing_is_not_printed():
    x = np.arange(FEWEST_PAIRS + 0.0)
    assert (
        correlation_text(x[1:], -x[1:])
        == "n = 9 (no intervals for fewer than 10)\nSpearman -1.000\nPearson -1.000\nslope -1"
    )
    lines = correlation_text(x, x**3).splitlines()
    assert lines[:2] == [
        "n = 10 (95 % bootstrap intervals)",
        "Spearman 1.000 (all resamples agree: no interval)",
    ]
    assert lines[2].startswith("Pearson 0.9")
    assert lines[2].endswith("]")
    assert lines[3] == f"slope {(x**4).sum() / (x**2).sum():.3g}"


def test_correlations_where_there_are_none():
    x = np.arange(50.0)
    for pair in ((x, np.ones(50)), (np.ones(50), x), (x[:2], x[:2]), (x[:0], x[:0])):
        start = f"n = {len(pair[0])}\nSpearman –\nPearson –\nslope "
        assert correlation_text(*pair).startswith(start)
    assert correlation_text(x[:2], 3 * x[:2]).endswith("slope 3")
    assert correlation_text(0 * x, x).endswith("slope –")
    assert str(Correlation(0.5, np.nan, np.nan)) == "0.500"


def test_bins_rank_all_checkpoints_by_the_last():
    last = np.random.default_rng(0).permutation(205).astype(float)
    bins = ranked_bins(np.stack([-last, last]), 100)
    ranked = np.sort(last)[::-1]
    expected = [ranked[:3].mean(), ranked[3:6].mean(), ranked[12:15].mean(), ranked[15:17].mean(), ranked[-2:].mean()]
    assert bins[1, [0, 1, 4, 5, -1]].tolist() == expected  # 205 = 5 bins of 3 and 95 of 2
    assert np.array_equal(bins[0], -bins[1])
    assert ranked_bins(last[None, :37]).tolist() == [np.sort(last[:37])[::-1].tolist()]  # fewer examples than bins


@pytest.mark.parametrize("count", [1, 2, 4, 17])
def test_evolving_draws_any_number_of_checkpoints(count):
    sensitivities = np.random.default_rng(0).random((count, 120))
    figure = evolving(sensitivities, [f"step {k}" for k in range(count)])
    axes = figure.axes[0]
    assert list(lines(axes)) == [f"step {k}" for k in range(count)]
    assert axes.get_xlim() == (0, 100)
    assert overlap(figure, axes, axes.get_legend()) == 0
    assert (np.diff(axes.lines[-1].get_ydata()) >= 0).all()  # ranked by the last checkpoint
    assert len({line.get_color() for line in axes.lines}) == count


def experiment(label, classes, drops, seed=0):
    rng = np.random.default_rng(seed)
    return LeaveClassOut(label, np.asarray(classes), rng.random(len(classes)), rng.random(len(classes)), drops)


def test_loco_sizes_marks_and_numbers():
    drops = np.array([0.1, 0.0, -0.2])
    axes = loco([experiment("a", [0, 4, 7], drops), experiment("b", [0, 1, 2], drops, 1)]).axes[0]
    first, second = axes.collections
    assert first.get_sizes().tolist() == [54.0, 4.0, 4.0]  # no accuracy lost, or some gained: small but visible
    assert len(first.get_facecolor()) == 1
    assert len(second.get_facecolor()) == 0  # hollow
    assert [text.get_text() for text in axes.texts] == ["0", "4", "7", "0", "1", "2"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


@pytest.mark.parametrize("classes", [1, 30])
def test_loco_of_any_number_of_classes_and_experiments(classes):
    many = [experiment(str(k), range(classes), np.full(classes, 0.05), k) for k in range(1 + 6 * (classes == 1))]
    axes = loco(many).axes[0]
    assert len(axes.collections) == len(many)
    assert len(axes.texts) == classes * len(many)


def test_labels_keep_off_markers_and_each_other():
    points = np.array([[100.0, 100.0], [112.0, 100.0], [104.0, 109.0], [300.0, 100.0], [395.0, 200.0]])
    radii, sizes = np.full(5, 5.0), np.tile([14.0, 12.0], (5, 1))
    frame = np.array([[0.0, 0.0], [400.0, 400.0]])
    centres = place_labels(points, radii, sizes, frame)
    for i in range(5):
        low, high = centres[i] - sizes[i] / 2, centres[i] + sizes[i] / 2
        assert (low >= frame[0]).all()
        assert (high <= frame[1]).all()
        assert (np.linalg.norm(np.clip(points, low, high) - points, axis=1) >= radii).all()
        for j in range(i):
            assert (np.abs(centres[i] - centres[j]) >= sizes[i]).any()
    assert (centres[3] > points[3]).all()  # alone: at the upper right, as in the paper


@pytest.mark.parametrize(
    ("ticks", "texts"),
    [
        ([0.4, 0.6], ["0.4", "0.6"]),
        ([0.05, 0.1, 0.15], ["0.05", "0.10", "0.15"]),
        ([0.0005, 0.001], ["0.0005", "0.0010"]),
        ([1, 2], ["1.0", "2.0"]),
    ],
)
def test_tick_labels_tell_ticks_apart(ticks, texts):
    assert Decimals().format_ticks(ticks) == texts
