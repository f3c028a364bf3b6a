"""Copies of videos: their orientation and rate, and what happens to everything else on the disk."""

import contextlib
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from data.files import ORIENTATIONS, encode, remux, scene, set_display_matrix

from nonlocal_jax import files
from nonlocal_jax.data import VideoError, annotations, stand_in, transcode
from nonlocal_jax.data.__main__ import main
from nonlocal_jax.data.video import Video

SMALL = ("--shorter", "16")
SECONDS = 120  # that threads and processes may take, which is far more than they need


@pytest.fixture(scope="module")
def small_video(tmp_path_factory):
    file = tmp_path_factory.mktemp("video") / "small.mkv"
    stand_in.write(file, scene(6, 32, 48))
    return file


@pytest.fixture
def sources(tmp_path, small_video):
    """A folder with videos in a format of old cameras, and a list of them."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("a.mkv", "b.mkv", "c.mkv"):
        shutil.copy(small_video, folder / name)
    (folder / "list.txt").write_text("a.mkv 0\nb.mkv 1\nc.mkv 1\n")
    return folder


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def names(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("shorter", [48, 24])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_copies_look_as_their_original_is_shown(tmp_path, name, shorter):
    original, copy = tmp_path / f"{name}.mp4", tmp_path / "copy.mp4"
    smooth = np.indices((48, 64)).transpose(1, 2, 0) * 3
    frames = np.stack([np.concatenate([smooth, smooth[..., :1] * 0 + t], -1) for t in range(5)])
    stand_in.write(original, frames.astype(np.uint8), options={"crf": "1"})
    set_display_matrix(original, ORIENTATIONS[name][0])
    transcode.transcode(original, copy, shorter=shorter, crf=1)
    with Video(original) as video:
        height, width = video.read([0]).shape[1:3]
        step = 48 // shorter
        expected = video.read(range(5))[:, step // 2 :: step, step // 2 :: step]
    with Video(copy) as video:
        assert video.read([0]).shape[1:3] == (height // step, width // step)
        assert next(video.decode([0]))[1].rotation == 0
        assert "DISPLAYMATRIX" not in next(video.decode([0]))[1].side_data
        assert np.abs(video.read(range(5)).astype(int) - expected).mean() < 4


@pytest.mark.parametrize("gap", [1e-3, 3600.0])
def test_copies_of_extreme_rates(tmp_path, gap):
    times = np.arange(4) * gap
    encode(tmp_path / "a.mkv", scene(4, 32, 48), "mpeg4", rate=1000, times=times)
    transcode.transcode(tmp_path / "a.mkv", tmp_path / "a.mp4", shorter=32)
    with Video(tmp_path / "a.mp4") as video:
        assert len(video) == 4
        np.testing.assert_allclose(video.seconds(np.arange(4)), times, rtol=1e-3)
        assert video.rate == pytest.approx(1 / gap)


def test_copies_of_a_slow_rate_without_times(tmp_path):
    """Two of the frames have the same time, so copies are spaced evenly, if not by an hour."""
    encode(tmp_path / "a.mkv", scene(4, 32, 48), "mpeg4", rate=1000, times=np.arange(4) * 3600)

    def change(number, packet):
        packet.pts = packet.dts = 0 if number == 1 else packet.pts
        return packet

    remux(tmp_path / "a.mkv", tmp_path / "b.mkv", change)
    transcode.transcode(tmp_path / "b.mkv", tmp_path / "b.mp4", shorter=32)
    with Video(tmp_path / "b.mkv") as video:
        assert video.timeline.times is None
        assert video.rate == pytest.approx(1 / 3600)
    with Video(tmp_path / "b.mp4") as video:
        np.testing.assert_allclose(video.seconds(np.arange(4)), np.arange(4) * 1001, rtol=1e-3)


def test_copies_of_a_varying_rate_have_the_same_rate(tmp_path):
    times = np.round(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.056, 40)), 3)
    encode(tmp_path / "a.mkv", scene(40, 32, 48), "mpeg4", rate=1000, times=times)
    transcode.transcode(tmp_path / "a.mkv", tmp_path / "a.mp4", shorter=32)
    with Video(tmp_path / "a.mp4") as video:
        assert video.rate == pytest.approx(39 / (times[-1] - times[0]), rel=1e-6)


def test_partial_copies_are_removed_unless_a_process_writes_them(tmp_path):
    partial = tmp_path / ".a.mp4.0a1b2c3d.partial"
    with transcode._create_locked(partial):
        transcode._remove_if_unused(partial)
        assert files.partial_files([tmp_path / "a.mp4"]) == [partial]
    transcode._remove_if_unused(partial)
    assert not partial.exists()
    transcode._remove_if_unused(partial)  # another process was faster


def test_folders_are_scanned_and_resolved_once(tmp_path, sources, monkeypatch):
    """Not for each of a hundred thousand videos."""
    folder, scanned, resolved = tmp_path / "small", [], []
    folder.mkdir()
    left_behind = [folder / f".{name}.mp4.0a1b2c3d.partial" for name in "abc"]
    for file in left_behind:
        file.touch()
    glob, realpath = Path.glob, os.path.realpath

    def scan(path, *arguments, **options):
        scanned.append(path)
        return glob(path, *arguments, **options)

    def resolve(path, **options):
        resolved.append(Path(path))
        return realpath(path, **options)

    monkeypatch.setattr(Path, "glob", scan)
    monkeypatch.setattr(os.path, "realpath", resolve)
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 0
    assert scanned == [folder]
    assert set(resolved) <= {folder, sources, sources / "list.txt"}
    assert names(folder) == ["a.mp4", "b.mp4", "c.mp4", "list.txt"]


def test_a_finished_copy_is_not_removed_before_it_has_its_name(tmp_path, sources, monkeypatch):
    target, fsync, found = tmp_path / "a.mp4", os.fsync, []

    def remove_and_fsync(number):
        found.extend(files.partial_files([target]))
        transcode._remove_if_unused(found[0])
        fsync(number)

    monkeypatch.setattr(os, "fsync", remove_and_fsync)
    transcode.transcode(sources / "a.mkv", target, shorter=32)
    assert len(found) == 1
    assert target.is_file()


@pytest.mark.parametrize("can_lock", [True, False])
def test_a_partial_copy_that_is_removed_before_it_is_locked(tmp_path, monkeypatch, can_lock):
    partial, flock, removed = tmp_path / ".a.mp4.00000000.partial", fcntl.flock, []

    def lock_late(file, operation):
        if not removed:
            partial.unlink()
            removed.append(file)
        if not can_lock:
            raise OSError("locks are not supported")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with transcode._create_locked(partial):
        transcode._remove_if_unused(partial)
        assert partial.exists()
    assert removed


def test_threads_that_write_the_same_copy(tmp_path, monkeypatch):
    """One removes partial copies that are not in use while the other writes its own."""
    source, target = tmp_path / "a.mkv", tmp_path / "a.mp4"
    stand_in.write(source, scene(60, 32, 48))
    scaled_frames, errors = transcode._scaled_frames, []
    is_half_done, can_go_on = threading.Event(), threading.Event()

    def pause_the_first(*arguments):
        is_first = not is_half_done.is_set()
        for number, frame in enumerate(scaled_frames(*arguments)):
            if is_first and number == 55:  # the encoder gives out nothing before the 40th frame
                is_half_done.set()
                can_go_on.wait(SECONDS)
            yield frame

    def run():
        try:
            transcode.transcode(source, target, shorter=32)
        except Exception as error:
            errors.append(error)

    monkeypatch.setattr(transcode, "_scaled_frames", pause_the_first)
    first, second = (threading.Thread(target=run, daemon=True) for _ in range(2))
    first.start()
    assert is_half_done.wait(SECONDS)
    (partial,) = files.partial_files([target])
    second.start()
    second.join(SECONDS)
    assert target.exists()
    assert partial.stat().st_size > 0
    can_go_on.set()
    first.join(SECONDS)
    assert not errors
    with Video(target) as video:
        assert len(video.read(range(60))) == 60
    assert not list(tmp_path.glob(".*"))


@pytest.mark.processes
def test_processes_that_write_the_same_folder(tmp_path, sources):
    """One of two is killed while they write. The other, and the next run, are not disturbed."""
    long = np.concatenate([scene(60, 192, 256)] * 2)
    stand_in.write(sources / "a.mkv", long, options={"preset": "ultrafast"})
    folder = tmp_path / "copies"
    arguments = ["transcode", sources / "list.txt", folder, "--shorter", "192", "--threads", "1"]
    command = [sys.executable, "-m", "nonlocal_jax.data", *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        processes = []
        for _ in range(2):
            options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            processes.append(stack.enter_context(subprocess.Popen(command, **options)))
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + SECONDS
        while not list(folder.glob("*")):  # also finds names that start with a dot
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes[0].kill()
        assert processes[0].wait(SECONDS) < 0
        assert processes[1].wait(SECONDS) == 0
    assert set(names(folder)) >= {"a.mp4", "b.mp4", "c.mp4", "list.txt"}
    assert main([str(word) for word in arguments]) == 0
    assert names(folder) == ["a.mp4", "b.mp4", "c.mp4", "list.txt"]
    for name, count in (("a.mp4", 120), ("b.mp4", 6), ("c.mp4", 6)):
        with Video(folder / name) as video:
            assert len(video.read(range(count))) == count


@pytest.mark.parametrize(
    "stem", ["x" * 251, "x" * 247, "é" * 125, "走" * 83, "a[b]*c?", "-o", "a:b", "%d", "a.b.c"]
)
def test_names_of_copies(tmp_path, sources, stem, monkeypatch):
    """Names of up to 255 bytes, also of folders, and with characters that FFmpeg may act on."""
    monkeypatch.chdir(tmp_path)
    suffix = ".ts" if len(os.fsencode(stem)) > 250 else ".mkv"
    stand_in.write(tmp_path / f"video{suffix}", scene(6, 32, 48))
    (sources / stem).mkdir()
    shutil.move(tmp_path / f"video{suffix}", sources / stem / f"{stem}{suffix}")
    (sources / "list.txt").write_text(f"{stem}/{stem}{suffix} 0\n")
    folder = tmp_path / "out:put"
    assert main(["transcode", str(sources / "list.txt"), "out:put", *SMALL]) == 0
    assert names(folder / stem) == [f"{stem}.mp4"]
    (record,) = annotations.read(folder / "list.txt").records
    with Video(record.path) as video:
        assert len(video) == 6


def test_names_that_are_too_long_for_a_copy(tmp_path, sources, capsys):
    name = "x" * 252 + ".ts"  # .mp4 is longer
    stand_in.write(tmp_path / "a.ts", scene(6, 32, 48))
    (tmp_path / "a.ts").rename(sources / name)
    (sources / "list.txt").write_text(f"{name} 0\na.mkv 1\n")
    assert main(["transcode", str(sources / "list.txt"), str(tmp_path / "small"), *SMALL]) == 1
    output = capsys.readouterr().out.replace("\n", "")
    assert "File name too long" in output
    assert "x" * 252 + ".mp4" in output
    assert names(tmp_path / "small") == ["a.mp4", "list.txt"]


def test_only_a_file_is_a_finished_copy(tmp_path, sources, capsys):
    folder = tmp_path / "small"
    (folder / "a.mp4").mkdir(parents=True)
    (folder / "b.mp4").touch()
    (folder / "c.mp4").symlink_to(tmp_path / "nowhere")
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 1
    output = capsys.readouterr().out
    assert "3 could not be copied" in output
    for name in "abc":
        assert f"{name}.mp4 exists, but is not a copy of {sources / name}.mkv" in output
    assert names(folder) == ["a.mp4", "b.mp4", "c.mp4", "list.txt"]
    assert not list((folder / "a.mp4").iterdir())
    assert (folder / "list.txt").read_bytes() == b""
    with pytest.raises(IsADirectoryError, match=r"a\.mp4 is a folder; remove it"):
        transcode.transcode(sources / "a.mkv", folder / "a.mp4")


def test_copies_that_exist_are_kept_whoever_made_them(tmp_path, sources):
    folder = tmp_path / "small"
    folder.mkdir()
    stand_in.write(folder / "a.mp4", scene(6, 32, 48))
    stand_in.write(tmp_path / "elsewhere.mp4", scene(6, 32, 48))
    (folder / "b.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    before = contents(folder)
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 0
    after = contents(folder)
    assert after.keys() - before.keys() == {"c.mp4", "list.txt"}
    assert {name: after[name] for name in before} == before
    assert (folder / "b.mp4").is_symlink()


@pytest.mark.parametrize("link", ["sub", "sub/deep", "sub/a.mp4"])
def test_nothing_is_written_outside_the_folder_through_a_link(tmp_path, sources, link, capsys):
    """A link to a folder outside is refused. A link in place of a copy is not a copy."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "small"
    elsewhere.mkdir()
    (elsewhere / "precious.txt").write_text("precious")
    (sources / "sub" / "deep").mkdir(parents=True)
    for name in ("sub/a.mkv", "sub/deep/a.mkv"):
        shutil.copy(sources / "a.mkv", sources / name)
    (sources / "list.txt").write_text("sub/a.mkv 0\nsub/deep/a.mkv 0\n")
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(elsewhere / ("new" if link.endswith("mp4") else ""))
    code = main(["transcode", str(sources / "list.txt"), str(folder), *SMALL])
    assert code == (1 if link.endswith("mp4") else 2)
    assert names(elsewhere) == ["precious.txt"]
    if code == 2:
        output = capsys.readouterr().err
        assert f"{elsewhere}" in output
        assert "because of a symbolic link; remove the link" in output


