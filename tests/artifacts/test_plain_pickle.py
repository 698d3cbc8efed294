"""Pickles of plain values can be read whatever wrote them; nothing else is loaded, and no code is run."""

import argparse
import copyreg
import io
import math
import pickle
import random
import struct

import numpy as np
import pytest
from refusals import FILE, RunsCode, refuse
from support import ROOT, SHARED

from src.artifacts.io import read_pickle
from src.errors import FileError

VALUE = {
    "array": np.arange(12.0).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "transposed": np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(1, 0, 2),
    "foreign order": np.arange(3, dtype=">f4"),
    "truth": np.array([True, False]),
    "empty": np.zeros((0, 3)),
    "single": np.array(2.5),
    "scalars": [np.float32(1.5), np.int64(-3), np.bool_(True), np.complex128(1j)],
    "numbers": (1, -(2**40), 0.5, math.inf, 1 + 2j, True, None),
    "text": "é\n",
    "bytes": [b"", b"\x00\xff"],
    np.int64(7): {3: [[], (), {}]},
}


def read(tmp_path, data: bytes):
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    return read_pickle(path)


def assert_same(found, wanted) -> None:
    """Whether values, types and dtypes (up to byte order) are equal."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        if isinstance(wanted, np.ndarray):
            assert found.dtype == wanted.dtype.newbyteorder("=")
            assert found.flags.writeable
        np.testing.assert_array_equal(found, wanted)


def assert_plain(value) -> None:
    """Whether there are only plain values, and no objects that a file could control."""
    if type(value) in (list, tuple):
        for item in value:
            assert_plain(item)
    elif type(value) is dict:
        for key, item in value.items():
            assert_plain(key)
            assert_plain(item)
    elif type(value) is np.ndarray or isinstance(value, np.generic):
        assert value.dtype.kind in "biufc"
        value.tolist()
    else:
        assert value is None or type(value) in (bool, int, float, complex, str, bytes)


@pytest.mark.parametrize("names", ["numpy 1", "numpy 2"])
@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_of_every_protocol_are_read(tmp_path, protocol, names):
    data = pickle.dumps(VALUE, protocol)
    if names == "numpy 1":  # the name becomes shorter, and so does its length prefix
        data = data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
        data = data.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
        data = data.replace(b"numpy._core", b"numpy.core")
    assert_same(read(tmp_path, data), VALUE)


@pytest.mark.parametrize("protocol", range(6))
def test_a_namespace_is_read_as_a_dict(tmp_path, protocol):
    data = pickle.dumps({"args": argparse.Namespace(lr=0.1, steps=[1])}, protocol)
    assert read(tmp_path, data) == {"args": {"lr": 0.1, "steps": [1]}}


PICKLES = [path for folder in ("src/metrics", "examples/scores") for path in (ROOT / folder).rglob("*.pkl")]


@pytest.mark.parametrize("path", [*PICKLES[::6], *(SHARED / "published_scores").rglob("*.pkl")], ids=lambda p: p.name)
def test_shipped_and_published_scores_are_read_as_pickle_reads_them(path):
    wanted = pickle.loads(path.read_bytes())
    found = read_pickle(path)
    assert found == wanted
    assert set(map(type, [*found, *found.values()])) == set(map(type, [*wanted, *wanted.values()]))


class Calls:
    """An object that pickles as a call, followed by a state with BUILD."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.parts = (function, arguments, state)

    def __reduce__(self):
        return self.parts


class _Global:
    """An object that pickles as a global, by name."""

    def __init__(self, module: str, name: str) -> None:
        self.where = (module, name)


def dumps(value, protocol: int = 3) -> bytes:
    """Pickle a value that may contain ``_Global``."""

    class Pickler(pickle._Pickler):
        def save(self, thing, save_persistent_id=True):
            if isinstance(thing, _Global):
                self.write("c{}\n{}\n".format(*thing.where).encode())
            else:
                super().save(thing, save_persistent_id)

        def save_reduce(self, func, args, state=None, *rest, obj=None, **more):
            self.save(func)
            self.save(args)
            self.write(b"R")
            if state is not None:
                self.save(state)
                self.write(b"b")

    file = io.BytesIO()
    Pickler(file, protocol).dump(value)
    return file.getvalue()


NDARRAY, DTYPE = _Global("numpy", "ndarray"), _Global("numpy", "dtype")
NAMESPACE = _Global("argparse", "Namespace")
RECONSTRUCT, SCALAR = (_Global("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar"))
FROMBUFFER = _Global("numpy._core.numeric", "_frombuffer")
POINTERS = struct.pack("<2Q", 0x41414141, 0x42424242)
EMPTY = (NDARRAY, (0,), b"b")
FLOATS = Calls(DTYPE, "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0))
OBJECTS = Calls(DTYPE, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 63))
NUMBERS_CALLED_OBJECTS = Calls(DTYPE, "f8", False, True, state=(3, "|", None, ("a",), {"a": (OBJECTS, 0)}, 8, 1, 0))
INTERFACE = {"shape": (2,), "typestr": "|O", "data": (0x41414141, False), "version": 3}

