"""Paths are local or remote, and files are written atomically at both."""

import contextlib
import copy
import os
import pickle
import sys
from pathlib import Path

import fsspec
import pytest

from nonlocal_jax import files, remote_paths
from nonlocal_jax.files import as_local_path, as_path
from nonlocal_jax.remote_paths import RemotePath


def test_local_paths_stay_what_they_are(tmp_path):
    assert as_path(tmp_path) == tmp_path
    assert as_path("runs/a b") == Path("runs/a b")
    assert as_path("file:///tmp/a") == Path("/tmp/a")
    assert as_path("c:/a") == Path("c:/a")
    assert as_path("train:/a") == Path("train:/a")  # no protocol has this name


def test_a_url_is_remote():
    path = as_path("MEMORY://bucket/a/file.txt")
    assert isinstance(path, RemotePath)
    assert str(path) == "memory://bucket/a/file.txt"
    assert as_path(path) is path


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (Path("gs://bucket/a"), "gs://bucket/a"),
        ("gs:/bucket/a", "gs://bucket/a"),
        (Path("s3:/b//c"), "s3://b/c"),
        (Path("file:///tmp/a"), "file:///tmp/a"),
    ],
)
def test_a_url_that_lost_a_slash(location, expected):
    with pytest.raises(ValueError, match=rf"two slashes after the colon, as in '{expected}'"):
        as_path(location)


@pytest.mark.parametrize("url", ["nosuch://bucket/a", "simplecache::memory://a"])
def test_an_unknown_protocol(url):
    with pytest.raises(ValueError, match=r"must start with a protocol of fsspec, such as gs://"):
        as_path(url)


