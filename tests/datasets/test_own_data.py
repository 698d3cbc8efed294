import errno
import hashlib
import io
import os
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import FILE, FLAG, refuse
from support import TRAIN, Forked, call, folders, succeed

from src.artifacts import io as files
from src.artifacts.io import read_json, read_npz, write_json
from src.datasets import DataConfig, dataset_name, decoding, load_dataset, own_images
from src.datasets.decoding import DRAFT_MARGIN, ImageFolder, open_image
from src.datasets.own import convert_channels, resize
from src.errors import FileError


def write_npz(path, x=(8, 8, 3), labels=(0, 1, 2, 0, 1, 2), test_labels=(2, 1, 0), **replaced):
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (len(labels), *x), dtype=np.uint8),
        "y_train": np.array(labels, dtype=np.uint8).reshape(-1, 1),
        "x_test": generator.integers(0, 256, (len(test_labels), *x), dtype=np.uint8),
        "y_test": np.array(test_labels),
        **replaced,
    }
    np.savez(path, **arrays)
    return f"npz:{path}"


def write_folder(root, mode="RGB", size=(8, 8), classes=("ant", "bee"), count=3):
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                shape = size if mode == "L" else (*size, 3)
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return f"folder:{root}"


def pixels(images):
    return images.fetch(torch.arange(len(images)))


def test_npz(tmp_path):
    name = write_npz(tmp_path / "my data.npz")
    train, test = load_dataset(name, tmp_path)
    stem, digest = train.entry.name.rsplit("-", 1)
    assert stem == "my_data"
    assert len(digest) == 8
    assert int(digest, 16) >= 0
    assert train.entry.num_classes == 3
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert test.labels.tolist() == [2, 1, 0]
    assert train.entry.training_augmentation(True, cutout_holes=1).crop_padding == 1
    stated, values = train.entry.normalizations["samis"], pixels(train).double() / 255
    assert np.allclose(stated.mean, values.mean(dim=(0, 2, 3)))
    assert np.allclose(stated.std, values.std(dim=(0, 2, 3), correction=0))


def test_name_follows_the_content(tmp_path):
    first = load_dataset(write_npz(tmp_path / "a.npz"), ".")[0].entry.name
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "a.npz", tmp_path / "copy" / "a.npz")
    assert load_dataset(f"npz:{tmp_path}/copy/a.npz", ".")[0].entry.name == first
    assert load_dataset(f"npz:{tmp_path}/a.npz", ".", image_size=4)[0].entry.name == first
    other = load_dataset(write_npz(tmp_path / "a.npz", test_labels=(2, 1, 1)), ".")[0].entry.name
    assert other != first
    assert other.startswith("a-")


def test_gray_arrays_without_channel_axis(tmp_path):
    train, _ = load_dataset(write_npz(tmp_path / "a.npz", x=(8, 8)), ".")
    assert train.image_shape == (1, 8, 8)
    color, _ = load_dataset(f"npz:{tmp_path}/a.npz", ".", channels=3, image_size=16)
    assert pixels(color).shape == (6, 3, 16, 16)
    assert len(color.entry.normalizations["mpe"].mean) == 3


def test_class_names_of_another_shape(tmp_path):
    with pytest.raises(FileError, match=r"a\.npz: class_names"):
        load_dataset(write_npz(tmp_path / "a.npz", class_names=np.array("abc")), ".")


@pytest.mark.parametrize("names", [["ant", "bée", "c\udce9"], [b"ant", "bée".encode(), b"c\xe9"]])
def test_class_names_can_be_printed(tmp_path, names):
    train, _ = load_dataset(write_npz(tmp_path / "a.npz", class_names=np.array(names)), ".")
    assert train.class_names[:2] == ["ant", "bée"]
    assert train.class_names[2].encode().startswith(b"c\\")


def test_image_size_makes_oblong_images_square(tmp_path):
    train, test = load_dataset(write_npz(tmp_path / "a.npz", x=(8, 6, 3)), ".", image_size=5)
    assert pixels(train).shape[1:] == pixels(test).shape[1:] == (3, 5, 5)


def test_resize_equals_pillow():
    ramp = np.linspace(0, 255, 20 * 30 * 3).reshape(20, 30, 3).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    for image in (ramp, noise):
        for size in (7, 20, 33):
            wide = round(30 * size / 20)
            slow = np.asarray(Image.fromarray(image).resize((wide, size), Image.Resampling.BILINEAR))
            left = (wide - size) // 2
            fast = resize(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0].permute(1, 2, 0).numpy()
            assert np.abs(fast.astype(int) - slow[:, left : left + size]).max() <= 1


