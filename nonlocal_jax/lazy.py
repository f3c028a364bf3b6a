"""Submodules that are imported on first use, so that importing a package stays cheap."""

import importlib
from collections.abc import Callable
from types import ModuleType


def submodules(
    package: str, *names: str
) -> tuple[Callable[[str], ModuleType], Callable[[], list[str]]]:
    """Makes `__getattr__` and `__dir__` for a package whose submodules are imported on first use.

    Args:
        package: Name of the package, its `__name__`.
        names: Submodules that become attributes.

    Returns:
        The functions to assign to `__getattr__` and `__dir__` (PEP 562). `dir()` lists the
        submodules whether or not they are imported already.

    >>> getattr_, dir_ = submodules("json", "tool")
    >>> getattr_("tool").__name__, "tool" in dir_(), "loads" in dir_()
    ('json.tool', True, True)
    >>> getattr_("missing")
    Traceback (most recent call last):
    AttributeError: module 'json' has no attribute 'missing'
    """

    def load(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return importlib.import_module(f"{package}.{name}")

    def list_names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *names})

    return load, list_names
