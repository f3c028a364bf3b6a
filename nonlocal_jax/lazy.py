"""What is imported on first use: submodules, and packages of the extras."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType


class MissingExtraError(ImportError):
    """Raised when a package of an extra is not installed. The message says what to install."""


@contextlib.contextmanager
def extra(name: str) -> Iterator[None]:
    """Turns a package that is missing in a block of imports into an error that names the extra.

    Args:
        name: Extra of nonlocal_jax that the packages belong to.

    Raises:
        MissingExtraError: A package is not installed.

    >>> with extra("visualize"):
    ...     import no_such_package.figures
    Traceback (most recent call last):
    nonlocal_jax.lazy.MissingExtraError: no_such_package is required here and not installed:
    pip install "nonlocal_jax[visualize]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise MissingExtraError(
            f'{package} is required here and not installed: pip install "nonlocal_jax[{name}]"',
            name=package,
        ) from None


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