def test_links_inside_of_the_folder_and_to_it(tmp_path, sources, capsys):
    real, folder = tmp_path / "real", tmp_path / "small"
    real.mkdir()
    folder.symlink_to(real)
    (real / "sub").mkdir()
    (real / "link").symlink_to(real / "sub")
    (sources / "link").mkdir()
    (sources / "sub").mkdir()
    for name in ("link/a.mkv", "sub/b.mkv", "sub/a.avi"):
        shutil.copy(sources / "a.mkv", sources / name)
    (sources / "list.txt").write_text("link/a.mkv 0\nsub/b.mkv 1\n")
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 0
    assert names(real / "sub") == ["a.mp4", "b.mp4"]
    (sources / "list.txt").write_text("link/a.mkv 0\nsub/a.avi 1\n")
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 2
    assert "would have the same copy" in capsys.readouterr().err


def test_paths_with_dots_stay_in_the_folder(tmp_path, sources):
    (sources / "lists").mkdir()
    (sources / "lists" / "list.txt").write_text("../a.mkv 0\n../lists/../b.mkv 1\n")
    folder = tmp_path / "x" / "y" / "small"
    before = contents(sources)
    assert main(["transcode", str(sources / "lists" / "list.txt"), str(folder), *SMALL]) == 0
    assert contents(sources) == before
    written = contents(tmp_path / "x")
    assert all(name.startswith("y/small/") for name in written)
    for line in written["y/small/list.txt"].decode().splitlines():
        assert f"y/small/{line.split()[0]}" in written