def test_convert_channels_equals_pillow():
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    gray = convert_channels(torch.from_numpy(image).permute(2, 0, 1)[None], 1)
    expected = np.asarray(Image.fromarray(image).convert("L"))
    assert np.abs(gray[0, 0].numpy().astype(int) - expected).max() <= 1
    color = convert_channels(gray, 3)
    assert color.shape == (1, 3, 9, 9)
    assert (color == gray).all()


def test_folder(tmp_path):
    name = write_folder(tmp_path / "pets")
    (tmp_path / "pets" / "train" / ".hidden").write_text("")
    (tmp_path / "pets" / "train" / "ant" / ".DS_Store").write_text("")
    train, test = load_dataset(name, ".")
    assert train.class_names == ["ant", "bee"]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert train.entry.name.startswith("pets-")
    expected = np.asarray(Image.open(tmp_path / "pets" / "train" / "bee" / "1.png"))
    assert torch.equal(pixels(train)[4].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    shutil.rmtree(tmp_path / "pets" / "test" / "ant")
    fewer, test = load_dataset(name, ".")
    assert test.labels.tolist() == [1, 1, 1]
    assert fewer.entry.name != train.entry.name


def test_folder_name_depends_on_content(tmp_path):
    name = write_folder(tmp_path / "pets")
    before = load_dataset(name, ".")[0].entry.name
    path = tmp_path / "pets" / "test" / "bee" / "2.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    after = load_dataset(name, ".")[0].entry.name
    path.rename(path.with_name("3.png"))
    assert len({before, after, load_dataset(name, ".")[0].entry.name}) == 3


def test_folders_without_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        with pytest.raises(FileError, match="empty/train: "):
            load_dataset(f"folder:{tmp_path}/empty", ".")
        (tmp_path / "empty" / "train").mkdir(exist_ok=True)


def _gray_among_color(root):
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(root / "train" / "bee" / "1.png")


def _other_size(root):
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(root / "test" / "bee" / "1.png")
    return "test/bee/1.png: is 9x8"


def _empty_class(root):
    (root / "train" / "cat").mkdir()
    return "train/cat: has no image"


def _other_format(root):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / "train" / "bee" / "1.png", "TGA")
    return "train/bee/1.png: cannot be read"


def _pipe(root):
    os.mkfifo(root / "train" / "bee" / "pipe.png")
    return "train/bee/pipe.png: is not a regular file"


def _dangling(root):
    (root / "train" / "bee" / "link.png").symlink_to(root / "none.png")
    return "train/bee/link.png: is not a regular file"


def _nested(root):
    (root / "train" / "bee" / "more").mkdir()
    return "train/bee/more: is a folder"


@pytest.mark.parametrize("spoil", [_other_format, _pipe, _dangling])
def test_spoilt_folder(tmp_path, spoil):
    name = write_folder(tmp_path / "pets")
    message = spoil(tmp_path / "pets")
    with pytest.raises(FileError) as caught:
        load_dataset(name, ".")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_mend_mixed_folders(tmp_path):
    name = write_folder(tmp_path / "pets")
    _gray_among_color(tmp_path / "pets")
    _other_size(tmp_path / "pets")
    for channels in (1, 3):
        train, test = load_dataset(name, ".", channels=channels, image_size=6)
        assert pixels(train).shape == pixels(test).shape == (6, channels, 6, 6)


def test_oblong_folder(tmp_path):
    name = write_folder(tmp_path / "pets", size=(8, 6))
    with pytest.raises(FileError, match="image_size"):
        load_dataset(name, ".")
    assert load_dataset(name, ".", image_size=6)[0].image_shape == (3, 6, 6)


def test_images_of_many_sizes_hide_no_broken_file(tmp_path):
    name = write_folder(tmp_path / "pets", count=30)
    for number, path in enumerate(sorted((tmp_path / "pets" / "train").rglob("*.png"))[1:-1]):
        Image.new("RGB", (20 + number, 9)).save(path)
    last = sorted((tmp_path / "pets" / "train").rglob("*.png"))[-1]
    last.write_bytes(b"junk")
    with pytest.raises(FileError) as caught:
        load_dataset(name, ".")
    message = str(caught.value)
    assert f"train/{last.parent.name}/{last.name}: cannot be read" in message
    assert message.count(" among images of ") == 3
    assert "more images: also differ in size" in message


