"""Folders of classes: what counts, and the lists that `index` writes are read back as indexed."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from nonlocal_jax.data import DataError, annotations
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.lists.writing import path_line

VISIBLE = ("jump/b.mp4", "run/a.MP4")
# Left by file managers, notebooks, network drives, operating systems, rsync and this library.
HIDDEN = (
    *(".thumbnails/t.mp4", ".ipynb_checkpoints/b-checkpoint.mp4", "run/._a.MP4", "._run/a.mp4"),
    *("@eaDir/a.mp4", "run/@eaDir/a.MP4/SYNOVIDEO.mp4", "#recycle/a.mp4", "@Recycle/a.mp4"),
    *("__MACOSX/run/._a.MP4", "__MACOSX/a.mp4", "run/.DS_Store", ".Trashes/a.mp4"),
    *("run/Thumbs.db", "$RECYCLE.BIN/a.mp4", "System Volume Information/a.mp4", "run/desktop.ini"),
    *("lost+found/a.mp4", "__pycache__/a.mp4", ".Trash-1000/a.mp4", ".git/a.mp4"),
    *("run/.a.MP4.Xy12Ab", "run/.b.mp4.0a1b2c3d.partial", ".~tmp~/a.mp4", "run/b.mp4.part"),
    *("run/.hidden.mp4", "run/folder.mp4/c.mp4"),
)


def make(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(videos, folder):
    return [str(record.path.relative_to(folder)) for record in videos.records]


@pytest.mark.parametrize("hidden", [[name] for name in HIDDEN] + [HIDDEN])
def test_hidden_files_and_folders_do_not_count(hidden, tmp_path):
    make(tmp_path, (*VISIBLE, *hidden))
    videos = annotations.read(tmp_path)
    assert videos.names == ("jump", "run")
    assert names_of(videos, tmp_path) == list(VISIBLE)
    assert [record.labels for record in videos.records] == [(0,), (1,)]
    assert videos.left_out == ()


def test_hidden_files_and_folders_of_remote_folders(tmp_path, copied):
    make(tmp_path, (*VISIBLE, *HIDDEN[:-1]))
    remote = copied(tmp_path)
    assert names_of(annotations.index(remote), remote) == list(VISIBLE)


def test_a_hidden_folder_may_hold_the_classes(tmp_path):
    make(tmp_path / ".cache", VISIBLE)
    assert len(annotations.index(tmp_path / ".cache")) == 2
    make(tmp_path / "only", HIDDEN)
    with pytest.raises(DataError, match=r"it has none\. Hidden files and folders do not count"):
        annotations.index(tmp_path / "only")


@pytest.mark.parametrize("name", ["@home/a.mp4", "#1/a.mp4", "recycling/a.mp4", "run/@a.mp4"])
def test_names_that_only_resemble_hidden_ones_count(name, tmp_path):
    make(tmp_path, (*VISIBLE, name))
    assert name in names_of(annotations.index(tmp_path), tmp_path)


def test_folders_without_videos_are_no_classes_and_are_reported(tmp_path, capsys):
    make(tmp_path, (*VISIBLE, "empty/notes.txt", "a.mp4"))
    videos = annotations.index(tmp_path)
    assert videos.names == ("jump", "run")
    assert videos.left_out == (f"{tmp_path}/empty has no video, so it is not a class",)
    named = annotations.index(tmp_path, names=("empty", "jump", "run"))
    assert [record.labels for record in named.records] == [(1,), (2,)]
    assert named.left_out == (f"{tmp_path}/empty has no video",)
    assert main(["index", str(tmp_path)]) == 0
    assert f"{tmp_path}/empty has no video" in capsys.readouterr().out


def test_classes_that_are_named_are_not_hidden(tmp_path, copied):
    names = ("recycled", "recycler", "run", "temporary_items", ".hack")
    found = [name.replace("_", " ") for name in names]
    make(tmp_path, [f"{name}/a.mp4" for name in found] + ["RECYCLER/b.mp4", "recycled/._a.mp4"])
    for folder in (tmp_path, copied(tmp_path)):
        videos = annotations.index(folder, names=names)
        assert {record.path.parent.name: record.labels for record in videos.records} == {
            name: (number,) for number, name in enumerate(found)
        }
        assert len(videos) == len(names)
        assert annotations.index(folder).names == ("run",)


def test_folders_are_named_like_the_classes_with_underscores(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    make(tmp_path, ("riding_a_bike/a.mp4", f"{decomposed}/b.mp4"))
    videos = annotations.index(tmp_path, names=(composed, "riding a bike"))
    assert {record.path.name: record.labels for record in videos.records} == {
        "a.mp4": (1,),
        "b.mp4": (0,),
    }
    make(tmp_path, ("walk/a.mp4",))
    with pytest.raises(DataError, match=r"walk must be named like one of the 2 classes; it is not"):
        annotations.index(tmp_path, names=(composed, "riding a bike"))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_class_numbers_do_not_depend_on_the_unicode_normal_form(form, tmp_path):
    name = unicodedata.normalize(form, "é")
    make(tmp_path, (f"{name}/a.mp4", "f/b.mp4", "e/c.mp4"))
    assert annotations.index(tmp_path).names == ("e", "f", name)


def test_links(tmp_path):
    make(tmp_path, ("data/run/a.mp4", "data/b.mp4", "other/c.mp4"))
    folder = tmp_path / "data"
    for link, target in {
        "itself": ".",
        "above": "..",
        "loop": "loop",
        "missing": "nowhere",
        "run/itself.mp4": "itself.mp4",
        "walk": "../other",
        "run/d.mp4": "../../other/c.mp4",
    }.items():
        (folder / link).symlink_to(target)
    message = r"run/itself.mp4 is a link to a file that does not exist. Repair or remove it"
    with pytest.raises(DataError, match=message):
        annotations.read(folder)
    videos = annotations.read(folder, leave_out=True)
    assert names_of(videos, folder) == ["run/a.mp4", "run/d.mp4", "walk/c.mp4"]
    assert videos.left_out == (f"{folder}/run/itself.mp4 is a link to a file that does not exist",)


def test_closed_folders(tmp_path, monkeypatch):
    make(tmp_path, VISIBLE)

    def closed(folder, original=Path.iterdir):
        if folder.name == "run":
            raise PermissionError(13, "Permission denied", str(folder))
        return original(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(DataError, match="run cannot be read: Permission denied"):
        annotations.index(tmp_path)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(DataError, match="nowhere cannot be read: No such file"):
        annotations.index(tmp_path / "nowhere")


CHARACTERS = (
    *" \t\"',;|#\\:%$&*?<>[]{}()=-_.0139aZé走\u0301\ufeff\x85\u3000\xa0\u2028\x1b\x7f\x01\x0b\x0c",
    *(".mp4", "label", "youtube_id", "path", "original_vido_id", " 3", ",3", '""', "..", "~"),
)


@pytest.mark.parametrize("seed", range(20))
def test_lists_that_index_writes_are_read_back(seed, tmp_path, capsys):
    """With other files nearby whose names could be meant as well."""
    rng = np.random.default_rng(seed)
    folder = tmp_path / "videos"

    def name():
        return "".join(rng.choice(CHARACTERS, rng.integers(1, 6))).replace("/", "")

    for class_name in {name() for _ in range(6)} - {".", ".."}:
        files = {f"{name()}.mp4" for _ in range(6)}
        variants = {change(file) for file in files for change in VARIANTS}
        make(folder, [f"{class_name}/{file}" for file in files | variants if len(file) > 2])
        make(tmp_path, [f"elsewhere/{class_name}{file}" for file in files])
    expected = annotations.index(folder)
    assert main(["index", str(folder)]) == 0
    found = annotations.read(folder / "list.txt", classes=folder / "classes.txt")
    assert [(record.path, record.labels) for record in found.records] == [
        (record.path, record.labels) for record in expected.records
    ]
    assert found.names == expected.names
    assert len(expected) > 10
    assert capsys.readouterr().out.replace("\n", "").isprintable()


VARIANTS = (
    lambda name: f" {name}",
    lambda name: f'"{name}',
    lambda name: name.strip(),
    lambda name: name.replace('"', ""),
    lambda name: unicodedata.normalize("NFD", name),
    lambda name: unicodedata.normalize("NFC", name),
)


def test_only_names_that_need_quotes_have_them(tmp_path):
    """Some programs that read such lists do not know quotes."""
    make(tmp_path, ("run/a-1_b.mp4", "走る/é.mp4", "long jump/a.mp4"))
    assert main(["index", str(tmp_path)]) == 0
    lines = ['"long jump/a.mp4" 0', "run/a-1_b.mp4 1", "走る/é.mp4 2"]
    assert (tmp_path / "list.txt").read_text(encoding="utf-8").splitlines() == lines
    assert (tmp_path / "classes.txt").read_text(encoding="utf-8") == "long jump\nrun\n走る\n"
    assert path_line('say "f".mp4', 3) == '"say ""f"".mp4" 3\n'
    for character in ",;|'#\t\ufeff\x85":
        assert path_line(f"a{character}.mp4", 3) == f'"a{character}.mp4" 3\n'


@pytest.mark.parametrize(
    ("name", "shown", "reason"),
    [
        (b"n\xff/a.mp4", r"n\udcff/a.mp4", "the name is not UTF-8"),
        (b"run/\xc3(.mp4", r"run/\udcc3(.mp4", "the name is not UTF-8"),
        (b"run/l\nist.mp4", r"run/l\nist.mp4", "the name has a line break"),
        (b"r\run/a.mp4", r"r\run/a.mp4", "the name has a line break"),
    ],
)
def test_names_that_cannot_be_written(name, shown, reason, tmp_path, capsys):
    make(tmp_path, ("jump/b.mp4", os.fsdecode(name)))
    before = sorted(tmp_path.iterdir())
    assert main(["index", str(tmp_path)]) == 2
    message = f"error: {tmp_path}/{shown} cannot be written to a list: {reason}. Rename it, or"
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert len(annotations.read(tmp_path)) == 2  # the folder itself can be used


def test_index_replaces_no_file(tmp_path, capsys):
    make(tmp_path / "train", ("run/a.mp4", "jump/b.mp4"))
    make(tmp_path / "val", ("run/c.mp4", "jump/d.mp4"))
    make(tmp_path / "other", ("walk/a.mp4",))
    lists = tmp_path / "lists"
    lists.mkdir()
    assert main(["index", str(tmp_path / "train"), "--out", str(lists / "train.txt")]) == 0
    assert main(["index", str(tmp_path / "val"), "--out", str(lists / "val.txt")]) == 0
    contents = {file.name: file.read_text() for file in lists.iterdir()}
    assert contents["val.txt"] == "jump/d.mp4 0\nrun/c.mp4 1\n"
    assert main(["index", str(tmp_path / "other"), "--out", str(lists / "val.txt")]) == 2
    assert f"{lists}/val.txt exists already; choose another with --out" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "other"), "--out", str(lists / "other.txt")]) == 2
    message = f"{lists}/classes.txt exists already and does not have the 1 classes of"
    assert message in capsys.readouterr().err
    (lists / "classes.txt").write_bytes(b"\xff")
    assert main(["index", str(tmp_path / "other"), "--out", str(lists / "other.txt")]) == 2
    assert message in capsys.readouterr().err
    assert sorted(file.name for file in lists.iterdir()) == sorted(contents)


def test_nothing_is_left_behind_if_the_names_cannot_be_written(tmp_path, monkeypatch, capsys):
    make(tmp_path, VISIBLE)

    def full(*_):
        raise OSError(28, "No space left on device", "classes.txt")

    monkeypatch.setattr("nonlocal_jax.files.write_text", full)
    assert main(["index", str(tmp_path)]) == 2
    assert "error: classes.txt: No space left" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["jump", "run"]
