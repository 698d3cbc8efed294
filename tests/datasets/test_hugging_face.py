"""Data sets of Hugging Face, offline: a folder of parquet files, an imagefolder, and a saved data set."""

import csv
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FLAG, refuse
from support import TRAIN, folders, succeed

from src.artifacts.io import read_npz
from src.datasets import DataConfig, dataset_name, decoding, load_dataset, own_images
from src.errors import FileError
from src.metrics import Proxy

TRAINING = ("--model=small_mlp", "--batch_size=4", "--learning_rate=0.05", "--lr_sched=const", "--epochs=2")
NAMES = ["ant", "bee, wild", "wasp"]


def test_without_the_package_one_line_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refuse("train_full.py", "--dataset=hf:cifar10", *TRAINING, *folders(tmp_path, *TRAIN), status=FLAG,
           says=("dataset", "requirements-hf.txt"))  # fmt: skip


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The package, with its files in a temporary folder and without access to the hub."""
    # not just "datasets", which is also this folder
    pytest.importorskip("datasets.arrow_dataset", reason="needs datasets: pip install -r requirements-hf.txt")
    package = sys.modules["datasets"]
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    return package


def images(count, seed=0):
    return [
        Image.fromarray(np.random.default_rng(seed + k).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for k in range(count)
    ]


def encoded(image):
    image.save(file := BytesIO(), "png")
    return file.getvalue()


def table(datasets, labels, kind, seed=0, **more):
    columns = {"picture": images(len(labels), seed), "kind": labels, "note": ["x"] * len(labels), **more}
    features = {"picture": datasets.Image(), "kind": kind, "note": datasets.Value("string")}
    features |= {name: datasets.Value("string") for name in more}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def write_parquet(datasets, folder, **splits):
    folder.mkdir()
    for name, (labels, seed) in splits.items():
        kind = datasets.ClassLabel(names=NAMES)
        table(datasets, labels, kind, seed).to_parquet(folder / f"{name}-00000-of-00001.parquet")
    return f"hf:{folder}"


def pixels(found):
    return found.fetch(torch.arange(len(found)))


def expected(count, seed=0):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images(count, seed)])).permute(0, 3, 1, 2)


def test_parquet_files(datasets, tmp_path, monkeypatch):
    name = write_parquet(datasets, tmp_path / "bugs", train=([2, 0, 2, 0], 0), test=([-1, -1], 9),
                         validation=([0, 2], 5))  # fmt: skip
    monkeypatch.setattr(own_images, "CACHED_FROM", 0)
    train, test = load_dataset(name, tmp_path)  # the test split has no labels
    assert (train.class_names, train.labels.tolist(), test.labels.tolist()) == (["ant", "wasp"], [1, 0, 1, 0], [0, 1])
    assert torch.equal(pixels(train), expected(4))
    assert torch.equal(pixels(test), expected(2, 5))
    assert train.entry.name == dataset_name(name)
    assert train.entry.name.startswith("bugs-")
    assert train.files is None
    monkeypatch.setattr(own_images, "open_image", None)  # read from the cache, without decoding
    again, _ = load_dataset(name, tmp_path)
    assert torch.equal(pixels(again), pixels(train))
    assert again.digest == train.digest


def test_an_imagefolder_keeps_its_file_names(datasets, tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(NAMES):
            (tmp_path / "bugs" / part / name).mkdir(parents=True)
            for k, image in enumerate(images(3, 10 * label)):
                image.save(tmp_path / "bugs" / part / name / f"{k} $é.png")
    train, test = load_dataset(f"hf:{tmp_path}/bugs", tmp_path)
    same, _ = load_dataset(f"folder:{tmp_path}/bugs", tmp_path)
    assert train.class_names == NAMES
    assert sorted(train.files) == sorted(same.files)
    order = [list(same.files).index(file) for file in train.files]
    assert torch.equal(pixels(train), pixels(same)[order])
    assert train.labels.tolist() == same.labels[order].tolist()
    assert len(test) == 9


def test_scores_and_exclusions_of_a_saved_data_set(datasets, tmp_path):
    labels = [NAMES[k % 3] for k in range(15)]
    table(datasets, labels, datasets.Value("string")).remove_columns("note").save_to_disk(tmp_path / "saved")
    name = f"hf:{tmp_path}/saved"
    assert np.array_equal(DataConfig(name).examples(tmp_path).labels, np.arange(15) % 3)
    (tmp_path / "out.txt").write_text("0\n4\n")
    flags = (f"--dataset={name}", *TRAINING, "--optimizer=sgd", "--measure_proxies", "--test_fraction=0.2")
    succeed("train_full.py", *flags, f"--exclude={tmp_path / 'out.txt'}", *folders(tmp_path, *TRAIN))
    succeed("average_scores.py", flags[0], "--test_fraction=0.2", "--model=small_mlp", "--seeds=1", "--optimizer=sgd",
            "--modes=aum", *folders(tmp_path, "datasets", "metrics"))  # fmt: skip
    proxy = Proxy("aum", name, folder=tmp_path / "metrics")
    drawn = load_dataset(name, tmp_path)[0].drawn.tolist()
    assert np.flatnonzero(np.isnan(proxy.scores)).tolist() == sorted({0, 4, *drawn})
    with proxy.path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(int(row["index"]), row["class"]) for row in rows} == {(i, labels[i]) for i in proxy.indices.tolist()}
    succeed("select_coreset.py", f"--dataset={name}", "--model=small_mlp", "--coreset_func=random",
            "--coreset_fraction=0.5", f"--out={tmp_path / 's.npz'}", f"--materialize={tmp_path / 'm'}",
            *folders(tmp_path, *TRAIN))  # fmt: skip
    assert len(list((tmp_path / "m").rglob("*.png"))) == len(read_npz(tmp_path / "s.npz")["indices"])


def test_the_digest_covers_the_labels_and_class_names(datasets, tmp_path):
    names = set()
    for place, (labels, classes) in enumerate((([0, 1], NAMES), ([1, 0], NAMES), ([0, 1], ["ant", "moth", "wasp"]))):
        kind = datasets.ClassLabel(names=classes)
        parts = {"train": table(datasets, [0, 1, 0, 1], kind), "test": table(datasets, labels, kind, 9)}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / str(place) / "saved"))
        train, test = load_dataset(f"hf:{tmp_path}/{place}/saved", tmp_path)
        assert test.labels.tolist() == labels
        names.add((train.entry.name, train.digest))
    assert len({name for name, _ in names}) == len({digest for _, digest in names}) == 3


def test_the_cache_follows_tables_that_also_list_files(datasets, tmp_path, monkeypatch):
    """If a table has both bytes and paths of existing files, the bytes are the images."""
    monkeypatch.setattr(own_images, "CACHED_FROM", 0)
    monkeypatch.setattr(decoding, "SETTLED", -(10**18))  # these files are new
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    name, file = (
        write_parquet(datasets, tmp_path / "bugs", train=([0, 1, 0, 1], 0), test=([0, 1], 9)),
        tmp_path / "x.png",
    )
    images(1, 99)[0].save(file)
    for seed in (10, 20):
        for part, count in (("train", 4), ("test", 2)):
            path = tmp_path / "bugs" / f"{part}-00000-of-00001.parquet"
            stored = parquet.read_table(path)
            place = stored.schema.get_field_index("picture")
            column = [{"bytes": encoded(image), "path": str(file)} for image in images(count, seed)]
            field = stored.schema.field(place)
            parquet.write_table(stored.set_column(place, field, pyarrow.array(column, field.type)), path)
        train, _ = load_dataset(name, tmp_path)
        assert torch.equal(pixels(train), expected(4, seed))


def test_unclear_data_sets_are_refused_in_one_line(datasets, tmp_path):
    classes = datasets.ClassLabel(names=NAMES)

    def refused(name):
        with pytest.raises(FileError) as caught:
            load_dataset(f"hf:{tmp_path}/{name}", tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refused("empty")
    assert "cannot be loaded" in refused("none")
    two = table(datasets, [0, 1, 0, 1], classes)
    two.add_column("other", ["a", "b", "a", "b"]).remove_columns("kind").save_to_disk(tmp_path / "unclear")
    assert "note, other that may be labels" in refused("unclear")
    two.remove_columns("picture").save_to_disk(tmp_path / "blind")
    assert "only the columns kind, note" in refused("blind")
    table(datasets, [1, 1], classes).save_to_disk(tmp_path / "single")
    assert "only class bee, wild" in refused("single")
    table(datasets, [0, 1, -1, 1], classes).save_to_disk(tmp_path / "unlabeled")
    assert "kind has no value for some training examples" in refused("unlabeled")
    table(datasets, [-1, 1, -1, 1], datasets.Value("int64")).remove_columns("note").save_to_disk(tmp_path / "signs")
    assert DataConfig(f"hf:{tmp_path}/signs", test_fraction=0.5).examples(tmp_path).class_names == ["-1", "1"]
    datasets.DatasetDict(a=two, b=two).save_to_disk(str(tmp_path / "splits"))
    assert "has no split train, only a, b" in refused("splits")
    datasets.DatasetDict(train=two, test=table(datasets, [2], classes)).save_to_disk(str(tmp_path / "extra"))
    assert "the class wasp has test images, but no training images" in refused("extra")
