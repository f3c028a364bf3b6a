"""Fixtures that read bytes as a file, and check the error of a file that is refused."""

import pytest

from nonlocal_jax.weights import FileFormatError, read


@pytest.fixture
def opened(tmp_path):
    """Reads bytes as a file whose suffix says nothing."""

    def open_bytes(content, **options):
        path = tmp_path / "weights.bin"
        path.write_bytes(content)
        return read(path, **options)

    return open_bytes


@pytest.fixture
def refused(opened):
    """Checks that a file raises an error, which must name the file and stay short."""

    def check(content, error=FileFormatError, match=None, **options):
        with pytest.raises(error, match=match) as raised:
            opened(content, **options)
        assert "weights.bin: " in str(raised.value)
        assert len(str(raised.value)) < 1000

    return check
