import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from src.datasets import Augmentation, Batches, DatasetEntry, ImageSet, Normalization, augment

NORMAL = Normalization((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
PLAIN = Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def made(count=50, size=12, channels=3):
    entry = DatasetEntry("made", 5, channels, size, {"samis": NORMAL, "mpe": NORMAL}, "npz")
    pixels = torch.randint(
        0, 256, (count, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return ImageSet(entry, "train", pixels, torch.arange(count) % 5)


def by_example(batches, epoch=1, **arguments):
    """Return everything that an epoch yields for each example, by original index."""
    images, order = {}, []
    for batch in batches.epoch(epoch, **arguments):
        for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
            images[index] = image.clone()
            order.append(index)
    return images, order


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_normalization_equals_torchvision_bit_for_bit():
    images = made(40)
    pipeline = transforms.Compose([transforms.ToTensor(), transforms.Normalize(NORMAL.mean, NORMAL.std)])
    batch = next(iter(Batches(images, 40, normalization=NORMAL)))
    for pixels, image in zip(images.fetch(torch.arange(40)), batch.images, strict=True):
        assert torch.equal(pipeline(Image.fromarray(pixels.permute(1, 2, 0).numpy())), image)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    images = made(8)
    batch = next(iter(Batches(images, 8, normalization=NORMAL, dtype=dtype)))
    mean, std = torch.tensor(NORMAL.mean, dtype=torch.float64), torch.tensor(NORMAL.std, dtype=torch.float64)
    exact = (images.fetch(torch.arange(8)).double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert batch.images.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(batch.images.double(), exact, rtol=tolerance, atol=tolerance)


def test_crop_and_flip_equal_one_image_at_a_time():
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (64, 3, 9, 9), dtype=torch.uint8, generator=generator)
    offsets = torch.randint(0, 7, (64, 2), generator=generator)
    mirrored = torch.rand(64, generator=generator) < 0.5
    fast = augment.flip(augment.crop(pixels, offsets, 3), mirrored)
    for index in range(64):
        image = np.pad(pixels[index].numpy(), ((0, 0), (3, 3), (3, 3)))
        top, left = offsets[index].tolist()
        window = image[:, top : top + 9, left : left + 9]
        window = window[:, :, ::-1] if mirrored[index] else window
        assert np.array_equal(fast[index].numpy(), window)


@pytest.mark.parametrize("length", [1, 4, 5, 40])
def test_cutout_equals_one_image_at_a_time(length):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(32, 3, 10, 10, generator=generator)
    centers = torch.randint(0, 10, (32, 3, 2), generator=generator)
    slow = images.clone()
    for index in range(32):
        for row, column in centers[index].tolist():
            top, bottom = max(row - length // 2, 0), min(row + length // 2, 10)
            left, right = max(column - length // 2, 0), min(column + length // 2, 10)
            slow[index, :, top:bottom, left:right] = 0
    assert torch.equal(augment.cutout(images.clone(), centers, length), slow)
    assert (length == 1) == torch.equal(slow, images)


def test_resized_crop_equals_cutting_and_scaling():
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=generator)
    draws = torch.rand(20, augment.CROP_DRAWS, generator=generator)
    fast = augment.resized_crop(pixels, draws)
    for index, (top, left, tall, wide) in enumerate(augment.crop_boxes(draws, 16, 16).tolist()):
        window = pixels[index : index + 1, :, top : top + tall, left : left + wide].float()
        scaled = torch.nn.functional.interpolate(window, (16, 16), mode="bilinear", align_corners=False)
        assert (fast[index].int() - scaled[0].round().int()).abs().max() <= 1  # rounding of .5


def test_crop_boxes_lie_inside_and_have_allowed_shapes():
    draws = torch.rand(4000, augment.CROP_DRAWS, generator=torch.Generator().manual_seed(4))
    top, left, tall, wide = augment.crop_boxes(draws, 300, 500).T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + tall <= 300).all()
    assert (left + wide <= 500).all()
    area, ratio = (tall * wide) / (300 * 500), wide / tall
    assert area.min() >= 0.078
    assert 0.7 < area.max() <= 0.801  # 300 x 400 of 300 x 500
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    narrow = augment.crop_boxes(torch.full((1, augment.CROP_DRAWS), 0.99), 10, 1000)  # no attempt fits
    assert narrow.tolist() == [[0, 493, 10, 13]]


AUGMENTED = Augmentation(crop_padding=2, flip=True, cutout_holes=2, cutout_length=4)


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 3}, {"batch_size": 50, "order": "sequential"}, {"batch_size": 16, "order": "fixed"}],
)
def test_augmentation_depends_only_on_seed_epoch_and_example(settings):
    images = made()
    reference, _ = by_example(
        Batches(images, 7, normalization=NORMAL, order="shuffled", augmentation=AUGMENTED, seed=5)
    )
    settings = {"order": "shuffled", **settings}
    other, _ = by_example(Batches(images, normalization=NORMAL, augmentation=AUGMENTED, seed=5, **settings))
    assert same(reference, other)


def test_augmentation_is_the_same_in_a_subset():
    images = made()
    whole, _ = by_example(Batches(images, 7, normalization=NORMAL, augmentation=AUGMENTED, seed=5))
    chosen = torch.tensor([40, 3, 17, 8])
    part, _ = by_example(Batches(images.subset(chosen), 3, normalization=NORMAL, augmentation=AUGMENTED, seed=5))
    planned, _ = by_example(
        Batches(images, 3, normalization=NORMAL, augmentation=AUGMENTED, seed=5, order="shuffled"), positions=chosen
    )
    assert part.keys() == planned.keys() == set(chosen.tolist())
    assert all(torch.equal(part[key], whole[key]) and torch.equal(planned[key], whole[key]) for key in part)


def test_epochs_and_seeds_differ():
    images = made()
    for field in ("crop_padding", "flip", "cutout_holes", "random_resized_crop"):
        augmentation = Augmentation(
            **{field: 2 if field in ("crop_padding", "cutout_holes") else True}, cutout_length=4
        )
        first = Batches(images, 50, normalization=NORMAL, augmentation=augmentation, seed=5)
        other = Batches(images, 50, normalization=NORMAL, augmentation=augmentation, seed=6)
        plain, _ = by_example(Batches(images, 50, normalization=NORMAL))
        one, two, three = by_example(first, 1)[0], by_example(first, 2)[0], by_example(other, 1)[0]
        assert same(one, by_example(first, 1)[0])
        assert not any(same(left, right) for left, right in [(one, two), (one, three), (one, plain)])


def test_alternating_flips_show_both_versions_in_consecutive_epochs():
    images = made()
    augmentation = Augmentation(flip=True, alternate_flips=True)
    plain, _ = by_example(Batches(images, 50, normalization=NORMAL))
    flipping = Batches(images, 50, normalization=NORMAL, augmentation=augmentation, seed=5)
    one, two, three = (by_example(flipping, epoch)[0] for epoch in (1, 2, 3))
    for key, image in plain.items():
        assert torch.equal(two[key], one[key].flip(-1))
        assert torch.equal(three[key], one[key])
        assert torch.equal(image, one[key]) or torch.equal(image, two[key])
    assert 5 < sum(torch.equal(plain[key], one[key]) for key in plain) < 45


@pytest.mark.parametrize(("world", "batch_size"), [(2, 8), (3, 7), (4, 3)])
def test_ranks_share_each_batch(world, batch_size):
    images = made(22)
    settings = {
        "normalization": NORMAL,
        "order": "shuffled",
        "augmentation": AUGMENTED,
        "seed": 1,
        "dtype": torch.float64,
    }
    weights = torch.rand(22, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = list(Batches(images, batch_size, **settings).epoch(2, weights=weights))
    ranks = [
        list(Batches(images, batch_size, rank=rank, world=world, **settings).epoch(2, weights=weights))
        for rank in range(world)
    ]
    assert all(len(rank) == len(whole) for rank in ranks)
    assert any(len(batch.labels) == 0 for rank in ranks for batch in rank) == (world == 4 or batch_size == 7)
    for step, batch in enumerate(whole):
        shares = [rank[step] for rank in ranks]
        assert sorted(torch.cat([share.indices for share in shares]).tolist()) == sorted(batch.indices.tolist())
        assert all(share.images.shape[1:] == batch.images.shape[1:] for share in shares)
        torch.testing.assert_close(batch.shares, batch.weights / batch.weights.sum())
        counts = dict(zip(batch.indices.tolist(), batch.shares.tolist(), strict=True))
        for share in shares:
            assert share.shares.tolist() == [counts[i] for i in share.indices.tolist()]
        lookup = dict(zip(batch.indices.tolist(), batch.images, strict=True))
        for share in shares:
            assert all(torch.equal(lookup[i], x) for i, x in zip(share.indices.tolist(), share.images, strict=True))


def test_orders():
    images = made()
    orders = {}
    for order in ("shuffled", "fixed", "sequential"):
        batches = Batches(images, 16, normalization=PLAIN, order=order, seed=3)
        orders[order] = [by_example(batches, epoch)[1] for epoch in (1, 2)]
        assert all(sorted(visited) == list(range(50)) for visited in orders[order])
    assert orders["sequential"] == [list(range(50))] * 2
    assert orders["fixed"][0] == orders["fixed"][1] != list(range(50))
    assert orders["shuffled"][0] != orders["shuffled"][1]
    assert orders["fixed"][0] not in orders["shuffled"]


def test_fields_weights_and_sizes():
    images = made(10).subset(torch.tensor([9, 1, 4, 6, 2]))
    batches = Batches(images, 2, normalization=PLAIN)
    weights = torch.tensor([1.0, 2, 3, 4, 5])
    seen = list(batches.epoch(1, weights=weights))
    assert len(seen) == len(batches) == 3
    assert torch.cat([batch.indices for batch in seen]).tolist() == [9, 1, 4, 6, 2]
    assert torch.cat([batch.labels for batch in seen]).tolist() == [4, 1, 4, 1, 2]
    assert torch.cat([batch.weights for batch in seen]).tolist() == weights.tolist()
    assert [batch.shares.tolist() for batch in seen] == [
        pytest.approx(part) for part in ([1 / 3, 2 / 3], [3 / 7, 4 / 7], [1])
    ]
    by_size = list(batches.epoch(1, weights=weights, by_size=True))
    assert [batch.shares.tolist() for batch in by_size] == [[0.5, 1], [1.5, 2], [5]]
    none = next(batches.epoch(1, weights=torch.zeros(5)))
    assert none.shares.tolist() == [0, 0]
    unpacked, labels, _, ones = next(iter(batches))
    assert unpacked.shape == (2, 3, 12, 12)
    assert labels.dtype == torch.int64
    assert ones.tolist() == [1, 1]
    with pytest.raises(ValueError, match="4 weights for 5"):
        next(batches.epoch(1, weights=weights[:4]))
    assert list(batches.epoch(1, positions=torch.zeros(0, dtype=torch.int64))) == []


def test_channels_last():
    images = made()
    plain = next(iter(Batches(images, 8, normalization=NORMAL))).images
    last = next(iter(Batches(images, 8, normalization=NORMAL, channels_last=True))).images
    assert torch.equal(plain, last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()


def test_global_generators_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(Batches(made(), 8, normalization=NORMAL, order="shuffled", augmentation=AUGMENTED).epoch(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_the_stored_images_are_not_changed():
    images = made()
    before = images.fetch(torch.arange(50)).clone()
    list(Batches(images, 8, normalization=NORMAL, order="sequential", augmentation=AUGMENTED).epoch(1))
    list(Batches(images, 50, normalization=NORMAL, dtype=torch.float64).epoch(1))
    assert torch.equal(images.fetch(torch.arange(50)), before)


@pytest.mark.parametrize("settings", [{"order": "random"}, {"batch_size": 0}, {"rank": 2, "world": 2}])
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match=r"order|batch_size"):
        Batches(made(), **{"batch_size": 4, "normalization": NORMAL, **settings})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stored", ["cpu", "cuda"])
def test_gpu_batches_equal_the_cpu_ones(stored):
    images = made()
    augmentation = Augmentation(2, True, 2, 4, random_resized_crop=False)
    settings = {"normalization": NORMAL, "order": "shuffled", "augmentation": augmentation, "seed": 5}
    reference, order = by_example(Batches(images, 7, **settings))
    moved = images.to(stored)
    assert moved.to(stored) is moved
    seen, gpu_order = by_example(Batches(moved, 7, device="cuda", **settings))
    assert order == gpu_order
    assert all(image.is_cuda for image in seen.values())
    assert all(torch.allclose(seen[index].cpu(), reference[index], rtol=1e-6, atol=1e-6) for index in seen)