@pytest.mark.parametrize("name", ["list.txt", "train.csv"])
def test_lists_that_are_not_of_these_copies_are_kept(tmp_path, sources, name, capsys):
    folder, text = tmp_path / "small", (sources / "list.txt").read_text()
    if name == "train.csv":
        text = "id,actions,length\na,c001 0.00 1.00,2.0\n"
        transcode.transcode(sources / "a.mkv", sources / "a.mp4", shorter=32)
    (sources / name).write_text(text)
    folder.mkdir()
    for content in ("precious\n", text + "d.mp4 0\n", "a.mp4 1\n"):
        (folder / name).write_text(content)
        assert main(["transcode", str(sources / name), str(folder), *SMALL]) == 2
        assert f"{folder / name} exists and is not a list of these" in capsys.readouterr().err
        assert contents(folder) == {name: content.encode()}
    (folder / name).unlink()
    (folder / name).mkdir()
    assert main(["transcode", str(sources / name), str(folder), *SMALL]) == 2
    (folder / name).rmdir()
    (folder / "classes.txt").write_text("precious\n")
    assert main(["transcode", str(sources / name), str(folder), *SMALL]) == 0
    assert (folder / "classes.txt").read_text() == "precious\n"
    assert main(["transcode", str(sources / name), str(folder), *SMALL]) == 0  # its own list
    assert (folder / name).read_text() == text.replace(".mkv", ".mp4")