def test_all_bad_files_are_listed_at_once(tmp_path):
    name = write_folder(tmp_path / "pets", count=12)
    expected = [spoil(tmp_path / "pets") for spoil in (_empty_class, _nested, _other_size)]
    (tmp_path / "pets" / "train" / "ant" / "3.png").write_bytes(b"junk")
    with pytest.raises(FileError) as caught:
        load_dataset(name, ".")
    assert "(4) " in str(caught.value)
    assert all(message in str(caught.value) for message in [*expected, "train/ant/3.png: cannot be read"])
    for path in (tmp_path / "pets" / "train").rglob("*.png"):
        path.write_bytes(b"junk")
    with pytest.raises(FileError, match=r"\(20\) train/bee.*; and 7 more$") as caught:
        load_dataset(name, ".")
    assert "(21)" not in str(caught.value)


def test_files_of_operating_systems_are_ignored(tmp_path, caplog):
    caplog.set_level("INFO")
    name = write_folder(tmp_path / "pets")
    before = load_dataset(name, ".")[0].entry.name
    for part in ("train", "test"):
        for file in ("Thumbs.db", "ant/DESKTOP.INI", "ant/thumbs.DB", "bee/.DS_Store", "bee/._1.png"):
            (tmp_path / "pets" / part / file).write_bytes(b"x")
        (tmp_path / "pets" / part / "__MACOSX" / "ant").mkdir(parents=True)
        (tmp_path / "pets" / part / "ant" / "__MacOSX").mkdir()
    train, test = load_dataset(name, ".")
    assert (train.class_names, len(train), len(test), train.entry.name) == (["ant", "bee"], 6, 6, before)
    (line,) = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert "hidden or system files ignored: 14" in line


@pytest.mark.parametrize("where", ["train", "test", "both"])
def test_mixed_gray_and_color_becomes_color(tmp_path, caplog, where):
    caplog.set_level("INFO")
    name = write_folder(tmp_path / "pets", mode="L")
    color = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for part in ("train", "test") if where == "both" else (where,):
        Image.fromarray(color).save(tmp_path / "pets" / part / "ant" / "1.png")
    train, test = load_dataset(name, ".")
    assert train.image_shape == (3, 8, 8)
    for images in (train, test):
        for k, path in enumerate(sorted((tmp_path / "pets" / images.part).rglob("*.png"))):
            expected = np.asarray(Image.open(path).convert("RGB"))
            assert torch.equal(pixels(images)[k].permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert "converting all to color" in caplog.text


TURNS = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.T,
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].T,
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_images_are_upright(tmp_path, orientation, kind):
    name = write_folder(tmp_path / "pets", mode="L")
    image = np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    path, more = tmp_path / "pets" / "train" / "ant" / "0.png", {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(image).save(path, kind, exif=exif, **more)
    train, test = load_dataset(name, ".", channels=1)
    found = pixels(train)[0, 0].numpy()
    assert np.abs(found.astype(int) - TURNS[orientation](image)).max() <= (1 if kind == "WEBP" else 0)
    # Pillow has always rotated TIFF images
    assert train.decoding == test.decoding == ("exif" if orientation > 1 and kind != "TIFF" else None)
    assert train.subset(torch.tensor([1])).to("meta").decoding == train.decoding


def test_other_exif_tags_do_not_matter(tmp_path):
    """Pillow reads this orientation, but fails to write back the malformed tag next to it."""
    name = write_folder(tmp_path / "pets", mode="L")
    image = np.random.default_rng(5).integers(0, 256, (8, 8), dtype=np.uint8)
    # big endian; two entries of (tag, type, count, value): orientation, and an ASCII tag of type "undefined"
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + struct.pack(">HHIHH", 274, 3, 1, 6, 0)
    exif += struct.pack(">HHI4s", 271, 5, 1, b"\0\0\0\x26") + b"\0\0\0\0" + struct.pack(">II", 1, 2)
    Image.fromarray(image).save(tmp_path / "pets" / "train" / "ant" / "0.png", exif=exif)
    train, _ = load_dataset(name, ".")
    assert torch.equal(pixels(train)[0, 0], torch.from_numpy(np.rot90(image, -1).copy()))


def transparent(kind):
    """A gray ramp whose left half is transparent, and what it looks like on white."""
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :4] = 0
    alpha[0, 7] = 102
    seen = np.rint((ramp * (alpha / 255)) + 255 * (1 - alpha / 255))
    if kind == "LA":
        return Image.fromarray(np.stack([ramp, alpha], -1)), seen, {}
    if kind == "RGBA":
        return Image.fromarray(np.stack([ramp] * 3 + [alpha], -1)), seen, {}
    seen = np.where(ramp == 9, 255, ramp)
    if kind == "L tRNS":
        return Image.fromarray(ramp), seen, {"transparency": 9}
    if kind == "I;16 tRNS":
        return Image.fromarray(ramp.astype(np.uint16) * 257), seen, {"transparency": 9 * 257}
    if kind == "RGB tRNS":
        return Image.fromarray(np.stack([ramp] * 3, -1)), seen, {"transparency": (9, 9, 9)}
    palette = Image.fromarray(ramp).convert("P")
    return palette, seen, {"transparency": 9}


