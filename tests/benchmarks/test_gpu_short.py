"""The short run on a GPU: its rows, budget and aims, measured on the CPU with tiny sizes."""

import dataclasses
import json

import jax
import pytest

from benchmarks import gpu_short, measure, network
from benchmarks.cases import Case, Job
from benchmarks.gpu_short import TRAINING, Row, aims, jobs, list_rows
from benchmarks.records import Record

ROWS = list_rows()
SKIPPED = "tests/ops/kernels/test_cudnn.py"  # without a GPU


def tiny_row(name):
    case = Case("operation", "embedded_gaussian", 7, 5, 3, "", batch=2)
    return Row(name, jobs(case, ("auto",), ("forward", "both")), 0.1)


@pytest.mark.processes
def test_a_row_is_kept_even_if_the_next_one_ends_the_run(tmp_path, monkeypatch):
    path, measure_row = tmp_path / "results" / "gpu-short.json", gpu_short.measure

    def measure_first(row, *arguments):
        if row.name == "second":
            raise KeyboardInterrupt
        return measure_row(row, *arguments)

    monkeypatch.setattr(gpu_short, "measure", measure_first)
    rows = [tiny_row(name) for name in ("first", "second", "third")]
    with pytest.raises(KeyboardInterrupt):
        gpu_short.run(rows, path, 100.0, backend="cpu", tests=(SKIPPED,))
    found = json.loads(path.read_text())
    assert found["left_out"] == ["second", "third"]
    assert found["tests"]["exit_code"] == 0
    assert found["tests"].get("skipped", 0) + found["tests"].get("passed", 0) > 0
    assert found["tests"]["failures"] == []
    assert found["environment"]["versions"]["jax"] == jax.__version__
    assert [record["direction"] for record in found["rows"]["first"]] == ["forward", "both"]
    for record in found["rows"]["first"]:
        assert record["failure"] is None
        assert record["seconds"] > 0
        assert record["xla_temporary_bytes"] is not None


def test_a_second_run_keeps_the_first(tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(gpu_short, "run_tests", lambda tests: {"passed": len(measured)})
    monkeypatch.setattr(gpu_short, "describe", lambda *arguments: {"versions": {}})
    monkeypatch.setattr(gpu_short, "PATH", tmp_path / "gpu-short.json")

    def count(row, workers, has_torch):
        measured.append(row.name)
        return records(row, auto=float(len(measured)))

    monkeypatch.setattr(gpu_short, "measure", count)
    gpu_short.run(ROWS[:-1], gpu_short.PATH, 100.0)
    gpu_short.run(ROWS[-1:], gpu_short.PATH, 0.0, keep=True)
    assert measured == [row.name for row in ROWS[:-1]]
    gpu_short.main(100.0, ("block/", "512"))
    again = measured[len(ROWS) - 1 :]
    assert "block/dot_product/3136/784/256" in again
    assert TRAINING not in again
    found = json.loads(gpu_short.PATH.read_text())
    assert found["tests"] == {"passed": 0}
    assert found["rows"][TRAINING][0]["seconds"] == measured.index(TRAINING) + 1
    assert found["rows"][again[0]][0]["seconds"] == len(ROWS)
    assert found["left_out"] == [ROWS[-1].name]
    with pytest.raises(SystemExit, match="only must name parts of"):
        gpu_short.main(100.0, ("no such row",))


def test_compilation_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE", 0)
    (row,) = (row for row in ROWS if row.name == TRAINING)

    class Workers:
        def ask(self, request, job, **options):
            return {"seconds": 40.0 if request == "prepare" else 0.1}

    timed = {job: Record.empty(job.case, job.competitor, "both", "a day") for job in row.jobs}
    measure.time_jobs(timed, Workers(), 1.0)
    assert [record.seconds for record in timed.values()] == [0.1] * len(row.jobs)


def test_a_job_that_fails_while_it_is_timed_keeps_the_others(monkeypatch):
    monkeypatch.setattr(measure, "PAUSE", 0)
    first, *others = tiny_row("row").jobs
    asked = []

    class Workers:
        def ask(self, request, job, **options):
            asked.append(job)
            if request == "time" and asked.count(job) > 2 and job == first:
                raise measure.JobError("no memory")
            return {"seconds": 0.01}

    timed = {
        job: Record.empty(job.case, job.competitor, job.direction, "a day")
        for job in (first, *others)
    }
    measure.time_jobs(timed, Workers(), 1.0)
    assert timed[first].failure == "no memory"
    assert [timed[job].seconds for job in others] == [0.01] * len(others)


@pytest.mark.parametrize("key", ["commit", "versions", "nvidia-smi"])
def test_rows_of_another_environment_are_not_kept(key):
    environment = {"commit": "a", "versions": {"jax": "1"}, "nvidia-smi": ["H100"], "seconds": 1}
    gpu_short.check_same(environment, environment | {"seconds": 2})
    with pytest.raises(ValueError, match=f"only from a run with the same {key}, other; that of"):
        gpu_short.check_same(environment, environment | {key: "other"})


def test_no_row_starts_after_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_short, "run_tests", lambda tests: {"passed": 1})
    monkeypatch.setattr(gpu_short, "describe", lambda *arguments: {"versions": {}})
    path = tmp_path / "gpu-short.json"
    gpu_short.run([tiny_row("first")], path, 0.0, backend="cpu")
    found = json.loads(path.read_text())
    assert (found["rows"], found["left_out"]) == ({}, ["first"])


