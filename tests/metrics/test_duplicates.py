"""Duplicates: hashes and search against slow references, planted copies through the script, and exclusion."""

import csv

import numpy as np
import pytest
import scipy.fft
import torch
from matplotlib.figure import Figure
from PIL import Image
from refusals import FILE, FLAG, refuse
from support import TRAIN, folders, succeed

from src.artifacts.io import read_json
from src.datasets import load_dataset
from src.metrics.duplicates import (
    EXACT,
    FEATURES,
    PIXELS,
    DuplicateConfig,
    Fingerprints,
    find_duplicates,
    fingerprints,
    perceptual_hash,
)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 20), (3, 32)])
def test_the_hash_is_that_of_the_discrete_cosine_transform(channels, size):
    images = torch.randint(0, 256, (5, channels, size, size), generator=torch.Generator().manual_seed(0)).byte()
    bits = perceptual_hash(images) > 0
    for image, found in zip(images.double().mean(dim=1).numpy(), bits.numpy(), strict=True):
        lowest = scipy.fft.dctn(image)[:8, :8].ravel()
        np.testing.assert_array_equal(found, lowest > np.sort(lowest[1:])[31])


def random_prints(n, seed, features):
    generator = torch.Generator().manual_seed(seed)
    near = torch.randint(0, 6, (n,), generator=generator)  # six kinds of images, with noise
    bits = torch.where(torch.rand(6, 64, generator=generator) < 0.5, 1.0, -1.0)[near]
    bits = torch.where(torch.rand(n, 64, generator=generator) < 0.06, -bits, bits) / 8
    pixels, learned = (
        torch.nn.functional.normalize(
            torch.randn(6, 30, generator=generator)[near] + 0.25 * torch.randn(n, 30, generator=generator)
        )
        for _ in range(2)
    )
    exact = [bytes([int(k)]) for k in torch.randint(0, 4 * n, (n,), generator=generator) % 250]
    return Fingerprints(exact, bits, pixels, learned if features else None)


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("block", [7, 64])
def test_the_search_is_the_obvious_loop(features, block, monkeypatch):
    monkeypatch.setattr("src.metrics.duplicates._SEARCHED", block)
    config = DuplicateConfig(hash_distance=8, pixel_similarity=0.93, feature_similarity=0.95)
    for seed in range(5):
        prints = random_prints(60, seed, features)
        first = {digest: prints.exact.index(digest) for digest in prints.exact}
        expected, kept = {}, []
        for i in range(60):
            if first[prints.exact[i]] < i:
                continue
            candidates = []
            for j in kept:
                distance = int((prints.bits[i] != prints.bits[j]).sum())
                alike = float(prints.pixels[i] @ prints.pixels[j])
                if distance <= 8 and alike >= 0.93:
                    candidates.append((0, -alike, j, PIXELS))
                if features and (alike := float(prints.features[i] @ prints.features[j])) >= 0.95:
                    candidates.append((1, -alike, j, FEATURES))
            if candidates:
                _, alike, j, test = min(candidates)
                expected[i] = (j, test, pytest.approx(-alike, rel=1e-5))
            else:
                kept.append(i)
        for i in range(60):
            if (j := first[prints.exact[i]]) < i:
                expected[i] = expected.get(j, (j, EXACT, 1.0))
        found = find_duplicates(prints, config)
        assert found == expected
        assert {test for _, test, _ in found.values()} >= ({PIXELS, FEATURES} if features else {PIXELS})


def test_constant_images_are_duplicates_only_if_they_are_equal():
    gray = torch.full((3, 1, 12, 12), 90, dtype=torch.uint8)
    gray[2] += 1

    class Images(list):
        def stream(self, batches):
            return (gray[positions] for positions, _ in batches)

    found = find_duplicates(fingerprints([Images(range(3))]), DuplicateConfig())
    assert found == {1: (0, EXACT, 1.0)}


