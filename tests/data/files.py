"""Makes the video files that tests read: every container, codec and oddity that was met."""

import struct
from fractions import Fraction

import av
import numpy as np

from nonlocal_jax.data import stand_in


def scene(count, height, width):
    """Makes frames of a moving bar over a gradient and noise; no two are equal."""
    rng = np.random.default_rng(count)
    gradient = np.linspace(0, 120, width)[:, None].astype(int)
    frames = rng.integers(0, 40, (count, height, width, 3)) + gradient
    for t in range(count):
        frames[t, : height // 2, (3 * t) % width : (3 * t) % width + 9] += 90
    return frames.astype(np.uint8)


def encode(file, frames, codec, pix_fmt="yuv420p", options=None, rate=25, times=None):
    """Writes frames with any codec of FFmpeg; times are in seconds, and rounded to milliseconds."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Coefficients a, b, c, d of display matrices, which map (x, y) to (a x + c y, b x + d y), y down:
# the four rotations, and the four mirrored ones. The filters are FFmpeg's for `-autorotate`.
ORIENTATIONS = {
    "upright": ((1, 0, 0, 1), ()),
    "clockwise": ((0, 1, -1, 0), (("transpose", "clock"),)),
    "upside_down": ((-1, 0, 0, -1), (("hflip", None), ("vflip", None))),
    "counterclockwise": ((0, -1, 1, 0), (("transpose", "cclock"),)),
    "mirrored": ((-1, 0, 0, 1), (("hflip", None),)),
    "flipped": ((1, 0, 0, -1), (("vflip", None),)),
    "transposed": ((0, 1, 1, 0), (("transpose", "cclock_flip"),)),
    "mirrored_clockwise": ((0, -1, -1, 0), (("transpose", "clock_flip"),)),
}


def set_display_matrix(file, coefficients):
    """Writes a display matrix to the track header of an MP4 file."""
    content = file.read_bytes()
    start = content.index(b"tkhd") + 44
    a, b, c, d = (round(65536 * x) for x in coefficients)
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(content[:start] + matrix + content[start + len(matrix) :])


def remux(old, new, change=lambda number, packet: packet, options=None):
    """Copies the packets of a file, each as `change` returns it; None leaves it out."""
    with av.open(str(old)) as source, av.open(str(new), "w", options=options or {}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.size]
        for number, packet in enumerate(packets):
            if (packet := change(number, packet)) is not None:
                packet.stream = stream
                target.mux(packet)


def replace_content(packet, content):
    """Returns a packet with the same times and other bytes."""
    replaced = av.Packet(content)
    for name in ("pts", "dts", "time_base", "is_keyframe"):
        setattr(replaced, name, getattr(packet, name))
    return replaced


def cut(file, first, source=None, muxer=None, **options):
    """Writes a file that starts at packet `first`; "keyframe" is the second keyframe."""
    whole = file.with_name(f"whole_{file.name}")
    if source is None:
        stand_in.write(
            whole, scene(60, 48, 64), options={"sc_threshold": "0", "g": "15", **options}
        )
    else:
        FILES[source](whole)
    if first == "keyframe":
        with av.open(str(whole)) as container:
            is_keyframe = [packet.is_keyframe for packet in container.demux(video=0)]
        first = [number for number, is_key in enumerate(is_keyframe) if is_key][1]
    remux(whole, file, lambda number, packet: packet if number >= first else None, muxer)


def hidden_packet(file):
    """Writes a file whose packet 7 is never shown, although others are predicted from it."""
    whole = file.with_name(f"whole_{file.name}")
    encode(whole, scene(30, 48, 64), "libvpx", options={"g": "20", "deadline": "realtime"})

    def change(number, packet):
        if number != 7:
            return packet
        content = bytes(packet)
        return replace_content(packet, bytes([content[0] & 0xEF]) + content[1:])

    remux(whole, file, change)


def timed_as_decoded(file, source="open_gop.mp4"):
    """Writes a file whose display times are decoding times, as converting from AVI makes them."""
    whole = file.with_name(f"whole_{file.stem}.mp4")
    FILES[source](whole)

    def change(number, packet):
        packet.pts = packet.dts
        return packet

    remux(whole, file, change)


def short_groups(file):
    """Writes keyframes that follow each other faster than frames are reordered."""
    with av.open(str(file), "w") as container:
        options = {
            "forced-idr": "1",
            "x264-params": "bframes=3:b-adapt=0:b-pyramid=normal:keyint=40",
        }
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height = 64, 48
        for number, pixels in enumerate(scene(50, 48, 64)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pict_type = 1 if 20 <= number < 26 else 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def cover_and_video(file):
    """Writes a file with a cover picture before the video."""
    with av.open(str(file), "w") as container:
        cover = container.add_stream("mjpeg", rate=25)
        cover.width, cover.height, cover.pix_fmt = 96, 80, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 64, 48
        container.mux(cover.encode(av.VideoFrame.from_ndarray(scene(1, 80, 96)[0], format="rgb24")))
        for pixels in scene(20, 48, 64):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def shown_late(file, pause=20):
    """Writes a pause after frame 30, which the evenly spaced decoding times do not show."""
    stand_in.write(file.with_name("steady.mp4"), scene(60, 48, 64), options={"g": "10", "bf": "2"})

    def change(number, packet):
        seconds = packet.pts * packet.time_base
        packet.pts += round(pause / 25 / packet.time_base) if seconds * 25 > 30 else 0
        return packet

    remux(file.with_name("steady.mp4"), file, change)


IRREGULAR = np.cumsum(np.random.default_rng(1).uniform(0.01, 0.12, 50)).tolist()
FILES = {
    "long_gop.mp4": lambda f: stand_in.write(f, scene(70, 48, 64)),
    "no_b_frames.mp4": lambda f: stand_in.write(
        f, scene(40, 48, 64), options={"bf": "0", "g": "15"}
    ),
    "open_gop.mp4": lambda f: stand_in.write(
        f,
        scene(60, 48, 64),
        options={"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0"},
    ),
    "all_key.mp4": lambda f: stand_in.write(f, scene(20, 48, 64), options={"g": "1"}),
    "every_other_key.mp4": lambda f: stand_in.write(
        f, scene(21, 48, 64), options={"g": "2", "bf": "1"}
    ),
    "intra_refresh.mp4": lambda f: stand_in.write(
        f, scene(50, 48, 64), options={"x264-params": "intra-refresh=1:keyint=12"}
    ),
    "odd.mp4": lambda f: stand_in.write(f, scene(30, 45, 67), options={"g": "8"}),
    "irregular.mp4": lambda f: stand_in.write(
        f, scene(50, 48, 64), times=IRREGULAR, options={"g": "10"}
    ),
    "irregular.mkv": lambda f: stand_in.write(
        f, scene(50, 48, 64), times=IRREGULAR, options={"g": "10"}
    ),
    "turned.mp4": lambda f: stand_in.write(f, scene(20, 48, 64), rotation=90),
    "upside_down.mp4": lambda f: stand_in.write(f, scene(20, 48, 64), rotation=180),
    "turned_back.mp4": lambda f: stand_in.write(f, scene(20, 48, 64), rotation=-90),
    "stream.ts": lambda f: stand_in.write(f, scene(40, 48, 64), options={"g": "10"}),
    "b_frames.avi": lambda f: stand_in.write(f, scene(40, 48, 64), options={"g": "10"}),
    "mpeg4.avi": lambda f: encode(f, scene(40, 48, 64), "mpeg4", options={"g": "12"}),
    "mpeg2.mpg": lambda f: encode(
        f, scene(40, 48, 64), "mpeg2video", options={"g": "12", "bf": "2"}
    ),
    "odd.webm": lambda f: encode(
        f, scene(30, 45, 67), "libvpx-vp9", options={"g": "10", "deadline": "realtime"}
    ),
    "tiny.mkv": lambda f: encode(f, scene(5, 1, 1), "ffv1", "bgr0"),
    "one.mp4": lambda f: stand_in.write(f, scene(1, 48, 64)),
    "hevc.mp4": lambda f: encode(
        f,
        scene(40, 48, 64),
        "libx265",
        options={"x265-params": "keyint=12:temporal-layers=1:log-level=none"},
    ),
    "hidden.webm": hidden_packet,
    "short_groups.mp4": short_groups,
    "timed_as_decoded.mp4": timed_as_decoded,
    "timed_as_decoded.mkv": timed_as_decoded,
    "mpeg4_b_frames.avi": lambda f: encode(
        f, scene(40, 48, 64), "mpeg4", options={"g": "12", "bf": "2"}
    ),
    "interlaced.mp4": lambda f: stand_in.write(
        f, scene(40, 64, 64), options={"flags": "+ildct+ilme", "x264-params": "tff=1", "g": "10"}
    ),
    "ten_bit.mp4": lambda f: encode(f, scene(40, 48, 64), "libx264", "yuv420p10le", {"g": "10"}),
    "turning.gif": lambda f: encode(f, scene(12, 48, 64), "gif", "rgb8"),
    "cover.mp4": cover_and_video,
    "shown_late.mp4": shown_late,
    "cut.mp4": lambda f: cut(f, 5, bf="0"),
    "cut.mkv": lambda f: cut(f, 5, bf="0"),
    "cut_b_frames.mp4": lambda f: cut(f, 7),
    "cut_b_frames.mkv": lambda f: cut(f, 7),
    "cut_open_gop.mkv": lambda f: cut(f, "keyframe", **{"x264-params": "open-gop=1"}),
    "cut_open_gop.mp4": lambda f: cut(f, "keyframe", **{"x264-params": "open-gop=1"}),
    "cut_without_edits.mp4": lambda f: cut(
        f, "keyframe", muxer={"use_editlist": "0"}, **{"x264-params": "open-gop=1"}
    ),
    "cut_in_refresh.mkv": lambda f: cut(f, 7, **{"x264-params": "intra-refresh=1"}),
    "cut_mpeg2.ts": lambda f: cut(f, 5, "mpeg2.mpg"),
}
