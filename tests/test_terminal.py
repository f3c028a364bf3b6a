import pytest

from nonlocal_jax.terminal import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layer/kernel [x] ä 走", "layer/kernel [x] ä 走"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J", r"\x9b2J"),  # CSI as one character
        ("\u202etxt.exe", r"\u202etxt.exe"),
        ("\udcff.mp4", r"\udcff.mp4"),  # how Python decodes a byte that is not UTF-8
        ("\u2028", r"\u2028"),
    ],
)
def test_control_characters_are_escaped(text, expected):
    assert printable(text) == expected


def test_other_objects_are_converted():
    assert printable(ValueError("a\x00")) == r"a\x00"


def test_lines_are_kept():
    assert printable_lines("a\x1b[2J\nb\r\n") == "a\\x1b[2J\nb\\r\n"