def scenes(n, seed=0):
    """Smooth random color images, 24 x 24."""
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 5, 5, 3)).astype(np.uint8)
    return [Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC) for image in coarse]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 40 training and 8 test images with six planted duplicates."""
    base = tmp_path_factory.mktemp("duplicates")
    images = scenes(48)
    for k, image in enumerate(images):
        place = base / "photos" / ("train" if k < 40 else "test") / f"class {k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{k:02}.png")
    train = base / "photos" / "train"
    images[3].save(train / "class 1" / "x copy.png")  # equal
    images[4].save(train / "class 1" / "x other class.png")  # equal, in another class
    images[5].save(train / "class 1" / "x recompressed.jpg", quality=60)
    images[7].resize((48, 48)).save(train / "class 1" / "x larger.png")
    images[9].point(lambda value: value * 0.8 + 10).save(train / "class 1" / "x darker.png")
    images[44].save(train / "class 0" / "x leaked.png")  # of the test set
    images[45].save(base / "photos" / "test" / "class 1" / "y twice.png")
    return base, ("--dataset=folder:" + str(base / "photos"), "--image_size=24")


def test_planted_duplicates_are_found_and_can_be_excluded(photos, tmp_path):
    _, data = photos
    result = succeed("find_duplicates.py", *data, *folders(tmp_path, "metrics", "datasets"))
    (path,) = tmp_path.rglob("duplicates.csv")
    with path.open(newline="") as file:
        rows = {row["file"].rsplit("/")[-1]: row for row in csv.DictReader(file)}
    names = {"x copy.png": "03.png", "x other class.png": "04.png", "x recompressed.jpg": "05.png",
             "x larger.png": "07.png", "x darker.png": "09.png", "x leaked.png": "44.png"}  # fmt: skip
    assert {name: row["its file"].rsplit("/")[-1] for name, row in rows.items()} == names
    assert {row["found by"] for name, row in rows.items() if name in ("x copy.png", "x leaked.png")} == {EXACT}
    assert {row["found by"] for name, row in rows.items() if name in ("x darker.png", "x recompressed.jpg")} == {
        PIXELS
    }
    assert [name for name, row in rows.items() if row["in"] == "test"] == ["x leaked.png"]
    assert [name for name, row in rows.items() if row["class"] != row["its class"]] == ["x other class.png"]
    record = read_json(path.with_suffix(".json"))
    assert record["training_duplicates"].items() >= {"of_a_test_example": 1, "with_another_label": 1}.items()
    assert [row["file"].rsplit("/")[-1] for row in record["within_the_test_set"]] == ["y twice.png"]
    assert all((path.parent / f"duplicates.{kind}").stat().st_size > 1000 for kind in ("png", "pdf"))
    assert "6 of 46 training examples" in result.out
    flags = ("--model=small_mlp", "--epochs=1", "--batch_size=8", "--learning_rate=0.05", "--lr_sched=const")
    succeed("train_full.py", *data, *flags, f"--exclude={path}", *folders(tmp_path, *TRAIN))
    (results,) = tmp_path.rglob("results.json")
    assert read_json(results)["settings"]["examples"] == 40


def test_features_find_what_pixels_cannot(photos, tmp_path):
    base, data = photos
    flags = ("--model=lenet", "--epochs=3", "--batch_size=8", "--learning_rate=0.05", "--lr_sched=const")
    train, _ = load_dataset(data[0].partition("=")[2], base, image_size=24)
    succeed("train_full.py", *data, *flags, *folders(tmp_path, *TRAIN))
    (checkpoint,) = tmp_path.rglob("last.pt")
    where = folders(tmp_path, "metrics", "datasets")
    # no pair of hashes agrees to the last bit but those of equal pixels, so all others are found by features
    result = succeed("find_duplicates.py", *data, f"--checkpoint={checkpoint}", "--pixel_similarity=1",
                     "--hash_distance=0", "--feature_similarity=0.9", *where)  # fmt: skip
    (path,) = (tmp_path / "metrics").rglob("duplicates.csv")
    with path.open(newline="") as file:
        found = {row["file"].rsplit("/")[-1]: row["found by"] for row in csv.DictReader(file)}
    assert found["x recompressed.jpg"] == found["x larger.png"] == FEATURES
    assert found["x copy.png"] == EXACT
    assert len(train) == 46
    assert result.status == 0


def test_pairs_of_data_without_a_test_part_are_drawn_by_index(tmp_path, monkeypatch):
    """A third of the images are drawn for testing, so positions in the training set are not indices."""
    flat = tmp_path / "flat"
    images = scenes(30, seed=3)
    for k, image in enumerate(images):
        place = flat / f"class {k % 2}"
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{k:02}.png")
    for k in range(30):
        images[k].point(lambda value: value * 0.9).save(flat / f"class {k % 2}" / f"{k:02} again.png")
    drawn = []
    monkeypatch.setattr("src.metrics.plots.image_grid", lambda images, *_: drawn.append(images) or Figure())
    flags = (f"--dataset=folder:{flat}", "--image_size=24", "--test_fraction=0.3")
    where = folders(tmp_path, "metrics", "datasets")
    succeed("find_duplicates.py", *flags, *where)
    ((duplicates, originals, *_),) = drawn
    assert len(duplicates) == 8
    for a, b in zip(duplicates, originals, strict=True):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.95
    refuse("find_duplicates.py", *flags, "--hash_distance=2", *where, status=FILE, says="hash_distance")
    refuse("find_duplicates.py", *flags, "--test_seed=1", *where, status=FILE, says="--overwrite")
    succeed("find_duplicates.py", *flags, "--hash_distance=2", "--overwrite", *where)


def test_a_set_without_duplicates_gives_an_empty_table(tmp_path):
    pixels = np.stack([np.asarray(image) for image in scenes(30, seed=1)])
    np.savez(
        tmp_path / "d.npz",
        x_train=pixels[:20],
        y_train=np.arange(20) % 2,
        x_test=pixels[20:],
        y_test=np.arange(10) % 2,
    )
    result = succeed(
        "find_duplicates.py", f"--dataset=npz:{tmp_path / 'd.npz'}", *folders(tmp_path, "metrics", "datasets")
    )
    (path,) = tmp_path.rglob("duplicates.csv")
    assert path.read_text().splitlines() == [
        "index,file,class,duplicate of,in,its file,its class,found by,similarity"
    ]
    assert not list(tmp_path.rglob("duplicates.png"))
    assert "train_full.py" not in result.out


def test_bad_input(tmp_path):
    refuse("find_duplicates.py", "--dataset=digits", "--hash_distance=65", status=FLAG, says="hash_distance")
    refuse("find_duplicates.py", "--dataset=digits", "--pixel_similarity=2", status=FLAG, says="pixel_similarity")
    refuse(
        "find_duplicates.py", "--dataset=digits", "--feature_similarity=0.9", status=FLAG, says="without --checkpoint"
    )
    refuse("find_duplicates.py", "--dataset=digits", f"--checkpoint={tmp_path / 'no.pt'}", status=FILE, says="no.pt")