def test_lists_of_versions_that_wrote_no_quotes_are_replaced(tmp_path, sources):
    paths = ("long jump/a b.mkv", 'run/say "c", d.mkv', "e.mkv")
    for path in paths:
        (sources / path).parent.mkdir(exist_ok=True)
        shutil.copy(sources / "a.mkv", sources / path)
    lines = [f"{path} {number}\n" for number, path in enumerate(paths)]
    (sources / "list.txt").write_text("".join(lines))
    folder = tmp_path / "small"
    command = ["transcode", str(sources / "list.txt"), str(folder), *SMALL]
    assert main(command) == 0
    written = (folder / "list.txt").read_text()
    assert written.startswith('"long jump/a b.mp4" 0\n"run/say ""c"", d.mp4" 1\n')
    for earlier in (lines, lines[1:]):  # the first video could not be copied, and then it could
        (folder / "list.txt").write_text("".join(earlier).replace(".mkv", ".mp4"))
        assert main(command) == 0
        assert (folder / "list.txt").read_text() == written


def test_a_list_grows_when_failed_videos_are_repaired(tmp_path, sources):
    folder, whole = tmp_path / "small", (sources / "b.mkv").read_bytes()
    (sources / "b.mkv").write_bytes(whole[:100])
    command = ["transcode", str(sources / "list.txt"), str(folder), *SMALL]
    assert main(command) == 1
    assert (folder / "list.txt").read_text() == "a.mp4 0\nc.mp4 1\n"
    (sources / "b.mkv").write_bytes(whole)
    assert main(command) == 0
    assert (folder / "list.txt").read_text() == "a.mp4 0\nb.mp4 1\nc.mp4 1\n"


