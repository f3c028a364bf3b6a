"""Atomic writes: readers, and processes killed halfway, find the old file or the new one."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same directory, which replaces `path` when the block succeeds.

    The contents are flushed to disk before the rename. If the block raises, the temporary file is
    removed and `path` keeps what it had.

    Args:
        path: File to create or replace. Its directory must exist.

    Yields:
        The path to write to. Its name starts with a dot and ends in ".partial", so it matches no
        file type.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp(), "notes.txt")
    >>> with atomic_write(file) as partial:
    ...     _ = partial.write_text("complete")
    >>> file.read_text(), len(list(file.parent.iterdir()))
    ('complete', 1)
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
