"""Data: what feeds the networks."""


class DataError(Exception):
    """The data is not there, or not what it should be; says what to do."""


class VideoError(DataError):
    """A file that cannot be decoded as a video: which, and why."""


__all__ = ["DataError", "VideoError"]
