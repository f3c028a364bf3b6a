"""Result tables of runs."""

import json

import pytest

from experiments import report
from experiments.shared import results


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


@pytest.mark.parametrize("half", ['{"step": 1201, "ki', "{", '{"step": 1201, "kind": "train"'])
def test_half_written_last_lines(half, tmp_path):
    """A run that was killed, or still runs, may leave one."""
    run = write_run(tmp_path / "run", 0, 0.9)
    (run / "results.json").unlink()
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1200, "kind": "train", "loss": 0.5, "accuracy": 0.6}\n' + half)
    assert [row["step"] for row in results.read_log(run, "train")] == [1, 1200]
    report.main(report.Config((run,), tmp_path / "out"))
    assert "run: unfinished, at step 1,200" in (tmp_path / "out" / "results.md").read_text()
    with (run / "metrics.jsonl").open("a") as log:
        log.write("\n")
    with pytest.raises(SystemExit, match=r"got \{.* in line 4\. Delete the line"):
        report.main(report.Config((run,), tmp_path / "out"))


def test_a_last_line_without_its_end_counts(tmp_path):
    run = write_run(tmp_path / "run", 0, 0.9)
    log = run / "metrics.jsonl"
    log.write_text(log.read_text().removesuffix("\n"))
    assert [row["step"] for row in results.read_log(run, "evaluation")] == [10]


def test_a_report_shows_unfinished_runs_with_several_classes_per_video(tmp_path, monkeypatch):
    """Their logs have no accuracy."""
    kinetics, charades = (write_run(tmp_path / name, 0, 0.9) for name in ("kinetics", "charades"))
    (charades / "results.json").unlink()
    log = [
        {"step": 1, "kind": "train", "loss": 1.0, "hit_at_1": 0.1},
        {"step": 1, "kind": "evaluation", "loss": 1.0, "hit_at_1": 0.1},
    ]
    (charades / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    figures = []
    monkeypatch.setattr(results, "save_figure", lambda figure, file: figures.append(figure))
    report.main(report.Config((kinetics, charades), tmp_path / "out"))
    text = (tmp_path / "out" / "results.md").read_text()
    assert "- charades: unfinished, at step 1; run its command again" in text
    (figure,) = figures
    losses, accuracies = ([line.get_label() for line in ax.lines] for ax in figure.axes)
    assert accuracies == ["kinetics, training", "kinetics, held out"]
    assert losses == [*accuracies, "charades, training", "charades, held out"]
    assert [label.get_text() for label in figure.axes[1].get_legend().get_texts()] == losses


def test_a_report_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "a", 0, 0.9)
    (tmp_path / "out" / "results.md").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"error: .*directory: '.*results\.md'"):
        report.main(report.Config((run,), tmp_path / "out"))


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
