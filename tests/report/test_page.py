"""The page of make_report.py, in a real browser: images, filters, order, search, selection by lasso, downloads."""

import csv
import io
import json

import numpy as np
import pytest
from browser import chromium, opened
from PIL import Image
from support import folders, succeed

from src.artifacts import paths
from src.artifacts.io import label_hash, write_npz
from src.artifacts.store import write_scores
from src.metrics import SCORES

# Untrusted names: markup, quotes, a formula, a formula of spreadsheets, right-to-left text, an emoji.
CLASSES = ("<script>alert(1)<", '"it\'s" & $x^2$', "שלום עולם", "🐈 cat")
SPECIAL = {0: "<img src=x onerror=alert(1)>.png", 1: '=cmd,"q".png', 2: "a b#c?d%20é.png"}
PER_CLASS = 18


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images in folders with hostile names, three scores, a run, out-of-sample probabilities and a selection."""
    base = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for part, count in (("train", PER_CLASS), ("test", 2)):
        for label, name in enumerate(CLASSES):
            (base / "data" / part / name).mkdir(parents=True)
            for k in range(count):
                file = SPECIAL[k] if label == 0 and k in SPECIAL and part == "train" else f"{k:03}.png"
                pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3)), 4, 0), 4, 1).astype(np.uint8)
                Image.fromarray(pixels).save(base / "data" / part / name / file)
    from src.datasets import DataConfig

    train, _ = DataConfig(f"folder:{base / 'data'}", cache_folder=base / "decoded").load(base)
    n, name, labels = len(train), train.entry.name, train.labels.numpy()
    facts = {"label_hash": label_hash(labels), "data_hash": train.digest, "model": "lenet", "seeds": [1], "cost": 3.0}
    scores = {"samis_loss": rng.random(n), "aum": rng.normal(size=n), "csl": np.r_[np.nan, rng.random(n - 1)]}
    for mode, values in scores.items():
        write_scores(SCORES[mode].path(base / "metrics", name), values, {**facts, "mode": mode, "settings": {}})
    predicted = labels.copy()
    predicted[[5, 40]] = (labels[[5, 40]] + 1) % 4
    probabilities = 0.9 * np.eye(4)[predicted] + 0.025
    write_npz(
        paths.memorization_path(base / "metrics", f"out_of_sample_{name}.npz"),
        probabilities=probabilities, labels=labels, label_hash=facts["label_hash"],
    )  # fmt: skip
    loss, settings = rng.random((20, n)), {"dataset": name, "model": "lenet", "epochs": 20}
    quantities = dict.fromkeys(("margin", "el2n", "divergence"), loss)
    run = paths.dynamics_folder(base / "metrics", f"standard_lenet_over_{name}_with_sgd_sched_const", 1)
    write_npz(
        run / "dynamics.npz", loss=loss, probability=np.exp(-loss), correct=(loss < 0.6).astype(float), **quantities,
        labels=labels, label_hash=facts["label_hash"], settings=json.dumps(settings),
    )  # fmt: skip
    write_npz(base / "selection.npz", indices=np.arange(0, n, 3), label_hash=facts["label_hash"])
    page = base / "page.html"
    flags = (f"--dataset=folder:{base / 'data'}", f"--selection={base / 'selection.npz'}", f"--out={page}")
    done = succeed("make_report.py", *flags, *folders(base, "datasets", "metrics", "models", "plots"))
    assert done.out.splitlines()[-1] == str(page)
    return {"page": page, "train": train, "scores": scores, "labels": labels, "predicted": predicted, "loss": loss}


def tiles(page):
    """The indices of the examples in the gallery, in order."""
    return [
        int(text) for text in page.locator("#tiles .tile").evaluate_all("nodes => nodes.map(n => n.dataset.index)")
    ]


def choose(page, **values):
    """Set fields of the gallery's filter, and wait until it is applied."""
    for name, value in values.items():
        field = page.locator(f"[name={name}]")
        (field.select_option if field.evaluate("node => node.tagName") == "SELECT" else field.fill)(value)
    page.wait_for_selector("#tiles:not([data-pending])")


