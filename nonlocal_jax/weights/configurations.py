"""What the training configuration in a file says about its network.

PySlowFast keeps its configuration in each checkpoint as YAML, mmaction2 as Python text. Neither is
executed: of YAML only text, lists and mappings are built, and of Python only literals and calls of
`dict` are understood.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nonlocal_jax.layers.conventions import INSTANTIATIONS, ClipFormat, Triple
from nonlocal_jax.models.bottleneck import StrideAt
from nonlocal_jax.models.video_tables import CLIP_FORMATS, LONG_CLIPS, STAGES, Places
from nonlocal_jax.types import Instantiation

MAX_CHARACTERS = 100_000  # of a configuration; the published ones have up to 15,000
MAX_DEPTH = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """What a training configuration states. None and {} are for what it does not state.

    Attributes:
        clip: Frames × their stride, if a layout with the same strides has this name.
        other_clip: Frames × their stride, if none has.
        pool2: Whether a pooling in time follows res2.
        instantiation: The pairwise function.
        key_pool: Window of the keys' max pooling.
        use_scale: Whether the logits of the embedded Gaussian are scaled.
        group_size: Frames of a temporal group of the non-local blocks, by stage.
        stride_at: The convolution of a residual block that has the stride of its stage.
    """

    clip: ClipFormat | None = None
    other_clip: str | None = None
    pool2: bool | None = None
    instantiation: Instantiation | None = None
    key_pool: Triple | None = None
    use_scale: bool | None = None
    group_size: Mapping[str, int] = dataclasses.field(default_factory=dict)
    stride_at: StrideAt | None = None


NOT_STATED = Configuration()
STRIDES_AT: dict[str, StrideAt] = {
    **{"True": "conv_a", "true": "conv_a", "False": "conv_b", "false": "conv_b"},  # STRIDE_1X1
    **{"caffe": "conv_a", "pytorch": "conv_b"},  # style of mmaction2
}


def read_configuration(text: str, source: str, kind: str, places: Places) -> Configuration:
    """Reads what a configuration states.

    Args:
        text: Its text; "" if the file has none.
        source: The source whose names the file has.
        kind: Inflation of the kernels, or "image".
        places: The residual blocks that non-local blocks follow, by stage.

    Returns:
        What it states, which is nothing if it cannot be read.

    Raises:
        ValueError: It states what no network here has.

    >>> text = "MODEL: {ARCH: c2d, MODEL_NAME: ResNet_nopool}"
    >>> read_configuration(text, "slowfast", "c2d", {}).pool2
    False
    """
    if source == "slowfast":
        return _slowfast(_Node(_parse_yaml(text)), places)
    if source == "mmaction2":
        return _mmaction2(_Node(parse_python(text)), kind)
    return NOT_STATED


class _Node:
    """A value of a configuration, of any type, whose parts may be missing."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __getitem__(self, key: str | int) -> "_Node":
        value = self.value
        if isinstance(value, dict) and key in value:
            return _Node(value[key])
        if isinstance(value, list) and isinstance(key, int) and key < len(value):
            return _Node(value[key])
        return _Node(None)

    def __iter__(self) -> Iterator["_Node"]:
        values = self.value if isinstance(self.value, list) else []
        return map(_Node, values)

    @property
    def text(self) -> str:
        return str(self.value) if isinstance(self.value, str | int | float) else ""

    @property
    def number(self) -> int | None:
        """The integer that it is or spells, at most four digits long."""
        return int(self.text) if re.fullmatch("[0-9]{1,4}", self.text) else None

    @property
    def flag(self) -> bool | None:
        return {"True": True, "true": True, "False": False, "false": False}.get(self.text)


def _slowfast(config: _Node, places: Places) -> Configuration:
    model, resnet, nonlocal_ = config["MODEL"], config["RESNET"], config["NONLOCAL"]
    for name, usual in (
        ("SPATIAL_STRIDES", ["1", "2", "2", "2"]),
        ("SPATIAL_DILATIONS", ["1"] * 4),
    ):
        found = [stage[0].text for stage in resnet[name]]
        if found and found != usual:
            raise ValueError(
                f"its configuration has RESNET.{name} {', '.join(found)} in res2 to res5, which "
                f"must be {', '.join(usual)} in the networks here"
            )
    pool2 = {"c2d": True, "i3d": True, "2d": False, "slow_c2d": False, "slow_i3d": False}.get(
        model["ARCH"].text
    )
    if "nopool" in model["MODEL_NAME"].text.lower():
        pool2 = False
    frames, rate = config["DATA"]["NUM_FRAMES"].number, config["DATA"]["SAMPLING_RATE"].number
    stages = [stage for stage in STAGES if places.get(stage)]
    functions: dict[str, Instantiation] = {
        "softmax": "embedded_gaussian",
        "dot_product": "dot_product",
    }
    return Configuration(
        # It has no stride in time before pool2, whatever the clip.
        **_clip(frames, rate, strides=(1, 1)),
        pool2=pool2,
        instantiation=functions.get(nonlocal_["INSTANTIATION"].text),
        key_pool=_slowfast_key_pool(nonlocal_["POOL"], stages),
        group_size=_slowfast_groups(nonlocal_["GROUP"], stages, frames, pool2),
        stride_at=STRIDES_AT.get(resnet["STRIDE_1X1"].text),
    )


