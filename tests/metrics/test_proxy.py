"""``Proxy`` and ``Memorization``: every method, the folders searched for files, and refused files."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from support import PUBLISHED, needs_published, write_blobs

from src.artifacts import paths
from src.artifacts.io import label_hash
from src.artifacts.store import read_scores, record_path, write_scores
from src.datasets import load_dataset
from src.errors import ArgumentError, FileError
from src.metrics import SCORES, Memorization, Proxy, find_score_file
from src.metrics.proxy import min_max, recipe

RAW = np.array([3.0, 1.0, 5.0, 1.0, 2.0])


def store(folder, mode="forg", dataset="toy", scores=RAW, **record):
    path = SCORES[mode].path(folder, dataset)
    write_scores(path, scores, record)
    return path


@pytest.fixture
def proxy(tmp_path):
    store(tmp_path)
    return Proxy("forg", "toy", folder=tmp_path)


def test_values_by_index_scaled_or_raw(tmp_path, proxy):
    np.testing.assert_allclose(proxy.scores, [0.5, 0, 1, 0, 0.25])
    assert proxy.scores.dtype == np.float64
    np.testing.assert_array_equal(Proxy("forg", "toy", False, tmp_path).scores, RAW)
    assert proxy.get(2) == 1.0
    np.testing.assert_allclose(proxy.get([4, 0]), [0.25, 0.5])
    np.testing.assert_allclose(proxy.get(slice(1, 3)), [0, 1])
    assert proxy.full_list() == [0.5, 0.0, 1.0, 0.0, 0.25]
    assert type(proxy.full_list()) is list
    assert proxy.indices.tolist() == [0, 1, 2, 3, 4]


def test_order_is_ascending_with_ties_by_index(proxy):
    assert proxy.get_sorted_indices().tolist() == [1, 3, 4, 0, 2]
    assert proxy.get_sorted_indices(-1) == 2
    assert proxy.get_sorted_indices([0, 2]).tolist() == [1, 4]
    assert list(proxy.get_dict_form().items()) == [(1, 0.0), (3, 0.0), (4, 0.25), (0, 0.5), (2, 1.0)]
    assert list(proxy.get_dict_form(sort=False)) == [0, 1, 2, 3, 4]
    assert all(type(key) is int and type(value) is float for key, value in proxy.get_dict_form().items())


def test_the_order_handed_out_is_a_copy(proxy):
    proxy.get_sorted_indices()[:] = 0
    assert proxy.get_sorted_indices().tolist() == [1, 3, 4, 0, 2]


def test_scores_that_do_not_vary_become_zeros(tmp_path):
    store(tmp_path, scores=np.full(4, 7.0))
    assert Proxy("forg", "toy", folder=tmp_path).full_list() == [0.0] * 4


def test_given_folders_are_searched_in_order_and_no_others(tmp_path, monkeypatch):
    root = tmp_path / "root"
    monkeypatch.setattr(paths, "ROOT", root)
    monkeypatch.setattr(paths, "PACKAGED_SCORES", root / "src" / "metrics")
    shipped, own = store(root / "src" / "metrics"), store(root / "metrics")
    given = [str(tmp_path / "a"), tmp_path / "b"]
    with pytest.raises(FileError, match=r"no forgetting events scores of toy .*src/metrics") as caught:
        find_score_file("forg", "toy", given)
    assert os.path.relpath(root / "src" / "metrics") in str(caught.value)
    for place in reversed(given):
        path = store(place)
        assert find_score_file("forg", "toy", given) == path
    assert find_score_file("forg", "toy", tmp_path / "b") == SCORES["forg"].path(tmp_path / "b", "toy")
    assert find_score_file("forg", "toy") == own
    own.unlink()
    assert Proxy("forg", "toy").path == shipped


def test_data_sets_by_any_of_their_names(tmp_path):
    """Data sets as given to --dataset, in upper or lower case, by file, and by the stem of the user's own data."""
    path = store(tmp_path, dataset="cifar10")
    assert Proxy("forg", "CIFAR10", folder=tmp_path).path == path
    data = write_blobs(tmp_path / "photos.npz", n=6)
    name = load_dataset(f"npz:{data}", tmp_path)[0].entry.name
    files = {mode: store(tmp_path, mode, name) for mode in ("forg", "samis_loss")}
    files["mem"] = memorization(tmp_path, name, tr_mem=RAW)
    for mode, path in files.items():
        for text in (name, "photos", f"npz:{data}"):
            proxy = Proxy(mode, text, folder=tmp_path)
            assert (proxy.path, proxy.dataset) == (path, name)
    store(tmp_path, dataset="photos-00000000")
    assert Proxy("samis_loss", "photos", folder=tmp_path).dataset == name
    with pytest.raises(FileError, match=rf"2 data sets named photos; choose from photos-00000000, {name}"):
        Proxy("forg", "photos", folder=tmp_path)
    store(tmp_path, dataset="svhn-00000000")
    with pytest.raises(FileError, match="no forgetting events scores of svhn"):
        Proxy("forg", "svhn", folder=tmp_path)
    for wrong in ("", "a/b", "../toy", "jpg:toy"):
        with pytest.raises(ArgumentError, match="is not the name of a data set"):
            Proxy("forg", wrong, folder=tmp_path)


