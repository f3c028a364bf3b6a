"""What all command lines share: grouped help, flags, suggestions, and what is printed."""

import dataclasses
import importlib
import io
import re
import sys

import pytest

import experiments
from experiments import charades, cifar, kinetics, predict, report, toy_video
from experiments.shared import command_line, recipes
from experiments.shared.command_line import PlainConsole, parse
from nonlocal_jax import training
from nonlocal_jax.lazy import MissingExtraError

EXPERIMENTS = {
    "kinetics": (kinetics.Config, recipes.GROUPS, ()),
    "charades": (charades.Config, recipes.GROUPS, ()),
    "cifar": (cifar.Config, cifar.GROUPS, ()),
    "toy_video": (toy_video.Config, toy_video.GROUPS, ()),
    "predict": (predict.Config, predict.GROUPS, ("a.mp4", "--weights", "b.pkl")),
    "report": (report.Config, report.GROUPS, ("runs/a",)),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_help_is_grouped(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    config, groups, _ = EXPERIMENTS[name]
    with pytest.raises(SystemExit) as stop:
        parse(config, groups, name, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: python -m experiments.{name} ")
    assert config.__doc__ in shown
    # Without a terminal, the boxes may be drawn in ASCII.
    titles = re.findall(r"^(?:╭─)? (\S.*) options [ ─╮]+$", shown, re.MULTILINE)
    assert titles == [title for title in groups if title]
    flags = re.findall(r"^[│ ] +(--[a-z0-9.-]+)", shown, re.MULTILINE)
    assert ", --no-" not in shown
    assert len(set(flags)) == len(flags) > 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_is_an_option_with_its_default(name):
    config, groups, words = EXPERIMENTS[name]
    parsed = parse(config, groups, name, words)
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            assert getattr(parsed, field.name) == field.default, field.name
    covered = {field.name for group in groups.values() for field in dataclasses.fields(group)}
    own = {field.name for field in dataclasses.fields(config)}
    assert own - covered <= set(groups)


def test_options_of_all_groups():
    words = ["--recipe", "i3d_r50_32x2", "--leave-out", "--dtype", "bfloat16", "--steps", "3"]
    parsed = parse(kinetics.Config, recipes.GROUPS, "kinetics", [*words, "--clips", "2"])
    assert parsed == kinetics.Config(
        recipe="i3d_r50_32x2", leave_out=True, dtype="bfloat16", steps=3, clips=2
    )
    parsed = parse(toy_video.Config, toy_video.GROUPS, "toy_video", ["--scene.size", "20"])
    assert parsed == toy_video.Config(scene=toy_video.Scene(size=20))


@pytest.mark.parametrize(
    ("words", "remat", "decay_biases"),
    [
        (["--remat", "--no-decay-biases"], True, False),
        (["--no-remat", "--decay-biases"], False, True),
        (["--remat", "--no-remat"], False, True),
        (["--no-remat", "--remat"], True, True),
        (["--no_decay_biases", "--decay_biases"], False, True),
    ],
)
def test_both_flags_of_a_switch_are_accepted(words, remat, decay_biases):
    parsed = parse(cifar.Config, cifar.GROUPS, "cifar", words)
    assert (parsed.remat, parsed.decay_biases) == (remat, decay_biases)


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("cifar", ["--batch-size", "0"], r"^error: batch_size must be at least 1; got 0\.$"),
        ("kinetics", ["--topology", "v5e:2x2"], "^error: --topology must come with --dry-run"),
        ("report", [], "^error: runs must name at least one folder"),
    ],
)
def test_wrong_values_are_one_line(name, words, message):
    config, groups, _ = EXPERIMENTS[name]
    with pytest.raises(SystemExit, match=message):
        parse(config, groups, name, words)


@pytest.mark.usefixtures("as_users_see_it")
def test_a_wrong_value_of_a_part(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(toy_video.Config, toy_video.GROUPS, "toy_video", ["--scene.size", "1"])
    assert stop.value.code == 2
    assert "Error parsing scene: size must be at least 8" in capsys.readouterr().err


def test_a_mistyped_flag_suggests_the_right_one(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(cifar.Config, cifar.GROUPS, "cifar", ["--learning-rat", "1"])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Perhaps you meant" in printed
    assert "--learning-rate FLOAT" in printed
    assert "python -m experiments.cifar --help" in printed


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("i3d_nl5_r5_32x2", "i3d_nl5_r50_32x2"),
        ("toy-mp4", "toy_mp4"),
        ("I3D_R50_32x2", "i3d_r50_32x2"),
    ],
)
def test_a_mistyped_recipe_suggests_the_nearest(given, nearest):
    with pytest.raises(SystemExit, match=rf"--recipe must be one of .* Did you mean {nearest}\?$"):
        kinetics.main(kinetics.Config(recipe=given))


def test_a_name_like_no_recipe_suggests_none():
    with pytest.raises(SystemExit, match=r"got 'zzz'\.$"):
        charades.main(charades.Config(recipe="zzz"))


def test_names_are_printed_as_they_are():
    file = io.StringIO()
    console = PlainConsole(file=file, width=200)
    console.print("[dQw4w9WgXcQ] [/x] [red]a[/red] :car: \x1b[2Jb\nc 走る")
    assert file.getvalue() == "[dQw4w9WgXcQ] [/x] [red]a[/red] :car: \\x1b[2Jb\nc 走る\n"


def test_errors_are_printed_without_control_characters():
    with (
        pytest.raises(SystemExit, match=r"^error: \\x1b\]0;a\\x07\n  b$"),
        command_line.exit_on(ValueError),
    ):
        raise ValueError("\x1b]0;a\x07\n  b")


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


def test_a_missing_extra_ends_commands_and_is_an_error_of_imports(monkeypatch):
    monkeypatch.setitem(sys.modules, "filelock", None)
    message = r'filelock is required here and not installed: pip install "nonlocal_jax\[experiments'
    with pytest.raises(MissingExtraError, match=f"^{message}"):
        importlib.reload(experiments)
    monkeypatch.setattr(sys, "argv", ["-m"])  # as while `python -m` looks for its module
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        importlib.reload(experiments)
