"""Literals in configurations, as YAML or Python text, parsed without executing anything."""

import re
from collections.abc import Iterator

MAX_CHARACTERS = 100_000  # of a text; published configurations have up to 15,000
MAX_DEPTH = 50


class Node:
    """A value of a configuration, of any type, whose parts may be missing."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __getitem__(self, key: str | int) -> "Node":
        value = self.value
        if isinstance(value, dict) and key in value:
            return Node(value[key])
        if isinstance(value, list) and isinstance(key, int) and key < len(value):
            return Node(value[key])
        return Node(None)

    def __iter__(self) -> Iterator["Node"]:
        values = self.value if isinstance(self.value, list) else []
        return map(Node, values)

    @property
    def text(self) -> str:
        return str(self.value) if isinstance(self.value, str | int | float) else ""

    @property
    def texts(self) -> list[str]:
        """The texts of a list, or of a single value; [] for anything else."""
        texts = [node.text for node in self] or [self.text]
        return [] if texts == [""] else texts

    @property
    def number(self) -> int | None:
        """The integer that it is or spells, at most four digits long."""
        return int(self.text) if re.fullmatch("[0-9]{1,4}", self.text) else None

    @property
    def flag(self) -> bool | None:
        return {"True": True, "true": True, "False": False, "false": False}.get(self.text)


def parse_yaml(text: str) -> object:
    """Parses YAML to text, lists and mappings; None if it cannot be read."""
    import yaml  # type: ignore[import-untyped]

    if len(text) > MAX_CHARACTERS:
        return None
    try:
        # BaseLoader makes no objects, and merges no mappings, which can grow without bound.
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return None


_TOKEN = re.compile(
    r"""(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
    r"|(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z_0-9]*)"
    r"|(?P<mark>[][(){}=,:])"
    r"|(?P<space>\s+|\#[^\n]*)"
    r"|(?P<other>.)"
)


def parse_python(text: str) -> dict[str, object] | None:
    """Parses assignments of literals, such as `model = dict(depth=50, inflate=(1, 0))`.

    Nothing is executed. Tuples become lists, numbers and flags stay text.

    Args:
        text: Python code, of nothing but assignments.

    Returns:
        The values by name; None if there is anything else in the text.

    >>> parse_python("model = dict(type='C2D', blocks=[3, 4])")
    {'model': {'type': 'C2D', 'blocks': ['3', '4']}}
    >>> parse_python("import os") is None
    True
    """
    if len(text) > MAX_CHARACTERS:
        return None
    tokens = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "other":
            return None  # at once: to search on from each of many lone quotes is quadratic
        if match.lastgroup != "space":
            tokens.append((str(match.lastgroup), match[0]))
    parser = _Parser([*tokens, ("end", "")])
    values: dict[str, object] = {}
    try:
        while parser.kind != "end":
            name = parser.take("name")
            parser.take("mark", "=")
            values[name] = parser.value(0)
    except SyntaxError:
        return None
    return values


class _Parser:
    """Reads values from tokens. Raises SyntaxError for all that is no literal."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens
        self._position = 0

    @property
    def kind(self) -> str:
        return self._tokens[self._position][0]

    @property
    def word(self) -> str:
        return self._tokens[self._position][1]

    def take(self, kind: str, *words: str) -> str:
        """Returns the current token, which must be of this kind, and moves to the next."""
        found, word = self._tokens[self._position]
        if found != kind or (words and word not in words):
            raise SyntaxError(f"expected {words or kind}")
        self._position += 1
        return word

    def value(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise SyntaxError("nested too deeply")
        if self.kind == "text":
            parts = []
            while self.kind == "text":  # adjacent texts are one
                parts.append(self.take("text")[1:-1])
            return "".join(parts)
        if self.kind == "number":
            return self.take("number")
        if self.kind == "name":
            name = self.take("name")
            if name in ("True", "False", "None"):
                return None if name == "None" else name
            if name == "dict":
                return self._call_of_dict(depth)
            raise SyntaxError(f"{name} is no literal")
        mark = self.take("mark", "(", "[", "{")
        if mark == "{":
            return dict(self._items("}", ":", depth))
        return self._elements({"(": ")", "[": "]"}[mark], depth)

    def _call_of_dict(self, depth: int) -> object:
        """Reads `(a=1)`, or `({'a b': 1})`, as mmengine writes keys that are no identifiers."""
        self.take("mark", "(")
        if self.word != "{":
            return dict(self._items(")", "=", depth))
        mapping = self.value(depth + 1)
        if self.word == ",":
            self.take("mark", ",")
        self.take("mark", ")")
        return mapping

    def _items(self, end: str, between: str, depth: int) -> Iterator[tuple[str, object]]:
        while self.word != end:
            key = self.take("name") if between == "=" else self.value(MAX_DEPTH)
            self.take("mark", between)
            yield str(key), self.value(depth + 1)
            if self.word != end:
                self.take("mark", ",")
        self.take("mark", end)

    def _elements(self, end: str, depth: int) -> object:
        """Reads a list or tuple. A value in parentheses without a comma is the value itself."""
        elements = []
        has_comma = False
        while self.word != end:
            elements.append(self.value(depth + 1))
            if self.word != end:
                self.take("mark", ",")
                has_comma = True
        self.take("mark", end)
        is_value = end == ")" and len(elements) == 1 and not has_comma
        return elements[0] if is_value else elements
