"""Lists are read as Python's csv module, pandas, spreadsheets and people write them."""

import csv
import io
import time
import unicodedata

import numpy as np
import pytest

from nonlocal_jax.data import DataError, annotations
from nonlocal_jax.data.lists.folders import VIDEO_SUFFIXES
from nonlocal_jax.data.lists.text import split_label


@pytest.fixture
def folder(tmp_path):
    for name in ("a.mp4", "riding a bike/x y.mp4", "c,d.mp4", "#1; 'e'.mp4", 'say "f".mp4'):
        touch(tmp_path / name)
    return tmp_path


def touch(file):
    file.parent.mkdir(exist_ok=True, parents=True)
    file.touch()


def read(folder, text, **options):
    (folder / "list").write_bytes(text.encode())
    return annotations.read(folder / "list", **options)


def found(folder, text, **options):
    records = read(folder, text, **options).records
    return [(str(record.path.relative_to(folder)), *record.labels) for record in records]


X_Y = "riding a bike/x y.mp4"
PATH_LINES = {
    "a.mp4": (
        *("a.mp4 3", "a.mp4   3", "a.mp4\t3", "a.mp4,3", "a.mp4;3", "a.mp4|3", "a.mp4 , 3"),
        *("a.mp4,3,", "a.mp4 3 ", "a.mp4;3;;", "  a.mp4 3", '"a.mp4",3', '"a.mp4","3"'),
        *('a.mp4,"3"', "a.mp4,3.0", '"a.mp4"\t3', "a.mp4,,3"),
    ),
    X_Y: (
        *(f"{X_Y},3", f"{X_Y}, 3", f"{X_Y} 3", f"{X_Y}\t3", f"{X_Y};3", f"{X_Y} ;3", f"{X_Y}|3"),
        *(f'"{X_Y}",3', f'"{X_Y}" 3', f'"{X_Y}", 3', f'"{X_Y}"\t3', f'"{X_Y}" , 3', f"{X_Y} 3,,"),
    ),
    "c,d.mp4": ("c,d.mp4,3", "c,d.mp4 3", "c,d.mp4;3", "c,d.mp4\t3", '"c,d.mp4",3', '"c,d.mp4" 3'),
    "#1; 'e'.mp4": ("#1; 'e'.mp4,3", "#1; 'e'.mp4 3", "\"#1; 'e'.mp4\";3"),
    'say "f".mp4': ('say "f".mp4 3', 'say "f".mp4,3', '"say ""f"".mp4",3', '"say ""f"".mp4" 3'),
}


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, lines in PATH_LINES.items() for line in lines]
)
def test_path_and_label(name, line, folder):
    for text in (
        line,
        f"path,label\n{line}",
        f"\ufeff{line}\r\n",
        f"\n \n{line}\n,,\n\n",
        f"{line}\r",
    ):
        assert found(folder, text) == [(name, 3)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " "])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("header", [None, ("path", "label"), ("", "video_path", "class")])
def test_what_the_csv_module_writes(delimiter, quoting, header, folder):
    """The header with an empty column is the one that pandas writes with its index."""
    if delimiter == " " and header and not header[0]:
        header = ("index", *header[1:])  # the blank before it would not count
    rows = [(name, label) for label, name in enumerate(PATH_LINES)]
    if header is not None:
        rows = [header, *((7, *row)[-len(header) :] for row in rows)]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=quoting).writerows(rows)
    assert found(folder, file.getvalue()) == [(name, n) for n, name in enumerate(PATH_LINES)]


def test_existing_files_decide_what_a_path_is(folder):
    touch(folder / '"a.mp4"')
    assert found(folder, '"a.mp4" 1\n"""a.mp4""" 2\n') == [("a.mp4", 1), ('"a.mp4"', 2)]
    (folder / "a.mp4").unlink()
    assert found(folder, '"a.mp4" 1\n') == [('"a.mp4"', 1)]
    touch(folder / " g.mp4")
    touch(folder / "h.mp4,")
    assert found(folder, " g.mp4 1\nh.mp4, 2\n") == [(" g.mp4", 1), ("h.mp4,", 2)]
    for name in ("g.mp4", "h.mp4"):
        touch(folder / name)
    for line, other in ((" g.mp4 1", "' g.mp4'|/ g.mp4'"), ("h.mp4, 2", "h.mp4,'")):
        message = f"line 1: the path can be '.*/{line.strip()[:5]}' or '.*({other}), and both exist"
        with pytest.raises(DataError, match=message):
            found(folder, line)
    quoted = '" g.mp4" 1\n"g.mp4" 2\n"h.mp4,", 3\n"h.mp4", 4\n'
    assert [name for name, _ in found(folder, quoted)] == [" g.mp4", "g.mp4", "h.mp4,", "h.mp4"]


