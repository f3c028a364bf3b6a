"""The part of the report about TPUs, from records with known figures."""

import json

import pytest

from benchmarks.tpu import cases, records, report

MILLISECOND = 1_500_000  # cycles of a v5e


def record(name, **figures):
    """Returns the record of the case with this name."""
    (case,) = (case for case in cases.list_cases() if case.name == name)
    size = None if case.size is None else list(case.size)
    return records.Record(
        case.topology,
        case.section,
        case.subject,
        size,
        case.batch,
        case.competitor,
        case.direction,
        "jax 0",
        **figures,
    )


def by_name(*found):
    return {one.name: one for one in found}


def cycles(**milliseconds):
    return {kind: int(time * MILLISECOND) for kind, time in milliseconds.items()}


@pytest.fixture
def found():
    network = "i3d_32x2"
    softmax = "operation/embedded_gaussian/3136/784/256/8"
    return by_name(
        record(
            f"v5e:1x1/inference/{network}/8/ours/forward",
            cycles_by_kind=cycles(products=9, copies=1),
            flops=197 * 10**9,
        ),
        record(
            f"v5e:4x4/training/{network}/64/ours/both",
            cycles_by_kind=cycles(products=31, copies=9),
            traffic=20 * 10**9,
            collectives={"all-reduce": [1, 10**6]},
        ),
        record(f"v5e:1x1/{softmax}/streaming/forward", cycles_by_kind=cycles(products=3)),
        record(f"v5e:1x1/{softmax}/dense/forward", cycles_by_kind=cycles(products=2)),
        record(f"v5e:1x1/{softmax}/flash/forward", cycles_by_kind=cycles(copies=1), unestimated=1),
    )


def test_targets(found):
    measured = {target.claim: (target.measured, target.met) for target in report.targets(found)}
    assert measured["I3D R50 32×2, inference of 8 clips"] == (pytest.approx(10), True)
    assert measured["its training step, 64 clips on 16 chips"] == (pytest.approx(40), False)
    assert measured["its training step: traffic"] == (pytest.approx(20), True)
    assert measured["inference: share of copies"] == (pytest.approx(10), False)
    # "auto" is streaming, and "flash" has no estimate of its kernel.
    claim = "embedded gaussian, every operation: auto's time over the best estimated one's"
    assert measured[claim] == (pytest.approx(1.5), False)
    claim = "dot product, every operation: auto's time over the best estimated one's"
    assert measured[claim] == (None, None)


def test_tables(found, tmp_path):
    text = report.markdown(found)
    assert "| I3D R50 32×2, inference | 8 on v5e:1x1 | ours | 10.0 | 1.00 | 10% |" in text
    assert "1 all-reduce, 1.00 MB" in text
    assert "| **streaming** | 3.00 |" in text
    assert "| flash | 1.00+ |" in text
    report.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_records_are_kept(found, tmp_path):
    records.write(found.values(), tmp_path / "tpu.json")
    assert records.read(tmp_path / "tpu.json") == found
    assert len(json.loads((tmp_path / "tpu.json").read_text())) == len(found)


def test_names_of_cases_are_unique():
    names = [case.name for case in cases.list_cases()]
    assert len(set(names)) == len(names)
    assert any(cases.is_small(case) for case in cases.list_cases())