@pytest.mark.processes
@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_it_stops_before_the_tests(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_short, "run_tests", lambda tests: pytest.fail("ran the tests"))
    monkeypatch.setattr(gpu_short, "PATH", tmp_path / "gpu-short.json")
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU that JAX can use; its backend is"):
        gpu_short.main(400.0)
    assert not gpu_short.PATH.exists()


@pytest.mark.processes
def test_tests_are_stopped_in_time(monkeypatch):
    monkeypatch.setattr(gpu_short, "TEST_SECONDS", 0.1)
    assert gpu_short.run_tests((SKIPPED,))["exit_code"] is None


def records(row, **seconds):
    """Returns the records of a row whose competitors take these seconds, in both directions."""
    return [
        dataclasses.replace(
            Record.empty(job.case, job.competitor, job.direction, "a day"),
            seconds=seconds.get(job.competitor.replace(" ", "_")),
        )
        for job in row.jobs
    ]


def test_aims():
    rows = {row.name: row for row in ROWS}
    softmax, dot_product = (
        f"operation/{name}/3136/784/256" for name in ("embedded_gaussian", "dot_product")
    )
    found = {
        softmax: records(rows[softmax], auto=1.0, cudnn=0.9, torch_cudnn=1.2),
        dot_product: records(rows[dot_product], auto=0.2, dense=0.3, torch_pairs=1.0),
        TRAINING: records(
            rows[TRAINING], auto=1.0, torch_channels_last=3.0, torch_sdpa=2.0, torch_compiled=1.6
        ),
    }
    measured = {aim.claim: (aim.measured, aim.met) for aim in aims(found)}
    claim = "embedded gaussian, 3136/784/256, forward: cuDNN's time over ours"
    assert measured.pop(claim) == (pytest.approx(0.9), False)
    claim = "I3D R50 32×2, training: the fastest torch's time over ours"
    assert measured.pop(claim) == (pytest.approx(1.6), True)
    claim = "dot product, 3136/784/256, forward: torch's time, with all pairs, over ours"
    assert measured.pop(claim) == (pytest.approx(5), True)
    claim = "embedded gaussian, 12544/3136/256, forward: cuDNN's time over ours"
    assert measured.pop(claim) == (None, None)
    assert len(measured) == 3


def test_the_rows_of_the_aims_come_first():
    assert len({row.name for row in ROWS}) == len(ROWS)
    names = [row.name for row in ROWS]
    assert names.index(TRAINING) < 4
    assert {job.dtype for row in ROWS for job in row.jobs} == {"bfloat16"}
    # An H100's cuDNN takes heads of up to 256 channels.
    widths = {job.case.d for row in ROWS for job in row.jobs if "cudnn" in job.competitor}
    assert widths == {256}


@pytest.mark.networks
def test_a_network_of_32_frames_computes_in_bfloat16():
    case = Case("network", "embedded_gaussian", 3136, 784, 256, "", (32, 32, 32), batch=3)
    lowered = network.lowered(Job(case, "auto", "forward", "bfloat16"))
    assert lowered.out_info.shape == (3, 400)
    products = [line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line]
    assert products
    assert all("xbf16>" in line for line in products)
