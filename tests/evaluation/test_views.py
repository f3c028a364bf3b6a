"""Views are scored in batches, combined, and their scores are kept on disk."""

import math

import ml_dtypes
import numpy as np
import pytest

from nonlocal_jax import evaluation

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_views_are_scored_in_batches_of_one_size(batch_size):
    views, shapes = RNG.random((7, 2, 3, 3, 1)), []

    def apply(batch):
        shapes.append(batch.shape)
        return batch.mean((1, 2, 3))

    found = evaluation.score_views(apply, iter(views), batch_size)
    np.testing.assert_array_equal(found, views.mean((1, 2, 3)))
    assert set(shapes) == {(batch_size, 2, 3, 3, 1)}


def test_combining_views():
    scores = RNG.random((30, 4))
    np.testing.assert_allclose(evaluation.combine(scores), scores.mean(0))
    np.testing.assert_allclose(evaluation.combine(scores, "max"), scores.max(0))


@pytest.mark.parametrize(
    ("dtype", "mean_type"),
    [
        (bool, np.float32),
        (np.int8, np.float32),
        (np.uint16, np.float32),
        (np.uint32, np.float64),
        (np.int64, np.float64),
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (ml_dtypes.float8_e4m3fn, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
    ],
)
def test_views_of_any_type_are_combined_exactly(dtype, mean_type):
    scores = (100 * np.random.default_rng(0).random((300, 4))).astype(dtype)
    values = [[float(score) for score in column] for column in scores.T]
    mean = evaluation.combine(scores)
    assert mean.dtype == mean_type
    expected = [math.fsum(column) / 300 for column in values]
    # Each addition of float64 numbers rounds by up to eps / 2; sums of other types are exact.
    rtol = (150 if dtype == np.float64 else 4) * np.finfo(mean_type).eps
    np.testing.assert_allclose(mean, expected, rtol=rtol)
    largest = evaluation.combine(scores, "max")
    assert largest.dtype == scores.dtype
    assert [float(score) for score in largest] == [max(column) for column in values]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_nan_in_a_view_is_not_hidden(how, dtype):
    scores = np.array([[0.5, math.nan, 1], [math.nan, 0.5, 1]], dtype)
    assert np.isnan(evaluation.combine(scores, how)).tolist() == [True, True, False]


@pytest.mark.usefixtures("as_users_see_it")
def test_views_that_cannot_be_combined():
    with pytest.raises(ValueError, match=r"at least one view; got \(0, 3\)"):
        evaluation.combine(np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"shape \(views, classes\), .*; got \(3,\)"):
        evaluation.combine(np.zeros(3))
    with pytest.raises(ValueError, match="scores must be real numbers"):
        evaluation.combine(np.zeros((2, 3), complex))
    with pytest.raises(ValueError, match="at least one view; got none"):
        evaluation.score_views(lambda batch: batch, iter(()), 2)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        evaluation.score_views(lambda batch: batch, [np.zeros((1, 1, 1, 1))], 0)


def test_a_resumed_run_finds_the_scores(tmp_path):
    rows = {video: {"single": RNG.random(4), "many": RNG.random(4)} for video in range(9)}
    stored = evaluation.ScoreFolder(tmp_path, every=1e9)
    for video in (0, 1, 2):
        stored.add(video, rows[video])
    stored.fail(3, "3.mp4: is no video")
    stored.write()
    stored.write()  # there is nothing new to write
    stored.add(4, rows[4])  # the run is killed before this is written
    resumed = evaluation.ScoreFolder(tmp_path, every=0.0)
    assert sorted(resumed.found) == [0, 1, 2]
    assert resumed.failures == {3: "3.mp4: is no video"}
    assert [video in resumed for video in range(5)] == [True, True, True, True, False]
    for video in (4, 5):
        resumed.add(video, rows[video])
    resumed.fail(6, "6.mp4: neither")
    last = evaluation.ScoreFolder(tmp_path)
    assert sorted(last.found) == [0, 1, 2, 4, 5]
    for video, scores in last.found.items():
        for name, row in scores.items():
            np.testing.assert_array_equal(row, rows[video][name])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float16, ml_dtypes.bfloat16, np.float64])
def test_scores_of_any_type_are_kept(dtype, tmp_path):
    scores = np.array([0, 1, 0.5], dtype)
    stored = evaluation.ScoreFolder(tmp_path)
    stored.add(2, {"many": scores})
    stored.write()
    resumed = evaluation.ScoreFolder(tmp_path)
    for found in (stored.found[2]["many"], resumed.found[2]["many"]):
        assert found.dtype == (np.float32 if dtype is ml_dtypes.bfloat16 else dtype)
        np.testing.assert_array_equal(found.astype(np.float64), scores.astype(np.float64))


@pytest.mark.usefixtures("as_users_see_it")
def test_scores_that_cannot_be_kept(tmp_path):
    stored = evaluation.ScoreFolder(tmp_path)
    with pytest.raises(ValueError, match="scores must be real numbers"):
        stored.add(0, {"many": np.array([None, {}])})
    stored.add(0, {"many": np.zeros(2)})
    for scores in ({"single": np.zeros(2)}, {"many": np.zeros(3)}, {}):
        with pytest.raises(ValueError, match=r"same scores, by name and shape \{'many': \(2,\)\}"):
            stored.add(1, scores)
    assert sorted(stored.found) == [0]


def test_damaged_files_of_scores(tmp_path):
    stored = evaluation.ScoreFolder(tmp_path)
    stored.add(0, {"many": np.zeros(2)})
    stored.write()
    (part,) = tmp_path.glob("*.npz")
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"must be a file of scores"):
        evaluation.ScoreFolder(tmp_path)
    part.write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a file of scores"):
        evaluation.ScoreFolder(tmp_path)
    (tmp_path / "x.npz").write_bytes(b"nothing")
    part.unlink()
    with pytest.raises(ValueError, match=r"x.npz must be a file of scores"):
        evaluation.ScoreFolder(tmp_path)


def test_scores_of_a_remote_folder(remote):
    stored = evaluation.ScoreFolder(str(remote / "scores"), "0")
    assert stored.found == {}
    stored.add(4, {"views": np.array([0.25, 0.75])})
    stored.write()
    other = evaluation.ScoreFolder(remote / "scores", "1")  # of another process, which sees them
    other.fail(5, "5.mp4: is no video")
    other.write()
    together = evaluation.ScoreFolder(remote / "scores", "all")
    np.testing.assert_array_equal(together.found[4]["views"], [0.25, 0.75])
    assert together.failures == {5: "5.mp4: is no video"}
    (remote / "scores/0.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"{remote}/scores/0.npz must be a file of scores"):
        evaluation.ScoreFolder(remote / "scores")
