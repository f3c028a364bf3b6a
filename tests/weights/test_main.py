"""The command line: what it prints, what it writes, and its exit codes."""

import pickle
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from weights import forge, samples

import nonlocal_jax as nl
from nonlocal_jax.weights import LoadedWeight, LoadReport, export, load, load_report, read, save
from nonlocal_jax.weights.__main__ import Names, main
from nonlocal_jax.weights.entries import NATIVE, naming_tables
from nonlocal_jax.weights.readers import checkpoint_files

DIGITS = nl.models.non_local_pytorch_mnist("concatenation")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "digits"
    save(path, samples.weights(DIGITS), names="non_local_pytorch")
    return path


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A pickle of Caffe2 of an image network, with its training state."""
    arrays = export(samples.weights(samples.network("c2d")), "caffe2")
    blobs = {name: a[:, :, 0] if a.ndim == 5 else a for name, a in arrays.items()}
    blobs |= {"lr": 0.1, "conv1_w_momentum": blobs["conv1_w"]}
    path = tmp_path_factory.mktemp("weights") / "image.pkl"
    path.write_bytes(pickle.dumps({"blobs": blobs}, 2))
    return path


@pytest.fixture
def run(capsys):
    """Runs a command. Returns the exit code, the output and the errors."""

    def run_main(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run_main


@pytest.fixture
def reads(monkeypatch):
    """The paths that were read."""
    paths = []
    monkeypatch.setattr(checkpoint_files, "read", lambda path: paths.append(path) or read(path))
    return paths


def line_of(output, *words):
    """Returns the words of the only line that has all these words."""
    lines = [line.split() for line in output.splitlines()]
    [line] = [line for line in lines if all(word in line for word in words)]
    return line


def assert_one_line(errors, *parts):
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for part in parts:
        assert part in errors


# inspect


def test_inspect(run, image, reads):
    code, output, errors = run("inspect", image)
    assert (code, errors) == (0, "")
    assert reads == [image]
    assert f"{image}: caffe2, 117 arrays, " in output
    assert "names: caffe2\n" in output
    network = "nl.models.video_resnet((1, 2, 2, 1), ..., nonlocal_blocks=0, clip=..., "
    network += "preset=..., num_classes=7, groups=1, width_per_group=4, pool2=...)"
    # The call is the last line, and what it leaves open is listed before it.
    assert output.endswith(f"network: {network}\n")
    questions = [line.split() for line in output.splitlines() if line.startswith("  --")]
    assert [words[0] for words in questions] == ["--preset", "--kind", "--clip", "--pool2"]
    assert "  --preset caffe2 or slowfast: networks of these sources have the same names" in output
    assert "  --pool2 True or False: " in output
    conv1 = line_of(output, "conv1_w")
    assert conv1 == ["conv1_w", "64×3×7×7", "float32", "params/conv1/kernel"]
    assert line_of(output, "lr")[:2] == ["lr", "training"]
    assert line_of(output, "conv1_w_momentum")[1:] == ["training", "state"]


def test_inspect_takes_choices(run, image):
    flags = ["--kind", "i3d_3x3x3", "--clip", "8x8", "--preset", "slowfast", "--pool2", "False"]
    output = run("inspect", image, *flags)[1]
    assert "'i3d_3x3x3', nonlocal_blocks=0, clip='8x8', preset='slowfast'" in output
    assert "pool2=False" in output
    assert "does not show" not in output


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A file with Caffe2's names, called like one of PySlowFast's model zoo."""
    path = tmp_path_factory.mktemp("weights") / "I3D_NLN_8x8_R50.pkl"
    save(path, samples.weights(samples.tiny_network(blocks={"res3": (0,)})), names="caffe2")
    return path


def test_the_answers_for_a_published_file_are_shown(run, blocks):
    """What the file does not show is asked for, and the name of the file only suggests answers."""
    flags = "--clip 8x8 --instantiation embedded_gaussian --preset slowfast --pool2 True "
    flags += "--key-pool 1 2 2"
    code, output, _ = run("inspect", blocks)
    advice = f"If it is PySlowFast's I3D_NLN_8x8_R50.pkl, as its name says, pass: {flags}"
    assert (code, output.splitlines()[-2]) == (0, advice)
    code, output, errors = run("verify", blocks)
    assert (code, output) == (2, "")
    assert f"{blocks} does not show which network its weights are of" in errors
    assert "  --instantiation embedded_gaussian or dot_product: " in errors
    assert advice in errors
    output = run("inspect", blocks, *flags.split())[1]
    assert "does not show" not in output
    assert "..." not in output
    assert "If it is" not in output