@pytest.mark.parametrize("blank", ["\u3000", "\xa0", "\u2003"])
def test_other_blanks_of_unicode_belong_to_names(blank, folder):
    names = [f"{blank}a.mp4", f"a{blank}b.mp4", f"c.mp4{blank}", f"{blank} d.mp4"]
    for name in (*names, "c.mp4", "d.mp4", "z.mp4"):
        touch(folder / name)
    rows = list(zip(names, range(len(names)), strict=True))
    assert found(folder, "".join(f"{name} {label}\n" for name, label in rows)) == rows
    table = "".join(f"{name},25,{label}\n" for name, label in rows)
    assert found(folder, f"path,fps,label\n{table}") == rows
    for text in (f"{blank}z.mp4 1\n", f"z.mp4{blank} 1\n", f"path,fps,label\n{blank}z.mp4,25,1\n"):
        with pytest.raises(DataError, match=f"there is no file .*/({blank}z.mp4|z.mp4{blank})$"):
            found(folder, text)
    assert found(folder, f"z.mp4 1{blank}\n") == [("z.mp4", 1)]


def test_other_readings_of_a_line_need_not_be_valid(folder, copied):
    """With its quotes or blanks, a URL would not be one, and lie outside of the root."""
    remote = copied(folder)
    for line in (f'"{remote}/a.mp4" 3', f"  {remote}/a.mp4 3"):
        (record,) = read(folder, line, root=remote).records
        assert record.path == remote / "a.mp4"


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_names_in_another_unicode_normal_form(stored, folder, copied):
    """macOS stores decomposed names, which other systems tell apart from composed ones."""
    name = "é/été 走る.mp4"
    touch(folder / unicodedata.normalize(stored, name))
    for place in (folder, copied(folder)):
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, f"{name},3\n")
            (place / "list").write_bytes(text.encode())
            (record,) = annotations.read(place / "list").records
            assert record.path == place / unicodedata.normalize(stored, name)
    other = {"NFC": "NFD", "NFD": "NFC"}[stored]
    touch(folder / unicodedata.normalize(other, name))  # now both exist, and each is found
    both = "".join(unicodedata.normalize(form, f"{name},3\n") for form in ("NFC", "NFD"))
    assert len(set(found(folder, both))) == 2


KINETICS = "label,youtube_id,time_start,time_end,split\nriding a bike,x1,5,15,train\n"
KINETICS_FORMS = {
    "blanks after commas": KINETICS.replace(",", ", "),
    "semicolons": KINETICS.replace(",", ";"),
    "tabs": KINETICS.replace(",", "\t"),
    "blanks": 'label youtube_id time_start time_end split\n"riding a bike" x1 5 15 train\n',
    "quoted": '"label","youtube_id","time_start","time_end"\n"riding a bike","x1","5","15"\n',
    "quotes after blanks": 'label, "youtube_id", time_start, time_end\n"riding a bike", x1, 5, 15',
    "floats": KINETICS.replace(",5,15", ",5.0,15.000"),
    "is_cc": "label,youtube_id,time_start,time_end,split,is_cc\nriding a bike,x1,5,15,train,0\n",
    "an index": ",label,youtube_id,time_start,time_end\n0,riding a bike,x1,5,15\n",
    "CRLF": "\ufeff" + KINETICS.replace("\n", "\r\n"),
    "CR": KINETICS.replace("\n", "\r"),
    "trailing commas": KINETICS.replace("\n", ",,\n"),
    "blank lines": "\n" + KINETICS.replace("\n", "\n\n,,,,\n"),
    "upper case": KINETICS.replace("label,youtube_id", "Label,YouTube_ID"),
    "other order": "split,time_end,time_start,youtube_id,label\ntrain,15,5,x1,riding a bike\n",
    "underscores": KINETICS.replace("riding a bike", "riding_a_bike"),
}


@pytest.mark.parametrize("form", KINETICS_FORMS)
@pytest.mark.parametrize("name", ["x1_000005_000015.mp4", "riding_a_bike/x1.webm"])
def test_forms_of_kinetics(form, name, folder):
    touch(folder / name)
    classes = folder / "classes.txt"
    classes.write_text("riding a bike\n")
    assert found(folder, KINETICS_FORMS[form], classes=classes) == [(name, 0)]
    assert read(folder, KINETICS_FORMS[form]).format == "kinetics"


@pytest.mark.parametrize("suffix", [*VIDEO_SUFFIXES, ".MP4", ".WebM"])
def test_containers(suffix, folder, copied):
    for name in ("x1_000005_000015", "AB12C"):
        touch(folder / f"{name}{suffix}")
        touch(folder / f"{name}.mp4.part")
        touch(folder / f"._{name}.mp4")
    charades = "id,actions\nAB12C,c001 0 1\n"
    for place in (folder, copied(folder)):
        for text, name in ((KINETICS, "x1_000005_000015"), (charades, "AB12C")):
            (place / "list").write_bytes(text.encode())
            (record,) = annotations.read(place / "list").records
            assert record.path == place / f"{name}{suffix}"


