"""The two errors that all readers raise."""


class FileFormatError(ValueError):
    """The file is damaged, or its format is not supported."""


class UnsafeFileError(ValueError):
    """The file asks for something that weights never need.

    Examples are a Python name outside the allowed ones, a file outside its folder, or far more
    memory than the size of the file explains.
    """
