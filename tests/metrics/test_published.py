"""Fetching the published files from a local server."""

import dataclasses
import functools
import hashlib
import http.server
import re
import threading

import pytest
from support import PUBLISHED, call, needs_published, succeed

from src.errors import ArgumentError, FileError
from src.metrics import proxy
from src.metrics.proxy import BASE_URL, COMMIT, PublishedFile, fetch, published_files, published_table

CONTENT = b"scores" * 100_000  # more than one chunk
MEM = b"memorization"


def blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


FILES = (
    PublishedFile("eps", "cifar10", len(CONTENT), hashlib.sha256(CONTENT).hexdigest(), blob(CONTENT)),
    PublishedFile("mem", "cifar100", None, None, blob(MEM)),
)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    """A folder that is served, and its URL."""
    root = tmp_path / "served"
    for file, content in zip(FILES, (CONTENT, MEM), strict=True):
        file.path(root).parent.mkdir(parents=True)
        file.path(root).write_bytes(content)
    handler = functools.partial(QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        thread = threading.Thread(target=service.serve_forever, daemon=True)
        thread.start()
        yield root, f"http://127.0.0.1:{service.server_port}"
        service.shutdown()
        thread.join()


def everything(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_files_are_fetched_verified_and_not_fetched_twice(server, tmp_path):
    root, url = server
    target = tmp_path / "metrics"
    for file, content in zip(FILES, (CONTENT, MEM), strict=True):
        assert fetch(file, target, url) is True
        assert file.path(target).read_bytes() == content
        file.path(root).unlink()  # a second download would fail
        assert fetch(file, target, url + "/") is False
    assert len(everything(target)) == 2


def test_a_file_that_is_not_the_published_one_is_not_written(server, tmp_path):
    root, url = server
    target = tmp_path / "metrics"
    for file, wrong in zip(FILES, (CONTENT[:-1] + b"!", MEM + b"!"), strict=True):
        file.path(root).write_bytes(wrong)
        with pytest.raises(FileError, match=r"does not match the published file .*nothing was written"):
            fetch(file, target, url)
        file.path(root).write_bytes(wrong[: len(wrong) // 2])
        with pytest.raises(FileError, match="does not match the published file"):
            fetch(file, target, url)
    assert everything(target) == []


def test_a_missing_file_and_an_absent_server_are_one_line_each(server, tmp_path):
    root, url = server
    FILES[0].path(root).unlink()
    with pytest.raises(FileError, match=r"eps_cifar10.pkl: the server responded with 404 .*the URL"):
        fetch(FILES[0], tmp_path / "metrics", url)
    for address in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(FileError, match=r"download failed .*the URL") as caught:
            fetch(FILES[0], tmp_path / "metrics", address)
        assert "\n" not in str(caught.value)
    assert everything(tmp_path / "metrics") == []


def test_other_scores_are_not_replaced_without_being_asked(server, tmp_path):
    _, url = server
    own = FILES[0].path(tmp_path / "metrics")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"computed for a week")
    own.with_suffix(".json").write_text("{}")
    with pytest.raises(FileError, match="differs from the published file"):
        fetch(FILES[0], tmp_path / "metrics", url)
    assert own.read_bytes() == b"computed for a week"
    fetch(FILES[0], tmp_path / "metrics", url, overwrite=True)
    assert own.read_bytes() == CONTENT
    assert everything(tmp_path / "metrics") == [own], "the record of the old scores is not taken for one of these"


def test_a_failed_download_leaves_what_stood_there(server, tmp_path):
    root, url = server
    own = FILES[0].path(tmp_path / "metrics")
    own.parent.mkdir(parents=True)
    own.write_bytes(b"old")
    own.with_suffix(".json").write_text("{}")
    FILES[0].path(root).write_bytes(b"garbled")
    with pytest.raises(FileError, match="nothing was written"):
        fetch(FILES[0], tmp_path / "metrics", url, overwrite=True)
    assert sorted(path.read_bytes() for path in everything(tmp_path / "metrics")) == [b"old", b"{}"]


def test_the_script_continues_after_a_failed_file_and_reports_it_at_the_end(server, tmp_path, monkeypatch):
    root, url = server
    files = [dataclasses.replace(FILES[0], mode=mode) for mode in ("eps", "flat", "forg")]
    monkeypatch.setattr(proxy, "published_table", lambda: files)
    for file, content in zip(files, (CONTENT[:-1] + b"!", CONTENT, CONTENT), strict=True):
        file.path(root).parent.mkdir(exist_ok=True)
        file.path(root).write_bytes(content)
    flags = ("fetch_scores.py", "--dataset=cifar10", f"--base_url={url}", f"--folder={tmp_path / 'metrics'}")
    result = call(*flags)
    assert result.status == 1
    assert re.search(r"1 of 3 files failed \(eps\); .*eps_cifar10.pkl: does not match", result.complaint)
    assert result.out.count("downloaded and verified") == 2
    assert {path.name for path in everything(tmp_path / "metrics")} == {"flat_cifar10.pkl", "forg_cifar10.pkl"}
    files[0].path(root).write_bytes(CONTENT)
    done = succeed(*flags)
    assert (done.out.count("downloaded and verified"), done.out.count("already up to date")) == (1, 2)


def test_the_table_is_complete_and_well_formed():
    table = published_table()
    assert len(table) == 19
    assert len({file.blob for file in table}) == 19
    assert all(len(file.blob) == 40 for file in table)
    assert [(f.mode, f.dataset) for f in table if f.sha256 is None] == [("mem", "cifar100")]
    assert all(len(file.sha256) == 64 and file.size > 0 for file in table if file.sha256)
    for dataset, count in (("cifar10", 6), ("cifar100", 7), ("svhn", 6)):
        assert len(published_files(dataset)) == count


def test_what_was_not_published_is_named():
    with pytest.raises(ArgumentError, match=r"^dataset mnist: .*cifar10: eps, .*; cifar100: .*mem.*; svhn: eps"):
        published_files("mnist")
    with pytest.raises(ArgumentError, match=r"^modes mem csl: not published for cifar10; available: cifar10: eps"):
        published_files("cifar10", ["mem", "eps", "csl"])
    assert [file.mode for file in published_files("SVHN", ["forg", "eps"])] == ["forg", "eps"]


def test_the_address_names_the_commit():
    assert BASE_URL.startswith("https://")
    assert COMMIT in BASE_URL
    assert len(COMMIT) == 40


@needs_published
def test_the_table_fits_the_real_files():
    there = [file for file in published_table() if file.sha256 and file.path(PUBLISHED).exists()]
    assert len(there) >= 8
    for file in there:
        with file.path(PUBLISHED).open("rb") as content:
            assert file.is_content_of(content)
            content.seek(0)
            assert blob(content.read()) == file.blob