def test_of_several_containers_the_first_of_the_table_is_used(folder):
    for suffix in (".webm", ".mkv", ".avi"):
        touch(folder / f"AB12C{suffix}")
    assert found(folder, "id,actions\nAB12C,c001 0 1\n") == [("AB12C.mkv", 1)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_charades(delimiter, folder):
    touch(folder / "AB12C.mp4")
    rows = [
        ("id", "subject", "script", "actions", "length"),
        ("AB12C", "X", 'A "person", cooking;\nthen eating', "c092 11.9 21.2;c147 0 12.6;", "30"),
    ]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows(rows)
    assert found(folder, file.getvalue()) == [("AB12C.mp4", 92, 147)]
    assert found(folder, file.getvalue().replace("\r\n", ";;\r\n" if delimiter == ";" else "\n"))


@pytest.mark.parametrize("delimiter", [" ", "  ", ",", "\t"])
def test_frame_lists(delimiter, folder):
    touch(folder / "f/a b.jpg")
    header = ["original_vido_id", "video_id", "frame_id", "path", "labels"]
    rows = [header, ["V", "0", "0", '"f/a b.jpg"', '"3,7"'], ["V", "0", "1", "f/2.jpg", '""']]
    text = "\r\n".join(map(delimiter.join, rows))
    (record,) = read(folder, text).records
    assert record.frames == (folder / "f/a b.jpg", folder / "f/2.jpg")
    assert record.frame_labels == ((3, 7), ())


WRONG = {
    "a path like the column of a header": (
        "youtube_id,label/a.mp4 x\n",
        "line 1: a label must be a whole number; got 'x'",
    ),
    "no label behind quotes": ('"a.mp4"\n', "line 1: `path label` is expected; got '\"a.mp4\"'"),
    "only a label": ("3\n", "line 1: `path label` is expected; got '3'"),
    "label that int32 cannot hold": (
        "a.mp4 2147483648\n",
        "line 1: labels must be from 0 to 2147483647; got 2147483648",
    ),
    "fraction": ("a.mp4 1.5\n", "line 1: a label must be a whole number; got '1.5'"),
    "only blank lines": ("\n ,,\n", "must have a line for each video; it is empty"),
    "more fields than columns": (
        "path,label,split\nc,d.mp4,3,train\n",
        "line 2: the header has 3 columns, the line 4; put fields that contain ',' in double",
    ),
    "a field is missing": (
        "path,fps,label\na.mp4,2",
        "line 2: a label must be a whole number; got ''",
    ),
    "a quote that is not closed": (
        KINETICS + '"riding a bike,x2,5,15,train\nriding a bike,x3,5,15,train\n',
        "line 3 cannot be read as CSV: unexpected end of data. Close each quote",
    ),
    "text after a quote": (
        KINETICS + 'riding a bike,"x2"3,5,15,train\n',
        "line 3 cannot be read as CSV: ',' expected after '\"'. Close each quote",
    ),
    "no id": (KINETICS.replace("x1", ""), "line 2: the column `youtube_id` is empty"),
    "half a second": (
        KINETICS.replace(",5,", ",5.5,"),
        "line 2: time_start must be a whole number; got '5.5'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors(name, folder):
    text, message = WRONG[name]
    touch(folder / "x1.mp4")
    with pytest.raises(DataError, match=message):
        read(folder, text)


def test_the_first_line_of_a_list_may_look_like_a_header(folder):
    names = ("label,youtube_id,x/a.mp4", "id,actions,y.mp4", "path,label,z.mp4")
    for name in (*names, "original_vido_id/a.mp4", "original_vido_id 1/a.mp4"):
        touch(folder / name)
        assert found(folder, f"{name} 1\n") == [(name, 1)]


def test_classes_of_kinetics_that_differ_in_underscores_are_one(folder):
    touch(folder / "x1.mp4")
    touch(folder / "x2.mp4")
    text = KINETICS + "riding_a_bike,x2,0,1,train\n"
    assert read(folder, text).names == ("riding a bike",)


@pytest.mark.parametrize("start", ["", '"'])
@pytest.mark.parametrize("characters", [" ", " ,", 'a"', 'a,"', '""', "a\t", "é "])
def test_the_time_of_long_lines_grows_linearly(characters, start):
    """Four times as many characters take about 4 times as long; 16 times would be quadratic."""
    text = "".join(np.random.default_rng(0).choice(list(characters), 80_000))

    def seconds(length):
        """Returns the least time, which other processes disturb least."""
        line, times = f"{start}{text[:length]} 1", []
        for _ in range(10):
            before = time.process_time()
            parsed = split_label(line)
            times.append(time.process_time() - before)
            assert parsed is None or parsed.label == "1"
        return min(times)

    assert seconds(80_000) < 10 * max(seconds(20_000), 1e-4)


def test_class_names(folder):
    file = folder / "classes.txt"
    file.write_bytes('\ufeff run \r\n\r\n"a, b"\r\n" c"\r\nsay "d"\r\n"""e"""\r\n'.encode())
    assert annotations.read_classes(file) == ("run", "a, b", " c", 'say "d"', '"e"')
    file.write_text('a\n""\n')
    with pytest.raises(DataError, match=r"classes.txt must name each class once"):
        annotations.read_classes(file)