def pixels(page, canvas):
    """What a canvas shows, uint8 ``(h, w, 3)``."""
    canvas.evaluate(
        "async node => { while (node.dataset.painted !== node.dataset.at) await new Promise(requestAnimationFrame) }"
    )
    read = "n => [n.width, ...n.getContext('2d').getImageData(0, 0, n.width, n.height).data]"
    side, *values = canvas.evaluate(read)
    return np.array(values, np.uint8).reshape(side, side, 4)[..., :3]


def saved(page, button):
    """The rows of the csv file that a button saves."""
    with page.expect_download() as download:
        page.locator(button).click()
    return list(csv.DictReader(io.StringIO(download.value.path().read_text())))


def test_gallery_shows_the_right_examples(photos, browser):
    score = photos["scores"]["samis_loss"]
    ranked = np.argsort(-score, kind="stable")
    with opened(browser, photos["page"]) as page:
        assert page.locator("#filters [name=score]").evaluate("n => n.selectedOptions[0].text") == "SAMIS-L"
        assert tiles(page) == ranked[:60].tolist()
        for place in (0, 1, 7, 30, 59):
            shown = pixels(page, page.locator("#tiles canvas").nth(place)).astype(int)
            images = photos["train"].fetch(photos["train"].indices).numpy().astype(int)
            errors = np.abs(images.transpose(0, 2, 3, 1) - shown).mean((1, 2, 3))
            assert errors.argmin() == ranked[place]
            assert errors[ranked[place]] < 12 < np.sort(errors)[1] / 2  # compressed, but no other image
        page.keyboard.press("ArrowRight")
        assert tiles(page) == ranked[60:].tolist()
        page.keyboard.press("ArrowLeft")
        assert tiles(page) == ranked[:60].tolist()
        choose(page, order="low", size="30")
        assert tiles(page) == ranked[::-1][:30].tolist()


def test_filters_and_search(photos, browser):
    scores, labels, predicted = photos["scores"], photos["labels"], photos["predicted"]
    files, n = list(photos["train"].files), len(labels)
    with opened(browser, photos["page"]) as page:
        choose(page, score="Cumulative sample loss", size="120")
        ranked = np.argsort(-np.nan_to_num(scores["csl"], nan=-np.inf), kind="stable")
        assert tiles(page) == ranked.tolist()  # the example without a score is last
        choose(page, score="Area under the margin (negated)", label="2")
        ranked = np.argsort(-scores["aum"], kind="stable")
        assert tiles(page) == ranked[labels[ranked] == 2].tolist()
        choose(page, low="0", high="1")
        inside = (labels[ranked] == 2) & (scores["aum"][ranked] >= 0) & (scores["aum"][ranked] <= 1)
        assert tiles(page) == ranked[inside].tolist()
        page.locator("#reset").click()
        choose(page, correct="0", order="index", size="120")
        assert tiles(page) == [5, 40] == np.flatnonzero(predicted != labels).tolist()
        choose(page, correct="", prediction=str(predicted[40]))
        assert tiles(page) == np.flatnonzero(predicted == predicted[40]).tolist()
        choose(page, prediction="", kept="1")
        assert tiles(page) == list(range(0, n, 3))
        page.locator("#reset").click()
        page.keyboard.press("/")
        page.keyboard.type("ONERROR")
        page.wait_for_selector("#tiles:not([data-pending])")
        assert tiles(page) == [k for k in range(n) if "onerror" in files[k]]
        choose(page, query="70, 3")
        assert sorted(tiles(page)) == [3, 70]
        rows = saved(page, "#download")
        assert [int(row["index"]) for row in rows] == tiles(page)
        assert [row["file"] for row in rows] == [files[k] for k in tiles(page)]


