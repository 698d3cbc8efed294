"""Figures show the scores correctly and are written in both formats."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from scipy.stats import gaussian_kde

from src.artifacts import paths
from src.artifacts.io import save_figure
from src.artifacts.store import write_scores
from src.errors import ArgumentError
from src.figures import BLUE, DPI
from src.metrics import SCORES, Proxy, plots

VALUES = np.random.default_rng(0).gamma(2.0, size=400)


@pytest.fixture
def proxy(tmp_path):
    write_scores(SCORES["csl"].path(tmp_path, "toy"), VALUES, {})
    return Proxy("csl", "toy", False, tmp_path)


def test_the_histogram_holds_every_example_in_50_bins():
    axes = plots.histogram(VALUES, "$s$", "scores, toy").axes[0]
    counts = [patch.get_height() for patch in axes.patches]
    assert len(counts) == 50
    assert sum(counts) == 400
    assert {to_hex(patch.get_facecolor()).upper() for patch in axes.patches} == {BLUE}
    assert all(count == round(count) for count in axes.get_yticks())
    assert axes.get_yscale() == "linear"
    assert axes.get_xlabel() == "$s$"
    skewed = np.concatenate([np.zeros(300), VALUES[:100]])
    assert plots.histogram(skewed, "$s$", "").axes[0].get_yscale() == "log"


def reflected(kernels, points):
    return sum(kernels(at) for at in (points, 2 * points[0] - points, 2 * points[-1] - points))


def test_the_binned_density_is_the_reflected_one():
    points, heights = plots.kernel_density(VALUES)
    np.testing.assert_allclose(heights, reflected(gaussian_kde(VALUES), points), rtol=0.01, atol=1e-4)
    assert (points[0], points[-1]) == (VALUES.min(), VALUES.max())
    points, heights = plots.kernel_density(np.array([0.0, 0.0, 1.0, 2.0, 2.0, 2.0]))
    centers = np.array([1, 2049, 4095]) / 2048  # centers of the first, middle and last of 2048 bins
    expected = reflected(gaussian_kde(centers, 6**-0.2, weights=[2, 1, 3]), points)
    np.testing.assert_allclose(heights, expected / np.trapezoid(expected, points), rtol=1e-9)


def test_the_density_is_right_at_its_ends():
    _, heights = plots.kernel_density(np.linspace(0, 1, 10_000))
    np.testing.assert_allclose(heights, 1, atol=0.01)


def test_a_density_of_equal_scores_is_refused():
    with pytest.raises(ArgumentError, match="all equal"):
        plots.density(np.ones(10), "$s$", "scores, toy")


def test_shares_are_of_all_examples(proxy, tmp_path):
    figure = plots.share_figure(np.arange(400), VALUES / VALUES.sum(), "$s$", "t")
    offsets = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(offsets[:, 1].sum(), 1.0)
    line = plots.share_figure(np.arange(5), VALUES[:5] / VALUES.sum(), "$s$", "t", "line").axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), VALUES[:5] / VALUES.sum())
    with pytest.raises(ArgumentError, match="choose scatter or line"):
        proxy.plot_prob_dist(plot="bars", folder=tmp_path)


def test_proxy_plots_go_into_a_folder_under_the_field_s_names(proxy, tmp_path):
    out = tmp_path / "plots"
    proxy.plot_scores_hist(folder=out)
    proxy.plot_scores_kde(np.arange(50), folder=out)
    proxy.plot_prob_dist([3, 7, 9], folder=out)
    names = ("all_scores_hist", "scores_distribution", "prob_dist")
    assert {path.name for path in out.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert (out / "all_scores_hist.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "all_scores_hist.pdf").read_bytes().startswith(b"%PDF")


def test_default_plots_stand_in_the_plots_folder(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    own = Proxy("csl", "toy", folder=tmp_path)
    written = own.plot_scores_hist([0, 1, 2])
    assert written[0] == tmp_path / "plots" / "proxies" / "toy" / "csl" / "scores_hist.png"


def test_the_comparison_shows_its_numbers():
    matrix = np.array([[0.123, -0.456], [np.nan, 1.0]])
    names = ["$a$", "$b$"]
    figure = plots.comparison([VALUES, VALUES[::-1]], names, ["$c$", "$d$"], {"rank correlation": matrix}, "title")
    ridges, heat = figure.axes
    assert [text.get_text() for text in heat.texts] == ["0.12", "-0.46", "–", "1.00"]
    assert [label.get_text() for label in heat.get_xticklabels()] == ["$c$", "$d$"]
    assert [label.get_text() for label in ridges.get_yticklabels()] == names


def test_extremes_per_class_by_score_then_index():
    scores = np.array([5.0, 1.0, 1.0, np.nan, 3.0, 9.0, 2.0, 0.0])
    indices = np.array([7, 5, 4, 3, 2, 1, 0])  # a subset in a different order
    labels = np.array([0, 1, 0, 0, 0, 0, 1])
    result = plots.extremes(scores, labels, indices, 2)
    lowest, highest = result[0]
    assert indices[lowest].tolist() == [7, 1]
    assert indices[highest].tolist() == [4, 2]
    assert [indices[end].tolist() for end in result[1]] == [[0, 5], [5, 0]]


def test_ties_go_to_the_lower_index_whatever_the_order():
    scores = np.zeros(6)
    for indices in (np.arange(6), np.arange(6)[::-1], np.array([2, 0, 5, 1, 4, 3])):
        lowest, highest = plots.extremes(scores, np.zeros(6, int), indices, 3)[0]
        assert indices[lowest].tolist() == [0, 1, 2]
        assert indices[highest].tolist() == [5, 4, 3]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_mosaic_places_every_image_untouched(channels):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, channels, 4, 5), dtype=np.uint8)
    canvas = plots.mosaic(images, 3, 2, 1, split=2)
    assert canvas.shape == (12, 3 * 5 + 2 + 2, 3)
    for r in range(2):
        for k, left in enumerate((0, 6, 14)):
            part = canvas[6 * r : 6 * r + 4, left : left + 5].transpose(2, 0, 1)
            np.testing.assert_array_equal(part, np.broadcast_to(images[r, k], (3, 4, 5)))
    assert (canvas[4:6] == 255).all()
    assert (canvas[:, 11:14] == 255).all()


def test_grids_name_rows_and_scores_and_take_short_rows(tmp_path):
    images = [np.zeros((3, 1, 8, 8), np.uint8), np.zeros((2, 1, 8, 8), np.uint8)]
    figure = plots.image_grid(images, [["0.1", "0.2", "0.3"], ["1", "2"]], ["$a$", "$b$"], "zero: lowest 3")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["$a$", "0.1", "0.2", "0.3", "$b$", "1", "2"]
    assert len(save_figure(figure, tmp_path / "grid")) == 2


def embedded(pdf):
    """The only image in a PDF file: uint8 ``(h, w, 3)``, and its width and height in points."""
    (header, data) = re.findall(rb"/Subtype /Image(.*?)stream\n(.*?)\nendstream", pdf.read_bytes(), re.S)[0]
    assert pdf.read_bytes().count(b"/Subtype /Image") == 1
    width, height = (int(re.search(rb"/%s (\d+)" % name, header)[1]) for name in (b"Width", b"Height"))
    length = len(zlib.decompress(data)) // height
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT": data, b"IEND": b""}
    assert length == 3 * width + 1  # RGB, not a palette; each row starts with a filter byte
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
    streams = re.findall(rb"stream\n(.*?)\nendstream", pdf.read_bytes(), re.S)
    (page,) = [text for text in map(_inflated, streams) if b" Do" in text]
    points = [float(number) for number in re.search(rb"q ([\d.]+) 0 0 ([\d.]+) \S+ \S+ cm /I1 Do", page).groups()]
    return np.asarray(Image.open(io.BytesIO(png))), points


def _inflated(stream):
    try:
        return zlib.decompress(stream)
    except zlib.error:
        return b""


@pytest.mark.parametrize(("side", "times"), [(24, 10), (32, 8), (50, 5), (224, 1)])
def test_each_pixel_is_a_square_in_print(tmp_path, side, times):
    images = np.random.default_rng(0).integers(0, 255, (2, 3, side, side), dtype=np.uint8)
    png, pdf = save_figure(plots.image_grid([images], [["1", "2"]], ["$a$"], "zero"), tmp_path / "grid")
    shown = np.asarray(Image.open(png).convert("RGB"))
    raster, points = embedded(pdf)
    height, width = raster.shape[:2]
    right, below = round(0.1 * DPI), round(0.05 * DPI)
    shown = shown[-below - height : -below, -right - width : -right]  # everything except titles, labels and margins
    assert shown.shape == raster.shape
    assert np.allclose(points, [72 / DPI * raster.shape[1], 72 / DPI * raster.shape[0]])
    square = np.repeat(np.repeat(images.transpose(0, 2, 3, 1), times, axis=1), times, axis=2)
    for drawn in (shown, raster):
        np.testing.assert_array_equal(drawn[: times * side, : times * side], square[0])
        np.testing.assert_array_equal(drawn[: times * side, -times * side :], square[1])


def test_tiny_images_are_enlarged_smoothly(tmp_path):
    images = np.zeros((1, 1, 8, 8), np.uint8)
    images[..., 4:] = 255
    figure = plots.image_grid([images], [["1"]], ["$a$"], "zero", "Note.")
    assert [text.get_text() for text in figure.texts] == ["zero", "Note. 8 × 8 pixels, enlarged smoothly."]
    png, _ = save_figure(figure, tmp_path / "grid")
    shown = np.asarray(Image.open(png).convert("L")).astype(int)
    row = shown[round(0.8 * DPI), round(0.76 * DPI) : round(1.54 * DPI)]
    assert row[0] == 0
    assert row[-1] == 255
    assert 0 < np.diff(row).max() < 20  # in squares it would jump by 255


def test_class_figures_show_the_index_of_each_image():
    images = np.zeros((4, 1, 8, 8), np.uint8)
    figure = plots.class_grids(
        lambda at: images[at], [np.array([2, 0])], [np.array([70, 50])], [np.array([0.5, 1.0])], ["$a$"], "t"
    )
    assert [text.get_text() for text in figure.axes[0].texts] == ["$a$", "70\n0.500", "50\n1.00"]
    assert "index" in figure.texts[1].get_text()


def test_large_photos_are_scaled_down_for_the_overview(tmp_path):
    rows = np.linspace(0, 250, 224).astype(np.uint8)[:, None].repeat(224, axis=1)
    images = np.broadcast_to(rows, (1, 3, 224, 224))
    (figure,) = plots.overview([("one", images, images)], 1, "$s$", "title")
    png, _ = save_figure(figure, tmp_path / "overview")
    shown = np.asarray(Image.open(png).convert("L")).astype(float)
    assert figure.get_size_inches()[0] < 3
    column = shown[-125:-12, round(DPI * (0.2 + 0.21 + 0.2))]  # in the first image
    np.testing.assert_allclose(np.diff(column), 250 / 123, atol=2)


def test_the_overview_takes_pages_for_many_classes():
    image = np.zeros((2, 3, 8, 8), np.uint8)
    classes = [(f"class {c}", image, image) for c in range(130)]
    figures = plots.overview(classes, 2, "$s$", "title")
    shown = [[text.get_text() for axes in figure.axes for text in axes.texts] for figure in figures]
    assert [sum(text.startswith("class") for text in page) for page in shown] == [100, 30]
    assert [len(figure.axes) for figure in figures] == [4, 2]