def test_a_missing_file_tells_how_to_get_it(tmp_path):
    with pytest.raises(FileError, match=r"no SAMIS-L scores of toy in .*compute_sam_sgd.py and average_scores.py"):
        Proxy("samis_loss", "toy", folder=tmp_path)
    with pytest.raises(
        FileError, match=r"train_full.py --measure_proxies and average_scores.py --dataset svhn .*csl"
    ):
        Proxy("csl", "svhn", folder=tmp_path)
    with pytest.raises(FileError, match=r"fetch_scores.py --dataset svhn --modes forg --folder=.*, or create"):
        Proxy("forg", "svhn", folder=tmp_path)
    with pytest.raises(FileError, match=r"fetch_scores.py --dataset cifar100 --modes mem"):
        Proxy("mem", "cifar100", folder=tmp_path)
    store(tmp_path, "etl", "svhn")
    with pytest.raises(
        FileError, match=r"your own estimates .*pluskid.github.io.*; scores found for this data set: etl"
    ) as caught:
        Proxy("mem", "svhn", folder=tmp_path)
    assert "fetch_scores" not in str(caught.value)
    with pytest.raises(
        ArgumentError, match=r"^mode 'forget': .*did you mean forg\? choose from mem, mem_prob, out_prob, forg"
    ):
        Proxy("forget", "toy")


def test_every_mode_has_a_place_a_symbol_and_a_recipe():
    assert len({score.symbol for score in SCORES.values()}) == len(SCORES)
    for score in SCORES.values():
        assert score.symbol.startswith("$")
        assert recipe(score, "toy").startswith(("create it", "store"))
    assert SCORES["forg"].path("m", "toy") == Path("m/forgettability/forg_toy.pkl")
    assert SCORES["mem"].path("m", "toy") == Path("m/memorization/mem_toy.pkl")
    assert SCORES["mem"].published_path("m", "toy") == Path("m/memorization/toy_infl_matrix.npz")


def test_the_page_of_scores_tells_what_each_one_costs():
    lines = (paths.ROOT / "docs" / "scores.md").read_text().splitlines()
    rows = {cells[1].strip(" `"): cells[4].strip() for line in lines if len(cells := line.split("|")) == 7}
    assert {name: rows.get(name) for name in SCORES} == {name: score.cost for name, score in SCORES.items()}


def test_the_page_of_scores_tells_when_each_one_can_be_trusted():
    text = (paths.ROOT / "docs" / "scores.md").read_text().split("## When to trust a score")[1].split("\n## ")[0]
    rows = {
        cells[1].strip(" `"): cells[2].strip() for line in text.splitlines() if len(cells := line.split("|")) == 8
    }
    low = {name: name in rows and rows[name].startswith("low") for name in SCORES}
    assert low == {name: score.assumes_learned for name, score in SCORES.items()}
    assert rows.keys() >= SCORES.keys()


def test_a_file_made_on_a_subset_keeps_original_indices(tmp_path):
    store(tmp_path, scores=np.array([np.nan, 4.0, np.nan, 2.0, 3.0, np.nan]))
    proxy = Proxy("forg", "toy", folder=tmp_path)
    np.testing.assert_array_equal(proxy.scores, [np.nan, 1, np.nan, 0, 0.5, np.nan])
    assert proxy.indices.tolist() == [1, 3, 4]
    assert proxy.get_sorted_indices().tolist() == [3, 4, 1]
    assert list(proxy.get_dict_form(sort=False)) == [1, 3, 4]
    assert len(proxy) == 6


