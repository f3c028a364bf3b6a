"""Data: what feeds the networks."""


class DataError(Exception):
    """The data is not there, or not what it should be; says what to do."""


__all__ = ["DataError"]