def test_controls_agree(photos, browser):
    """Filters, marks, the lasso and the keyboard change only what they are meant to."""
    labels, scores = photos["labels"], photos["scores"]
    with opened(browser, photos["page"]) as page:
        choose(page, size="30", query="png")
        before = tiles(page)
        page.keyboard.press("ArrowRight")  # moves the cursor of the field
        assert tiles(page) == before
        choose(page, score="Area under the margin (negated)", label="2", low="0")
        choose(page, score="Cumulative sample loss")
        assert page.locator("[name=low]").input_value() == ""  # it was about the other score
        page.locator("#mark-all").click()
        assert page.locator("#marks").inner_text() == f"{PER_CLASS} marked"
        page.locator("#reset").click()
        fields = "names => names.map(name => document.querySelector(`[name=${name}]`).value)"
        assert page.evaluate(fields, ["score", "size", "label", "query"]) == ["2", "30", "", ""]
        page.locator("#marks").click()
        assert sorted(tiles(page)) == np.flatnonzero(labels == 2).tolist()
        page.locator(".tile").first.click()
        page.locator("#toggle").click()
        assert page.locator("#toggle").inner_text() == "Mark (m)"
        assert page.locator("#marks").inner_text() == f"{PER_CLASS - 1} marked"
        page.mouse.click(*(page.locator("#example").bounding_box()[key] + 6 for key in "xy"))  # its margin
        assert page.locator("#example").is_visible()
        page.keyboard.press("ArrowRight")
        assert page.locator("#example h3").inner_text().startswith(f"Example {tiles(page)[1]}:")
        page.keyboard.press("Escape")
        page.locator("#clear-marks").click()
        # the table of classes, by keyboard
        heading = page.locator(".sortable th", has_text="Mean score")
        means = [scores["samis_loss"][labels == k].mean() for k in range(4)]
        for reverse in (True, False):
            heading.press("Enter")
            rows = page.locator(".sortable tbody tr td:first-child").all_text_contents()
            ordered = sorted(range(4), key=means.__getitem__, reverse=reverse)
            assert rows == [photos["train"].class_names[k] for k in ordered]


def test_print_is_light(photos, browser):
    with opened(browser, photos["page"], color_scheme="dark") as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("h1").is_visible()  # the name of the data set
        assert page.locator("#order").inner_text() == "SAMIS-L, most atypical first"
        assert page.evaluate("getComputedStyle(document.body).color") == "rgb(29, 32, 37)"
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("getComputedStyle(document.body).color") != "rgb(29, 32, 37)"


def test_an_example(photos, browser):
    files, n = photos["train"].files, len(photos["labels"])
    with opened(browser, photos["page"]) as page:
        place = next(k for k in range(n) if "a b#c" in files[k])
        choose(page, query=str(place))
        page.locator("#tiles .tile").first.click()
        dialog = page.locator("#example")
        text = dialog.inner_text()
        assert CLASSES[0] in text
        assert files[place] in text
        for values in photos["scores"].values():
            if not np.isnan(values[place]):
                rank = 1 + np.count_nonzero(values > values[place])
                assert f"\t{rank}\n" in f"{text}\n"
        # the link leads to the file, whatever its name
        href = dialog.locator("a").get_attribute("href")
        from urllib.parse import unquote, urlparse

        assert unquote(urlparse(href).path) == str(files.path(place).resolve())
        assert urlparse(href).scheme == "file"
        # twelve epochs of the learning curve, to one byte
        drawn = page.locator("#example .plot").evaluate("node => [node.data[0].x, node.data[0].y, node.data[1].y]")
        epochs = np.array(drawn[0])
        assert (len(epochs), epochs[0], epochs[-1]) == (12, 1, 20)
        loss = photos["loss"][epochs - 1, place]
        np.testing.assert_allclose(drawn[1], np.exp(-loss), atol=1 / 254)
        np.testing.assert_allclose(drawn[2], loss, atol=2 * photos["loss"].max() / 254)
        page.keyboard.press("m")
        page.keyboard.press("Escape")
        assert [int(row["index"]) for row in saved(page, "#save-marks")] == [place]


