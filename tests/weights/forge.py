"""Makes files of weights byte by byte: pickles from opcodes, torch files from their parts.

The torch files were checked with torch 2.13: `torch.load(weights_only=True)` reads equal tensors.
"""

import io
import struct
import zipfile

import numpy as np

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
STORAGES = {
    "float32": "FloatStorage",
    "int64": "LongStorage",
    "bfloat16": "BFloat16Storage",
    "bool": "BoolStorage",
}


# Pickles. Each function returns opcodes that leave one object on the stack.


def whole(code, protocol=2):
    return b"\x80" + bytes([protocol]) + code + b"."


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def data(value):
    return b"B" + struct.pack("<I", len(value)) + value


def number(value):
    return (
        b"J" + struct.pack("<i", value)
        if -(2**31) <= value < 2**31
        else b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)
    )


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def dotted(module, attribute):
    """Refers to a name as protocol 4 does, which follows dots in the attribute."""
    return text(module) + text(attribute) + b"\x93"


def sequence(*items):
    return b"(" + b"".join(items) + b"t"


def listed(*items):
    return b"](" + b"".join(items) + b"e"


def mapping(items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(function, *arguments):
    return function + sequence(*arguments) + b"R"


def dtype(code="f4", order="<"):
    state = sequence(number(3), text(order), b"NNN", number(-1), number(-1), number(0))
    return call(name("numpy", "dtype"), text(code), b"\x89", b"\x88") + state + b"b"


def empty_array():
    return call(
        name("numpy.core.multiarray", "_reconstruct"),
        name("numpy", "ndarray"),
        sequence(number(0)),
        text("b"),
    )


def array(value, code="f4", shape=None, content=None):
    shape = sequence(*map(number, value.shape)) if shape is None else shape
    content = data(value.tobytes()) if content is None else content
    return empty_array() + sequence(number(1), shape, dtype(code), b"\x89", content) + b"b"


def python2(blobs, protocol):
    """Writes float32 arrays as cPickle of Python 2 with NumPy 1.x did, with protocol 0 or 2."""
    buffer = []
    for key, value in blobs.items():
        raw, shape = value.tobytes(), value.shape
        if protocol == 0:
            sizes = "".join(f"I{n}\n" for n in shape)
            quoted = (
                "'"
                + "".join(
                    chr(b) if 32 <= b < 127 and chr(b) not in "'\\" else f"\\x{b:02x}" for b in raw
                )
                + "'"
            )
            buffer.append(
                f"S'{key}'\ncnumpy.core.multiarray\n_reconstruct\n"
                f"(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n({sizes}tcnumpy\ndtype\n"
                f"(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS{quoted}\ntbs"
            )
        else:
            text2 = [b"U" + bytes([len(t)]) + t for t in (key.encode(), b"b", b"f4", b"<")]
            buffer.append(
                text2[0]
                + b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85"
                + text2[1]
                + b"\x87R"
                b"(K\1("
                + b"".join(b"K" + bytes([n]) for n in shape)
                + b"tcnumpy\ndtype\n"
                + text2[2]
                + b"K\0K\1\x87R"
                b"(K\3"
                + text2[3]
                + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89T"
                + struct.pack("<i", len(raw))
                + raw
                + b"tbs"
            )
    if protocol == 0:
        return ("(dp0\nS'blobs'\np1\n(dp2\n" + "".join(buffer) + "s.").encode()
    return b"\x80\x02}q\1U\5blobsq\2}q\3" + b"".join(buffer) + b"s."


# Torch files.


def storage(key, size, kind="FloatStorage", legacy=False):
    parts = [text("storage"), name("torch", kind), text(key), text("cpu"), number(size)]
    return sequence(*parts, *([b"N"] if legacy else [])) + b"Q"


def tensor(stored, shape, strides, offset=0):
    hooks = call(name("collections", "OrderedDict"))
    sizes, steps = (sequence(*map(number, numbers)) for numbers in (shape, strides))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        stored,
        number(offset),
        sizes,
        steps,
        b"\x89",
        hooks,
    )


def state_dict(arrays, legacy=False):
    """Returns the opcodes of a state dict, and the content of its storages."""
    entries = {}
    for key, (label, value) in enumerate(arrays.items()):
        stored = storage(str(key), value.size, STORAGES[value.dtype.name], legacy)
        entries[label] = tensor(stored, value.shape, [n // value.itemsize for n in value.strides])
    return mapping(entries), {
        str(key): value.tobytes() for key, value in enumerate(arrays.values())
    }


def zipped(
    code, contents, root="archive", extra=(), order="little", compression=zipfile.ZIP_STORED
):
    """Makes the archive that torch.save writes since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", whole(code))
        archive.writestr(f"{root}/byteorder", order)
        for key, content in contents.items():
            archive.writestr(f"{root}/data/{key}", content)
        archive.writestr(f"{root}/version", "3\n")
        for member, content in extra:
            archive.writestr(member, content)
    return buffer.getvalue()


def legacy(code, contents, sizes, magic=MAGIC, protocol=None, machine=None, keys=None):
    """Makes the file that torch.save wrote before 1.6, with storages of the given sizes."""
    protocol = whole(number(1001)) if protocol is None else protocol
    machine = whole(mapping({"little_endian": b"\x88"})) if machine is None else machine
    keys = whole(listed(*map(text, contents))) if keys is None else keys
    raw = b"".join(struct.pack("<q", sizes[key]) + content for key, content in contents.items())
    return magic + protocol + machine + whole(code) + keys + raw


def legacy_of(arrays, **parts):
    code, contents = state_dict(arrays, legacy=True)
    return legacy(
        code, contents, {str(key): value.size for key, value in enumerate(arrays.values())}, **parts
    )


def zip_of(arrays, **parts):
    return zipped(*state_dict(arrays), **parts)


def example():
    draw = np.random.default_rng(0).standard_normal
    return {"conv1_w": draw((2, 3)).astype("float32"), "fc.bias": draw(5).astype("float32")}


def torch_archive(code=None, contents=None, **parts):
    """Makes the archive of `example`, or one with another pickle or other storages."""
    example_code, example_contents = state_dict(example())
    contents = example_contents if contents is None else contents
    return zipped(code or example_code, contents, **parts)
