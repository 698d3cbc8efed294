"""Memorization from models trained on random subsets: the estimator, and the files of members."""

import argparse
import itertools

import numpy as np
import pytest

from src.errors import ArgumentError, FileError
from src.metrics.members import train_members
from src.metrics.memorization import (
    MemberFiles,
    Members,
    MemorizationConfig,
    Tally,
    included_examples,
    members_needed,
    parse_members,
)

RNG = np.random.default_rng


def leave_one_out(total):
    return ~np.eye(total, dtype=bool)


# ------------------------------------------------------------------------------------------------------ estimator


def nearest_neighbor(points, labels, included):
    """Whether the nearest included neighbor of each example (itself, if included) has its label."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    return np.stack([labels[np.where(mask, distances, np.inf).argmin(1)] == labels for mask in included])


def test_leave_one_out_of_a_nearest_neighbor_model():
    """An included example is predicted correctly; a left-out one has the label of its nearest other example."""
    points, labels = RNG(0).normal(size=(40, 2)), RNG(1).integers(0, 2, 40)
    included = leave_one_out(40)
    tally = Tally(40)
    tally.add(included, nearest_neighbor(points, labels, included))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag(np.full(40, np.inf))
    np.testing.assert_array_equal(tally.estimate().value, labels[distances.argmin(1)] != labels)
    assert (tally.counts == [[1], [39]]).all()


def test_leave_one_out_of_ridge_regression():
    """Without example j the prediction for i is f_i - h_ij r_j / (1 - h_jj), with hat matrix h and residuals r."""
    generator = RNG(2)
    inputs, targets = generator.normal(size=(25, 4)), generator.normal(size=25)
    penalty = 0.3 * np.eye(4)
    hat = inputs @ np.linalg.solve(inputs.T @ inputs + penalty, inputs.T)
    fitted = hat @ targets
    without = fitted[:, None] - hat * ((targets - fitted) / (1 - np.diag(hat)))  # (i, j)
    exact = (without.sum(1) - np.diag(without)) / 24 - np.diag(without)
    included = leave_one_out(25)
    values = [inputs @ np.linalg.solve(inputs[m].T @ inputs[m] + penalty, inputs[m].T @ targets[m]) for m in included]
    tally = Tally(25)
    tally.add(included, np.array(values))
    np.testing.assert_allclose(tally.estimate().value, exact, atol=1e-12)


def test_random_subsets_estimate_the_mean_over_all_subsets():
    """For a nearest-neighbor model the expectation over subsets of a size is a sum over all of them."""
    points, labels = RNG(3).normal(size=(8, 2)), np.array([0, 0, 0, 0, 1, 1, 1, 1])

    def all_subsets(order):
        pairs = itertools.product(
            *(list(itertools.combinations(np.flatnonzero(labels[order] == c), 2)) for c in (0, 1))
        )
        masks = np.zeros((36, 8), bool)
        for mask, (one, two) in zip(masks, pairs, strict=True):
            mask[[*one, *two]] = True
        return masks

    for order in (np.arange(8), RNG(4).permutation(8)):  # the estimate follows a permutation of the examples
        tally, exact = Tally(8), Tally(8)
        included = np.stack([included_examples(labels[order], 0.5, 1, member) for member in range(1, 1501)])
        tally.add(included, nearest_neighbor(points[order], labels[order], included))
        every = all_subsets(order)
        exact.add(every, nearest_neighbor(points[order], labels[order], every))
        found, expected = tally.estimate(), exact.estimate().value
        assert np.ptp(expected) > 0.3
        assert (np.abs(found.value - expected) <= 4 * found.error + 1e-12).all()
        if (order == np.arange(8)).all():
            original = expected
        np.testing.assert_allclose(expected, original[order], atol=1e-12)


@pytest.mark.parametrize("unit", [None, 2])
def test_the_standard_error_is_unbiased(unit):
    """Its mean square over repetitions is the variance of the estimates, for dependent pairs of members, too."""
    generator, members, repetitions = RNG(5), 12, 4000
    included = np.zeros((members, repetitions), bool)
    if unit:
        included[0::2] = generator.random((members // 2, repetitions)) < 0.5
        included[1::2] = ~included[0::2]
    else:
        included[:8] = True
    shared = np.repeat(generator.normal(size=(members // (unit or 1), repetitions)), unit or 1, axis=0)
    values = shared + generator.normal(size=(members, repetitions)) + np.where(included, 2.0, 0.0)
    tally = Tally(repetitions, unit)
    tally.add(included, values)
    found = tally.estimate()
    assert found.value.mean() == pytest.approx(2.0, abs=0.05)
    assert (found.error**2).mean() == pytest.approx(found.value.var(), rel=0.08)


def test_examples_of_all_members_or_of_none_have_no_estimate():
    tally = Tally(4)
    tally.add(np.array([[1, 0, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1]], bool), np.ones((3, 4)))
    found = tally.estimate()
    np.testing.assert_array_equal(found.value, [np.nan, np.nan, 0, 0])
    assert np.isnan(found.error).all()  # a variance needs two members
    assert found.median_error is None
    tally.add(np.array([[0, 0, 1, 1], [0, 0, 1, 1]], bool), np.zeros((2, 4)))
    found = tally.estimate()
    np.testing.assert_array_equal(np.isnan(found.error), [False, True, False, True])
    assert found.median_error == np.mean(found.error[[0, 2]])  # of the examples that have one


@pytest.mark.parametrize(("fraction", "complementary"), [(0.7, False), (0.5, True)])
def test_members_get_a_random_share_of_every_class(fraction, complementary):
    labels = np.repeat([0, 1, 2, 5], [1, 10, 33, 59])
    masks = np.stack([included_examples(labels, fraction, 7, m, complementary) for m in range(1, 2001)])
    sizes = masks.sum(1)
    assert set(sizes) == ({51, 52} if complementary else {round(fraction * 103)})
    for label in np.unique(labels):
        mine, exact = masks[:, labels == label].sum(1), (labels == label).sum() * sizes / 103
        assert (np.abs(mine - exact) < 1 + 1e-9).all()
    assert np.abs(masks.mean(0) - sizes.mean() / 103).max() < 5 * 0.5 / 2000**0.5
    if complementary:
        np.testing.assert_array_equal(masks[0::2], ~masks[1::2])
    np.testing.assert_array_equal(masks[1998], included_examples(labels, fraction, 7, 1999, complementary))
    assert (masks[0] != included_examples(labels, fraction, 8, 1, complementary)).any()


def test_folds_leave_out_every_example_once_per_round():
    labels = RNG(0).permutation(np.repeat([0, 1, 2, 5], [2, 10, 33, 58]))
    held = np.stack([~included_examples(labels, 0.7, 7, member, folds=3) for member in range(1, 7)])
    for each in (held[:3], held[3:]):
        assert (each.sum(0) == 1).all()
        assert set(each.sum(1)) == {34, 35}
        for label in np.unique(labels):
            assert np.ptp(each[:, labels == label].sum(1)) <= 1
    assert (held[:3] != held[3:]).any()

    config = MemorizationConfig(members=(1, 201), folds=3)  # 201 members are in three files, none a whole round
    values, tallies = RNG(1).normal(size=(201, 103)), [Tally(103, config.unit) for _ in range(2)]
    masks = np.stack([included_examples(labels, 0.7, 7, member, folds=3) for member in range(1, 202)])
    tallies[0].add(masks, values)
    for rows in (slice(100), slice(100, 200), slice(200, None)):
        tallies[1].add(masks[rows], values[rows])
    rounds = np.stack([np.where(masks[r : r + 3], values[r : r + 3] / 2, -values[r : r + 3]).sum(0)
                       for r in range(0, 201, 3)])  # fmt: skip
    for found in (tally.estimate() for tally in tallies):
        np.testing.assert_allclose(found.value, rounds.mean(0), atol=1e-12)
        np.testing.assert_allclose(found.error, rounds.std(0, ddof=1) / 67**0.5, atol=1e-12)
    for members in ((1, 4), (2, 4), (1, 200)):
        with pytest.raises(ArgumentError, match="whole rounds of 3"):
            MemorizationConfig(members=members, folds=3)


def test_how_many_members_cover_every_example():
    labels = np.arange(500) % 10
    needed = members_needed(500, 0.7)
    lacking = 0
    for seed in range(40):
        count = np.sum([included_examples(labels, 0.7, seed, m) for m in range(1, needed + 1)], axis=0)
        lacking += ((count == 0) | (count == needed)).any()
    assert lacking <= 6  # expected: 2
    assert needed < 35


# ------------------------------------------------------------------------------------------------ members on disk


def exact_fit(numbers, included):
    """Members of a nearest-neighbor model of 12 fixed points, without any training."""
    points, labels = RNG(6).normal(size=(12, 2)), np.arange(12) % 2
    correct = nearest_neighbor(points, labels, included)
    left_out = ((~included)[..., None] * np.stack([correct, ~correct], 2)).sum(0).astype(np.uint32)
    test = np.stack([RNG(n).random(5) for n in numbers])
    return Members(np.array(numbers), included, correct, (correct * 0.9).astype(np.float16), test > 0.5,
                   test.astype(np.float16), left_out)  # fmt: skip


def masks(member):
    return included_examples(np.arange(12) % 2, 0.5, 1, member)


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.npz")}


def test_interrupted_and_merged_members_equal_those_of_one_run(tmp_path):
    whole, stopped = (MemberFiles(tmp_path / name, {"a": 1}) for name in ("whole", "stopped"))
    config = MemorizationConfig(members=(1, 230))
    assert train_members(whole, exact_fit, masks, config, together=10) == 230
    assert set(stored(whole.folder)) == {"members_1.npz", "members_101.npz", "members_201.npz"}

    trained = []

    def dies(numbers, included):
        if len(trained) in (3, 14):
            trained.append(None)
            raise KeyboardInterrupt
        trained.append(numbers)
        return exact_fit(numbers, included)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_members(stopped, dies, masks, config, together=10)
    train_members(stopped, dies, masks, config, together=10)
    numbers = [number for chunk in filter(None, trained) for number in chunk]
    assert numbers == list(range(1, 231))  # none twice
    assert stored(stopped.folder) == stored(whole.folder)

    parts = []
    for first, last in ((151, 230), (1, 60), (61, 150)):
        parts.append(MemberFiles(tmp_path / f"part_{first}", {"a": 1}))
        train_members(parts[-1], exact_fit, masks, MemorizationConfig(members=(first, last)), together=7)
    merged = MemberFiles(tmp_path / "merged", {"a": 1})
    assert merged.missing(230).tolist() == list(range(1, 231))
    assert [merged.merge(part.folder) for part in parts] == [80, 60, 90]
    assert [merged.merge(part.folder) for part in parts] == [0, 0, 0]  # as after an interruption
    assert stored(merged.folder) == stored(whole.folder)
    assert not len(merged.missing(230))

    other = MemberFiles(tmp_path / "other", {"a": 2})
    train_members(other, exact_fit, masks, MemorizationConfig(members=(231, 240)))
    with pytest.raises(FileError, match=r"a \(2 vs. 1\)"):
        merged.merge(other.folder)
    overlapping = MemberFiles(tmp_path / "overlapping", {"a": 1})
    train_members(overlapping, exact_fit, masks, MemorizationConfig(members=(225, 240)))
    with pytest.raises(FileError, match="member 225-230 is also in"):
        merged.merge(overlapping.folder)
    (tmp_path / "renamed").mkdir()
    (tmp_path / "renamed" / "members_301.npz").write_bytes(stored(whole.folder)["members_1.npz"])
    with pytest.raises(FileError, match="copied or renamed"):
        merged.merge(tmp_path / "renamed")
    assert stored(merged.folder) == stored(whole.folder)


def test_training_stops_at_the_target_standard_error(tmp_path):
    files, config = MemberFiles(tmp_path, {}), MemorizationConfig(members=(1, 900), target_se=0.1)
    last = train_members(files, exact_fit, masks, config, together=10)
    tally, before = Tally(12), Tally(12)
    for part in files.blocks(last):
        tally.add(part.included, part.correct)
    assert tally.counts.sum(0).tolist() == [last] * 12
    assert tally.typical_error() <= 0.1 < 900
    for part in files.blocks(last - 10):
        before.add(part.included, part.correct)
    assert before.typical_error() > 0.1
    assert train_members(files, exact_fit, masks, config, together=10) == last


@pytest.mark.parametrize("text", ["0", "5-3", "a", "1-2-3", "-4", ""])
def test_bad_numbers_of_members(text):
    assert (parse_members("7"), parse_members("3-9")) == ((1, 7), (3, 9))
    with pytest.raises(argparse.ArgumentTypeError):
        parse_members(text)
