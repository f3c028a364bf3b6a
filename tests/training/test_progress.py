"""What a run prints: names as they are, without what a terminal would act on."""

import io

import pytest
from rich.console import Console

from nonlocal_jax.training.progress import Bar


@pytest.mark.parametrize(
    ("line", "printed"),
    [
        ("resumed at step 3: runs/[dQw4w9WgXcQ]", "resumed at step 3: runs/[dQw4w9WgXcQ]"),
        ("runs/[/x] and [bold]b[/bold] :smile:", "runs/[/x] and [bold]b[/bold] :smile:"),
        ("runs/\x1b[2J\x07", "runs/\\x1b[2J\\x07"),
        ("Füße 走る", "Füße 走る"),
    ],
)
def test_lines_are_printed_as_they_are(line, printed):
    out = io.StringIO()
    with Bar(Console(file=out, width=200), 3, 0) as bar:
        bar.say(line)
    assert printed in out.getvalue().splitlines()


def test_names_of_the_bar_are_not_markup():
    out = io.StringIO()
    with Bar(Console(file=out, width=200), 3, 0) as bar:
        bar.doing("evaluating [/x]")
        bar.step(1, {"loss": 0.5}, 7.0)
        bar.doing("evaluating [/x]")
    assert "evaluating [/x]" in out.getvalue()
    assert "loss 0.5, 7 examples/s" in out.getvalue()
