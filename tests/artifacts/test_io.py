"""Files are written completely or not at all, and read without running code."""

import io
import os
import pickle
import resource
import signal
import socket
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import unprivileged

from src.artifacts.io import (
    label_hash,
    link,
    read_checkpoint,
    read_index_file,
    read_json,
    read_npz,
    read_pickle,
    write_checkpoint,
    write_npz,
    write_pickle,
    write_text,
    write_with,
)
from src.errors import FileError


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "scores.npz"
    write_npz(path, arr_0=np.arange(3.0))

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match=r"scores\.npz: could not be written \(No space left on device\)"):
        write_with(path, fail)
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.npz"]
    np.testing.assert_array_equal(read_npz(path)["arr_0"], np.arange(3.0))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_npz(path, a=np.zeros(10**6)),
        lambda path: write_checkpoint(path, {"a": torch.zeros(10**6)}),
        lambda path: write_pickle(path, b"0" * 10**7),
    ],
    ids=("npz", "checkpoint", "pickle"),
)
def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path, write):
    """A file size limit makes every writer fail partway, like a full disk."""
    target = write_text(tmp_path / "target", "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, limits[1]))
    try:
        with pytest.raises(FileError, match="target: could not be written") as caught:
            write(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert target.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(FileError, match="could not be written"):
        write_text(tmp_path / "a" / "b.txt", "x")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(FileError, match="could not be written"):
        write_text(tmp_path / "a" / "b.txt", "x")


class _Malicious:
    def __reduce__(self):
        return (os.system, ("true",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({0: _Malicious()}))
    with pytest.raises(FileError, match=r"evil\.pkl.*system, which is not plain data"):
        read_pickle(path)


@pytest.mark.parametrize("name", ["numpy.load", "builtins.eval", "numpy.core.multiarray.fromfile"])
def test_only_plain_globals_are_known(tmp_path, name):
    module, attribute = name.rsplit(".", 1)
    path = tmp_path / "odd.pkl"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(FileError, match="not plain data"):
        read_pickle(path)


_READERS = [
    (read_npz, "npz"),
    (read_pickle, "pkl"),
    (read_checkpoint, "pt"),
    (read_json, "json"),
    (read_index_file, "txt"),
]


@pytest.mark.parametrize(("read", "suffix"), _READERS)
def test_missing_damaged_and_foreign_files_are_named(tmp_path, read, suffix):
    path = tmp_path / f"x.{suffix}"
    with pytest.raises(FileError, match=rf"x\.{suffix}: file not found"):
        read(path)
    path.write_bytes(b"\x80garbage")
    with pytest.raises(FileError, match=rf"x\.{suffix}: is not .* or is damaged"):
        read(path)
    with pytest.raises(FileError, match="is a folder"):
        read(tmp_path)


@pytest.mark.parametrize(("read", "suffix"), _READERS)
def test_what_is_no_regular_file_is_named_and_never_waited_for(tmp_path, read, suffix):
    pipe, link = tmp_path / f"pipe.{suffix}", tmp_path / f"link.{suffix}"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "gone")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (pipe, "/dev/zero", tmp_path / "socket"):
            with pytest.raises(FileError, match=f"{path}: is a pipe, socket, or device"):
                read(path)
    with pytest.raises(FileError, match=r"is a link to .*gone, which does not exist"):
        read(link)


@pytest.mark.parametrize(("read", "suffix"), _READERS)
def test_good_files_that_may_not_be_read_are_not_called_damaged(read, suffix):
    with tempfile.TemporaryDirectory() as base:  # not tmp_path, whose parent folders only the owner can enter
        folder = Path(base, "closed")
        folder.mkdir()
        inside, alone = folder / f"a.{suffix}", Path(base, f"b.{suffix}")
        for path in (inside, alone):
            path.write_bytes(b"")
        for path, mode in ((alone, 0), (folder, 0), (Path(base), 0o755)):
            path.chmod(mode)
        with unprivileged():
            for path in (inside, alone):
                with pytest.raises(FileError, match=f"{path}: cannot be opened .Permission denied") as error:
                    read(path)
                assert "damaged" not in str(error.value)
        folder.chmod(0o700)


def test_truncated_archives_are_named(tmp_path):
    for name, write, read in (
        ("a.npz", lambda p: write_npz(p, a=np.zeros(1000)), read_npz),
        ("a.pt", lambda p: write_checkpoint(p, {"a": torch.zeros(1000)}), read_checkpoint),
    ):
        path = tmp_path / name
        write(path)
        path.write_bytes(path.read_bytes()[:2000])
        with pytest.raises(FileError, match="damaged"):
            read(path)


def test_object_arrays_are_neither_written_nor_read(tmp_path):
    with pytest.raises(TypeError, match="Python objects"):
        write_npz(tmp_path / "a.npz", a=np.array([{}, None]))
    np.savez(tmp_path / "b.npz", a=np.array([{}, None]))
    with pytest.raises(FileError, match=r"b\.npz"):
        read_npz(tmp_path / "b.npz")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    torch.save({"model": _Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(FileError, match=r"evil\.pt: is not a checkpoint"):
        read_checkpoint(tmp_path / "evil.pt")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_found_in_every_archive(tmp_path, compressed):
    """Without checksums, torch would read wrong weights and NumPy wrong numbers from most of these files."""
    values = np.random.default_rng(0).normal(size=40)
    (np.savez_compressed if compressed else write_npz)(tmp_path / "a.npz", a=values, name="x")
    write_checkpoint(tmp_path / "a.pt", {"a": torch.from_numpy(values), "epoch": 3})
    for path, read in ((tmp_path / "a.npz", read_npz), (tmp_path / "a.pt", read_checkpoint)):
        content = path.read_bytes()
        refused = 0
        for bit in range(0, 8 * len(content), 29):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            path.write_bytes(changed)
            try:
                found = read(path)
            except FileError:
                refused += 1
            else:  # the bit is in an unused part of the file
                np.testing.assert_array_equal(found["a"], values)
                assert found.get("epoch", 3) == 3
                assert found.get("name", "x") == "x"
        assert refused > 0.5 * len(content) * 8 / 29


def test_what_an_npz_archive_holds_beside_arrays_is_refused(tmp_path):
    good = io.BytesIO()
    np.save(good, np.arange(3))
    short = good.getvalue().replace(b"(3,)", b"(2,)")
    for name, content, says in (
        ("a.npy", b"hello", "a.npy is not an array"),
        ("notes.txt", b"hello", "notes.txt is not an array"),
        ("a.npy", short, "more bytes than values"),
        ("a.npy", good.getvalue()[:-8], "a.npy is not an array"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.writestr(name, content)
        with pytest.raises(FileError, match=rf"a\.npz: .*{says}"):
            read_npz(tmp_path / "a.npz")
    for array in (np.zeros(2, "datetime64[s]"), np.zeros(2, [("a", "f8")]), np.array([2**31]).view("<U2")):
        np.savez(tmp_path / "a.npz", array)
        with pytest.raises(FileError, match=r"not of numbers or text|invalid Unicode characters"):
            read_npz(tmp_path / "a.npz")


@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")
def test_other_formats_of_torch_are_named_with_the_way_out(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    path = tmp_path / "a.pt"
    for save, says in (
        (lambda: torch.save(model, path), r"pickled model.*run code.*state_dict\(\)"),
        (lambda: torch.save({"model": model}, path), "pickled model"),
        (lambda: torch.jit.save(torch.jit.script(model), path), "TorchScript archive.*is not loaded"),
        (lambda: torch.save({}, path, _use_new_zipfile_serialization=False), r"before version 1\.6.*convert it"),
    ):
        save()
        with pytest.raises(FileError, match=rf"a\.pt: is .*{says}"):
            read_checkpoint(path)


def test_label_hash_tells_orders_apart_and_ignores_the_type():
    labels = np.array([0, 1, 2, 1])
    assert label_hash(labels) == label_hash(torch.tensor(labels, dtype=torch.int32).numpy())
    assert label_hash(labels) != label_hash(labels[::-1])


def test_an_interruption_waits_until_the_file_is_whole(tmp_path):
    def write(file):
        file.write(b"first ")
        os.kill(os.getpid(), signal.SIGINT)
        file.write(b"last")

    with pytest.raises(KeyboardInterrupt):
        write_with(tmp_path / "a.txt", write)
    # the signal arrives once the content is on disk; the old name then has all of it or nothing
    assert [path.read_text() for path in tmp_path.iterdir()] in ([], ["first last"])


@pytest.mark.parametrize("links", [True, False])
def test_a_second_name_keeps_its_content_when_the_first_is_written_again(tmp_path, monkeypatch, links):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:  # as on exFAT
        monkeypatch.setattr(os, "link", no_links)
    first, second = write_text(tmp_path / "a", "old"), tmp_path / "folder" / "b"
    for _ in range(2):
        assert link(first, second) == second
        assert os.path.samefile(first, second) == links
    write_text(first, "new")
    assert second.read_text() == "old"
    link(first, second)
    assert second.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "folder"]


def test_a_link_to_nothing_or_into_a_file_is_named(tmp_path):
    file = write_text(tmp_path / "file", "content")
    with pytest.raises(FileError, match="missing: file not found"):
        link(tmp_path / "missing", tmp_path / "b")
    with pytest.raises(FileError, match="file/b: could not be written"):
        link(file, file / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
