"""Types of command-line options that name files, for tyro.

An option of type `pathlib.Path` would turn gs://bucket/file into gs:/bucket/file, silently.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from tyro.constructors import PrimitiveConstructorSpec

from nonlocal_jax.files import AnyPath, PathLike, as_local_path, as_path
from nonlocal_jax.remote_paths import RemotePath


def _path_option(convert: Callable[[PathLike], Any]) -> PrimitiveConstructorSpec[Any]:
    def from_words(words: list[str]) -> Any:
        try:
            return convert(words[0])
        except ImportError as error:
            raise ValueError(str(error)) from error  # tyro reports it as an invalid option

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=from_words,
        is_instance=lambda instance: isinstance(instance, Path | RemotePath),
        str_from_instance=lambda instance: [str(instance)],
    )


AnyPathOption: TypeAlias = Annotated[AnyPath, _path_option(as_path)]
LocalPathOption: TypeAlias = Annotated[Path, _path_option(as_local_path)]