@pytest.mark.parametrize("kind", ["LA", "RGBA", "L tRNS", "I;16 tRNS", "RGB tRNS", "P"])
def test_transparency_shows_white(tmp_path, kind):
    name = write_folder(tmp_path / "pets")
    image, seen, more = transparent(kind)
    path = tmp_path / "pets" / "test" / "ant" / "0.png"
    image.save(path, **more)
    for channels in (1, 3):
        train, test = load_dataset(name, ".", channels=channels)
        assert (np.abs(pixels(test)[0].numpy().astype(int) - seen) <= 1).all()
        # earlier versions refused 16 bits, so there are no older results that differ
        assert train.decoding == (None if "16" in kind else "alpha")


def test_opaque_images_are_decoded_as_before(tmp_path):
    name = write_folder(tmp_path / "pets")
    solid = np.random.default_rng(3).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    solid[..., 3] = 255
    Image.fromarray(solid).save(tmp_path / "pets" / "train" / "ant" / "0.png")
    white = np.full((8, 8, 4), 255, np.uint8)
    white[:4, :, 3] = 0  # transparent, but white in any case
    Image.fromarray(white).save(tmp_path / "pets" / "train" / "ant" / "1.png")
    train, _ = load_dataset(name, ".")
    assert train.decoding is None
    assert torch.equal(pixels(train)[0].permute(1, 2, 0), torch.from_numpy(solid[..., :3].copy()))
    assert (pixels(train)[1] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PGM"])
def test_16_bit_gray_is_scaled(tmp_path, kind):
    name = write_folder(tmp_path / "pets", mode="L")
    deep = np.random.default_rng(2).integers(0, 65536, (8, 8)).astype(np.uint16)
    deep[0, :3] = 0, 65535, 129
    path = tmp_path / "pets" / "train" / "ant" / "0.png"
    if kind == "PGM":
        path.write_bytes(b"P5 8 8 65535\n" + deep.astype(">u2").tobytes())
    else:
        Image.fromarray(deep).save(path, kind)
    train, _ = load_dataset(name, ".")
    assert train.image_shape == (1, 8, 8)
    assert np.array_equal(pixels(train)[0, 0].numpy(), np.rint(deep / 257))


def test_names_that_are_not_utf8(tmp_path):
    name = write_folder(tmp_path / "pets", classes=("ant", "bée"))
    before = load_dataset(name, ".")[0].entry.name
    digest = hashlib.sha256()  # as always for UTF-8 names
    for path in sorted((tmp_path / "pets").rglob("*.png"), key=lambda path: (path.parts[-3] != "train", path)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(tmp_path / 'pets')}\0{len(content)}\0".encode() + content)
    assert before == f"pets-{digest.hexdigest()[:8]}"
    for part in ("train", "test"):
        folder = os.fsencode(tmp_path / "pets" / part)
        os.rename(folder + b"/ant", folder + b"/caf\xe9")
        os.rename(folder + b"/caf\xe9/0.png", folder + b"/caf\xe9/\xff.png")
    train, _ = load_dataset(name, ".")
    assert train.class_names == ["bée", "caf\\xe9"]
    assert train.entry.name != before


# ---------------------------------------------------------------------------------------------------------- photos


def photo(seed, size=(240, 320)):
    """Random waves of all wavelengths, with larger amplitudes at longer ones, as in photos; uint8 ``(h, w, 3)``."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size[0])[:, None], np.fft.rfftfreq(size[1])[None])
    frequency[0, 0] = 1
    waves = generator.normal(size=(2, 3, *frequency.shape)) / frequency**1.2
    image = np.fft.irfft2(waves[0] + 1j * waves[1], size).transpose(1, 2, 0)
    return np.clip(128 + 55 * (image - image.mean()) / image.std(), 0, 255).astype(np.uint8)


def write_photos(root, count=4):
    for part in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(photo([label, number, len(part)]))
                image.save(root / part / name / f"{number}.jpg", quality=90)
    return f"folder:{root}"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder that is large enough to be cached and old enough for its timestamps to be trusted."""
    monkeypatch.setattr(own_images, "CACHED_FROM", 0)
    monkeypatch.setattr(decoding, "SETTLED", 0)
    return write_photos(tmp_path / "photos")


def cache_file(base):
    (path,) = (base / "decoded").iterdir()
    return path


def lines(caplog):
    found = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return found


def same(one, other):
    return all(
        torch.equal(pixels(first), pixels(second))
        and first.entry == second.entry
        and (first.digest, first.decoding, first.class_names) == (second.digest, second.decoding, second.class_names)
        and torch.equal(first.labels, second.labels)
        for first, second in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("target", [7, 15, 16, 29, 30, 31, 60, 61, 120, 300])
@pytest.mark.parametrize("size", [(240, 320), (321, 243)])
def test_no_photo_is_reduced_below_twice_what_is_wanted(monkeypatch, target, size):
    file = io.BytesIO()
    Image.fromarray(photo(0, size)).save(file, "JPEG")
    image, reduced = open_image(file, target)
    assert reduced == (min(size) >= 2 * DRAFT_MARGIN * target)
    assert min(image.size) == target if reduced else image.size == size[::-1]
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", lambda image, *_, **__: image)
        file.seek(0)
        assert not reduced or min(open_image(file, target)[0].size) >= DRAFT_MARGIN * target
    assert not open_image(file)[1]


def rgb(image, path):
    Image.fromarray(image).save(path, "JPEG", quality=90)


def gray(image, path):
    Image.fromarray(image).convert("L").save(path, "JPEG", quality=90)


def cmyk(image, path):
    Image.fromarray(image).convert("CMYK").save(path, "JPEG", quality=90)


def progressive(image, path):
    Image.fromarray(image).save(path, "JPEG", progressive=True, subsampling=0)


def turned(image, path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(image).save(path, "JPEG", exif=exif)


def two_in_one(image, path):
    Image.fromarray(image).save(path, "MPO", save_all=True, append_images=[Image.fromarray(255 - image)])


def alpha(image, path):
    veil = np.linspace(0, 255, image.shape[1]).astype(np.uint8)
    Image.fromarray(np.dstack([image, np.broadcast_to(veil, image.shape[:2])])).save(path, "PNG")


@pytest.mark.parametrize(
    ("write", "rules"),
    [(rgb, "draft"), (gray, "draft"), (cmyk, "draft"), (progressive, "draft"), (turned, "exif,draft"),
     (two_in_one, "draft"), (alpha, "alpha")],
)  # fmt: skip
@pytest.mark.parametrize(("channels", "size"), [(None, 37), (1, 59), (3, 20)])
def test_draft_decoding_is_close_to_full_decoding(tmp_path, write, rules, channels, size):
    name = write_folder(tmp_path / "pets")
    for number in range(3):
        write(photo(number, (241, 327)), tmp_path / "pets" / "train" / "ant" / f"{number}.png")
    options = {"image_size": size, "channels": channels}
    draft, full = (load_dataset(name, tmp_path, decode=decode, **options)[0] for decode in ("draft", "full"))
    assert (draft.decoding, full.decoding) == (rules, rules.replace("draft", "").strip(",") or None)
    assert draft.entry.name == full.entry.name
    difference = (pixels(draft).int() - pixels(full).int()).abs().float()
    assert difference[3:].max() == 0  # small files are decoded as before
    if "draft" in rules:
        assert 0 < difference[:3].mean() < 1.5
        assert difference[:3].max() < 16
        assert draft.digest != full.digest
    else:
        assert same([draft], [full])


def test_turned_tiff_images_are_not_taken_for_reduced_ones(tmp_path):
    name = write_folder(tmp_path / "pets")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(photo(0)).save(tmp_path / "pets" / "train" / "ant" / "0.png", "TIFF", exif=exif)
    assert load_dataset(name, tmp_path, image_size=20)[0].decoding is None


def test_without_a_size_photos_are_decoded_in_full(tmp_path):
    name = write_folder(tmp_path / "pets")
    for path in (tmp_path / "pets").rglob("*.png"):
        rgb(photo(0, (64, 64)), path)
    assert load_dataset(name, tmp_path)[0].decoding is None
    assert load_dataset(name, tmp_path, image_size=64)[0].decoding is None


def test_later_starts_read_what_was_decoded(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    first = load_dataset(photos, tmp_path, image_size=20)
    kept, reduced = cache_file(tmp_path), lines(caplog)
    assert any("16 of 16 photos were decoded at reduced size" in line for line in reduced)
    assert any(str(kept) in line and "19 KiB" in line for line in reduced)
    written = kept.stat()
    with monkeypatch.context() as patch:
        patch.setattr(own_images, "open_image", None)
        patch.setattr(ImageFolder, "content", None)
        patch.setattr(own_images, "normalization_of", None)
        again = load_dataset(photos, tmp_path, image_size=20)
    (line,) = lines(caplog)
    assert line == f"read 16 decoded images from {kept} (19 KiB)"
    assert same(first, again)
    assert kept.stat().st_mtime_ns == written.st_mtime_ns
    for other in ({"image_size": 21}, {"image_size": 20, "channels": 1}, {"image_size": 20, "decode": "full"}):
        fresh = load_dataset(photos, tmp_path, **other)
        assert not any(line.startswith("read ") for line in lines(caplog))
        assert same(fresh, load_dataset(photos, tmp_path, **other))
        lines(caplog)
    assert len(list((tmp_path / "decoded").iterdir())) == 4
    shutil.copytree(tmp_path / "photos", tmp_path / "elsewhere" / "photos")
    load_dataset(f"folder:{tmp_path / 'elsewhere' / 'photos'}", tmp_path, image_size=20)
    assert len(list((tmp_path / "decoded").iterdir())) == 5


def test_few_small_files_are_not_kept(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(own_images, "CACHED_FROM", 4 << 20)
    load_dataset(photos, tmp_path, image_size=20)
    assert not (tmp_path / "decoded").exists()


def _changed(path):
    """Write different content of the same length, and restore the modification time."""
    times, content = path.stat(), bytearray(path.read_bytes())
    Image.fromarray(255 - photo(9)).save(path, "JPEG", quality=50)
    path.write_bytes(path.read_bytes().ljust(len(content), b"\0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (times.st_size, times.st_mtime_ns, times.st_ino)


def _moved_over(path):
    """Do the same by renaming another file to this name."""
    other = path.parent.parent.parent.parent / "other"
    shutil.copy2(path, other)
    _changed(other)
    times = path.stat()
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(path)


def _renamed(path):
    path.rename(path.with_name("9.jpg"))


def _exchanged(path):
    other = path.with_name("1.jpg")
    path.rename(path.with_name("x"))
    other.rename(path)
    path.with_name("x").rename(other)


def _removed(path):
    path.unlink()


def _added(path):
    shutil.copy(path, path.with_name("9.jpg"))


@pytest.mark.parametrize("change", [_changed, _moved_over, _renamed, _exchanged, _removed, _added])
@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("settled", [True, False])
def test_changed_photos_are_noticed(photos, tmp_path, monkeypatch, caplog, change, part, settled):
    caplog.set_level("INFO")
    monkeypatch.setattr(decoding, "SETTLED", 0 if settled else 10**13)
    before = load_dataset(photos, tmp_path, image_size=20)
    time.sleep(0.02)  # more than the resolution of file timestamps
    change(tmp_path / "photos" / part / "cat" / "0.jpg")
    lines(caplog)
    after = load_dataset(photos, tmp_path, image_size=20)
    assert sum("decoding again" in line for line in lines(caplog)) == 1
    assert after[0].entry.name != before[0].entry.name
    assert same(after, load_dataset(photos, tmp_path, image_size=20))
    shutil.rmtree(tmp_path / "decoded")
    assert same(after, load_dataset(photos, tmp_path, image_size=20))


def test_files_that_were_only_touched_are_read_but_not_decoded(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    before = load_dataset(photos, tmp_path, image_size=20)
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.touch()
    monkeypatch.setattr(own_images, "open_image", None)
    lines(caplog)
    assert same(before, load_dataset(photos, tmp_path, image_size=20))
    assert "saved the decoded images" in lines(caplog)[0]
    monkeypatch.setattr(ImageFolder, "content", None)
    assert same(before, load_dataset(photos, tmp_path, image_size=20))


def test_photos_that_changed_just_now_are_read_again(photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(decoding, "SETTLED", 10**13)
    before = load_dataset(photos, tmp_path, image_size=20)
    counted, content = [], ImageFolder.content
    monkeypatch.setattr(ImageFolder, "content", lambda folder: counted.append(1) or content(folder))
    assert same(before, load_dataset(photos, tmp_path, image_size=20))
    assert counted == [1]


def _flip(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(b"junk" * 1000),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a pixel": lambda path: path.write_bytes(_flip(path.read_bytes(), path.stat().st_size // 2)),
    "foreign": lambda path: files.write_npz(path, x_train=np.zeros(3)),
    "no header": lambda path: files.write_npz(path, **(read_npz(path) | {"header": np.array("[]")})),
    "header of lists": lambda path: files.write_npz(path, **(read_npz(path) | {"header": np.array("[" * 10**5)})),
    "too few": lambda path: files.write_npz(path, **(read_npz(path) | {"train": read_npz(path)["train"][1:]})),
    "floats": lambda path: files.write_npz(path, **(read_npz(path) | {"test": read_npz(path)["test"] / 2})),
    "folder": lambda path: path.unlink() or path.mkdir(),
    "link to nothing": lambda path: path.unlink() or path.symlink_to("nothing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_decoded_again(photos, tmp_path, caplog, damage):
    caplog.set_level("INFO")
    before = load_dataset(photos, tmp_path, image_size=20)
    path = cache_file(tmp_path)
    DAMAGES[damage](path)
    lines(caplog)
    assert same(before, load_dataset(photos, tmp_path, image_size=20))
    said = [line for line in lines(caplog) if "cache cannot be used" in line]
    assert len(said) == (damage != "link to nothing")
    assert not any("\n" in line for line in said)
    if damage != "folder":
        assert same(before, load_dataset(photos, tmp_path, image_size=20))
        assert "read 16 decoded images" in lines(caplog)[-1]


def test_another_pillow_decodes_again(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    before = load_dataset(photos, tmp_path, image_size=20)
    monkeypatch.setattr(own_images.PIL, "__version__", "99")
    lines(caplog)
    assert same(before, load_dataset(photos, tmp_path, image_size=20))
    assert sum("decoding again" in line for line in lines(caplog)) == 1


def test_a_place_that_cannot_be_written_costs_the_cache_alone(photos, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").write_text("")
    found = load_dataset(photos, tmp_path / "file", image_size=20)
    (warned,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "cache_folder" in warned
    assert "cannot save the decoded images" in warned
    caplog.clear()
    elsewhere = load_dataset(photos, tmp_path / "file", image_size=20, cache_folder=tmp_path / "decoded")
    assert same(found, elsewhere)
    cache_file(tmp_path).unlink()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert same(found, load_dataset(photos, tmp_path, image_size=20))
    assert "No space left" in " ".join(lines(caplog))
    assert not list((tmp_path / "decoded").iterdir())


def test_broken_photos_are_listed_although_there_is_a_cache(photos, tmp_path):
    load_dataset(photos, tmp_path, image_size=20)
    for number in range(2):
        (tmp_path / "photos" / "test" / "dog" / f"{number}.jpg").write_bytes(b"junk")
    with pytest.raises(FileError, match=r"dog/0.jpg.*dog/1.jpg"):
        load_dataset(photos, tmp_path, image_size=20)
    truncated = tmp_path / "photos" / "test" / "dog" / "2.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-3000])
    with pytest.raises(FileError, match=r"dog/2.jpg: cannot be read as an image"):
        load_dataset(photos, tmp_path, image_size=20)


def test_names_and_labels_need_no_reading_if_there_is_a_cache(photos, tmp_path, monkeypatch):
    train, _ = load_dataset(photos, tmp_path, image_size=20)
    config = DataConfig(photos, image_size=20)
    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "read", None)
        found = config.examples(tmp_path)
        assert (found.name, found.labels.tolist()) == (train.entry.name, train.labels.tolist())
        assert found.digest == train.digest is not None
    Image.new("RGB", (300, 300)).save(tmp_path / "photos" / "test" / "dog" / "0.jpg")
    changed = config.examples(tmp_path)
    assert changed.name == dataset_name(photos) != found.name
    assert changed.digest == load_dataset(photos, tmp_path, image_size=20)[0].digest != train.digest


def test_the_name_needs_no_decoding(photos, tmp_path, monkeypatch):
    name = load_dataset(photos, tmp_path, image_size=20)[0].entry.name
    monkeypatch.setattr(own_images, "open_image", None)
    assert dataset_name(photos) == name
    arrays = write_npz(tmp_path / "oblong.npz", x=(8, 6, 3))
    assert dataset_name(arrays) == load_dataset(arrays, ".", image_size=9)[0].entry.name


def test_decode_belongs_to_folders(tmp_path):
    for data in ("digits", "imagenet", f"npz:{tmp_path}/a.npz"):
        refuse(
            "train_full.py", f"--dataset={data}", "--decode=full", status=FLAG, says="--decode full: applies only to"
        )
    refuse("train_full.py", "--dataset=folder:x", "--decode=fast", status=FLAG, says="--decode")
    assert DataConfig("folder:x", decode="full").decode == "full"


def test_scripts_share_a_cache_and_do_not_mix_decodings(photos, tmp_path):
    """Two runs that start at once and one later; results of draft decoding, full decoding and older versions."""
    data = (f"--dataset={photos}", "--image_size=20", "--model=small_mlp", "--epochs=1", "--lr_sched=const")
    where = folders(tmp_path, *TRAIN)
    started = [Forked("train_full.py", *data, f"--optimizer={name}", *where) for name in ("sgd", "sam")]
    for process in started:
        result = process.result()
        assert result.status == 0, result.err
    cache_file(tmp_path / "datasets")
    done = succeed("compute_sam_sgd.py", *data[:4], *folders(tmp_path, "datasets", "models", "metrics"))
    assert "read 16 decoded images" in done.err
    assert "decoded at reduced size" not in done.err
    full = (*data, "--decode=full")
    records = list(tmp_path.rglob("results.json"))
    assert all(read_json(path)["settings"]["decoding"] == "draft" for path in records)
    refuse("train_full.py", *full, *where, status=FILE, says=(r"decoding \(draft vs. None\)", "--decode=draft"))
    refuse("compute_sam_sgd.py", *full[:4], "--decode=full", "--overwrite",
           *folders(tmp_path, "datasets", "models", "metrics"), status=FILE, says="give --decode=draft")  # fmt: skip
    older = folders(tmp_path / "older", *TRAIN)
    for name in ("sgd", "sam"):
        succeed("train_full.py", *full, f"--optimizer={name}", *older)
    for path in (tmp_path / "older").rglob("results.json"):
        record = read_json(path)
        assert "decoding" not in record["settings"]
        del record["settings"]["images"]  # as in versions that did not record their images
        write_json(path, record)
    assert call("train_full.py", *full, *older).status == 0
    refuse("train_full.py", *data, *older, status=FILE, says=(r"decoding \(None vs. draft\)", "--decode=full"))
    mixed = (*data[:3], "--epochs=1", *folders(tmp_path / "older", "datasets", "models"))
    metrics = f"--metrics_folder={tmp_path / 'mixed'}"
    succeed("compute_sam_sgd.py", *mixed, "--decode=full", metrics)
    for name in ("sgd", "sam"):
        succeed("train_full.py", *data, f"--optimizer={name}", "--seed=2", *older)
    succeed("compute_sam_sgd.py", *mixed, "--seed=2", metrics)
    refuse("average_scores.py", *data[:3], "--seeds", 1, 2, f"--datasets_folder={tmp_path}", metrics, status=FILE,
           says="decoding")  # fmt: skip
    succeed("average_scores.py", *data[:3], "--seeds=1", f"--datasets_folder={tmp_path}", metrics)
    shown = ("--modes=samis_loss", *folders(tmp_path, "datasets", "plots"), f"--scores_folder={tmp_path / 'mixed'}")
    refuse(
        "plot_images.py", *data[:2], *shown, status=FILE, says=r"made for different images .*with the same --decode"
    )
    succeed("plot_images.py", *data[:2], "--decode=full", *shown)