def test_choices_of_blocks(run, blocks):
    flags = ["--preset", "slowfast", "--pool2", "False", "--clip", "16x4", "--stride-at", "conv_a"]
    flags += ["--instantiation", "dot_product", "--key-pool", "2", "2", "2"]
    last = run("inspect", blocks, *flags)[1].splitlines()[-1]
    for argument in (
        "pool2=False",
        "clip='16x4'",
        "stride_at='conv_a'",
        "instantiation='dot_product'",
        "block_options={'subsample': (2, 2, 2)}",
    ):
        assert argument in last


def test_convert_needs_no_answers(run, blocks, tmp_path):
    """Networks that have the same arrays are the same file."""
    code, output, errors = run("convert", blocks, tmp_path / "out", "--names", "slowfast")
    assert (code, errors) == (0, "")
    assert "clip=..." in output
    assert len(read(tmp_path / "out").arrays) == len(read(blocks).arrays)


def test_convert_needs_no_network_that_computes_the_same(run, tmp_path):
    """Whatever the configuration states, the arrays are those of the file."""
    arrays = export(samples.weights(samples.tiny_network()), "slowfast")
    state, contents = forge.state_dict(arrays)
    refused = forge.text("RESNET: {SPATIAL_STRIDES: [[1], [2], [2], [1]]}")
    entries = forge.mapping({"model_state": state, "cfg": refused})
    (tmp_path / "file.pyth").write_bytes(forge.zipped(entries, contents))
    assert run("verify", tmp_path / "file.pyth")[0] == 2
    code, output, errors = run("convert", tmp_path / "file.pyth", tmp_path / "out")
    assert (code, errors) == (0, "")
    assert "network: none here, but its arrays were converted. " in output
    assert "has RESNET.SPATIAL_STRIDES of 1, 2, 2, 1, which must be 1, 2, 2, 2" in output
    assert len(read(tmp_path / "out").arrays) == len(arrays)


def test_convert_does_not_warn_of_what_is_open(run, tmp_path):
    path = tmp_path / "C2D_NOPOOL_8x8_R50.pkl"
    save(path, samples.weights(samples.tiny_network("c2d")), names="caffe2")
    assert run("convert", path, tmp_path / "out")[0] == 0


