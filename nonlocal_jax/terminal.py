"""Text from files and file names, as it may reach a terminal."""


def printable(text: object) -> str:
    r"""Returns text whose control characters are written as escapes.

    A terminal acts on control characters, so a name in a file from elsewhere could clear the
    screen, hide lines or set the title. Invisible characters that change the direction of text, and
    bytes of file names that are not UTF-8, are escaped as well.

    Pass the result to rich as `rich.text.Text`, or with `markup=False`: brackets are not escaped.

    >>> printable("conv1\x1b[2J"), printable("Füße 走る.mp4")
    ('conv1\\x1b[2J', 'Füße 走る.mp4')
    """
    characters = str(text)
    if characters.isprintable():
        return characters
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in characters)


def printable_lines(text: object) -> str:
    r"""Returns text whose control characters are written as escapes, except the ends of lines.

    >>> printable_lines("a\x07\nb")
    'a\\x07\nb'
    """
    return "\n".join(map(printable, str(text).split("\n")))