def test_lasso_selects_into_the_gallery_and_a_file(photos, browser):
    x, y = photos["scores"]["samis_loss"], photos["scores"]["aum"]
    with opened(browser, photos["page"]) as page:
        page.locator("#scatter").scroll_into_view_if_needed()
        page.locator("#y").select_option("Area under the margin (negated)")
        page.wait_for_function("document.querySelector('#plot').data?.[0].y.length == 72")
        page.locator("#plot").scroll_into_view_if_needed()
        page.wait_for_timeout(500)
        box, layout = page.locator("#plot").bounding_box(), "document.querySelector('#plot')._fullLayout"
        corners = [(0.25, -0.5), (0.75, -0.5), (0.75, 0.9), (0.25, 0.9)]
        at = [
            page.evaluate(f"{layout}.xaxis._offset + {layout}.xaxis.d2p({a})") + 1j
            * page.evaluate(f"{layout}.yaxis._offset + {layout}.yaxis.d2p({b})")
            for a, b in corners
        ]  # fmt: skip
        page.mouse.move(box["x"] + at[0].real, box["y"] + at[0].imag)
        page.mouse.down()
        for corner in (*at[1:], at[0]):
            page.mouse.move(box["x"] + corner.real, box["y"] + corner.imag, steps=6)
        page.mouse.up()
        expected = np.flatnonzero((x > 0.25) & (x < 0.75) & (y > -0.5) & (y < 0.9)).tolist()
        page.wait_for_selector("#download-selected")
        assert 5 < len(expected) < 60
        rows = saved(page, "#download-selected")
        assert [int(row["index"]) for row in rows] == expected
        assert [row["file"] for row in rows] == [photos["train"].files[k] for k in expected]
        np.testing.assert_allclose([float(row["samis_loss"]) for row in rows], x[expected], rtol=1e-6)
        page.locator("#color").select_option("Label")  # what is selected stays selected
        assert page.locator("#selected").inner_text() == f"{len(expected)} selected"
        page.locator("#show-selected").click()
        assert sorted(tiles(page)) == expected
        page.locator("#by-rank").check()  # the axes change
        assert not page.locator("#show-selected").is_visible()


def test_fifty_thousand_examples_of_a_thousand_classes(browser, tmp_path):
    """The page stays small, and shows and filters the right examples."""
    n, classes = 50_000, 1000
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, n)
    images = np.repeat(np.repeat(rng.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8), 4, 1), 4, 2)
    test = {"x_test": images[:classes], "y_test": np.arange(classes)}
    np.savez(tmp_path / "large.npz", x_train=images, y_train=labels, **test)
    from src.datasets import DataConfig

    train, _ = DataConfig(f"npz:{tmp_path / 'large.npz'}").load(tmp_path)
    facts = {"label_hash": label_hash(labels), "data_hash": train.digest, "settings": {}}
    scores = {mode: rng.random(n) for mode in ("mem", "aum", "csl", "el2n")}
    for mode, values in scores.items():
        write_scores(SCORES[mode].path(tmp_path / "metrics", train.entry.name), values, {**facts, "mode": mode})
    out = tmp_path / "page.html"
    where = folders(tmp_path, "datasets", "metrics", "models", "hessian", "ntk")
    succeed("make_report.py", f"--dataset=npz:{tmp_path / 'large.npz'}", f"--out={out}", *where)
    assert out.stat().st_size < 30e6
    ranked = np.argsort(-scores["mem"].astype("f4"), kind="stable")
    with opened(browser, out) as page:
        assert tiles(page) == ranked[:60].tolist()
        for place in (0, 20, 59):
            shown = pixels(page, page.locator("#tiles canvas").nth(place)).astype(int)
            errors = np.abs(images.astype(np.int16) - shown.astype(np.int16)).mean((1, 2, 3))
            assert errors.argmin() == ranked[place]
        choose(page, label="733", size="120")
        assert tiles(page) == ranked[labels[ranked] == 733][:120].tolist()
        assert [int(row["index"]) for row in saved(page, "#download")] == ranked[labels[ranked] == 733].tolist()
        page.locator("#scatter").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#plot').data?.[0].x.length == 50000")


