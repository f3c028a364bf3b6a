"""Lists of every format are read, and errors name the line that is wrong."""

from pathlib import Path

import pytest

from nonlocal_jax.data import DataError, annotations
from nonlocal_jax.data.annotations import Action


@pytest.fixture
def folder(tmp_path):
    """Makes empty files, since lists are checked without decoding."""
    for name in (
        "a.mp4",
        "b c.mp4",
        "inside/d.mp4",
        "abseiling/x1_000005_000015.mp4",
        "air_drumming/y2.mp4",
        "AB12C.mp4",
        "f/1.jpg",
        "f/2.jpg",
    ):
        file = tmp_path / "videos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return tmp_path / "videos"


def write(folder, text, name="list.txt"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_path_and_label(folder):
    found = annotations.read(write(folder, "a.mp4 3\nb c.mp4 0\n\ninside/d.mp4,2\n"))
    assert [(record.path, record.labels, record.line) for record in found.records] == [
        (folder / "a.mp4", (3,), 1),
        (folder / "b c.mp4", (0,), 2),
        (folder / "inside/d.mp4", (2,), 4),
    ]
    assert (found.num_classes, found.multi_label) == (4, False)
    elsewhere = write(folder.parent, f"d.mp4 1\n{folder}/inside/d.mp4 1\n")
    with pytest.raises(DataError, match=r"line 2: .*d.mp4 is on line 1 too"):
        annotations.read(elsewhere, root=folder / "inside")


OFFICIAL = """label,youtube_id,time_start,time_end,split
abseiling,x1,5,15,train
air drumming,y2,0,10,train
"""


def test_official_kinetics(folder):
    found = annotations.read(write(folder, OFFICIAL, "train.csv"))
    assert [record.path.relative_to(folder) for record in found.records] == [
        Path("abseiling/x1_000005_000015.mp4"),
        Path("air_drumming/y2.mp4"),
    ]
    assert [record.labels for record in found.records] == [(0,), (1,)]
    assert found.names == ("abseiling", "air drumming")
    classes = write(folder, "zumba\nair drumming\nabseiling\n", "classes.txt")
    assert [
        record.labels for record in annotations.read(folder / "train.csv", classes=classes).records
    ] == [(2,), (1,)]
    with pytest.raises(
        DataError, match="column `label`; the official list of the test split has none"
    ):
        annotations.read(
            write(folder, "youtube_id,time_start,time_end,split\nx1,5,15,test\n", "test.csv")
        )


CHARADES = (
    "id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length\n"
    'AB12C,HR43,Kitchen,6,7,Yes,"A person, cooking",food,"none; ""really""",'
    "c092 11.90 21.20;c147 0.00 12.60,30.54\n"
)


def test_a_list_with_some_of_the_classes_needs_the_names_of_all(folder):
    """Otherwise the sorted names would get other numbers than in the whole data set."""
    official = write(folder, OFFICIAL, "train.csv")
    with pytest.raises(
        DataError, match=r"must have 400 classes; 2 are named\. Pass a file that names all classes"
    ):
        annotations.read(official, num_classes=400)
    classes = write(folder, "abseiling\nair drumming\n", "classes.txt")
    plain = write(folder, "a.mp4 1\n", "plain.txt")
    for file, count in ((official, 3), (plain, 3), (write(folder, CHARADES, "charades.csv"), None)):
        with pytest.raises(DataError, match=f"must have {count or 157} classes; 2 are named"):
            annotations.read(file, num_classes=count, classes=classes)
    assert annotations.read(plain, classes=classes).names == ("abseiling", "air drumming")


def test_only_line_feeds_end_a_line(folder):
    (folder / "a\x85b.mp4").touch()
    (folder / "list.txt").write_bytes("a.mp4 1\r\na\x85b.mp4 2\r\n".encode())
    assert [record.path.name for record in annotations.read(folder / "list.txt").records] == [
        "a.mp4",
        "a\x85b.mp4",
    ]


def test_charades(folder):
    charades = annotations.read(write(folder, CHARADES, "charades.csv"))
    (record,) = charades.records
    assert record.actions == (Action(92, 11.9, 21.2), Action(147, 0.0, 12.6))
    assert (record.labels, record.path, record.line) == ((92, 147), folder / "AB12C.mp4", 2)
    assert (charades.num_classes, charades.multi_label) == (157, True)
    empty = annotations.read(write(folder, "id,actions,length\nAB12C,,3\n", "empty.csv"))
    assert empty.records[0].labels == ()


def test_frame_lists_of_pyslowfast(folder):
    text = 'original_vido_id video_id frame_id path labels\nV 0 0 f/1.jpg ""\nV 0 1 f/2.jpg "3,7"\n'
    (record,) = annotations.read(write(folder, text)).records
    assert record.frames == (folder / "f/1.jpg", folder / "f/2.jpg")
    assert record.frame_labels == ((), (3, 7))
    assert record.labels == (3, 7)


def test_folders(folder):
    found = annotations.read(folder)
    assert found.names == ("abseiling", "air_drumming", "inside")
    assert [record.labels for record in found.records] == [(0,), (1,), (2,)]
    with pytest.raises(DataError, match="must have 400 classes; it has 3"):
        annotations.index(folder, num_classes=400)
    with pytest.raises(DataError, match="must have a folder for each class"):
        annotations.index(folder / "inside")


WRONG = {
    "no label": ("a.mp4\n", "line 1: `path label` is expected; got 'a.mp4'"),
    "label is no number": (
        "a.mp4 3\nb c.mp4 x\n",
        "line 2: a label must be a whole number; got 'x'",
    ),
    "label out of range": ("a.mp4 400\n", "line 1: labels must be from 0 to 399; got 400"),
    "negative label": ("a.mp4 -1\n", "line 1: labels must be from 0 to 399; got -1"),
    "label as Python writes numbers": (
        "a.mp4 1_0\n",
        "line 1: a label must be a whole number; got '1_0'",
    ),
    "a very long line": (140_000 * "a" + ",1\n", "line 1: there is no file"),
    "kinetics: a very long field": (
        OFFICIAL + 140_000 * "a" + ",z3,0,10,train\n",
        "line 4 cannot be read as CSV: field larger",
    ),
    "missing": ("a.mp4 1\nnone.mp4 1\n", "line 2: there is no file .*none.mp4"),
    "too long": (300 * "a" + ".mp4 1\n", "line 1: there is no file"),
    "twice": ("a.mp4 1\n./a.mp4 2\n", "line 2: .*a.mp4 is on line 1 too"),
    "nothing": ("", "must have a line for each video; it is empty"),
    "not text": ("\0 1\n", "line 1: .* is not a path"),
    "charades: ends before it starts": (
        "id,actions,length\nAB12C,c001 5.0 4.0,9\n",
        "line 2: an action must not end before it starts; got 'c001 5.0 4.0'",
    ),
    "charades: no class": (
        "id,actions,length\nAB12C,092 5.0 6.0,9\n",
        "line 2: an action must look like `c092 11.10 21.50`; got '092 5.0 6.0'",
    ),
    "charades: no time": (
        "id,actions,length\nAB12C,c001 x 6.0,9\n",
        "line 2: times must be non-negative seconds; got 'x'",
    ),
    "charades: not finite": (
        "id,actions,length\nAB12C,c001 0 inf,9\n",
        "line 2: times must be non-negative seconds; got 'inf'",
    ),
    "charades: out of range": (
        "id,actions,length\nAB12C,c157 0 1,9\n",
        "line 2: labels must be from 0 to 156; got 157",
    ),
    "charades: no id": ("id,actions,length\n,c001 0 1,9\n", "line 2: the column `id` is empty"),
    "kinetics: unknown class": (
        OFFICIAL + "juggling,z3,0,10,train\n",
        "line 4: 'juggling' is not one of the 2 classes",
    ),
    "kinetics: no time": (
        OFFICIAL + "abseiling,z3,,10,train\n",
        "line 4: time_start must be a whole number; got ''",
    ),
    "frames: too few columns": (
        "original_vido_id video_id frame_id path labels\nV 0 f/1.jpg 1\n",
        "line 2: .*labels` is expected",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_line(folder, name):
    text, message = WRONG[name]
    options = {"num_classes": None if name.startswith(("charades", "kinetics")) else 400}
    if name == "kinetics: unknown class":
        options = {"classes": write(folder, "abseiling\nair drumming\n", "classes.txt")}
    with pytest.raises(DataError, match=message):
        annotations.read(write(folder, text), **options)


def test_paths_outside_the_root(folder):
    (folder.parent / "secret.mp4").touch()
    for name in ("../secret.mp4", "inside/../../secret.mp4", f"{folder.parent}/secret.mp4"):
        file = write(folder, f"{name} 1\n")
        assert annotations.read(file).records  # without a root, files may lie anywhere
        with pytest.raises(DataError, match=r"line 1: .*secret.mp4 lies outside the root"):
            annotations.read(file, root=folder)
    (record,) = annotations.read(write(folder, "inside/../a.mp4 1\n"), root=folder).records
    assert record.path == folder / "a.mp4"


def test_leaving_lines_out(folder):
    file = write(folder, "a.mp4 1\nnone.mp4 1\na.mp4 2\n")
    with pytest.raises(
        DataError, match=r"has 2 line\(s\) that cannot be used:\n  line 2.*\n  line 3"
    ):
        annotations.read(file)
    found = annotations.read(file, leave_out=True)
    assert len(found) == 1
    assert [text.split(":")[0] for text in found.left_out] == ["line 2", "line 3"]
    # Only missing and repeated files are left out, not wrong lines.
    with pytest.raises(DataError, match="line 1: a label must be a whole number"):
        annotations.read(write(folder, "a.mp4 x\n"), leave_out=True)
    with pytest.raises(DataError, match=r"at least one existing video; 1 line\(s\) were left out"):
        annotations.read(write(folder, "none.mp4 1\n"), leave_out=True)


def test_only_the_first_of_many_wrong_lines_are_shown(folder):
    with pytest.raises(DataError, match=r"(?s)has 40 line\(s\).*line 10: .*and 30 more$"):
        annotations.read(write(folder, "a.mp4 x\n" * 40))


def test_files_that_are_not_lists(folder):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        annotations.read(folder / "none.txt")
    (folder / "binary.txt").write_bytes(b"a.mp4 1\n\xff\xfe")
    with pytest.raises(DataError, match="must be a text file in UTF-8; byte 8 is not"):
        annotations.read(folder / "binary.txt")
    with pytest.raises(DataError, match="must name each class once"):
        annotations.read(
            write(folder, "a.mp4 1\n"), classes=write(folder, "one\none\n", "classes.txt")
        )