@pytest.mark.parametrize("arguments", [["inspect", "a\nb"], ["convert", "a", "b\nc/out"]])
def test_newlines_in_names_of_files_are_escaped(arguments, run, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").symlink_to(digits)
    code, _, errors = run(*arguments)
    assert code == 2
    assert_one_line(errors, r"a\nb: No such" if arguments[0] == "inspect" else r"b\nc is not a")
    (tmp_path / "x\ny").write_bytes(b"")
    assert_one_line(run("convert", "a", "x\ny")[2], r"x\ny exists already")


# A name that clears the screen, one that hides what precedes it, one with markup of rich, and one
# that reverses text.
HOSTILE = {
    "\x1b[2J\x1b]0;owned\x07conv1_w": r"\x1b[2J\x1b]0;owned\x07conv1_w",
    "a\rb": r"a\rb",
    "[red]x[/red] :smile:": "[red]x[/red] :smile:",
    "c\u202ed\nerror: all is well": r"c\u202ed\nerror: all is well",
}


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_names_do_not_reach_the_terminal_as_they_are(command, prefix, run, tmp_path):
    """Beside names of this library, of another source, and of none."""
    arrays = {prefix + name: np.ones((2, 2), np.float32) for name in HOSTILE}
    path = tmp_path / "a\x1b[2Jb"
    path.write_bytes(pickle.dumps({"blobs": arrays}, 2))
    rest = [tmp_path / "out"] if command == "convert" else []
    code, output, errors = run(command, path, *rest)
    assert code == 2
    shown = [output] if command == "inspect" else [errors]
    for text in (output, errors):
        assert all(line.isprintable() for line in text.split("\n"))
    for escaped in HOSTILE.values():
        if command == "inspect":
            assert prefix + escaped in shown[0]


def test_reports_and_errors_of_loading_are_printable(tmp_path):
    model = samples.tiny_network("c2d")
    arrays = export(samples.weights(model), "caffe2")
    report = load_report(samples.write(tmp_path / "good", arrays), model)
    assert all(line.isprintable() for line in str(report).split("\n"))
    hostile = {name: np.ones((2, 2), np.float32) for name in HOSTILE}
    path = samples.write(tmp_path / "bad\x1b", arrays | hostile)
    with pytest.raises(ValueError, match="does not fit") as raised:
        load(path, model)
    assert all(line.isprintable() for line in str(raised.value).split("\n"))
    for escaped in HOSTILE.values():
        assert f"{escaped} 2×2 is not a weight of any network here" in str(raised.value)
    row = LoadedWeight("a\x1b", "b\x1b", (), (), "unchanged")
    assert all(line.isprintable() for line in str(LoadReport("", (row,))).split("\n"))


def test_inspect_shows_entries_of_unknown_names(run, tmp_path):
    arrays = {"encoder.w": np.ones((2, 3), np.float32), "decoder.w": np.ones(3, np.float16)}
    samples.write(tmp_path / "other", arrays)
    code, output, errors = run("inspect", tmp_path / "other")
    assert code == 2
    assert line_of(output, "encoder.w") == ["encoder.w", "2×3", "float32", "unknown"]
    assert_one_line(errors, "must have the names of caffe2")


def test_inspect_shows_entries_of_odd_files(run, tmp_path):
    arrays = export(samples.weights(samples.network()), "caffe2")
    arrays = {name.replace("res4_1", "res4_2"): array for name, array in arrays.items()}
    samples.write(tmp_path / "odd", arrays)
    code, output, errors = run("inspect", tmp_path / "odd")
    assert code == 2
    assert line_of(output, "res4_2_branch2a_w")[-1] == "params/res4_2/conv_a/kernel"
    assert "network:" not in output
    assert_one_line(errors, "res4 has a residual block 2 but no 1")


# convert


def test_all_names_can_be_chosen():
    assert get_args(Names) == (NATIVE, *naming_tables())


@pytest.mark.parametrize(
    "names", [NATIVE, "non_local_pytorch", "non_local_pytorch (first version)"]
)
def test_convert(names, run, digits, tmp_path, reads):
    converted = tmp_path / "converted.safetensors"
    code, output, errors = run("convert", digits, converted, "--names", names)
    assert (code, errors) == (0, "")
    assert reads == [digits]
    assert "network: nl.models.non_local_pytorch_mnist('concatenation')" in output
    summary = "48 weights loaded by the names of non_local_pytorch, 402,266 numbers"
    assert f"{summary}; written to {converted} by the names of {names}" in output
    assert read(converted).arrays.keys() == export(samples.weights(DIGITS), names).keys()
    samples.assert_equal(load(converted, DIGITS), samples.weights(DIGITS))


def test_convert_inflates(run, image, tmp_path):
    flags = ["--kind", "i3d_3x1x1", "--names", "slowfast"]
    assert run("convert", image, tmp_path / "out", *flags)[0] == 0
    kernel = read(tmp_path / "out").arrays["s1.pathway0_stem.conv.weight"]
    assert kernel.shape == (64, 3, 5, 7, 7)
    np.testing.assert_allclose(kernel.sum(2), read(image).arrays["conv1_w"], rtol=1e-5, atol=1e-6)


def test_convert_folds(run, image, tmp_path):
    assert run("convert", image, tmp_path / "out", "--fold")[0] == 0
    folded = load(tmp_path / "out", samples.network("c2d", frozen_bn=True))
    variables = samples.weights(samples.network("c2d"))
    norm, statistics = (variables[part]["conv1_norm"] for part in ("params", "batch_stats"))
    scale = norm["scale"] / np.sqrt(statistics["var"] + 1e-5)
    expected = norm["bias"] - statistics["mean"] * scale
    np.testing.assert_allclose(
        folded["params"]["conv1_norm"]["bias"], expected, rtol=1e-5, atol=1e-6
    )
    assert "batch_stats" not in folded


def test_convert_leaves_out_what_the_file_lacks(run, tmp_path):
    """Without a classifier in the file, none is written."""
    trunk = samples.without(samples.weights(samples.tiny_network()), "/head/")
    samples.write(tmp_path / "trunk", export(trunk, "slowfast"))
    assert run("convert", tmp_path / "trunk", tmp_path / "out")[0] == 0
    converted = read(tmp_path / "out").arrays
    assert len(converted) == len(read(tmp_path / "trunk").arrays)
    assert not any("head" in name for name in converted)


def test_convert_overwrites_only_on_request(run, digits, tmp_path):
    converted = tmp_path / "out"
    converted.write_bytes(b"precious")
    code, _, errors = run("convert", digits, converted)
    assert code == 2
    assert_one_line(errors, f"{converted} exists already; --overwrite replaces a file.")
    assert converted.read_bytes() == b"precious"
    assert run("convert", digits, converted, "--overwrite")[0] == 0
    samples.assert_equal(load(converted, DIGITS), samples.weights(DIGITS))


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_convert_overwrites_no_folder(flags, run, digits, tmp_path):
    (tmp_path / "folder").mkdir()
    code, _, errors = run("convert", digits, tmp_path / "folder", *flags)
    assert code == 2
    assert_one_line(errors, "folder exists already")


def test_convert_into_a_missing_folder(run, digits, tmp_path):
    code, _, errors = run("convert", digits, tmp_path / "none" / "out")
    assert code == 2
    assert_one_line(errors, f"{tmp_path / 'none'} is not a folder")


def test_convert_to_names_that_do_not_exist(run, digits, tmp_path):
    code, _, errors = run("convert", digits, tmp_path / "out", "--names", "torchvision")
    assert code == 2
    assert_one_line(errors, "torchvision has no name for")
    assert not (tmp_path / "out").exists()


def test_convert_to_another_kind(run, tmp_path):
    """An I3D cannot become a C2D."""
    save(tmp_path / "i3d", samples.weights(samples.tiny_network()))
    code, _, errors = run("convert", tmp_path / "i3d", tmp_path / "out", "--kind", "c2d")
    assert code == 2
    assert "params/conv1/kernel has 1×7×7×3×64" in errors
    assert not (tmp_path / "out").exists()


# verify


@pytest.mark.networks
def test_verify(run, digits, reads):
    code, output, errors = run("verify", digits)
    assert (code, errors) == (0, "")
    assert reads == [digits]
    assert line_of(output, "fc2", "256×10")[:4] == ["fc2", "2", "256×10", "0"]
    assert "largest difference, weights: 0" in output
    assert output.endswith("verified, tolerance 0.0001\n")
    # Rounding alone makes the layers differ from their definitions.
    code, output, errors = run("verify", digits, "--tolerance", "1e-12")
    assert (code, errors) == (1, "")
    assert output.endswith("NOT VERIFIED, tolerance 1e-12\n")


@pytest.mark.networks
def test_verify_fails_for_numbers_that_are_not_finite(run, digits, tmp_path):
    arrays = dict(read(digits).arrays)
    arrays["fc.3.bias"] = np.full(10, np.nan, np.float32)
    path = samples.write(tmp_path / "broken", arrays)
    code, output, errors = run("verify", path, "--tolerance", "1e-3")
    assert (code, errors) == (1, "")
    assert "wrong: params/fc2/bias has 10 values that are not finite" in output
    assert "NOT VERIFIED, tolerance 0.001" in output


def test_verify_fails_for_an_entry_without_a_place(run, digits, tmp_path):
    arrays = {**read(digits).arrays, "nl_3.theta.weight": np.ones((2, 2), np.float32)}
    code, output, errors = run("verify", samples.write(tmp_path / "more", arrays))
    assert code == 1
    assert "nl_3.theta.weight 2×2 is not a weight of any network here" in errors
    assert "verified" not in output


# All commands.


@pytest.mark.parametrize("command", ["inspect", "verify", "convert"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"", "is empty"),
        (b"<html>", "a web page"),
        (b"\x80\x02cos\nsystem\n(S'true'\ntR.", "it asks for 'os.system'"),
    ],
    ids=["nothing", "empty", "page", "hostile"],
)
def test_unusable_files(command, content, message, run, tmp_path):
    path = tmp_path / "weights.pkl"
    if content is not None:
        path.write_bytes(content)
    output_file = [tmp_path / "out"] if command == "convert" else []
    code, output, errors = run(command, path, *output_file)
    assert (code, output) == (2, "")
    assert_one_line(errors, str(path), message)


def test_choices_that_do_not_fit(run, digits):
    code, _, errors = run("inspect", digits, "--kind", "c2d")
    assert code == 2
    assert_one_line(errors, "has no kind to choose")


@pytest.mark.parametrize(
    "arguments",
    [[], ["inspect"], ["inspect", "x", "--knd", "c2d"], ["convert", "x"], ["open", "x"]],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for command in ("inspect", "convert", "verify"):
        assert f"python -m nonlocal_jax.weights {command}" in shown


@pytest.mark.processes
def test_the_exit_code_is_that_of_the_process(tmp_path):
    command = [sys.executable, "-m", "nonlocal_jax.weights", "inspect", tmp_path / "nothing"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