def test_names_in_figures_are_literal_and_looks_can_be_switched(photos, browser):
    with opened(browser, photos["page"], color_scheme="dark") as page:
        page.locator("#scatter").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#plot').data")
        page.locator("#color").select_option("Label")
        page.wait_for_function("document.querySelectorAll('#plot .legendtext').length == 4")
        assert sorted(page.locator("#plot .legendtext").all_text_contents()) == sorted(CLASSES)
        ink = "getComputedStyle(document.body).color"
        dark = page.evaluate(ink)
        page.locator("#theme").click()
        assert page.evaluate(ink) != dark
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert page.evaluate(ink) != dark  # the choice is kept
        rendering = "getComputedStyle(document.querySelector('#tiles canvas')).imageRendering"
        assert page.evaluate(rendering) == "pixelated"
        page.locator("#smooth").click()
        assert page.evaluate(rendering) == "auto"


def test_digits(browser, tmp_path):
    """Gray images of 8x8 pixels, of a catalog data set without file names."""
    from src.datasets import DataConfig

    train, _ = DataConfig("digits").load(tmp_path)
    values = np.random.default_rng(0).random(len(train))
    record = {"label_hash": label_hash(train.labels.numpy()), "data_hash": train.digest, "settings": {}}
    write_scores(SCORES["mem"].path(tmp_path / "metrics", "digits"), values, {**record, "mode": "mem"})
    out = tmp_path / "new" / "page.html"
    succeed("make_report.py", "--dataset=digits", f"--out={out}", *folders(tmp_path, "datasets", "metrics", "models"))
    ranked = np.argsort(-values, kind="stable")
    images = train.fetch(train.indices).numpy().astype(int)[:, 0]
    with opened(browser, out) as page:
        assert page.locator("#count").inner_text() == "1,438 of 1,438 examples"
        assert page.locator("section").evaluate_all("nodes => nodes.map(node => node.id)") == [
            "overview", "gallery", "classes", "scores"
        ]  # fmt: skip
        for place in (0, 1, 31, 58, 59):
            shown = pixels(page, page.locator("#tiles canvas").nth(place))
            assert np.abs(images[ranked[place]] - shown[..., 0].astype(int)).mean() < 4
            assert np.abs(images - shown[..., 0].astype(int)).mean((1, 2)).argmin() == ranked[place]
        rows = saved(page, "#download")
        assert [int(row["index"]) for row in rows] == ranked.tolist()
        assert {row["file"] for row in rows} == {""}
    # a part of them, by a score with ties: the extremes of each class, ranks among all examples
    rounded = np.round(values, 2)
    write_scores(SCORES["csl"].path(tmp_path / "metrics", "digits"), rounded, {**record, "mode": "csl"})
    part = ("--examples=200", "--modes", "csl", "mem", f"--out={tmp_path / 'part.html'}")
    succeed("make_report.py", "--dataset=digits", *part, *folders(tmp_path, "datasets", "metrics", "models"))
    with opened(browser, tmp_path / "part.html") as page:
        assert page.locator("#count").inner_text() == "200 of 200 examples on this page"
        assert "This page contains 200 of 1,438 examples" in page.locator("#overview").inner_text()
        found = tiles(page)
        assert found == sorted(found, key=lambda k: (-rounded[k], k))
        names = page.locator("#tiles .sub span:last-child").evaluate_all("nodes => nodes.map(n => n.title)")
        for index, name in zip(found, names, strict=True):
            assert f"rank {1 + np.count_nonzero(rounded > rounded[index]):,} of 1,438," in name
        shown = pixels(page, page.locator("#tiles canvas").nth(3))[..., 0].astype(int)
        assert np.abs(images - shown).mean((1, 2)).argmin() == found[3]
        page.locator("#scatter").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('#plot').data")
        assert page.locator("#thinned").inner_text().startswith("200 of 1,438 examples are drawn")