def write_raw(folder, content, record=None):
    path = SCORES["forg"].path(folder, "toy")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=4))
    if record is not None:
        record_path(path).write_text(json.dumps(record))
    return path


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1.0, 2.0], "not a score file"),
        ({}, "not a score file"),
        ({"0": 1.0}, "some keys are not integers"),
        ({0.0: 1.0, 1.0: 2.0}, "some keys are not integers"),
        ({0: "high"}, "some scores are not numbers"),
        ({0: [1.0]}, "some scores are not numbers"),
        ({-1: 1.0, 0: 1.0}, "negative index -1"),
        ({0: 1.0, 1: float("nan")}, "score of example 1 is nan"),
        ({0: 1.0, 1: float("inf")}, "score of example 1 is inf"),
        ({0: 1.0, 2: 1.0}, "no score for example 1"),
    ],
)
def test_damaged_score_files_are_refused_in_one_line(tmp_path, content, complaint):
    path = write_raw(tmp_path, content)
    with pytest.raises(FileError, match=complaint) as caught:
        Proxy("forg", "toy", folder=tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_json_must_fit_its_file(tmp_path):
    write_raw(tmp_path, {0: 1.0, 2: 3.0}, {"n": 2, "total": 4})
    np.testing.assert_array_equal(Proxy("forg", "toy", False, tmp_path).scores, [1, np.nan, 3, np.nan])
    write_raw(tmp_path, {0: 1.0, 2: 3.0}, {"n": 3, "total": 4})
    with pytest.raises(FileError, match="has 2 scores, but its json file lists 3"):
        Proxy("forg", "toy", folder=tmp_path)
    write_raw(tmp_path, {0: 1.0}, [])
    with pytest.raises(FileError, match=r"forg_toy\.json"):
        Proxy("forg", "toy", folder=tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    write_raw(tmp_path, {0: Evil()})
    with pytest.raises(FileError, match=r"forg_toy\.pkl"):
        Proxy("forg", "toy", folder=tmp_path)
    assert not marker.exists()


def test_scores_of_another_data_set_are_refused(tmp_path):
    path = store(tmp_path, label_hash="aaaa")
    Proxy("forg", "toy", folder=tmp_path, n=5, label_hash="aaaa")
    with pytest.raises(FileError, match=r"forg_toy.pkl: was made for 5 examples, but the data set has 6"):
        Proxy("forg", "toy", folder=tmp_path, n=6)
    with pytest.raises(FileError, match="was made for different labels"):
        Proxy("forg", "toy", folder=tmp_path, n=5, label_hash="bbbb")
    record_path(path).unlink()  # the labels are then unknown, as for the published files
    assert Proxy("forg", "toy", folder=tmp_path, label_hash="bbbb").check(5) is not None


def test_the_written_format_is_the_published_one(tmp_path):
    path = store(tmp_path, seeds=[1, 2])
    raw = path.read_bytes()
    assert raw[:2] == b"\x80\x04", "protocol 4"
    content = pickle.loads(raw)
    assert list(content) == sorted(content)
    assert {type(k) for k in content} == {int}
    assert {type(v) for v in content.values()} == {float}
    digest = hashlib.sha256(raw).hexdigest()
    record = {"seeds": [1, 2], "n": 5, "total": 5, "sha256": digest}
    assert json.loads(record_path(path).read_text()) == record
    with pytest.raises(FileError, match="no example has a score"):
        store(tmp_path, scores=np.full(3, np.nan))
    with pytest.raises(FileError, match="infinite"):
        store(tmp_path, scores=np.array([1.0, np.inf]))
    np.testing.assert_array_equal(read_scores(path), RAW)


def memorization(folder, dataset="toy", **arrays):
    path = SCORES["mem"].published_path(folder, dataset)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path


def test_memorization_shares_and_scaling(tmp_path):
    path = memorization(tmp_path, tr_mem=RAW, tr_labels=np.zeros(5))
    np.testing.assert_allclose(Proxy("mem", "toy", False, tmp_path).scores, RAW / RAW.sum())
    np.testing.assert_allclose(Proxy("mem", "toy", True, tmp_path).scores, (RAW - 1) / 4)
    mem = Memorization(path)
    np.testing.assert_array_equal(mem.scores, RAW)
    assert mem.get(2) == 5.0
    assert mem.get_prob(0) == pytest.approx(0.25)
    assert sum(mem.full_prob()) == pytest.approx(1.0)
    assert mem.get_sorted_indices().tolist() == [1, 3, 4, 0, 2]


def test_own_estimates_win_over_the_published_file(tmp_path):
    published = memorization(tmp_path, tr_mem=RAW)
    assert Proxy("mem", "toy", folder=tmp_path).path == published
    own = store(tmp_path, "mem", scores=RAW[::-1])
    proxy = Proxy("mem", "toy", normalize=False, folder=tmp_path)
    assert proxy.path == own
    np.testing.assert_array_equal(proxy.scores, RAW[::-1])
    assert find_score_file("mem", "toy", [tmp_path / "none", tmp_path]) == own


def test_memorization_of_other_labels_is_refused(tmp_path):
    labels = np.array([0, 1, 1, 0, 2])
    path = memorization(tmp_path, tr_mem=RAW, tr_labels=labels)
    mem = Proxy("mem", "toy", folder=tmp_path, n=5, label_hash=label_hash(labels))
    with pytest.raises(FileError, match="was made for different labels"):
        mem.check(5, label_hash(labels[::-1]))
    with pytest.raises(FileError, match="was made for different labels"):
        Memorization(path).check(label_hash=label_hash(1 - labels))
    memorization(tmp_path, tr_mem=RAW, tr_labels=labels[:4])
    with pytest.raises(FileError, match="tr_labels"):
        mem.check(label_hash=label_hash(labels))


def test_scores_of_a_huge_range_stay_finite(tmp_path):
    huge = np.array([1.5e308, -1.5e308, 0.0])
    store(tmp_path, scores=huge)
    np.testing.assert_allclose(Proxy("forg", "toy", folder=tmp_path).scores, [1, 0, 0.5])
    np.testing.assert_allclose(min_max(np.array([1e308, np.nan, -1e308, 5e307])), [1, np.nan, 0, 0.75])
    path = memorization(tmp_path, tr_mem=np.array([1.5e308, 1.5e308, 0.0]))
    np.testing.assert_allclose(Proxy("mem", "toy", False, tmp_path).scores, [0.5, 0.5, 0])
    assert Memorization(path).full_prob() == [0.5, 0.5, 0]
    drawn = Proxy("mem", "toy", folder=tmp_path).plot_prob_dist(folder=tmp_path)
    assert all(path.stat().st_size for path in drawn)


@pytest.mark.parametrize(
    "arrays",
    [{"mem": RAW}, {"tr_mem": np.array([[1.0]])}, {"tr_mem": np.array([1.0, np.nan])}, {"tr_mem": np.array(["a"])}],
)
def test_foreign_memorization_files_are_refused(tmp_path, arrays):
    memorization(tmp_path, **arrays)
    with pytest.raises(FileError, match=r"toy_infl_matrix.npz: .*fetch_scores.py"):
        Proxy("mem", "toy", folder=tmp_path)


def test_a_missing_memorization_file_is_explained(tmp_path):
    with pytest.raises(FileError, match=r"pluskid\.github\.io"):
        Memorization(tmp_path / "cifar100_infl_matrix.npz")


@needs_published
@pytest.mark.parametrize(
    ("mode", "dataset", "n", "low", "high", "mean", "highest", "first"),
    [
        ("forg", "cifar10", 50000, 0, 0.108125, 0.02047, [13329, 24402, 16867], [0.02875, 0.005625, 0.01375]),
        ("etl", "cifar10", 50000, 0.0175, 1, 0.18492, None, [0.239375, 0.0475, 0.080625]),
        ("eps", "cifar10", 50000, 0, 1, 0.40416, [10869, 26815, 3739], [0.683316, 0.000174849, 0.532234]),
        ("flat", "cifar10", 50000, 0, 1, 0.30230, [47183, 22999, 7696], [0.480351, 1.77609e-05, 0.364398]),
        ("samis_loss", "cifar100", 50000, 0, 1, 0.09268, [34372, 20593, 44560], [0.0417236, 0, 0.0159118]),
        ("samis_prob", "cifar100", 50000, 0, 1, 0.22512, [29091, 20586, 36960], [0.348626, 2.15792e-13, 0.153911]),
        ("samis_loss", "svhn", 73257, 0, 1, 0.01108, [54974, 17760, 66849], [0.00238145, 7.56678e-05, 0.0242072]),
        ("samis_prob", "svhn", 73257, 0, 1, 0.05622, [48876, 37134, 14817], [0.0500513, 0.00174791, 0.118398]),
    ],
)
def test_published_files_are_read_as_they_are(mode, dataset, n, low, high, mean, highest, first):
    proxy = Proxy(mode, dataset, normalize=False, folder=PUBLISHED, n=n)
    assert (proxy.scores.min(), proxy.scores.max()) == pytest.approx((low, high), abs=1e-12)
    assert proxy.scores.mean() == pytest.approx(mean, abs=5e-6)
    np.testing.assert_allclose(proxy.scores[:3], first, rtol=5e-6)
    if highest:
        assert proxy.get_sorted_indices()[::-1][:3].tolist() == highest


@needs_published
def test_published_memorization():
    mem = Memorization(SCORES["mem"].published_path(PUBLISHED, "cifar100"))
    assert (mem.scores == 0).sum() == 11844
    assert (mem.scores == 1).sum() == 959
    assert mem.scores.sum() == pytest.approx(13760.56, abs=5e-3)
