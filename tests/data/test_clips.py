"""Clips depend on list, seed, epoch and number. Unreadable videos are replaced and counted."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.files import encode, remux
from PIL import Image

from nonlocal_jax.data import DataError, VideoError, annotations, augment, stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import CentreClips, TestingClips, TrainingClips, Watch, normalise
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.data.sampling import InSpace, InTime, whole
from nonlocal_jax.data.video import Video

IN_TIME, IN_SPACE = InTime(4, 2), InSpace(16, (18, 24))
TRAIN = 12  # readable videos for training; numbers 12 and 13 are damaged and without a video
DAMAGED, SOUND = 12, 13


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    numbers = {"train": TRAIN, "test": 2}
    files = {name: stand_in.make(folder / name, name, numbers=numbers) for name in stand_in.SECONDS}
    return {
        name: {split: annotations.read(file, num_classes=6) for split, file in splits.items()}
        for name, splits in files.items()
    }


@pytest.fixture(scope="module")
def source(lists):
    return TrainingClips(lists["kinetics"]["train"], IN_TIME, IN_SPACE, seed=3)


@pytest.fixture(scope="module")
def reference(source):
    """Batches that threads of one process read."""
    return first_batches(source, 7)


def first_batches(source, count, **options):
    return list(itertools.islice(training_batches(source, 4, seed=5, **options), count))


def assert_same_batches(batches, expected):
    for batch, expected_batch in zip(batches, expected, strict=True):
        assert batch.keys() == expected_batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(value, expected_batch[name])


def test_the_stand_in_has_the_variety_that_it_claims(lists):
    train = lists["kinetics"]["train"]
    assert [record.path.name for record in train.records[TRAIN:]] == ["damaged.mp4", "sound.mp4"]
    assert [record.labels for record in train.records[:TRAIN]] == [(i % 6,) for i in range(TRAIN)]
    sizes, rates = set(), set()
    for record in train.records[:TRAIN]:
        with av.open(str(record.path)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
        with Video(record.path) as video:
            sizes.add(video.read([0]).shape[1:3])
            rates.add(video.rate)
    assert len(sizes) > 2
    assert len(rates) > 2
    with Video(train.records[0].path) as video:  # stored on its side
        frame = next(video.decode([0]))[1]
        assert abs(frame.rotation) == 90
        assert video.read([0]).shape[1:3] == (frame.width, frame.height)
    for record in train.records[TRAIN:]:
        with pytest.raises(VideoError), Video(record.path):
            pass


def test_the_stand_in_is_the_same_each_time(lists, tmp_path):
    """Its files do not depend on how many there are."""
    stand_in.make(tmp_path, "kinetics", numbers={"train": 3, "test": 1})
    first_folder = lists["kinetics"]["train"].records[0].path.parent
    expected = ["classes.txt", "damaged.mp4", "sound.mp4", "stand_in.json", "test.txt"]
    expected += ["test0000.mp4", "train.txt", "train0000.mp4", "train0001.mp4", "train0002.mp4"]
    assert sorted(file.name for file in tmp_path.iterdir()) == expected
    for file in tmp_path.glob("*.mp4"):
        assert file.read_bytes() == (first_folder / file.name).read_bytes(), file.name
    lines = (first_folder / "train.txt").read_text().splitlines()
    kept = [*lines[:3], *lines[-2:]]
    assert (tmp_path / "train.txt").read_text().splitlines() == kept


@pytest.mark.parametrize("name", ["classes.txt", "train.txt", "test0000.mp4", "damaged.mp4"])
def test_the_stand_in_replaces_no_other_files(tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(FileExistsError, match=rf"{name} exists already; choose another folder"):
        stand_in.make(tmp_path, "kinetics", numbers={"train": 2, "test": 1})
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_the_stand_in_is_completed_after_an_interruption(tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    numbers = {"train": 2, "test": 1}
    with monkeypatch.context() as patch:
        patch.setattr(stand_in, "_write_unreadable", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stand_in.make(tmp_path, "kinetics", numbers=numbers)
    written = stand_in.make(tmp_path, "kinetics", numbers=numbers)["train"].stat().st_mtime_ns
    assert len(annotations.read(tmp_path / "train.txt")) == 4
    assert (
        stand_in.make(tmp_path, "kinetics", numbers=numbers)["train"].stat().st_mtime_ns == written
    )


def test_several_threads_that_make_the_stand_in(tmp_path):
    """They find what the first one wrote, as the processes of a run do."""
    numbers = {"train": 2, "test": 1}
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(stand_in.make, tmp_path, "kinetics", numbers=numbers) for _ in range(4)]
    assert len({str(future.result()) for future in made}) == 1
    assert len(annotations.read(tmp_path / "train.txt")) == 4
    assert not list(tmp_path.glob(".*"))


def test_digits_move_as_their_class_says(lists):
    """The centre of the bright pixels moves up or down."""
    for record in lists["kinetics"]["train"].records[:TRAIN]:
        with Video(record.path) as video:
            frames = video.read([2, len(video) - 3]).astype(float).max(-1)
        start, end = (np.argwhere(frame > 130)[:, 0].mean() / len(frame) for frame in frames)
        assert (end < start) == stand_in.CLASSES[record.labels[0]].endswith("up")


def test_batches_do_not_depend_on_the_reader(source, reference):
    assert_same_batches(first_batches(source, 7), reference)
    assert_same_batches(first_batches(source, 4, start=3), reference[3:])  # a resumed run
    halves = [first_batches(source, 3, rows=range(*half)) for half in ((0, 2), (2, 4))]  # hosts
    for batch, first, second in zip(reference, *halves, strict=False):
        for name, value in batch.items():
            joined = np.concatenate([first[name], second[name]])
            np.testing.assert_array_equal(value, joined)


@pytest.mark.processes
def test_batches_do_not_depend_on_the_number_of_processes(source, reference):
    assert_same_batches(first_batches(source, 4, start=1, workers=2), reference[1:5])


def test_epochs_and_seeds_have_different_clips(source):
    first, second = source.read(np.array([1, 1]), np.array([0, 1]))["inputs"]
    assert first.shape == (4, 16, 16, 3)
    assert not np.array_equal(first, second)
    reseeded = TrainingClips(source.annotations, IN_TIME, IN_SPACE, seed=4)
    third = reseeded.read(np.array([1]), np.array([0]))["inputs"][0]
    assert not np.array_equal(first, third)


def test_clips_are_those_of_the_sampling_rules(source):
    """Record 4 of epoch 2, by hand."""
    batch = source.read(np.array([4]), np.array([2]))
    shares = np.random.default_rng([3, 2, 4]).random(4)
    record = source.annotations.records[4]
    with Video(record.path) as video:
        frames = IN_TIME.clip(len(video), video.rate, shares[0])
        expected = video.read(frames, lambda h, w: IN_SPACE.window(h, w, shares[1:]))
    np.testing.assert_array_equal(batch["inputs"][0], expected)
    assert batch["labels"].tolist() == list(record.labels)


def test_unreadable_videos_are_replaced_by_random_numbers_of_the_example(source):
    batch = source.read(np.array([DAMAGED, 0, SOUND]), np.array([1, 1, 1]))
    damaged, readable, sound = batch["failure"]
    assert "damaged.mp4: not a video" in damaged
    assert readable == ""
    assert "only audio" in sound
    rng = np.random.default_rng([3, 1, DAMAGED])
    rng.random(4)  # the shares of the failed attempt
    replacement = int(rng.integers(TRAIN + 2))
    assert replacement < TRAIN
    assert batch["labels"][0] == replacement % 6
    assert batch["inputs"][0].std() > 0


def test_watch_counts_and_stops(source, reference):
    messages = []
    watch = Watch(len(source), share=0.2, say=messages.append)
    batches = list(watch(dict(batch) for batch in reference))
    assert all("failure" not in batch for batch in batches)
    assert sorted(text.split(": ")[0] for text in messages) == [
        "1 of 14 videos cannot be read",
        "2 of 14 videos cannot be read",
    ]
    both = "(damaged.*sound|sound.*damaged)"
    message = rf"(?s)2 of 14 videos cannot be read, more than 10\.0%:\n.*{both}"
    strict = Watch(len(source), share=0.1, say=messages.append)
    with pytest.raises(DataError, match=message):
        list(strict(dict(batch) for batch in reference))


def test_watch_counts_a_video_once(lists, tmp_path):
    """A file whose end is missing fails at another frame each time. A resumed run remembers it."""
    readable = lists["kinetics"]["train"].records[0].path
    cut = tmp_path / "cut.mp4"
    remux(readable, cut, options={"movflags": "+faststart"})
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) * 2 // 3])
    records = (Record(cut, (0,)), *(Record(readable, (0,)) for _ in range(3)))
    source = TrainingClips(Annotations(records, 1), IN_TIME, IN_SPACE)
    epochs = [source.read(np.arange(4), np.full(4, epoch)) for epoch in range(12)]
    assert len({batch["failure"][0] for batch in epochs} - {""}) > 1
    messages, file = [], tmp_path / "unreadable.jsonl"
    list(Watch(4, 0.25, messages.append, file)(dict(batch) for batch in epochs))
    assert len(messages) == 1
    with file.open("a") as log:
        log.write('{"record": 2, "fail')  # the run was killed while it wrote
    resumed = Watch(4, 0.25, messages.append, file)
    list(resumed(dict(batch) for batch in epochs))
    assert len(messages) == len(resumed.failed) == 1
    assert "cut.mp4" in resumed.failed[0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", {}),
        (b"\n\n", {}),
        (b'{"record": 3, "failure": "a.mp4: empty"}\n', {3: "a.mp4: empty"}),
        (b'{"record": 3, "failure": "a\xff.mp4: empty"}\n', {3: "a\ufffd.mp4: empty"}),
        (b'{"record": 3, "failurf": "x"}\n{"record": 4, "failure": "y"}\n', {4: "y"}),
        (b'null\n5\n[]\n"x"\n{}\n\xff\n{"record": 4, "failure": "y"}', {4: "y"}),
        (b'{"record": [1], "failure": "x"}\n', {}),
        (b'{"record": 1.5, "failure": "x"}\n{"record": true, "failure": "x"}\n', {}),
        (b'{"record": 10, "failure": "x"}\n{"record": -1, "failure": "x"}\n', {}),
        (b'{"record": 1, "failure": null}\n', {}),
        (b"[" * 100_000 + b"\n", {}),
        (b'{"record": ' + b"9" * 5000 + b', "failure": "x"}\n', {}),
    ],
)
def test_damaged_logs_of_unreadable_videos(tmp_path, content, expected):
    """What is damaged is ignored, and nothing recorded later is lost."""
    file = tmp_path / "unreadable-train-0.jsonl"
    file.write_bytes(content)
    messages = []
    watch = Watch(10, 0.5, messages.append, file)
    assert watch.failed == expected
    list(watch([{"record": np.array([2]), "failure": np.array(["b.mp4: empty"])}]))
    assert messages == [f"{len(expected) + 1} of 10 videos cannot be read: b.mp4: empty"]
    assert Watch(10, 0.5, messages.append, file).failed == {**expected, 2: "b.mp4: empty"}
    assert file.read_bytes().startswith(content)


@pytest.mark.parametrize("name", ["a.webm", "a.mkv", "a.mp4"])
def test_fps_counts_in_the_time_of_a_varying_rate(tmp_path, name):
    """The brightness of a frame tells its number. The file states 1000 frames a second."""
    times = np.array([0, 0.04, 0.08, 0.2, 0.3, 0.6, 0.62, 0.64, 0.66, 0.68, 1.0, 1.1])
    brightness = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20
    frames = np.broadcast_to(brightness, (12, 32, 48, 3))
    codec = "libvpx" if name == "a.webm" else "libx264"
    encode(tmp_path / name, frames, codec, rate=1000, times=times)
    videos = Annotations((Record(tmp_path / name, (0,)),), 1)
    source = TestingClips(videos, InTime(5, 1, fps=5.0), clips=2, crops="full", size=16)
    first, last, _ = source.read(0)
    # By hand: the frames shown at 0, 0.2, 0.4, 0.6 and 0.8 s.
    assert (first.mean((1, 2, 3)) / 20).round().tolist() == [0, 3, 4, 5, 9]
    # The rate is 10, so the last start that fits is frame 11 - 8, which is at 0.3 s on average.
    assert (last.mean((1, 2, 3)) / 20).round().tolist() == [4, 4, 9, 9, 11]
    batch = CentreClips(videos, InTime(3, 1, fps=2.0), 16, 16).read(np.array([0]))
    assert (batch["inputs"][0].mean((1, 2, 3)) / 20).round().tolist() == [2, 5, 11]  # from 0.1 s
    batch = TrainingClips(videos, InTime(3, 1, fps=2.0), InSpace(16, (16, 16))).read(np.array([0]))
    expected = InTime(3, 1, fps=2.0).clip(
        12, 10.0, np.random.default_rng([0, 0, 0]).random(4)[0], times
    )
    assert (batch["inputs"][0].mean((1, 2, 3)) / 20).round().tolist() == expected.tolist()


def test_a_list_without_readable_videos(tmp_path):
    (tmp_path / "empty.mp4").touch()
    broken = Annotations((Record(tmp_path / "empty.mp4", (0,)),), 1)
    reason = "empty.mp4: the file is empty"
    message = rf"(?s)too many videos cannot be read; in a row:\n  .*{reason}"
    with pytest.raises(DataError, match=message):
        TrainingClips(broken, IN_TIME, IN_SPACE).read(np.array([0]))


def test_centre_clips(lists):
    train = lists["kinetics"]["train"]
    batches = list(evaluation_batches(CentreClips(train, IN_TIME, 16, 20), 4))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.tolist() == [True] * 12 + [False] * 4  # two unreadable, two of padding
    with Video(train.records[5].path) as video:
        count = len(video)
        rows, columns = video.read([0]).shape[1:3]
        side = round(min(rows, columns) * 16 / 20)
        frames = video.read(IN_TIME.clips(count, video.rate, 1)[0])
    top, left = (rows - side) // 2 // 2 * 2, (columns - side) // 2 // 2 * 2
    expected = frames[:, top : top + side, left : left + side].mean((1, 2))
    np.testing.assert_allclose(batches[1]["inputs"][1].mean((1, 2)), expected, atol=4)


def test_views(lists, monkeypatch):
    test = lists["kinetics"]["test"]
    decoded, decode = [], Video.decode

    def record_decoding(video, indices):
        for index, frame in decode(video, indices):
            decoded.append(index)
            yield index, frame

    monkeypatch.setattr(Video, "decode", record_decoding)
    views = TestingClips(test, IN_TIME, clips=5, size=20).read(1)
    assert len(decoded) == len(set(decoded)) == len(views.frames)  # each frame once
    arrays = list(views)
    assert len(arrays) == len(views) == 5 * 3 + 1
    assert {view.shape for view in arrays} == {(4, 20, 20, 3)}
    with Video(test.records[1].path) as video:
        clips, middle = (IN_TIME.clips(len(video), video.rate, n) for n in (5, 1))
        last = video.read(clips[-1], lambda h, w: whole(h, w, 20))
        centre = video.read(middle[0], lambda h, w: whole(h, w, 20))
    np.testing.assert_array_equal(arrays[12], last[:, :20, :20])  # left, or top
    np.testing.assert_array_equal(arrays[14], last[:, -20:, -20:])
    top, left = (-(-(n - 20) // 2) for n in centre.shape[1:3])
    np.testing.assert_array_equal(arrays[15], centre[:, top : top + 20, left : left + 20])
    full = TestingClips(test, IN_TIME, clips=5, crops="full", size=20).read(1)
    assert len(full) == 6
    assert next(iter(full)).shape == (4, *last.shape[1:])


def test_labels_of_a_clip_are_the_actions_between_its_frames(lists):
    train = lists["charades"]["train"]
    source = TrainingClips(train, IN_TIME, IN_SPACE, seed=0)
    partial = 0
    for epoch in range(3):
        labels = source.read(np.arange(TRAIN), np.full(TRAIN, epoch))["labels"]
        for index, record in enumerate(train.records[:TRAIN]):
            share = np.random.default_rng([0, epoch, index]).random(4)[0]
            with Video(record.path) as video:
                frames = IN_TIME.clip(len(video), video.rate, share)
                start, end = frames[0] / video.rate, frames[-1] / video.rate
            expected = {
                action.label
                for action in record.actions
                if action.start <= end and start <= action.end
            }
            assert set(np.flatnonzero(labels[index])) == expected
            partial += expected < set(record.labels)
    assert partial > 3
    video_labels = CentreClips(train, IN_TIME, 16, 20).read(np.arange(4))["labels"]
    for row, record in zip(video_labels, train.records, strict=False):
        assert tuple(np.flatnonzero(row)) == record.labels


def test_frames_as_image_files(lists, tmp_path):
    """A video gives the same clips as its frames in PNG files, listed as by PySlowFast."""
    record = lists["charades"]["test"].records[1]
    rows = ["original_vido_id video_id frame_id path labels"]
    with Video(record.path) as video:
        frames = video.read(range(len(video)))
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png", compress_level=1)
        rows.append(f'V 0 {i} {i}.png "{"2" if i == 3 else ""}"')
    (tmp_path / "list.csv").write_text("\n".join(rows))
    images = annotations.read(tmp_path / "list.csv", num_classes=6)
    video = Annotations((record,), 6, multi_label=True)
    in_time = InTime(4, 2)
    views = [TestingClips(videos, in_time, clips=3, size=20).read(0) for videos in (images, video)]
    for from_images, from_video in zip(*views, strict=True):
        # The colours of the images were converted once more.
        assert np.abs(from_images.astype(int) - from_video).mean() < 3
    source = TrainingClips(images, in_time, IN_SPACE)
    labels = source.read(np.zeros(20, int), np.arange(20))["labels"]
    for epoch in range(20):
        share = np.random.default_rng([0, epoch, 0]).random(4)[0]
        clip = in_time.clip(len(frames), 24.0, share)
        assert bool(labels[epoch][2]) == (clip[0] <= 3 <= clip[-1])


@pytest.mark.usefixtures("as_users_see_it")
def test_normalisation_of_each_source():
    clip = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    caffe2 = (clip.astype(np.float32) - 114.75) / 57.375
    np.testing.assert_allclose(normalise(clip, "caffe2"), caffe2, rtol=1e-6)
    slowfast = (clip / 255.0 - 0.45) / 0.225
    np.testing.assert_allclose(normalise(clip, "slowfast"), slowfast, atol=1e-5)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    mmcv = (clip - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalise(clip, "mmcv"), mmcv, atol=1e-5)
    with pytest.raises(ValueError, match=r"preset must be one of 'paper', 'caffe2', .*'torch'"):
        normalise(clip, "torch")


def test_all_frames_of_a_clip_are_flipped_alike():
    clips = np.random.default_rng(0).random((64, 3, 4, 5, 3), np.float32)
    keys = augment.example_keys(jax.random.key(0), jnp.arange(64, dtype=jnp.uint32))
    flipped = np.asarray(augment.random_flip(jnp.asarray(clips), keys))
    is_mirrored = (flipped == clips[:, :, :, ::-1]).all((1, 2, 3, 4))
    is_unchanged = (flipped == clips).all((1, 2, 3, 4))
    assert np.logical_xor(is_mirrored, is_unchanged).all()
    assert 20 < is_mirrored.sum() < 44
