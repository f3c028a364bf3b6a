"""Damaged folders of Orbax: nothing outside them is read, and no memory is allocated on trust."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore
from weights import samples

from nonlocal_jax.weights import FileFormatError, UnsafeFileError, read

KERNEL = "params.conv.kernel"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints by the way in which arrays are stored, with a text."""
    import orbax.checkpoint as ocp

    root = tmp_path_factory.mktemp("stored")
    conv = {"kernel": jnp.arange(8.0), "bias": jnp.ones(3, jnp.bfloat16)}
    tree = {"params": {"conv": conv}, "epoch": 3, "lr": 0.5, "name": "x", "none": None}
    for name, options in STORED.items():
        with ocp.PyTreeCheckpointer(**options) as checkpointer:
            checkpointer.save(root / name, tree)
    return root


STORED = {
    "zarr": {"use_ocdbt": False},
    "zarr3": {"use_ocdbt": False, "use_zarr3": True},
    "ocdbt": {"use_ocdbt": True},
    "ocdbt of zarr3": {"use_ocdbt": True, "use_zarr3": True},
}


@pytest.mark.parametrize("name", STORED)
def test_every_way_to_store_arrays(name, saved):
    checkpoint = read(saved / name)
    kernel = np.arange(8, dtype="f4")
    expected = {"params/conv/bias": np.ones(3, ml_dtypes.bfloat16), "params/conv/kernel": kernel}
    samples.assert_arrays(checkpoint.arrays, expected)
    assert checkpoint.ignored == {
        "epoch": "not weights: int",
        "lr": "not weights: float",
        "name": "not weights: str",
        "none": "not weights: None",
    }


def test_checkpoints_of_old_versions(saved, tmp_path):
    """Their list does not say how arrays are stored, and chunks of zeros are left out."""
    for name in ("zarr", "ocdbt"):
        folder = shutil.copytree(saved / name, tmp_path / name)
        with edited(folder / "_METADATA") as metadata:
            for key in ("use_ocdbt", "use_zarr3", "store_array_data_equal_to_fill_value"):
                del metadata[key]
        assert len(read(folder).arrays) == 2
    (tmp_path / "zarr" / KERNEL / "0").unlink()
    np.testing.assert_array_equal(
        read(tmp_path / "zarr").arrays["params/conv/kernel"], np.zeros(8, "f4")
    )


