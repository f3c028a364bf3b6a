"""Clips depend on list, seed, epoch and number alone; what cannot be read is replaced, counted, and stops the run."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data.files import remux

from nonlocal_jax.data import DataError, VideoError, annotations, augment, stand_in
from nonlocal_jax.data.annotations import Annotations, Record
from nonlocal_jax.data.clips import CentreClips, TestingClips, TrainingClips, Watch, normalise
from nonlocal_jax.data.pipeline import evaluation_batches, training_batches
from nonlocal_jax.data.sampling import InSpace, InTime, whole
from nonlocal_jax.data.video import Video

IN_TIME, IN_SPACE = InTime(4, 2), InSpace(16, (18, 24))


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_in")
    return {
        kind: {split: annotations.read(file, num_classes=6) for split, file in made.items()}
        for kind in ("kinetics", "charades")
        for made in [stand_in.make(folder / kind, kind, numbers={"train": 12, "test": 4})]
    }


@pytest.fixture(scope="module")
def source(lists):
    return TrainingClips(lists["kinetics"]["train"], IN_TIME, IN_SPACE, seed=3)


def batches(source, count, **options):
    return list(itertools.islice(training_batches(source, 4, seed=5, **options), count))


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])


def test_the_stand_in_is_what_it_says(lists):
    train = lists["kinetics"]["train"]
    assert [record.path.name for record in train.records[-2:]] == ["damaged.mp4", "sound.mp4"]
    assert [record.labels for record in train.records[:12]] == [(i % 6,) for i in range(12)]
    sizes, rates = set(), set()
    for record in train.records[:12]:
        with Video(record.path) as video:
            assert video._stream.codec_context.name == "h264"
            sizes.add(video.read([0]).shape[1:3])
            rates.add(video.rate)
    assert len(sizes) > 2
    assert len(rates) > 2
    with Video(train.records[0].path) as video:  # turned: it is stored on its side
        frame = next(video.decode([0]))[1]
        assert abs(frame.rotation) == 90
        assert video.read([0]).shape[1:3] == (frame.width, frame.height)
    for record in train.records[12:]:
        with pytest.raises(VideoError), Video(record.path):
            pass


def test_the_stand_in_is_the_same_each_time(lists, tmp_path):
    again = stand_in.make(tmp_path, "kinetics", numbers={"train": 12, "test": 4})
    first = lists["kinetics"]["train"].records[0].path.parent
    names = sorted(file.name for file in first.iterdir())
    assert names == sorted(file.name for file in tmp_path.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / name).read_bytes(), name
    assert again["train"].parent == tmp_path


def test_digits_move_as_their_class_says(lists):
    """The middle of what is bright goes up, or down, in the frames of a file."""
    for record in lists["kinetics"]["train"].records[:12]:
        with Video(record.path) as video:
            frames = video.read([2, len(video) - 3]).astype(float).max(-1)
        rows = [(np.argwhere(frame > 130)[:, 0]).mean() / len(frame) for frame in frames]
        assert (rows[1] < rows[0]) == stand_in.CLASSES[record.labels[0]].endswith("up")


def test_the_same_whatever_reads_it(source):
    threads = batches(source, 7)
    assert_same(threads, batches(source, 7))
    assert_same(threads[3:], batches(source, 4, start=3))  # resumed
    assert_same(threads[:5], batches(source, 5, workers=2))  # by processes
    rows = [batches(source, 3, rows=range(*half)) for half in ((0, 2), (2, 4))]  # by hosts
    for whole_batch, first, second in zip(threads, *rows, strict=False):
        for name in whole_batch:
            np.testing.assert_array_equal(
                whole_batch[name], np.concatenate([first[name], second[name]])
            )


def test_each_epoch_and_seed_has_clips_of_its_own(source):
    once, again = source.read(np.array([1, 1]), np.array([0, 1]))["inputs"]
    assert not np.array_equal(once, again)
    other = TrainingClips(source.annotations, IN_TIME, IN_SPACE, seed=4).read(
        np.array([1]), np.array([0])
    )["inputs"][0]
    assert not np.array_equal(once, other)
    assert once.shape == (4, 16, 16, 3)


def test_clips_are_what_sampling_says(source):
    """Record 4 of epoch 2, by hand."""
    read = source.read(np.array([4]), np.array([2]))
    shares = np.random.default_rng([3, 2, 4]).random(4)
    record = source.annotations.records[4]
    with Video(record.path) as video:
        frames = IN_TIME.clip(len(video), video.rate, shares[0])
        expected = video.read(frames, lambda h, w: IN_SPACE.window(h, w, shares[1:]))
    np.testing.assert_array_equal(read["inputs"][0], expected)
    assert read["labels"].tolist() == list(record.labels)


def test_what_cannot_be_read_is_replaced_by_its_own_random_numbers(source):
    damaged, sound = 12, 13
    read = source.read(np.array([damaged, 0, sound]), np.array([1, 1, 1]))
    assert [
        "damaged.mp4: no video" in read["failure"][0],
        read["failure"][1],
        "only audio" in read["failure"][2],
    ] == [
        True,
        "",
        True,
    ]
    rng = np.random.default_rng([3, 1, damaged])
    rng.random(4)
    instead = int(rng.integers(14))
    assert instead < 12
    assert read["labels"][0] == instead % 6
    assert read["inputs"][0].std() > 0


def test_watch_counts_and_stops(source):
    said = []
    watch = Watch(len(source), share=0.2, say=said.append)
    seen = list(itertools.islice(watch(training_batches(source, 4, seed=5)), 12))
    assert all("failure" not in batch for batch in seen)
    assert sorted(text.split(": ")[0] for text in said) == [
        "1 of 14 videos cannot be read",
        "2 of 14 videos cannot be read",
    ]
    with pytest.raises(
        DataError,
        match=r"(?s)2 of 14 videos cannot be read, more than 10\.0%:\n.*(damaged.*sound|sound.*damaged)",
    ):
        list(
            itertools.islice(
                Watch(len(source), 0.1, said.append)(training_batches(source, 4, seed=5)), 12
            )
        )


def test_watch_counts_a_video_once(source, lists, tmp_path):
    """A file whose end is missing fails at another frame each time; and a run that goes on has not forgotten."""
    whole = lists["kinetics"]["train"].records[0].path
    remux(whole, tmp_path / "cut.mp4", options={"movflags": "+faststart"})
    content = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) * 2 // 3])
    records = (Record(tmp_path / "cut.mp4", (0,)), *(Record(whole, (0,)) for _ in range(3)))
    cut = TrainingClips(Annotations(records, 1), IN_TIME, IN_SPACE)
    epochs = [cut.read(np.arange(4), np.full(4, epoch)) for epoch in range(12)]
    assert len({batch["failure"][0] for batch in epochs} - {""}) > 1
    said, file = [], tmp_path / "unreadable.jsonl"
    list(Watch(4, 0.25, said.append, file)(dict(batch) for batch in epochs))
    assert len(said) == 1
    with file.open("a") as out:
        out.write('{"record": 2, "fail')  # a kill in between
    again = Watch(4, 0.25, said.append, file)
    list(again(dict(batch) for batch in epochs))
    assert len(said) == len(again.failed) == 1
    assert "cut.mp4" in again.failed[0]


def test_nothing_but_broken_videos(tmp_path):
    (tmp_path / "empty.mp4").touch()
    broken = Annotations((Record(tmp_path / "empty.mp4", (0,)),), 1)
    with pytest.raises(
        DataError,
        match=r"(?s)too many videos cannot be read; in a row:\n  .*empty.mp4: the file is empty",
    ):
        TrainingClips(broken, IN_TIME, IN_SPACE).read(np.array([0]))


def test_the_middle_clip_and_what_has_none(lists):
    train = lists["kinetics"]["train"]
    middle = list(evaluation_batches(CentreClips(train, IN_TIME, 16, 20), 4))
    masks = np.concatenate([batch["mask"] for batch in middle])
    assert masks.tolist() == [True] * 12 + [False] * 4  # two broken, two to fill the batch
    with Video(train.records[5].path) as video:
        count = len(video)
        rows, columns = video.read([0]).shape[1:3]
        side = round(min(rows, columns) * 16 / 20)
        frames = video.read(IN_TIME.clips(count, video.rate, 1)[0])
    top, left = (rows - side) // 2 // 2 * 2, (columns - side) // 2 // 2 * 2
    expected = frames[:, top : top + side, left : left + side].mean((1, 2))
    np.testing.assert_allclose(middle[1]["inputs"][1].mean((1, 2)), expected, atol=4)


def test_views(lists, monkeypatch):
    source = TestingClips(lists["kinetics"]["test"], IN_TIME, clips=5, size=20)
    decoded = []
    decode = Video.decode
    monkeypatch.setattr(
        Video,
        "decode",
        lambda self, indices: (
            (i, frame) for i, frame in decode(self, indices) if decoded.append(i) or True
        ),
    )
    views = source.read(1)
    assert len(decoded) == len(set(decoded)) == len(views.frames)  # each frame once
    found = list(views)
    assert len(found) == len(views) == 5 * 3 + 1
    assert {view.shape for view in found} == {(4, 20, 20, 3)}
    with Video(lists["kinetics"]["test"].records[1].path) as video:
        clips, middle = (IN_TIME.clips(len(video), video.rate, n) for n in (5, 1))
        last = video.read(clips[-1], lambda h, w: whole(h, w, 20))
        centre = video.read(middle[0], lambda h, w: whole(h, w, 20))
    np.testing.assert_array_equal(found[12], last[:, :20, :20])  # left, or top
    np.testing.assert_array_equal(found[14], last[:, -20:, -20:])
    rows, columns = (-(-(n - 20) // 2) for n in centre.shape[1:3])
    np.testing.assert_array_equal(found[15], centre[:, rows : rows + 20, columns : columns + 20])
    full = TestingClips(lists["kinetics"]["test"], IN_TIME, clips=5, crops="full", size=20).read(1)
    assert len(full) == 6
    assert next(iter(full)).shape == (4, *last.shape[1:])


def test_labels_of_a_clip_are_those_that_are_seen_in_it(lists):
    train = lists["charades"]["train"]
    source = TrainingClips(train, IN_TIME, IN_SPACE, seed=0)
    partial = 0
    for epoch in range(3):
        read = source.read(np.arange(12), np.full(12, epoch))
        for index in range(12):
            record, share = (
                train.records[index],
                np.random.default_rng([0, epoch, index]).random(4)[0],
            )
            with Video(record.path) as video:
                frames = IN_TIME.clip(len(video), video.rate, share)
                start, end = frames[0] / video.rate, frames[-1] / video.rate
            seen = {
                action.label
                for action in record.actions
                if action.start <= end and start <= action.end
            }
            assert set(np.flatnonzero(read["labels"][index])) == seen
            partial += seen < set(record.labels)
    assert partial > 3
    of_videos = CentreClips(train, IN_TIME, 16, 20).read(np.arange(4))["labels"]
    assert [tuple(np.flatnonzero(row)) for row in of_videos] == [
        record.labels for record in train.records[:4]
    ]


def test_frames_as_image_files(lists, tmp_path):
    """A video, and its frames as PNG files in PySlowFast's list, give the same clips."""
    import matplotlib.image

    record = lists["charades"]["test"].records[1]
    rows = ["original_vido_id video_id frame_id path labels"]
    with Video(record.path) as video:
        frames = video.read(range(len(video)))
    for i, frame in enumerate(frames):
        matplotlib.image.imsave(tmp_path / f"{i}.png", frame)
        rows.append(f'V 0 {i} {i}.png "{"2" if i == 3 else ""}"')
    (tmp_path / "list.csv").write_text("\n".join(rows))
    images = annotations.read(tmp_path / "list.csv", num_classes=6)
    one = Annotations((record,), 6, multi_label=True)
    clips = [TestingClips(found, InTime(4, 2), clips=3, size=20).read(0) for found in (images, one)]
    for ours, theirs in zip(*clips, strict=True):
        assert np.abs(ours.astype(int) - theirs).mean() < 3  # a colour conversion more
    seen = TrainingClips(images, InTime(4, 2), IN_SPACE).read(np.zeros(20, int), np.arange(20))[
        "labels"
    ]
    starts = [
        InTime(4, 2).clip(len(frames), 24.0, np.random.default_rng([0, epoch, 0]).random(4)[0])
        for epoch in range(20)
    ]
    assert [bool(row[2]) for row in seen] == [clip[0] <= 3 <= clip[-1] for clip in starts]


def test_normalisation_of_each_source():
    clip = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        normalise(clip, "caffe2"), (clip.astype(np.float32) - 114.75) / 57.375, rtol=1e-6
    )
    np.testing.assert_allclose(
        normalise(clip, "slowfast"), (clip / 255.0 - 0.45) / 0.225, atol=1e-5
    )
    with pytest.raises(
        ValueError, match="source must be one of 'caffe2', 'slowfast', 'mmcv'; got 'torch'"
    ):
        normalise(clip, "torch")


def test_a_flip_is_of_all_frames():
    clips = np.random.default_rng(0).random((64, 3, 4, 5, 3), np.float32)
    keys = augment.example_keys(jax.random.key(0), jnp.arange(64, dtype=jnp.uint32))
    flipped = np.asarray(augment.random_flip(jnp.asarray(clips), keys))
    mirrored = [
        np.array_equal(new, old[:, :, ::-1]) for new, old in zip(flipped, clips, strict=True)
    ]
    same = [np.array_equal(new, old) for new, old in zip(flipped, clips, strict=True)]
    assert np.logical_xor(mirrored, same).all()
    assert 20 < sum(mirrored) < 44
