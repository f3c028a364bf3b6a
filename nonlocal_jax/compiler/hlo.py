"""The instructions of an optimised program, parsed from XLA's text."""

import dataclasses
import math
import re

# Bits of the dtypes in XLA's text.
_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"(?:calls|body|to_apply|branch_computations|called_computations)=\{?([^,}]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of an optimised program.

    Attributes:
        name: Its name in the text.
        opcode: Its operation, such as "fusion".
        result: The text of its result's type.
        operands: Names of its operands; the number of a parameter, the value of a constant.
        attributes: The text after the operands.
        is_root: Whether it is the result of its computation.
    """

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 if it has none."""
        match = _CYCLES.search(self.attributes)
        return int(match[1]) if match else 0

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls."""
        names = ",".join(match[1] for match in _CALLED.finditer(self.attributes))
        return [name.strip().lstrip("%") for name in names.split(",") if name.strip()]


def parse(line: str) -> Instruction | None:
    """Parses a line of a computation; returns None if it is not an instruction."""
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    text = line[match.end() :]
    end = _end_of_type(text)
    result, text = text[:end], text[end + 1 :]
    opcode, _, text = text.partition("(")
    end = _matching_parenthesis(text)
    operands = tuple(re.findall(r"%([\w.\-]+)", text[:end]))
    if opcode in ("parameter", "constant"):
        operands = (text[:end],)
    return Instruction(match[2], opcode, result, operands, text[end + 1 :], bool(match[1]))


def _end_of_type(text: str) -> int:
    if text.startswith("("):
        return 1 + _matching_parenthesis(text[1:]) + 1
    return text.index(" ")


def _matching_parenthesis(text: str) -> int:
    """Returns the index of the parenthesis that closes one before the text."""
    depth = 1
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis must be closed; got {text[:80]!r}.")


def sizes(result: str) -> list[int]:
    """Returns the sizes of the axes of an array's type."""
    match = _SHAPE.search(result)
    return [int(size) for size in match[2].split(",") if size] if match else []


def multiplications(convolution: Instruction, left: str, right: str) -> int:
    """Counts the multiplications of a convolution.

    XLA:TPU writes a product of batches as a convolution that is dilated and strided so that one of
    its taps counts for each result. So taps that fall on padding or between inputs are left out.

    Args:
        convolution: The instruction.
        left: Type of its input.
        right: Type of its kernel.
    """
    labels = _LABELS.search(convolution.attributes)
    if labels is None:
        raise ValueError(
            f"a convolution must have dim_labels; got {convolution.attributes[:80]!r}."
        )
    inputs, kernel, results = (
        dict(zip(names, sizes(array), strict=True))
        for names, array in zip(labels.groups(), (left, right, convolution.result), strict=True)
    )
    total = results["b"] * results["f"] * kernel["i"]
    window = _parse_window(convolution.attributes)
    for axis in range(len(results) - 2):
        name = str(axis)
        total *= _taps(inputs[name], results[name], kernel[name], window, axis)
    return total


def _parse_window(attributes: str) -> dict[str, list[str]]:
    """Returns the strides, paddings and dilations of a window, for each axis."""
    match = _WINDOW.search(attributes)
    fields = match[1].split() if match else []
    return {name: values.split("x") for name, values in (field.split("=") for field in fields)}


def _taps(inputs: int, results: int, taps: int, window: dict[str, list[str]], axis: int) -> int:
    """Counts the pairs of a result and a tap, along one axis, that meet an input."""
    stride, dilation, spread = (
        int(window[name][axis]) if name in window else 1
        for name in ("stride", "rhs_dilate", "lhs_dilate")
    )
    padding = int(window["pad"][axis].partition("_")[0]) if "pad" in window else 0
    places = (
        result * stride + tap * dilation - padding
        for result in range(results)
        for tap in range(taps)
    )
    return sum(place % spread == 0 and 0 <= place <= (inputs - 1) * spread for place in places)


def split_types(result: str) -> list[str]:
    """Splits the type of a tuple of arrays into the types of the arrays."""
    return [match[0] for match in _SHAPE.finditer(result)]


def _bytes(dtype: str, sizes: str) -> int:
    return math.prod(map(int, filter(None, sizes.split(",")))) * _BITS.get(dtype, 0) // 8


def bytes_of_type(result: str) -> int:
    """Returns the bytes of all arrays of a type."""
    return sum(_bytes(dtype, sizes) for dtype, sizes, _ in _SHAPE.findall(result))


def bytes_in_memory(result: str) -> int:
    """Returns the bytes of the arrays of a type that are in the main memory."""
    return sum(
        _bytes(dtype, sizes)
        for dtype, sizes, layout in _SHAPE.findall(result)
        if not re.search(r"S\([1-9]", layout)
    )