ATTACKS = {
    # The five that made NumPy read a pointer chosen by the file.
    "array over a buffer": dumps(Calls(NDARRAY, (2,), OBJECTS, POINTERS)),
    "array over a buffer, by name": dumps(Calls(NDARRAY, (2,), "O", POINTERS)),
    "field of objects": dumps(Calls(NDARRAY, (2,), [("a", "O")], POINTERS)),
    "dtype with a field": dumps(Calls(RECONSTRUCT, *EMPTY, state=(1, (2,), NUMBERS_CALLED_OBJECTS, False, POINTERS))),
    "objects that are said to be none": dumps(
        Calls(
            RECONSTRUCT,
            *EMPTY,
            state=(1, (2,), Calls(DTYPE, "O8", 0, 1, state=(3, "|", None, None, None, 8, 8, 0)), False, POINTERS),
        )
    ),
    "Namespace that is an array": dumps(Calls(NAMESPACE, state=(None, {"__array_interface__": INTERFACE}))),
    "attributes of the class Namespace": dumps([NAMESPACE])[:-2] + dumps((None, {"evil": 1}))[2:-1] + b"ba.",
    # The same attacks by other means.
    "objects through frombuffer": dumps(Calls(FROMBUFFER, POINTERS, OBJECTS, (2,), "C")),
    "objects through frombuffer, by name": dumps(Calls(FROMBUFFER, POINTERS, "O", (2,), "C")),
    "scalar of objects": dumps(Calls(SCALAR, OBJECTS, POINTERS[:8])),
    "subarray": dumps(
        Calls(SCALAR, Calls(DTYPE, "f8", 0, 1, state=(3, "<", (FLOATS, (2,)), None, None, -1, -1, 0)), POINTERS)
    ),
    "text": dumps(Calls(SCALAR, Calls(DTYPE, "U2", 0, 1, state=(3, "<", None, None, None, 8, 4, 8)), b"\xff" * 8)),
    "void": dumps(Calls(SCALAR, Calls(DTYPE, "V8", 0, 1, state=(3, "|", None, None, None, 8, 1, 0)), POINTERS[:8])),
    "subclass of arrays": dumps(Calls(RECONSTRUCT, _Global("numpy", "matrix"), (0,), b"b")),
    "state of the function": dumps([RECONSTRUCT])[:-2] + dumps({"__defaults__": (1,)})[2:-1] + b"ba.",
    "slots of the function": dumps([RECONSTRUCT])[:-2] + dumps((None, {"__defaults__": (1,)}))[2:-1] + b"ba.",
    "state of a scalar": dumps(Calls(SCALAR, FLOATS, POINTERS[:8], state=(1, 2))),
    "array that is never filled": dumps(Calls(RECONSTRUCT, *EMPTY)),
    "dtype": dumps(FLOATS),
    "function": dumps(RECONSTRUCT),
    "class": dumps(NAMESPACE),
    "call of a class": dumps(Calls(NDARRAY, (2,))),
    "encoded text": dumps(Calls(_Global("_codecs", "encode"), "x", "rot13")),
    "bytes of any length": dumps(Calls(_Global("builtins", "bytes"), 10**12)),
    "any class": dumps(Calls(_Global("copyreg", "_reconstructor"), _Global("builtins", "object"), 1, 2, 3)),
    # Declared sizes without that much data.
    "shape without content": dumps(Calls(RECONSTRUCT, *EMPTY, state=(1, (10**12,), FLOATS, False, b""))),
    "shape of the wrong sign": dumps(Calls(RECONSTRUCT, *EMPTY, state=(1, (-1, -2), FLOATS, False, POINTERS))),
    "shape beyond all integers": dumps(Calls(RECONSTRUCT, *EMPTY, state=(1, (0, 2**80), FLOATS, False, b""))),
    "text without end": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes without end": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "frame without end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
    "memo of 64 GiB": b"\x80\x04Nr\xff\xff\xff\x7f",
    "number of 80,000 bits": b"\x80\x02\x8b" + struct.pack("<i", 10**4) + b"\x7f" * 10**4 + b".",
    "number of 10,000 digits": b"L" + b"9" * 10**4 + b"L\n.",
    # Depth and size through references.
    "list in lists": b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".",
    "tuple in tuples": b"\x80\x04)" + b"\x85" * 200_000 + b".",
    "tuple in tuples as a key": b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
    "Namespace in Namespaces": dumps(NAMESPACE)[:-1]
    + b"q\x00"
    + b")\x81}X\x01\x00\x00\x00ah\x00" * 10**4
    + b")\x81"
    + b"sb" * 10**4
    + b".",
    "list in itself": b"\x80\x04]\x94h\x00a.",
    "2^60 numbers": b"\x80\x04K\x01" + b"\x85" + b"2\x86" * 60 + b".",
    "2^40 numbers of arrays": dumps(Calls(FROMBUFFER, bytes(800), FLOATS, (100,), "C"))[:-1] + b"2\x86" * 40 + b".",
    "the same bytes, made a thousand times": b"\x80\x04c_codecs\nencode\n\x940X\x10\x27\x00\x00"
    + b"a" * 10**4
    + b"\x940\x8c\x06latin1\x940"
    + b"h\x00h\x01h\x02\x86R0" * 1000
    + b"N.",
    # Opcodes that create objects.
    "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
    "NEWOBJ of an array": b"\x80\x02cnumpy\nndarray\nK\x02\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04cargparse\nNamespace\n)}\x92.",
    "OBJ": b"\x80\x02(cargparse\nNamespace\no.",
    "INST": b"(ios\nsystem\n.",
    "INST of a known name": b"(S'x'\niargparse\nNamespace\n.",
    "extension": b"\x80\x02\x82\x01.",
    "extension of four bytes": b"\x80\x02\x84\x01\x00\x00\x00.",
    "persistent": b"Px\n.",
    "persistent, from the stack": b"\x80\x02K\x01Q.",
    "buffer from elsewhere": b"\x80\x05\x97.",
    "read-only buffer": b"\x80\x05C\x01a\x98.",
    "set": b"\x80\x04\x8f(K\x01\x90.",
    "frozenset": b"\x80\x04(K\x01\x91.",
    "bytes that may change": b"\x80\x05\x96" + struct.pack("<Q", 1) + b"a.",
    # Invalid opcode sequences.
    "nothing": b"",
    "no end": b"\x80\x04N",
    "empty stack": b"\x80\x04.",
    "no mark": b"\x80\x04}u.",
    "no memo": b"\x80\x04h\x05.",
    "odd items": b"\x80\x04}(Nu.",
    "items of a list": b"\x80\x04](NNu.",
    "list as a key": b"\x80\x04}]Ns.",
    "pair from one": b"\x80\x04N\x86.",
    "unknown instruction": b"\x80\x04\xff.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_but_plain_data_comes_out(tmp_path, attack):
    before = dict(vars(argparse.Namespace))
    with pytest.raises(FileError, match=r"x\.pkl: is not a pickle of plain values, or is damaged"):
        read(tmp_path, ATTACKS[attack])
    assert dict(vars(argparse.Namespace)) == before


def test_a_registered_extension_is_not_looked_up(tmp_path):
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(FileError, match="EXT1"):
            read(tmp_path, b"\x80\x02\x82\xf0X\x04\x00\x00\x00true\x85R.")
    finally:
        copyreg.remove_extension("os", "system", 240)


def test_no_code_is_run(tmp_path):
    with pytest.raises(FileError, match="is not plain data"):
        read(tmp_path, pickle.dumps(RunsCode(tmp_path / "proof")))
    assert not (tmp_path / "proof").exists()


def test_attributes_of_a_namespace_are_no_array(tmp_path):
    data = dumps(Calls(NAMESPACE, state={"__array_interface__": INTERFACE, "__class__": 1}))
    found = read(tmp_path, data)
    assert_plain(found)
    with pytest.raises(TypeError):
        np.asarray(found, dtype=np.float64)


def test_bytes_that_are_no_truth_value_count_as_true(tmp_path):
    data = pickle.dumps(np.array([True, False, True]), 4).replace(b"\x01\x00\x01", b"\x02\x00\xff")
    found = read(tmp_path, data)
    assert found.tolist() == [True, False, True]
    assert found.tobytes() == b"\x01\x00\x01"


def test_a_score_file_that_points_into_memory_ends_a_script_with_one_line(tmp_path):
    path = tmp_path / "flatness" / "flat_digits.pkl"
    path.parent.mkdir()
    path.write_bytes(ATTACKS["array over a buffer"])
    flags = ("--dataset=digits", "--modes=flat", f"--scores_folder={tmp_path}")
    refuse("plot_proxies.py", *flags, status=FILE, says=(r"flat_digits\.pkl: is not a pickle of plain values",))


@pytest.mark.parametrize("protocol", range(6))
def test_damaged_pickles_give_plain_values_or_one_line(tmp_path, protocol):
    """Flip bits, and remove, repeat and swap bytes: about half of the results can still be read."""
    rng = random.Random(protocol)
    data = pickle.dumps({**VALUE, "args": argparse.Namespace(lr=0.1)}, protocol)
    attacks = list(ATTACKS.values())
    read_ones = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            place, length = rng.randrange(len(changed)), rng.randint(1, 8)
            kind = rng.randrange(5)
            if kind == 0:
                changed[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del changed[place : place + length]
            elif kind == 2:
                changed[place:place] = changed[rng.randrange(len(changed)) :][:length]
            elif kind == 3:
                changed[place] = rng.choice(b"()}]abceguRobstQ2012\x81\x85\x86\x87\x92\x93\x94\x97")
            else:
                part = rng.choice(attacks)[2:200]
                changed[place:place] = part[: rng.randint(1, len(part) or 1)]
        try:
            found = read(tmp_path, bytes(changed))
        except FileError:
            continue
        assert_plain(found)
        read_ones += 1
    assert read_ones
