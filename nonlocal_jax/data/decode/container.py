"""Opening a video file, and reading its packets from the start or from a keyframe."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

from nonlocal_jax.data import VideoError
from nonlocal_jax.data.decode.conversion import check_size, ffmpeg_message
from nonlocal_jax.files import AnyPath
from nonlocal_jax.lazy import extra
from nonlocal_jax.remote_paths import RemotePath

# Demuxers that may open a file. FFmpeg has others that follow URLs and paths found in the file
# (HLS, concat), which an untrusted file must not be able to ask for.
FORMATS = (
    "mov",
    "matroska",
    "avi",
    "mpegts",
    "mpeg",
    "flv",
    "asf",
    "ogg",
    "gif",
    "ivf",
    "jpeg_pipe",
    "png_pipe",
)
# Formats of pictures by their first bytes. FFmpeg would go by the file name, and take a name that
# ends in .jpg, or has a character such as % or *, for a sequence of files.
PICTURES = {b"\xff\xd8\xff": "jpeg_pipe", b"\x89PN": "png_pipe"}
# A remote file is fetched as a whole: for the few MB of a clip, one request is faster than the many
# that FFmpeg's seeking would make, and no request can fail while it decodes.
MAX_REMOTE_BYTES = 1 << 30


class Container:
    """An open video file and its first video stream.

    Attributes:
        path: The file.
        stream: The video stream, an `av.VideoStream`. Reopening the file replaces it.
    """

    def __init__(self, path: AnyPath, threads: int, max_pixels: int) -> None:
        """Opens the file.

        Args:
            path: The file.
            threads: Threads of the decoder; 0 uses all cores.
            max_pixels: Largest number of pixels that a frame may have.

        Raises:
            VideoError: The file is missing or empty, its format is not one of `FORMATS`, it has no
                video stream that can be decoded, or it is remote and larger than
                `MAX_REMOTE_BYTES`.
        """
        self.path = path
        self._threads, self._max_pixels = threads, max_pixels
        try:
            if not path.is_file():
                raise VideoError(f"{path}: there is no such file.")
            size = path.stat().st_size
            if not size:
                raise VideoError(f"{path}: the file is empty.")
            self._content = self._fetch(path, size) if isinstance(path, RemotePath) else None
            self._format = PICTURES.get(self._first_bytes(path, 3))
        except OSError as error:
            raise VideoError(f"{path}: cannot be opened ({ffmpeg_message(error)}).") from error
        self._open()

    def _fetch(self, path: RemotePath, size: int) -> bytes:
        if size > MAX_REMOTE_BYTES:
            raise VideoError(
                f"{path}: a remote video may have up to {MAX_REMOTE_BYTES:,} bytes; "
                f"got {size:,}. Copy it to this machine, or cut it."
            )
        return path.read_bytes()

    def _first_bytes(self, path: AnyPath, count: int) -> bytes:
        if isinstance(path, RemotePath):
            return self._content[:count] if self._content else b""
        with path.open("rb") as file:
            return file.read(count)

    def _open(self) -> None:
        with extra("experiments"):
            import av

        options = {"protocol_whitelist": "file", "format_whitelist": ",".join(FORMATS)}
        # PyAV before 19 refuses a file whose title is not UTF-8 unless told to replace such bytes.
        lenient: dict[str, Any] = {}
        if int(av.__version__.split(".")[0]) < 19:
            lenient = {"metadata_errors": "replace"}
        try:
            source = f"file:{self.path}" if self._content is None else io.BytesIO(self._content)
            self._file = av.open(source, "r", format=self._format, options=options, **lenient)
        except (av.FFmpegError, ValueError) as error:
            reason = ffmpeg_message(error)
            raise VideoError(f"{self.path}: not a video that can be read ({reason}).") from error
        try:
            self.stream = self._video_stream()
            self._configure_decoder()
        except BaseException:
            self._file.close()
            raise
        self._at_start = True

    def _video_stream(self) -> Any:
        """Returns the first video stream that is not a cover picture."""
        import av

        cover = av.stream.Disposition.attached_pic
        videos = [stream for stream in self._file.streams.video if not stream.disposition & cover]
        if videos:
            return videos[0]
        kinds = {
            "a cover" if stream.type == "video" else stream.type for stream in self._file.streams
        }
        contents = ", ".join(sorted(kinds)) or "nothing"
        raise VideoError(f"{self.path}: no video stream, only {contents}.")

    def _configure_decoder(self) -> None:
        if self.codec is None:
            raise VideoError(f"{self.path}: FFmpeg has no decoder for the codec of its video.")
        check_size(self.path, self.codec.width, self.codec.height, self._max_pixels)
        self.codec.thread_count = self._threads
        if self._threads != 1:
            self.codec.thread_type = "AUTO"

    @property
    def codec(self) -> Any:
        """The decoder, an `av.VideoCodecContext`. Reopening the file replaces it."""
        return self.stream.codec_context

    @property
    def format_name(self) -> str:
        """Names of the file format, separated by commas."""
        return str(self._file.format.name)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def packets(self) -> Iterator[Any]:
        """Returns the packets of the whole stream, from the first one on."""
        # Not every format can seek to its first packet, so the file is opened again.
        if not self._at_start:
            self._file.close()
            self._open()
        self._at_start = False
        return iter(self._file.demux(self.stream))

    def packets_from(self, time: int) -> Iterator[Any]:
        """Seeks, and returns the packets from the keyframe found on.

        Args:
            time: Time of the keyframe in the stream's units. FFmpeg looks for the last keyframe at
                or before it, by the file's own index, which may be wrong.
        """
        self._file.seek(time, stream=self.stream, backward=True)
        self.codec.flush_buffers()
        self._at_start = False
        packets = self._file.demux(self.stream)
        return itertools.dropwhile(lambda packet: not packet.is_keyframe, packets)

    def frames(self) -> Iterator[Any]:
        """Decodes the whole stream, from its first packet on."""
        for packet in self.packets():
            yield from packet.decode()
