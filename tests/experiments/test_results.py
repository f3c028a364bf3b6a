"""Result tables of runs."""

import json

import pytest

from experiments import report


def write_run(folder, seed, accuracy, **config):
    """Writes the files of a finished run."""
    folder.mkdir()
    metrics = {"accuracy": accuracy, "loss": 0.1, "count": 450}
    record = {
        "command": f"train --seed {seed}",
        "hardware": "a device",
        "data": "digits",
        "parameters": 1234,
        "steps": 10,
        "seconds": 5.0,
        "metrics": metrics,
    }
    config = {"seed": seed, "output": str(folder), "depth": 20, **config}
    log = [
        {"step": 1, "kind": "train", "loss": 1.0, "accuracy": 0.1},
        {"step": 10, "kind": "evaluation", **metrics},
    ]
    (folder / "results.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return folder


def test_a_report_groups_seeds(tmp_path):
    runs = (
        write_run(tmp_path / "a0", 0, 0.9),
        write_run(tmp_path / "a1", 1, 0.94),
        write_run(tmp_path / "b", 0, 0.5, depth=32),
    )
    report.main(report.Config(runs, tmp_path / "out"))
    table = (tmp_path / "out" / "results.md").read_text()
    assert "| a0 | digits | 1,234 | 2 | 92.00 ± 2.83 | 10 | 5 |" in table
    assert "| b | digits | 1,234 | 1 | 50.00 | 10 | 5 |" in table
    assert "- a1: `train --seed 1`, a device" in table
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000


def test_a_report_needs_finished_runs(tmp_path):
    with pytest.raises(SystemExit, match="must be the folder of a finished run"):
        report.main(report.Config((tmp_path,), tmp_path / "out"))
    with pytest.raises(ValueError, match="runs must name at least one folder"):
        report.Config(())


def test_a_report_shows_unfinished_runs(tmp_path, capsys):
    finished = write_run(tmp_path / "a[x]", 0, 0.9)
    stopped = write_run(tmp_path / "stopped[red]", 1, 0.4)
    started = write_run(tmp_path / "started", 2, 0.1)
    (stopped / "results.json").unlink()
    rows = [{"step": step, "kind": "train", "loss": 1.0, "accuracy": 0.5} for step in (1, 1200)]
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("results.json", "metrics.jsonl"):
        (started / name).unlink()
    report.main(report.Config((stopped, finished, started), tmp_path / "out"))
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| a[x] | digits | 1,234 | 1 | 90.00 | 10 | 5 |" in text
    assert "- stopped[red]: unfinished, at step 1,200; run its command again to continue" in text
    assert "- started: unfinished, before its first logged step" in text
    printed = capsys.readouterr().out
    assert "| a[x] |" in printed
    assert "stopped[red]: unfinished" in printed
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    report.main(report.Config((started,), tmp_path / "alone"))
    assert "unfinished" in (tmp_path / "alone" / "results.md").read_text()
    assert not (tmp_path / "alone" / "curves.png").exists()


def test_a_report_needs_accuracies(tmp_path):
    run = write_run(tmp_path / "a", 0, 0.9)
    record = json.loads((run / "results.json").read_text())
    record["metrics"] = {"hit_at_1": 0.5, "loss": 0.1}
    (run / "results.json").write_text(json.dumps(record))
    with pytest.raises(
        SystemExit,
        match=r"results.json must be the results .* accuracy; got hit_at_1, loss\.",
    ):
        report.main(report.Config((run,), tmp_path / "out"))
