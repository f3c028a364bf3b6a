"""Files that torch itself writes give the arrays that torch itself reads."""

import numpy as np
import pytest
import torch

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read

FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


@pytest.fixture(params=FORMATS)
def saved(request, tmp_path):
    def read_back(tree):
        torch.save(tree, tmp_path / "saved", **FORMATS[request.param])
        return read(tmp_path / "saved")

    return read_back


def assert_equal(arrays, tensors):
    assert list(arrays) == list(tensors)
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            assert arrays[name].dtype.name == "bfloat16"
            array = arrays[name].view(np.uint16)
            expected = tensor.contiguous().view(torch.uint16).numpy()
        else:
            array, expected = arrays[name], tensor.numpy()
        np.testing.assert_array_equal(array, expected, strict=True)


def numbers(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(50).to(dtype)


REAL = [
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
]


@pytest.mark.parametrize("dtype", REAL)
def test_every_dtype(dtype, saved):
    tensors = {
        "w": numbers(2, 3, 5).abs().to(getattr(torch, dtype)),
        "n": torch.ones((), dtype=getattr(torch, dtype)),
    }
    assert_equal(saved(tensors).arrays, tensors)


def test_every_layout(saved):
    base = numbers(3, 5, 7)
    stored = numbers(11)
    tensors = {
        "transposed": base.permute(2, 0, 1),
        "sliced": base[1:, ::2, 3:],
        "same storage": base[0],
        "whole": base,
        "channels last": numbers(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "expanded": stored[:1].expand(4, 6, 1)[:, 1:],
        "scalar": torch.tensor(7),
        "one": stored[9],
        "empty": torch.zeros(0, 3),
        "empty slice": stored[11:],
        "parameter": torch.nn.Parameter(numbers(2, 3)),
        "parameter view": torch.nn.Parameter(numbers(2, 3).t()),
        "tied": stored,
        "tied again": stored,
    }
    checkpoint = saved(tensors)
    assert_equal(checkpoint.arrays, tensors)
    assert checkpoint.ignored == {}


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(
            torch.nn.Conv3d(2, 3, (1, 3, 5)),
            torch.nn.BatchNorm3d(3),
            torch.nn.Linear(7, 4).to(torch.bfloat16),
        )


def test_state_dicts_of_modules(saved):
    state = Net().state_dict()
    assert state._metadata
    assert_equal(saved(state).arrays, state)


@pytest.mark.parametrize("key", ["state_dict", "model_state", "model_state_dict", "model", "net"])
def test_checkpoints_with_the_state_of_training(key, saved):
    net = Net()
    optimiser = torch.optim.Adam(net.parameters())
    sum(p.float().sum() for p in net.parameters()).backward()
    optimiser.step()
    checkpoint = saved(
        {
            "epoch": 3,
            "best": np.float64(0.5),
            "history": np.arange(3.0),
            "shape": torch.Size([2, 3]),
            "dtype": torch.float32,
            "optimizer": optimiser.state_dict(),
            key: net.state_dict(),
            "cfg": {"lr": [0.1, 0.01], "name": "réseau"},
        }
    )
    assert_equal(checkpoint.arrays, net.state_dict())
    assert list(checkpoint.ignored) == [
        "epoch",
        "best",
        "history",
        "shape",
        "dtype",
        "optimizer",
        "cfg",
    ]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Net(), UnsafeFileError, "it asks for .*Net"),
        (lambda: {"w": torch.ones(2, dtype=torch.complex64)}, FileFormatError, "complex tensors"),
        (lambda: {"w": torch.ones(2).to(torch.float8_e5m2)}, FileFormatError, "8-bit floats"),
        (lambda: {"w": torch.eye(3).to_sparse()}, FileFormatError, "sparse tensors"),
        (
            lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)},
            FileFormatError,
            "quantised tensors",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_unsupported_objects_are_named(make, error, match, saved):
    tree = make()
    with pytest.raises(error, match=match):
        saved(tree)


def test_negated_views_are_refused(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, tmp_path / "saved")
    with pytest.raises(FileFormatError, match="negated"):
        read(tmp_path / "saved")


def test_torchscript_is_refused(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(FileFormatError, match=r"script\.pt: it is a TorchScript archive"):
        read(tmp_path / "script.pt")


def test_torch_reads_the_files_that_tests_make_by_hand(tmp_path):
    """Then the tests without torch say something about torch files."""
    from weights import forge

    arrays = forge.example() | {
        "n": np.array(2**40),
        "t": np.array([True, False]),
        "e": np.zeros((0, 3), np.float32),
    }
    for make in (forge.zip_of, forge.legacy_of):
        (tmp_path / "forged").write_bytes(make(arrays))
        loaded = torch.load(tmp_path / "forged", weights_only=True)
        assert list(loaded) == list(arrays)
        for name, value in arrays.items():
            np.testing.assert_array_equal(loaded[name].numpy(), value, strict=True)