def _slowfast_key_pool(pools: _Node, stages: list[str]) -> Triple | None:
    windows = {_triple(pools[STAGES.index(stage)][0]) for stage in stages}
    if len(windows) > 1:
        raise ValueError(
            f"its configuration pools keys differently by stage: NONLOCAL.POOL of "
            f"{' and '.join(stages)} must be the same in the networks here"
        )
    return windows.pop() if windows else None


def _triple(node: _Node) -> Triple | None:
    match [part.number for part in node]:
        case [int(t), int(h), int(w)] if min(t, h, w) > 0:
            return t, h, w
    return None


def _slowfast_groups(
    groups: _Node, stages: list[str], frames: int | None, pool2: bool | None
) -> dict[str, int]:
    """Converts numbers of temporal groups to numbers of frames in each."""
    sizes = {}
    for stage in stages:
        count = groups[STAGES.index(stage)][0].number or 1
        if count > 1 and frames is not None and pool2 is not None:
            halves = pool2 and stage != "res2"
            sizes[stage] = max(frames // (2 if halves else 1) // count, 1)
    return sizes


def _mmaction2(config: _Node, kind: str) -> Configuration:
    backbone = config["model"]["backbone"]
    for name, usual in (("spatial_strides", ["1", "2", "2", "2"]), ("dilations", ["1"] * 4)):
        found = [stage.text for stage in backbone[name]]
        if found and found != usual:
            raise ValueError(
                f"its configuration has {name} of {', '.join(found)} in its four stages, which "
                f"must be {', '.join(usual)} in the networks here"
            )
    epsilon = backbone["norm_cfg"]["eps"].text
    if epsilon not in ("", "1e-5", "1e-05", "0.00001"):
        raise ValueError(f"its configuration has ε of {epsilon}, which must be 1e-5 here")
    # By default: strides in time of conv1 and pool1, and whether there is a pool2. To a network for
    # images each frame is an image. C2D is such a network with poolings in time.
    strides_and_pool2: dict[str, tuple[int, int, bool]] = {
        "ResNet3d": (1, 1, True),
        "ResNet3dSlowOnly": (1, 1, False),
        "C2D": (1, 1, True),
        "ResNet": (1, 1, False),
    }
    defaults = strides_and_pool2.get(backbone["type"].text)
    if defaults is None:
        return NOT_STATED
    conv1, pool1, pool2 = defaults
    strides = (
        backbone["conv1_stride_t"].number or conv1,
        backbone["pool1_stride_t"].number or pool1,
    )
    block = backbone["non_local_cfg"]
    modes = {name: name for name in INSTANTIATIONS}
    # What mmcv does by default, where blocks are configured at all.
    mode = block["mode"].text or ("embedded_gaussian" if block.value is not None else "")
    use_scale = block["use_scale"].flag
    is_default_scale = block.value is not None and use_scale is None
    with_pool2 = backbone["with_pool2"].flag
    pool2 = pool2 if with_pool2 is None else with_pool2
    if backbone["type"].text == "ResNet3d" and kind == "c2d" and pool2 and strides == (1, 1):
        raise ValueError(
            "its configuration has a ResNet3d without inflated kernels, whose pool1 is padded; the "
            "C2D of mmaction2 pads none, and no network here does both"
        )
    return Configuration(
        **_mmaction2_clip(config, strides),
        pool2=pool2,
        instantiation=modes.get(mode),  # type: ignore[call-overload]
        use_scale=True if is_default_scale else use_scale,
        stride_at=STRIDES_AT.get(backbone["style"].text or "pytorch"),
    )


def _mmaction2_clip(config: _Node, strides: tuple[int, int]) -> dict[str, Any]:
    for name in ("test_pipeline", "val_pipeline", "train_pipeline"):
        for step in config[name]:
            if step["type"].text == "SampleFrames":
                frames, rate = step["clip_len"].number, step["frame_interval"].number
                return _clip(frames, rate or 1, strides)
    return {}


def _clip(frames: int | None, rate: int | None, strides: tuple[int, int]) -> dict[str, Any]:
    """Returns the clip format, if its layout has these strides in time in conv1 and pool1."""
    if frames is None or rate is None:
        return {}
    name = f"{frames}x{rate}"
    expected = (2, 2) if name in LONG_CLIPS else (1, 1)
    if name in CLIP_FORMATS and strides == expected:
        return {"clip": name}
    conv1, pool1 = strides
    return {"other_clip": f"{name} with strides in time of {conv1} in conv1 and {pool1} in pool1"}


def _parse_yaml(text: str) -> object:
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
                self.take("mark", "(")
                return dict(self._items(")", "=", depth))
            raise SyntaxError(f"{name} is no literal")
        mark = self.take("mark", "(", "[", "{")
        if mark == "{":
            return dict(self._items("}", ":", depth))
        return self._elements({"(": ")", "[": "]"}[mark], depth)

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
