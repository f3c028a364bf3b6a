"""Result tables of finished runs, and what all command lines share."""

import dataclasses
import json

import pytest

from experiments import report
from experiments.shared import command_line
from nonlocal_jax import training


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


@pytest.mark.parametrize("error", command_line.TRAINING_ERRORS)
def test_training_errors_are_one_printed_line(error):
    with (
        pytest.raises(SystemExit, match=r"^error: it failed\. Try again\.$"),
        command_line.exit_on(*command_line.TRAINING_ERRORS, hint=" Try again."),
    ):
        raise error("it failed.")
    with pytest.raises(KeyError), command_line.exit_on(training.RunError):
        raise KeyError("other errors pass")


def test_settings_leave_out_the_excluded_fields():
    config = dataclasses.make_dataclass("Config", [("seed", int), ("dry_run", bool)])(3, True)
    assert command_line.settings(config, excluded=("dry_run",)) == {"seed": 3}
