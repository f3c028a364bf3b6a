"""Damaged lists, class names and CIFAR records are read or refused with an error that says so."""

import pytest
from damage.mutation import outcomes

from nonlocal_jax.data import DataError, annotations, cifar

VIDEOS = (
    *("a.mp4", "riding a bike/x y.mp4", "c,d.mp4", "é.mp4"),
    *("x1_000005_000015.mp4", "air_drumming/y2.webm", "riding a bike/z3.mkv"),
    *("AB12C.mp4", "DE34F.mkv", "f/1.jpg", "f/2.jpg", "f/3 4.jpg"),
)
LISTS = {
    "path label": 'a.mp4 3\n"riding a bike/x y.mp4" 0\n\nc,d.mp4 2\né.mp4 5\n',
    "path,label": 'path,label\na.mp4,3\nriding a bike/x y.mp4,0\n"c,d.mp4",2\né.mp4,5\n',
    "kinetics": "label,youtube_id,time_start,time_end,split,is_cc\n"
    'riding a bike,x1,5,15,train,0\n"air drumming",y2,0.0,10.0,train,1\n'
    "riding a bike,z3,20,30,train,0\n",
    "charades": "id,subject,script,actions,length\n"
    'AB12C,HR43,"A person, ""cooking"";",c092 11.90 21.20;c147 0.00 12.60,30.54\n'
    "DE34F,HR43,none,,12\n",
    "frames": "original_vido_id video_id frame_id path labels\n"
    'V 0 0 f/1.jpg ""\nV 0 1 f/2.jpg "3,7"\nW 1 0 "f/3 4.jpg" "1"\n',
}


@pytest.fixture
def folder(tmp_path):
    for name in VIDEOS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_lists(name, leave_out, folder, mutated_files):
    def read(path):
        videos = annotations.read(path, leave_out=leave_out, root=folder)
        assert len(videos) > 0
        for record in videos.records:
            files = record.frames or (record.path,)
            assert files[0].is_file()
            assert all(file.is_relative_to(folder) for file in files)
            labels = [*record.labels, *(action.label for action in record.actions)]
            assert videos.multi_label or len(labels) == 1
            assert all(0 <= label < videos.num_classes for label in labels)
        return videos

    data = LISTS[name].encode()
    (folder / "whole").write_bytes(data)
    assert len(read(folder / "whole")) >= 2
    found = outcomes(read, folder / "list.csv", data, mutated_files, (DataError,))
    print(f"{name}, leave_out={leave_out}: {dict(found)}")
    assert found["read"] > 0
    assert found["DataError"] > 0


def test_class_names(folder, mutated_files):
    def read(path):
        names = annotations.read_classes(path)
        assert len(set(names)) == len(names) > 0
        assert all(names)

    data = 'riding a bike\r\n"a, b"\r\n\r\né\r\n'.encode()
    found = outcomes(read, folder / "classes.txt", data, mutated_files, (DataError,))
    print(f"class names: {dict(found)}")
    assert found["read"] > 0


def test_cifar_records(tmp_path, mutated_files):
    from array_record.python.array_record_module import ArrayRecordWriter

    file = tmp_path / "cifar10-train.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for label in range(4):
        writer.write(bytes([label]) + bytes(range(256)) * 12)
    writer.close()

    def read(path):
        images = cifar.load("cifar10", "train", path.parent)
        assert images.images.shape == (len(images.labels), 32, 32, 3)
        assert ((images.labels >= 0) & (images.labels < 10)).all()

    found = outcomes(read, file, file.read_bytes(), mutated_files, (DataError,))
    print(f"CIFAR: {dict(found)}")
    assert found["DataError"] > 0
