"""The figure of a comparison: what is drawn, and names that can be distinguished."""

from itertools import pairwise

import numpy as np
import pytest

from src.artifacts.io import save_figure
from src.coresets.grid import summarize
from src.coresets.plots import accuracy_figure, line_styles, spread
from src.errors import ArgumentError


def grid(methods, shares, seeds=(1, 2, 3), *, shots=False):
    rng = np.random.default_rng(0)
    return [
        {
            "method": method,
            "share": None if shots else share,
            "shots": share if shots else None,
            "seed": seed,
            "finished": True,
            "accuracy": float(rng.uniform(0.3, 0.9)),
            "best": 0.9,
            "epoch": 1,
            "examples": 1,
            "selection_seconds": None,
            "training_seconds": 1.0,
        }
        for method in methods
        for share in shares
        for seed in seeds
    ]


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}


def names_of(figure):
    return [text.get_text() for text in sorted(figure.axes[0].texts, key=lambda text: -text.get_position()[1])]


def test_lines_bands_ticks_and_names():
    rows = summarize(grid(["craig", "random", "el2n"], [0.1, 0.3, 0.9]))
    figure = accuracy_figure(rows, title="lenet on digits", full=0.95, full_std=0.01)
    axes, lines = figure.axes[0], lines_of(figure)
    assert list(lines) == ["craig", "random", "el2n", "all examples"]
    bands = {band.get_label(): band for band in axes.collections}
    for method in ("craig", "random", "el2n"):
        own = [row for row in rows if row["method"] == method]
        mean, std = (100 * np.array([row[key] for row in own]) for key in ("mean", "std"))
        np.testing.assert_allclose(lines[method].get_xdata(), [0.1, 0.3, 0.9])
        np.testing.assert_allclose(lines[method].get_ydata(), mean)
        corners = bands[f"_{method}"].get_paths()[0].vertices
        for x, low, high in zip([0.1, 0.3, 0.9], mean - std, mean + std, strict=True):
            heights = corners[corners[:, 0] == x, 1]
            np.testing.assert_allclose([heights.min(), heights.max()], [low, high])
    assert (lines["random"].get_color(), lines["random"].get_linestyle()) == ("black", "--")
    assert lines["all examples"].get_linestyle() == ":"
    np.testing.assert_allclose(lines["all examples"].get_ydata(), 95)
    np.testing.assert_allclose(axes.get_xticks(), [0.1, 0.3, 0.9])
    assert axes.get_title() == "lenet on digits (mean of 3 seeds; bands: ± one standard deviation)"
    assert axes.get_xlabel() == "Fraction of examples kept"
    ends = {name: line.get_ydata()[-1] for name, line in lines.items()}
    assert names_of(figure) == sorted(ends, key=lambda name: -ends[name])


def test_one_seed_has_no_band_and_shots_have_their_axis():
    figure = accuracy_figure(summarize(grid(["random", "craig"], [1, 5, 10, 50], [1], shots=True)), title="t")
    axes = figure.axes[0]
    assert not axes.collections
    assert axes.get_title() == "t"
    assert axes.get_xlabel() == "Examples per class"
    assert axes.get_xscale() == "log"  # 1 and 5 would overlap
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "5", "10", "50"]
    assert "all examples" not in names_of(figure)


def test_what_is_not_finished_is_not_drawn():
    records = grid(["random", "craig", "el2n"], [0.1, 0.5])
    for record in records:
        record["finished"] = record["method"] == "random" or (record["method"] == "craig" and record["share"] == 0.1)
    lines = lines_of(accuracy_figure(summarize(records), title="t"))
    assert list(lines) == ["random", "craig"]
    assert list(lines["craig"].get_xdata()) == [0.1]
    for record in records:
        record["finished"] = False
    assert list(lines_of(accuracy_figure(summarize(records), title="t", full=0.9))) == ["all examples"]


def test_colors_stay_with_their_methods_as_a_grid_fills():
    records = grid(["forget", "random", "craig"], [0.1, 0.5])
    whole = lines_of(accuracy_figure(summarize(records), title="t"))["craig"].get_color()
    for record in records:
        record["finished"] = record["method"] == "craig"
    assert lines_of(accuracy_figure(summarize(records), title="t"))["craig"].get_color() == whole


def test_one_share_has_bars():
    figure = accuracy_figure(summarize(grid(["random", "craig"], [1.0])), title="t")
    axes = figure.axes[0]
    assert len(axes.collections) == 2
    low, high = axes.get_xlim()
    assert low < 1.0 < high


def test_shares_and_shots_do_not_mix():
    rows = summarize(grid(["random"], [0.1]) + grid(["craig"], [5], shots=True))
    with pytest.raises(ArgumentError, match="separate axes"):
        accuracy_figure(rows, title="t")


def test_many_methods_look_different_and_their_names_keep_apart():
    methods = ["random", *(f"method {number}" for number in range(18))]
    seen = {(s["color"], str(s["linestyle"]), s["marker"]) for s in line_styles(methods).values()}
    assert len(seen) == len(methods)
    figure = accuracy_figure(summarize(grid(methods, [0.1, 0.5])), title="t", full=0.9)
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert all(high.y0 >= low.y1 - 1 for low, high in pairwise(boxes))
    assert all(box.x1 <= figure.bbox.width for box in boxes)


def test_spread_keeps_a_gap_and_moves_little():
    np.testing.assert_allclose(spread([0.2, 0.5, 0.9], 0.1), [0.2, 0.5, 0.9])
    np.testing.assert_allclose(spread([0.5, 0.5, 0.9], 0.1), [0.45, 0.55, 0.9])
    np.testing.assert_allclose(spread([0.98, 1.0, 1.0], 0.1), [0.8, 0.9, 1.0])
    np.testing.assert_allclose(spread([0.5] * 5, 0.5), [0, 0.25, 0.5, 0.75, 1])  # no room for more
    np.testing.assert_allclose(spread([1.2], 0.1), [1.0])
    assert len(spread([], 0.1)) == 0


def test_png_and_pdf(tmp_path):
    figure = accuracy_figure(summarize(grid(["random", "craig"], [0.1, 0.5])), title="t", full=0.9)
    paths = save_figure(figure, tmp_path / "plots" / "comparison")
    assert [path.name for path in paths] == ["comparison.png", "comparison.pdf"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
