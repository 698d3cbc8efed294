import hashlib
import os
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from src.datasets import load_dataset
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
    assert "more images: differ in size" in message


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
    assert "14 hidden or system files" in line


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
    assert "are converted to color" in caplog.text


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
    # Pillow has always turned TIFF images
    assert train.decoding == test.decoding == ("exif" if orientation > 1 and kind != "TIFF" else None)
    assert train.subset(torch.tensor([1])).to("meta").decoding == train.decoding


def test_other_exif_tags_do_not_matter(tmp_path):
    """Pillow reads this orientation, but fails to write the malformed tag beside it back."""
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
        # 16 bits were refused before, so there are no older results that differ
        assert train.decoding == (None if "16" in kind else "alpha")


def test_opaque_images_are_decoded_as_before(tmp_path):
    name = write_folder(tmp_path / "pets")
    solid = np.random.default_rng(3).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    solid[..., 3] = 255
    Image.fromarray(solid).save(tmp_path / "pets" / "train" / "ant" / "0.png")
    white = np.full((8, 8, 4), 255, np.uint8)
    white[:4, :, 3] = 0  # transparent, but white either way
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
    digest = hashlib.sha256()  # as it has always been for names in UTF-8
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