@pytest.mark.parametrize(("url", "package"), [("gs://b/a", "gcsfs"), ("s3://b/a", "s3fs")])
def test_a_missing_package(url, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    remote_paths._check_protocol.cache_clear()
    protocol = url.split(":")[0]
    message = (
        rf"start with {protocol}:// require the package {package}, .*: pip install {package}\."
    )
    with pytest.raises(ImportError, match=message):
        as_path(url)


def test_where_only_local_paths_can_be_used():
    assert as_local_path("a/b") == Path("a/b")
    with pytest.raises(ValueError, match=r"must be local; got memory://a/b\."):
        as_local_path("memory://a/b")


def test_functions_for_local_files_refuse_remote_paths():
    with pytest.raises(TypeError):
        Path(RemotePath("memory://a/b"))
    with pytest.raises(ValueError, match=r"must look like gs://bucket/file; got 'a/b'"):
        RemotePath("a/b")


def test_parts_of_a_path():
    path = RemotePath("memory://bucket/a//b/../c.tar.gz/")
    assert str(path) == "memory://bucket/a/c.tar.gz"
    assert (path.name, path.stem, path.suffix) == ("c.tar.gz", "c.tar", ".gz")
    assert str(path.parent.parent) == "memory://bucket"
    assert str(path.with_name("d")) == "memory://bucket/a/d"
    assert str(path.with_suffix(".zip")) == "memory://bucket/a/c.tar.zip"
    assert str(path.parent / "x" / "y/z") == "memory://bucket/a/x/y/z"
    assert path.absolute() is path


def test_a_path_does_not_leave_the_root():
    assert str(RemotePath("memory://bucket/../../other/a")) == "memory://other/a"
    folder = RemotePath("memory://bucket/a")
    assert (folder / "b/c").is_relative_to(folder)
    assert str((folder / "b/c").relative_to(folder)) == "b/c"
    for other in (folder / "../ab", folder.parent, RemotePath("unreachable://bucket/a/b")):
        assert not other.is_relative_to(folder)
        with pytest.raises(ValueError, match=r"is not in memory://bucket/a\."):
            other.relative_to(folder)


def test_paths_are_values():
    a, b = RemotePath("memory://x/a"), RemotePath("memory://x/b")
    assert sorted([b, a]) == [a, b]
    assert {a: 1}[RemotePath("memory://x/./a")] == 1
    assert a != b
    assert a != Path("memory:/x/a")
    assert pickle.loads(pickle.dumps(a)) == copy.deepcopy(a) == a


def test_files_and_folders(remote):
    file = remote / "a/b.txt"
    assert not remote.exists()
    assert not file.exists()
    file.write_text("grün\r\n")
    assert (remote.exists(), remote.is_dir(), remote.is_file()) == (True, True, False)
    assert (file.exists(), file.is_dir(), file.is_file()) == (True, False, True)
    assert file.stat().st_size == 7
    assert file.read_bytes() == "grün\r\n".encode()
    assert file.read_bytes(3) == "grün".encode()[:3]
    assert file.read_text() == "grün\n"
    (remote / "a/c").write_bytes(b"")
    (remote / "a/d/e").write_bytes(b"")
    assert sorted(remote.glob("*")) == [remote / "a"]
    assert sorted((remote / "a").iterdir()) == [
        remote / f"a/{name}" for name in ("b.txt", "c", "d")
    ]
    assert list((remote / "a").glob("*.txt")) == [file]
    (remote / "a").mkdir()
    with pytest.raises(FileExistsError, match=f"File exists: '{remote}/a'"):
        (remote / "a").mkdir(exist_ok=False)


def test_a_folder_is_listed_as_it_is_now(remote, monkeypatch):
    """Other hosts write to the same folders, so a listing that a file system keeps is old."""
    kept = {}
    file_system = fsspec.filesystem("memory")
    original = file_system.ls

    def ls(path, **options):
        if path not in kept:
            kept[path] = original(path, **options)
        return kept[path]

    monkeypatch.setattr(file_system, "ls", ls)
    monkeypatch.setattr(file_system, "invalidate_cache", lambda path: kept.pop(path, None))
    for name in ("a", "b"):
        (remote / name).write_text("")
        assert remote / name in list(remote.iterdir())


def test_errors_name_the_path(remote):
    missing = remote / "missing"
    for method in (missing.read_bytes, missing.stat, lambda: list(missing.iterdir())):
        with pytest.raises(FileNotFoundError) as raised:
            method()
        assert raised.value.filename == str(missing)
        assert raised.value.strerror == "No such file or directory"


def test_without_a_connection_nothing_counts_as_missing(tmp_path):
    path = RemotePath("unreachable://bucket/a")
    (tmp_path / "local").touch()
    for method in (
        path.exists,
        path.is_file,
        path.stat,
        path.read_text,
        path.mkdir,
        lambda: path.write_text("a"),
        lambda: list(path.iterdir()),
        lambda: path.upload(tmp_path / "local"),
        lambda: path.download(tmp_path / "copy"),
    ):
        with pytest.raises(OSError, match=r"RuntimeError: no connection: 'unreachable://bucket/a'"):
            method()


@pytest.fixture(params=["local", "remote"])
def folder(request, tmp_path, remote):
    return tmp_path if request.param == "local" else remote


def test_a_file_is_replaced_when_it_is_complete(folder):
    file = folder / "notes.txt"
    files.write_text(file, "old")
    with contextlib.suppress(KeyError), files.atomic_write(file) as partial:
        partial.write_text("new")
        raise KeyError
    assert file.read_text() == "old"
    with files.atomic_write(file) as partial:
        assert partial.name.startswith(".")
        assert partial.suffix == ".partial"
        partial.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert list(folder.iterdir()) == [file]
    assert not partial.exists()


@pytest.mark.parametrize(
    "name", ["a", "x" * 237, "x" * 238, "x" * 251, "x" * 255, "é" * 127, "走" * 85, "[x]*" * 63]
)
def test_names_of_up_to_255_bytes(tmp_path, name):
    file = tmp_path / name
    (tmp_path / ".a.0a1b2c3d.part").touch()  # not one of them
    before = set(tmp_path.iterdir())
    for text in ("old", "new"):
        with files.atomic_write(file) as partial:
            partial.write_text(text)
            assert files.partial_files([file]) == [partial]
            assert len(os.fsencode(partial.name)) <= 255
        assert file.read_text() == text
        assert files.partial_files([file]) == []
    assert set(tmp_path.iterdir()) == {*before, file}


def test_partial_files_of_many_paths(tmp_path):
    paths = [tmp_path / folder / name for folder in ("one", "two") for name in ("a.mp4", "b\n.mp4")]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    with contextlib.ExitStack() as stack:
        partial = [stack.enter_context(files.atomic_write(path)) for path in paths]
        for file in partial:
            file.touch()
        assert set(files.partial_files(paths)) == set(partial)
        assert files.partial_files(paths[1:2]) == partial[1:2]
        (tmp_path / "file").touch()
        missing = [tmp_path / "none" / "a.mp4", tmp_path / "file" / "a.mp4", tmp_path / "a.mp4"]
        assert files.partial_files(missing) == []
        assert files.partial_files([]) == []


def test_names_that_are_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff\xfe" * 126)
    with files.atomic_write(file) as partial:
        partial.write_text("new")
    assert file.read_text() == "new"


def test_names_that_are_too_long_remotely(remote):
    files.write_text(remote / ("x" * 300), "new")
    assert (remote / ("x" * 300)).read_text() == "new"


def test_lines_are_appended(folder):
    for line in ("a", "b"):
        files.append_line(folder / "log", line)
    assert (folder / "log").read_text() == "a\nb\n"


def test_a_local_copy(folder):
    file = folder / "a.bin"
    file.write_bytes(b"content")
    with files.local_copy(file) as copy_of_file:
        assert isinstance(copy_of_file, Path)
        assert copy_of_file.read_bytes() == b"content"
    assert copy_of_file.exists() == (copy_of_file == file)  # a temporary copy is removed
    assert file.exists()


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_permissions_are_those_of_open(mask, tmp_path):
    """Those of the umask for a new file, and those of the file that is replaced."""
    previous = os.umask(mask)
    try:
        for name, mode in (("new", None), ("private", 0o600), ("shared", 0o664)):
            opened, written = tmp_path / f"{name}-opened", tmp_path / f"{name}-written"
            for file in (opened, written):
                if mode is not None:
                    file.touch()
                    file.chmod(mode)
            opened.write_text("a")
            files.write_text(written, "a")
            assert written.stat().st_mode == opened.stat().st_mode, name
    finally:
        os.umask(previous)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("there", "not-there"):
        target, link = tmp_path / "folder" / name, tmp_path / f"link-{name}"
        link.symlink_to(target)
        if name == "there":
            target.write_text("old")
        files.write_text(link, "new")
        assert link.is_symlink()
        assert target.read_text() == "new"
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "folder",
        "link-not-there",
        "link-there",
    ]


@pytest.mark.parametrize("mode", [0o444, 0o400])
def test_a_read_only_file_is_replaced(tmp_path, mode):
    """As users other than root see it: the new file is flushed before it is read-only."""
    file = tmp_path / "a.txt"
    file.write_text("old")
    file.chmod(mode)
    files.write_text(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == mode