def test_a_list_is_replaced_not_written_through_a_link(tmp_path, sources):
    folder, other = tmp_path / "small", tmp_path / "other.txt"
    folder.mkdir()
    other.write_text("a.mp4 0\n")
    (folder / "list.txt").symlink_to(other)
    assert main(["transcode", str(sources / "list.txt"), str(folder), *SMALL]) == 0
    assert other.read_text() == "a.mp4 0\n"
    assert (folder / "list.txt").read_text() == "a.mp4 0\nb.mp4 1\nc.mp4 1\n"


def test_a_file_in_place_of_the_folder(tmp_path, sources, capsys):
    (tmp_path / "small").write_text("precious")
    assert main(["transcode", str(sources / "list.txt"), str(tmp_path / "small"), *SMALL]) == 2
    assert "small is a file; choose a folder" in capsys.readouterr().err
    assert (tmp_path / "small").read_text() == "precious"


def test_a_file_and_a_folder_of_the_same_name(tmp_path, sources, capsys):
    """The copy of a.mkv has the name of a folder that copies of other videos lie in."""
    (sources / "a.mp4").mkdir()
    shutil.copy(sources / "b.mkv", sources / "a.mp4" / "b.mkv")
    (sources / "list.txt").write_text("a.mp4/b.mkv 0\na.mkv 1\n")
    command = ["transcode", str(sources / "list.txt"), str(tmp_path / "small"), *SMALL]
    assert main([*command, "--threads", "1"]) == 1
    assert "a.mp4 exists, but is not a copy" in capsys.readouterr().out
    assert (tmp_path / "small" / "a.mp4" / "b.mp4").is_file()


@contextlib.contextmanager
def limited_file_size(size):
    """Lets writes fail, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.95, 0.999])
def test_a_full_disk(tmp_path, sources, share):
    whole, target = tmp_path / "whole.mp4", tmp_path / "small" / "a.mp4"
    transcode.transcode(sources / "a.mkv", whole, shorter=32)
    with limited_file_size(int(share * whole.stat().st_size)):  # noqa: SIM117
        with pytest.raises(VideoError, match=r"a\.mkv: cannot be copied to .*a\.mp4 \("):
            transcode.transcode(sources / "a.mkv", target, shorter=32)
    assert not list(target.parent.iterdir())


def test_an_interrupted_copy(tmp_path, sources, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(transcode, "_scaled_frames", interrupt)
    with pytest.raises(KeyboardInterrupt):
        transcode.transcode(sources / "a.mkv", tmp_path / "small" / "a.mp4")
    assert not list((tmp_path / "small").iterdir())


def test_a_damaged_source(tmp_path, sources):
    stand_in.write(sources / "whole.mp4", scene(60, 48, 64), options={"g": "10"})
    remux(sources / "whole.mp4", sources / "cut.mp4", options={"movflags": "+faststart"})
    content = (sources / "cut.mp4").read_bytes()
    (sources / "cut.mp4").write_bytes(content[: 2 * len(content) // 3])
    with pytest.raises(VideoError, match=r"cut\.mp4: frame \d+ of 60 cannot be decoded"):
        transcode.transcode(sources / "cut.mp4", tmp_path / "small" / "cut.mp4", shorter=16)
    assert not list((tmp_path / "small").iterdir())
