"""The part of the report about what is compiled only, from records with known figures."""

import json

import flax.linen as nn
import jax
import pytest

from benchmarks.compiled import cases, command, programs, records, report
from nonlocal_jax.compiler import gpu

EVERY_CASE = [*cases.list_cases("tpu"), *cases.list_cases("gpu")]
MILLISECOND = 1_500_000  # cycles of a v5e


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(2)(x.mean(1))


def record(name, **figures):
    """Returns the record of the case with this name."""
    (case,) = (case for case in EVERY_CASE if case.name == name)
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
        record(f"h100/inference/{network}/8/ours/forward", temporary=398_000_000),
        record(f"h100/{softmax}/streaming/forward", temporary=17_000_000),
        record(f"h100/{softmax}/dense/forward", temporary=34_000_000),
        record("h100/operation/dot_product/3136/784/256/8/reassociated/both", temporary=7_000_000),
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
    assert measured[
        "H100: every operation, size and direction: streaming's memory over dense's"
    ] == (
        pytest.approx(0.5),
        True,
    )


def test_streaming_must_not_need_more_memory_than_dense_on_an_h100(found):
    largest = "h100/operation/embedded_gaussian/12544/12544/256/8"
    found |= by_name(
        record(f"{largest}/streaming/both", temporary=1_010_000),
        record(f"{largest}/dense/both", temporary=1_000_000),
    )
    measured = {target.claim: (target.measured, target.met) for target in report.targets(found)}
    claim = (
        "H100: embedded gaussian 12544/12544, forward + backward: streaming's memory over dense's"
    )
    assert measured[claim] == (pytest.approx(1.01), False)
    claim = "H100: every operation, size and direction: streaming's memory over dense's"
    assert measured[claim] == (pytest.approx(1.01), False)


def test_tables(found, tmp_path):
    text = report.markdown(found)
    assert "| I3D R50 32×2, inference | 8 on v5e:1x1 | ours | 10.0 | 1.00 | 10% |" in text
    assert "1 all-reduce, 1.00 MB" in text
    assert "| **streaming** | 3.00 |" in text
    assert "| flash | 1.00+ | – |" in text
    assert "| I3D R50 32×2, inference | 8 on h100 | ours | – | – | – | – | – | 398 | none |" in text
    assert "| **streaming** | 3.00 | 0 | 0 | 17.0 | 0 |" in text
    assert "| 3136 / 784 / 256 | **reassociated** | – | – | – | **7.00** | – |" in text
    head, _, inference, training = report.excerpt(found).splitlines()
    assert head == "|  | roofline, ms | ms | traffic, GB | memory, GB |"
    assert inference.startswith("| I3D R50 32×2, inference of 8 clips | 1.00 | 10.0 · – |")
    assert "| 40.0 · – | 20.0 · – |" in training
    report.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_records_are_kept(found, tmp_path):
    for platform in ("tpu", "gpu"):
        chosen = [one for one in found.values() if one.case.platform == platform]
        records.write(chosen, tmp_path / f"{platform}.json")
        assert len(json.loads((tmp_path / f"{platform}.json").read_text())) == len(chosen)
    assert records.read_all(tmp_path) == found


@pytest.mark.parametrize("section", ["operation", "training"])
def test_programs_for_a_gpu_have_memory_only(section, monkeypatch):
    """Compiled for the CPU, so that it needs no plugin."""
    monkeypatch.setattr(gpu, "h100", lambda: jax.devices("cpu")[:1])
    monkeypatch.setitem(records.COMPILERS, "gpu", "jaxlib")
    monkeypatch.setattr(programs, "_network", lambda case: (Tiny(), (3, 5)))
    name = {
        "operation": "h100/operation/embedded_gaussian/784/196/512/8/dense/both",
        "training": "h100/training/cifar/128/ours/both",
    }[section]
    (case,) = (case for case in EVERY_CASE if case.name == name)
    found = command.compiled(case)
    assert found.failure is None
    assert found.temporary > 0
    assert found.arguments > 0
    assert (found.flops, found.traffic, found.cycles_by_kind) == (0, 0, {})
    # Compiled with the options for GPUs.
    monkeypatch.setattr(gpu, "COMPILER_OPTIONS", {"no_such_option": True})
    assert "no_such_option" in command.compiled(case).failure


def test_names_of_cases_are_unique():
    names = [case.name for case in EVERY_CASE]
    assert len(set(names)) == len(names)
