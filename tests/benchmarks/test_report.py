"""The report's numbers, from results made by hand."""

import dataclasses

import pytest

from benchmarks import report
from benchmarks.cases import Case
from benchmarks.formats import number
from benchmarks.measure import SAMPLE, plan
from benchmarks.records import Record, Results
from benchmarks.targets import growth, ratio, seconds, slope, targets, temporary
from benchmarks.workload_report import first_minute, training

ENVIRONMENT = {
    "backend": "cpu",
    "versions": {"python": "3.11.7"},
    "cpu": "a CPU",
    "cores": 2,
    "memory_bytes": 8e9,
    "commit": "abc",
    "load": 0.1,
    "command": "python -m benchmarks",
}


def record(section, instantiation, n, m, competitor, direction="forward", **values):
    return dataclasses.replace(
        Record.empty(Case(section, instantiation, n, m, 7, "here"), competitor, direction, "a day"),
        **values,
    )


@pytest.fixture
def results():
    block = ("block", "concatenation", 3136, 784)
    operation = ("operation", "concatenation", 12544, 3136)
    return Results(
        ENVIRONMENT,
        [
            record(*operation, "auto", seconds=0.02, implementation="sorted", error=2e-7),
            record(*operation, "dense", seconds=0.3, error=5e-8),
            record(*operation, "auto", "both", seconds=0.04, implementation="sorted"),
            record(*operation, "dense", "both", seconds=1.2),
            record(*block, "auto", seconds=0.05, temporary_bytes=10_000_000),
            record(*block, "torch pairs", seconds=0.06, temporary_bytes=30_000_000),
            record(*block, "mmcv contiguous", seconds=9.0, temporary_bytes=15_000_000_000),
            record(*block, "mmcv channels_last", seconds=8.0, temporary_bytes=500_000_000),
            record(
                "block",
                "concatenation",
                784,
                196,
                "mmcv contiguous",
                failure="RuntimeError: no memory",
            ),
            *(
                record("growth", "dot_product", n, n // 4, "auto", seconds=1e-9 * n**2)
                for n in (300, 20, 1000)
            ),
        ],
    )


def claims(results):
    return {target.claim: target for target in targets(results)}


def test_ratios_and_what_they_meet(results):
    found = claims(results)
    slow = found["concatenation, 12544/3136, forward: dense's time over auto's"]
    assert (slow.measured, slow.met) == (pytest.approx(15), False)
    quick = found["concatenation, 12544/3136, forward + backward: dense's time over auto's"]
    assert (quick.measured, quick.met) == (pytest.approx(30), True)
    peer = found["concatenation block, 3136/784, forward: the fastest torch peer's time over ours"]
    assert (peer.measured, peer.met) == (pytest.approx(1.2), True)
    error = found["concatenation, every size, float32: auto's error over dense's"]
    assert (error.measured, error.met) == (pytest.approx(4), False)
    assert found["dot product, 12544/12544, forward: dense's time over auto's"].met is None


def test_mmcv_is_the_faster_of_its_formats(results):
    case = {"section": "block", "instantiation": "concatenation", "n": 3136}
    assert ratio(results, "mmcv", "auto", "forward", seconds, **case) == pytest.approx(160)
    assert ratio(results, "mmcv", "auto", "forward", temporary, **case) == pytest.approx(
        50
    )  # of the faster one, not the larger


def test_growth_is_sorted_and_fitted(results):
    lengths, values = growth(results, "dot_product", "auto", "forward", seconds)
    assert lengths == [20, 300, 1000]
    assert slope(lengths, values) == pytest.approx(2)
    assert claims(results)["dot product, forward: exponent of time in N"].met is False


def test_memory_below_the_resolution_does_not_flatter():
    results = Results(
        {},
        [
            record("block", "gaussian", 5, 3, name, temporary_bytes=0)
            for name in ("auto", "torch sdpa")
        ],
    )
    assert ratio(results, "torch", "auto", "forward", temporary, section="block") == 1


def test_json_keeps_everything_and_new_records_replace_old_ones(results, tmp_path):
    path = tmp_path / "results" / "cpu.json"
    results.write(path)
    read = Results.read(path)
    assert read == results
    read.put([record("growth", "dot_product", 20, 5, "auto", seconds=3.0)])
    assert len(read.records) == len(results.records)
    assert growth(read, "dot_product", "auto", "forward", seconds)[1][0] == 3.0


def test_report_is_written_with_its_picture(results, tmp_path):
    results.write(tmp_path / "results" / "cpu.json")
    project = tmp_path / "project.md"
    project.write_text("before\n<!-- benchmarks: begin -->\nold\n<!-- benchmarks: end -->\nafter\n")
    report.write(tmp_path / "results", tmp_path / "README.md", project)
    text = (tmp_path / "README.md").read_text()
    assert "| concatenation | 3136 / 784 / 7 | here | 50.0 · 60.0 · 8,000 |" in text
    assert (
        "| concatenation, 12544/3136, forward: dense's time over auto's | 15.0× | ≥ 20× | no |"
        in text
    )
    assert "| dot product | exponent | 2.00 · – · – |" in text
    assert "RuntimeError: no memory" in text
    first, *lines, last = project.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert (
        lines[3]
        == "| concatenation | 12544 | 3136 | 20.0 · 300 · – | 40.0 · 1200 · – | – · – · – |"
    )
    assert (tmp_path / "results" / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_report_without_results_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m benchmarks"):
        report.write(tmp_path, tmp_path / "README.md", tmp_path / "project.md")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (0.0123, "0.012"),
        (1.234, "1.23"),
        (15.0, "15.0"),
        (467.4, "467"),
        (9000, "9,000"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_slow_jobs_get_fewer_rounds():
    assert plan({"quick": SAMPLE, "slow": 3.0}, budget=1.0) == {"quick": 9, "slow": 3}
    assert plan({"quick": SAMPLE}, budget=60.0) == {"quick": 31}
    assert plan({}, budget=1.0) == {}


def test_training_is_reported_against_its_aims():
    results = {
        "environment": {
            "backend": "cpu",
            "cpu": "a CPU",
            "cores": 2,
            "versions": {"jax": "0.10"},
            "commit": "abc",
            "date": "a day",
            "command": "a command",
        },
        "batch_size": 128,
        "seconds": {"loop": 0.41, "bare": 0.4, "torch, contiguous": 0.2},
        "loop_over_bare_step": 1.025,
        "pipeline_over_step": 170.0,
        "torch_over_step": 0.5,
        "stall_in_steps": 1.5,
    }
    text = training(results)
    assert "| the loop's step over the bare one | 1.02× | ≤ 1.03× | yes |" in text
    assert "| cost of a checkpoint, in steps | 1.50 steps | ≤ 1 steps | no |" in text
    assert "| bare | 400 |" in text
    assert "| torch, contiguous | 200 |" in text


def test_the_first_minute_is_reported_beside_its_peers():
    results = {
        "environment": ENVIRONMENT | {"date": "a day"},
        "measures": {
            "operations": {"dot product, dense": 1.2, "gaussian, streaming": 3.5},
            "cifar": {"seconds": 12.0},
            "cifar_peer": {"seconds": 18.0},
            "load torch": {"seconds": 1.1, "peak over file": 1.06},
            "load_peer": {"seconds": 0.3},
            "attention": {"1×4096, d = 64": 0.1},
            "attention_peer": {"1×4096, d = 64": 0.085},
        },
    }
    text = first_minute(results)
    assert "without jit over the jitted call | 3.50× | ≤ 3× | no | – |" in text
    assert "to the first step | 12.0 s | ≤ 15 s | yes | 18.0 s |" in text
    assert "a file of torch.save | 1.10 s | ≤ 1.2 s | yes | 0.300 s |" in text
    assert "over the file, torch | 1.06× | ≤ 1.3× | yes | – |" in text
    assert "torch's time over ours | 0.850× | ≥ 0.8× | yes | 85.0 ms |" in text
    assert "| first checkpoint restored | – | ≤ 3 s | not measured | – |" in text