class edited:  # noqa: N801 - used like a function
    """Opens a JSON file to change it."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        self.content = json.loads(self.file.read_bytes())
        return self.content

    def __exit__(self, *_):
        self.file.write_text(json.dumps(self.content))


@pytest.fixture
def folder(saved, tmp_path):
    """A checkpoint to damage, and beside it an array that is not its own."""
    shutil.copytree(saved / "zarr" / KERNEL, tmp_path / "secret")
    return shutil.copytree(saved / "zarr", tmp_path / "checkpoint")


def refused(folder, error, match):
    with pytest.raises(error, match=match) as raised:
        read(folder)
    assert f"{folder}: " in str(raised.value)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 1000


def rename(folder, *keys):
    """Changes the keys of the kernel in the list of arrays."""
    with edited(folder / "_METADATA") as metadata:
        set_keys(metadata, *keys)


def set_keys(metadata, *keys):
    """Changes the keys of the kernel, and lists no other variable, beside which it is none."""
    del metadata["tree_metadata"]["('params', 'conv', 'bias')"]
    entry = metadata["tree_metadata"]["('params', 'conv', 'kernel')"]
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]


@pytest.mark.parametrize(
    "keys",
    [
        ("{outside}",),
        ("../secret",),
        ("x/../../secret",),
        ("", "./secret"),  # joined by a dot: "../secret"
        ("params/", "./../secret"),
        ("../checkpoint/../secret",),
        ("./../secret/",),
        ("secret\0",),
    ],
)
def test_keys_name_no_place_outside(keys, folder, tmp_path):
    rename(folder, *(key.replace("{outside}", str(tmp_path / "secret")) for key in keys))
    refused(folder, UnsafeFileError, "its entry .* would lie outside the folder")


@pytest.mark.parametrize("keys", [("..", "secret"), ("", "/secret"), ("file://{outside}",), ("",)])
def test_unusual_keys_name_places_inside(keys, folder, tmp_path):
    """There, nothing is found, or TensorStore refuses the name."""
    rename(folder, *(key.replace("{outside}", str(tmp_path / "secret")) for key in keys))
    refused(folder, FileFormatError, "TensorStore cannot read it")


def test_keys_may_name_folders_inside(folder):
    (folder / "params").mkdir()
    (folder / KERNEL).rename(folder / "params/conv..kernel")
    rename(folder, "params/conv.", "kernel")
    assert "params/conv./kernel" in read(folder).arrays


@pytest.mark.parametrize("entry", [KERNEL, f"{KERNEL}/0", f"{KERNEL}/.zarray", "_METADATA", "new"])
def test_links_lead_nowhere_outside(entry, folder, tmp_path):
    target = tmp_path / "moved"
    if (folder / entry).exists():
        (folder / entry).rename(target)
    else:
        target.mkdir()
    (folder / entry).symlink_to(target)
    refused(folder, UnsafeFileError, f"its entry {re.escape(entry)} is a link to a place outside")


def test_the_folder_of_a_manager_is_no_link(folder, tmp_path):
    (tmp_path / "7").mkdir()
    (tmp_path / "7/default").symlink_to(folder)
    refused(tmp_path / "7", UnsafeFileError, "its entry default is a link to a place outside")


def test_links_inside_are_followed(folder):
    (folder / KERNEL).rename(folder / "elsewhere")
    (folder / KERNEL).symlink_to("elsewhere")
    (folder / "itself").symlink_to(".")
    assert len(read(folder).arrays) == 2


def test_links_explain_no_memory(folder):
    """Twenty names of one file of 1 MiB are no reason to allocate 20 times 32 MiB."""
    (folder / "content").write_bytes(bytes(2**20))
    for number in range(20):
        (folder / f"link{number}").symlink_to("content")
    with edited(folder / KERNEL / ".zarray") as zarray:
        zarray |= {"shape": [2**24], "chunks": [2**20]}
    refused(folder, UnsafeFileError, "its arrays would take 671[0-9]* bytes, which its size of 105")


@pytest.mark.parametrize("layout", ["zarr", "zarr3"])
def test_links_to_one_chunk_are_not_decoded_without_end(layout, saved, tmp_path):
    """Of each chunk the array needs one row, and a chunk of zeros is small."""
    rows, columns = 64, 2**20
    folder = shutil.copytree(saved / layout, tmp_path / "checkpoint")
    shutil.rmtree(folder / KERNEL)
    is_zarr3 = layout == "zarr3"
    spec = {
        "driver": layout,
        "kvstore": {"driver": "file", "path": f"{folder / KERNEL}/"},
        "store_data_equal_to_fill_value": True,
    }
    if is_zarr3:
        grid = {"name": "regular", "configuration": {"chunk_shape": [1, columns]}}
        zstd = {"name": "zstd", "configuration": {"level": 3}}
        spec["metadata"] = {"data_type": "float32", "shape": [rows, 8], "chunk_grid": grid}
        spec["metadata"]["codecs"] = [{"name": "bytes"}, zstd]
    else:
        zstd = {"id": "zstd", "level": 3}
        spec["metadata"] = {"dtype": "<f4", "shape": [rows, 8], "chunks": [1, columns]}
        spec["metadata"]["compressor"] = zstd
    store = tensorstore.open(spec, create=True).result()
    store[:1].write(np.zeros((1, 8), "f4")).result()
    names = ("c/{}/0", "c/0/0") if is_zarr3 else ("{}.0", "0.0")
    for row in range(1, rows):
        link = folder / KERNEL / names[0].format(row)
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(folder / KERNEL / names[1])
    message = "the chunks of its arrays would take 2684[0-9]* bytes, which its size of"
    refused(folder, UnsafeFileError, message)


def test_errors_of_the_file_system(folder, monkeypatch):
    failure = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=failure))
    with pytest.raises(PermissionError, match=f"Permission denied: '{folder}'"):
        read(folder)


def test_entries_that_block_are_refused(folder):
    (folder / "loop").symlink_to("loop")
    refused(folder, FileFormatError, "its entry loop is neither a file nor a folder")
    (folder / "loop").unlink()
    (folder / KERNEL / "0").unlink()
    os.mkfifo(folder / KERNEL / "0")
    refused(folder, FileFormatError, "its entry .*/0 is neither a file nor a folder")


def test_pointers_of_a_database_stay_inside(tmp_path):
    """A database names its files relative to its folder, and TensorStore refuses other names."""
    base = {"driver": "file", "path": f"{tmp_path}/base/"}
    for prefix in ("../outside/", f"{tmp_path}/outside/"):
        spec = {"driver": "ocdbt", "base": base, "value_data_prefix": prefix}
        spec["config"] = {"max_inline_value_bytes": 0}
        with pytest.raises(ValueError, match="Invalid key"):
            tensorstore.KvStore.open(spec).result().write("a", bytes(99)).result()


ZARRAYS = {  # changes of an array's description
    "large": ({"shape": [2**31], "chunks": [2**20]}, "arrays would take 85[0-9]* bytes, over max_"),
    "unexplained": ({"shape": [2**26], "chunks": [2**20]}, "would take 268[0-9]* bytes, which its"),
    "large chunks": ({"chunks": [2**34]}, "a chunk of .params/conv/kernel. would take 68719476736"),
    "many chunks": ({"shape": [2**21], "chunks": [1]}, "its arrays have 20971[0-9]* chunks, which"),
    "endless": ({"shape": [2**62] * 2, "chunks": [1, 1]}, "its arrays would take 85070[0-9]* byte"),
    "Blosc": (
        {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 9, "shuffle": 0}},
        "is compressed with Blosc",
    ),
}


@pytest.mark.parametrize("case", ZARRAYS)
@pytest.mark.parametrize("value_type", ["jax.Array", "scalar"])
def test_sizes_are_checked_before_arrays_are_read(case, value_type, folder):
    change, match = ZARRAYS[case]
    with edited(folder / KERNEL / ".zarray") as zarray:
        zarray |= change
    with edited(folder / "_METADATA") as metadata:
        entry = metadata["tree_metadata"]["('params', 'conv', 'kernel')"]
        entry["value_metadata"]["value_type"] = value_type
        metadata["store_array_data_equal_to_fill_value"] = False
    refused(folder, UnsafeFileError, match)


def test_chunks_of_zeros_expand_no_further_than_declared(folder):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / KERNEL)}}
    shape = {"shape": [2**26], "chunks": [2**26]}
    spec["metadata"] = {"dtype": "<f4", "compressor": {"id": "zstd", "level": 3}, **shape}
    shutil.rmtree(folder / KERNEL)
    spec["store_data_equal_to_fill_value"] = True
    tensorstore.open(spec, create=True).result().write(np.zeros(2**26, "f4")).result()
    refused(folder, UnsafeFileError, "its arrays would take .* which its size of")
    with edited(folder / KERNEL / ".zarray") as zarray:
        zarray |= {"shape": [8], "chunks": [8]}
    refused(folder, FileFormatError, "TensorStore cannot read it .*End of data expected")


def damage(change):
    def damaged(metadata):
        change(metadata["tree_metadata"]["('params', 'conv', 'kernel')"], metadata)
        return json.dumps(metadata)

    return damaged


LISTS = {  # changes of the list of arrays
    "no JSON": (lambda _: "{", "its _METADATA is not JSON"),
    "no text": (lambda _: b"\xff\xfe\xfd", "its _METADATA is not JSON"),
    "nested": (lambda _: "[" * 100_000, "its _METADATA is not JSON .maximum recursion depth"),
    "digits": (lambda _: "9" * 10_000, "its _METADATA is not JSON .Exceeds the limit"),
    "a list": (lambda _: "[]", "must be a JSON object with tree_metadata; got list of 0"),
    "another tree": (lambda _: '{"tree_metadata": 3}', "must be a JSON object with tree_metadata"),
    "control characters": (
        damage(lambda entry, metadata: metadata["tree_metadata"].update({"\x1b[2J": 3})),
        r"has a damaged entry, '\\x1b\[2J'",
    ),
    "control characters in a key": (
        damage(lambda _, metadata: set_keys(metadata, "\x1b[2J")),
        r"does not exist|NOT_FOUND",
    ),
    "keys": (damage(lambda entry, _: entry.update(key_metadata={})), "has a damaged entry"),
    "a key": (damage(lambda entry, _: entry.update(key_metadata=[{"key": 1}])), "a damaged entry"),
    "surrogates": (
        damage(lambda _, metadata: set_keys(metadata, "\ud800")),
        "TensorStore cannot read it",
    ),
    "type": (damage(lambda entry, _: entry.update(value_metadata={})), "has a damaged entry"),
    "twice": (
        damage(lambda entry, metadata: metadata["tree_metadata"].update(again=entry)),
        "two of its entries have the same name",
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_damaged_lists(case, folder):
    change, match = LISTS[case]
    content = change(json.loads((folder / "_METADATA").read_bytes()))
    content = content.encode() if isinstance(content, str) else content
    (folder / "_METADATA").write_bytes(content)
    refused(folder, FileFormatError, match)


def test_long_lists_are_refused(folder):
    with (folder / "_METADATA").open("ab") as file:
        file.truncate(2**24 + 1)
    refused(folder, UnsafeFileError, "its _METADATA has 16777217 bytes; expected at most 16777216")


def test_values_of_other_types_are_ignored(folder):
    with edited(folder / "_METADATA") as metadata:
        entry = metadata["tree_metadata"]["('params', 'conv', 'kernel')"]
        entry["value_metadata"]["value_type"] = "grain\x1b[2J"
    shutil.rmtree(folder / KERNEL)
    checkpoint = read(folder)
    assert list(checkpoint.arrays) == ["params/conv/bias"]
    assert checkpoint.ignored["params/conv/kernel"] == r"not weights: grain\x1b[2J"


def test_types_that_are_no_numbers(folder):
    with edited(folder / KERNEL / ".zarray") as zarray:
        zarray |= {"dtype": "|S4"}
    refused(folder, FileFormatError, "is of char, which is not supported")


def test_names_of_other_files_are_escaped(tmp_path):
    (tmp_path / "\x1b[2J").mkdir()
    with pytest.raises(FileFormatError, match=r"it holds \\x1b\[2J\. Pass a file"):
        read(tmp_path)
    with pytest.raises(FileFormatError, match=r"\\x1b\[2J: it is a folder without"):
        read(tmp_path / "\x1b[2J")


def test_folders_in_an_object_store(saved, monkeypatch):
    """What TensorStore is asked for, since the tests have no store."""
    from nonlocal_jax import remote_paths
    from nonlocal_jax.weights.readers import orbax_folders

    monkeypatch.setattr(remote_paths, "_check_protocol", lambda protocol: None)
    remote = [remote_paths.RemotePath(url) for url in ("gs://bucket/run/7", "gs://bucket")]
    entry = orbax_folders.Entry(("params", "conv", "kernel"), "jax.Array", True)
    metadata = {"use_ocdbt": True, "store_array_data_equal_to_fill_value": True}
    for folder in [saved / "ocdbt", *remote]:
        spec = tensorstore.Spec(orbax_folders._spec(folder, entry, metadata))
        url = f"file://{folder}" if isinstance(folder, Path) else str(folder)
        assert spec.kvstore.base.url == f"{url}/"
        assert spec.kvstore.path == f"{KERNEL}/"
