"""Published snapshots: what they hold is read bit for bit, nothing in them runs, and every hostile one gets one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call, said
from published_files import (
    PERSISTENT,
    Call,
    Name,
    New,
    Persistent,
    dumps,
    flow_map_snapshot,
    torch_file,
    written,
)

from imm import checkpoints, pickles, unpickling
from imm.checkpoints import CheckpointError, import_published, read_published

LINEAR = "torch.nn.modules.linear.Linear"
LOAD = "torch.storage._load_from_bytes"
REBUILD = "torch._utils._rebuild_tensor_v2"
DICT = Call("collections.OrderedDict")
FLOAT = Name("torch.float32")


def refusal(path: Path, tree: Any, protocol: int = 4) -> str:
    """The one line that a file gets from both readers; nothing is written, run or waited for."""
    written(path, tree, protocol)
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        import_published(path, path.with_name("out.safetensors"))
    assert time.process_time() - start < 10.0
    assert "IMM_TEST_RAN" not in os.environ
    assert os.listdir(path.parent) == [path.name]
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 1200
    return message


def plain_snapshot(state: dict[str, Any]) -> dict[str, Any]:
    return {"ema": New(LINEAR, {"_parameters": state})}


@pytest.mark.parametrize("zipped", [False, True])
def test_files_of_torch_save(zipped, small_dit, tmp_path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.nn.Parameter(torch.randn(3).half()), "c": torch.tensor(7)}
    source = tmp_path / "a.pt"
    state, _ = read_published(written(source, torch_file(plain_snapshot(tensors), zipped)))
    assert all(torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype for name, tensor in tensors.items())
    # The same formats for a storage inside of a plain pickle, where torch writes the older one.
    typed = torch_file(tensors["b"].detach()._typed_storage(), zipped)
    tree = plain_snapshot({"b": Call(REBUILD, Call(LOAD, typed), 1, (2,), (1,), False, DICT)})
    assert torch.equal(read_published(written(source, tree))[0]["b"], tensors["b"].detach()[1:])
    tree = flow_map_snapshot(small_dit, "DiT_T_4")
    imported = import_published(written(source, torch_file(tree, zipped)), tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(imported.network.parameters(), small_dit.network.parameters(), strict=True))


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.bool])
def test_every_dtype_and_layout(dtype, tmp_path) -> None:
    whole = (torch.arange(24).reshape(2, 3, 4) % 2).to(dtype)
    tensors = {
        "whole": whole,
        "turned": whole.permute(2, 0, 1),
        "part": whole[1, 1:],
        "gaps": whole[:, :, ::2],
        "one": whole[0, 0, 1],
    }
    tensors["none"] = torch.empty(0, dtype=dtype)
    state, _ = read_published(written(tmp_path / "a.pkl", plain_snapshot(tensors)))
    for name, tensor in tensors.items():
        assert state[name].dtype == dtype
        assert state[name].is_contiguous()
        assert torch.equal(state[name], tensor)
    state["whole"].zero_()  # its own memory, which can be written to
    assert torch.equal(state["turned"], tensors["turned"])


def test_a_bool_is_0_or_1(tmp_path) -> None:
    data = bytearray(dumps(plain_snapshot({"a": torch.tensor([True, False])})))
    at = data.rindex(b"\x01\x00", 0, data.index(b"_parameters") + 1000)
    state, _ = read_published(written(tmp_path / "a.pkl", bytes(data)))
    assert state["a"].tolist() == [True, False]
    data[at : at + 2] = b"\x00\x77"
    state, _ = read_published(written(tmp_path / "a.pkl", bytes(data)))
    assert state["a"].view(torch.uint8).tolist() == [0, 1]


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "builtins.eval",
        "builtins.exec",
        "builtins.getattr",
        "builtins.__import__",
        "operator.attrgetter",
        "copyreg._reconstructor",
        "copyreg.__newobj__",
        "functools.partial",
        "importlib.import_module",
        "torch.load",
        "torch.hub.load",
        "torch.storage.os",
        "torch._utils._rebuild_tensor",
        "torch.nn.modules.module._global_forward_hooks",
        "torch.nn.modules.linear.Linear.__init__.__globals__",
        "numpy.core.multiarray._reconstruct.__globals__",
        "builtins.dict.__class__",
        "timm.layers.format.format",
        "training.networks.SongUNet",
        "pickle.loads",
        "x" * 100_000 + ".y",
        "os\nimport x.system",
    ],
)
def test_a_name_that_no_snapshot_has_is_refused_by_name(name, here, tmp_path) -> None:
    path = tmp_path / "a.pkl"
    for tree in (Call(name, "touch x"), New(name, {"a": 1}), Name(name)):
        assert f"refused: the file names {name[:80]!r}, which it has no use for" in refusal(path, {"ema": tree})


MODULE = New(LINEAR, {"_parameters": {}})
SHELL = "expected a dict with a network under the key 'ema', got none"


def storage(dtype: str = "FloatStorage", length: int = 4, said: int | None = None, data: bytes = b"\0" * 16) -> bytes:
    """A nested torch file, whose parts may contradict each other."""
    header = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    pid = dumps(("storage", Name(f"torch.{dtype}"), "k", "cpu", length, None), 2)[:-1] + b"Q."
    return header + pid + pickle.dumps(["k"], 2) + struct.pack("<q", length if said is None else said) + data


def tensor(shape: Any, stride: Any, offset: Any = 0, data: Any = None, grad: Any = False, hooks: Any = DICT) -> Any:
    return plain_snapshot(
        {"a": Call(REBUILD, Call(LOAD, storage() if data is None else data), offset, shape, stride, grad, hooks)}
    )


SHARED = storage(length=1024, data=bytes(4096))


def raw(text: bytes) -> bytes:
    return b"\x80\x04" + text


SET = b"cbuiltins\nset\n"
CLASS = b"ctorch.nn.modules.linear\nLinear\n"
HOSTILE: dict[str, tuple[Any, str]] = {
    "a class of torch called": ({"ema": Call(LINEAR, 4, 4)}, f"the file calls {LINEAR}, which no such file does"),
    "a dtype called": ({"ema": Call("torch.float32")}, "the file calls torch.float32"),
    "a string called": (raw(b"\x8c\x02os)R."), "'str' object is not callable"),
    "a record called": (raw(CLASS + b")\x81)R."), "the file calls Linear"),
    "a rebuilder made": ({"ema": New(REBUILD, {})}, "NEWOBJ class argument must be a type"),
    "an instance from arguments": (raw(CLASS + b"N\x85\x81."), "expected a whole pickle"),
    "an instance from keywords": (raw(CLASS + b")}\x8c\x01aNs\x92."), "expected a whole pickle"),
    "a function with too many arguments": ({"ema": Call("builtins.set", [], [])}, "expected 1 arguments, got 2"),
    "a global from numbers": (raw(b"K\x01K\x02\x93."), "STACK_GLOBAL requires str"),
    "a class set": ({"ema": New(LINEAR, {"__class__": FLOAT})}, "attributes: expected a plain name, got '__class__'"),
    "a dunder in a persistent object": ({"ema": Persistent("A", {"__setstate__": 1})}, "got '__setstate__'"),
    "a dunder as the class": ({"ema": Persistent("__import__", {})}, "class_name: expected a plain name, got '__import__'"),
    "a class that is no text": ({"ema": Persistent(FLOAT, {})}, "class_name: expected a plain name, got "),
    "an attribute that is no name": ({"ema": New(LINEAR, {"a.b": 1})}, "expected a plain name, got 'a.b'"),
    "an attribute of a dict": ({"ema": Call("collections.OrderedDict", state={"a": 1})}, "'dict' object has no attribute"),
    "the class of a list": (raw(b"]N}\x8c\x09__class__" + CLASS + b"s\x86b."), "__class__ assignment"),
    "an attribute of a storage": ({"ema": Call(LOAD, storage(), state={"a": 1})}, "the file sets attributes of a storage"),
    "an attribute of a tensor": (
        {"ema": Call(REBUILD, Call(LOAD, storage()), 0, (1,), (1,), False, DICT, state=(1, (1,), 2, 3, b""))},
        "the file sets attributes of a tensor",
    ),
    "an attribute of a function": (raw(SET + b"}\x8c\x01aNsb."), "the file sets attributes of builtins.set"),
    "a slot of a function": (raw(SET + b"N}\x8c\x08functionNs\x86b."), "the file sets attributes of builtins.set"),
    "an attribute of a class": (raw(CLASS + b"}\x8c\x0c__setstate__" + SET + b"sb."), "__setstate__"),
    "a slot of a class": (raw(CLASS + b"N}\x8c\x0c__setstate__" + SET + b"s\x86b."), "__setstate__"),
    "items of a class": (raw(CLASS + b"(Ne."), "expected a whole pickle"),
    "slots": ({"ema": New(LINEAR, (None, {"a": 1}))}, "attributes: expected a dict, got a tuple"),
    "a state twice": (dumps({"ema": MODULE})[:-2] + b"}bu.", "the file sets attributes of 'Linear' twice"),
    "another type of persistent object": ({"ema": Call(PERSISTENT, {"type": "module"})}, "expected type 'class', got 'module'"),
    "a persistent object of a list": ({"ema": Call(PERSISTENT, [1])}, "torch_utils.persistence: expected a dict"),
    "a pickle in a storage": (tensor((4,), (1,), data=dumps(Call("os.system", "x"))), "names 'os.system', which a storage has"),
    "an import in a storage": (tensor((4,), (1,), data=pickle.dumps([1])), "_load_from_bytes: expected a storage, got a list"),
    "a storage in a storage": (tensor((4,), (1,), data=dumps(Call(LOAD, storage()))), f"names '{LOAD}', which a storage has"),
    "a storage that is text": (tensor((4,), (1,), data="x"), "expected bytes, got 'x'"),
    "an unknown storage": (tensor((4,), (1,), data=storage("ComplexFloatStorage")), "names 'torch.ComplexFloatStorage'"),
    "a storage of terabytes": (tensor((4,), (1,), data=storage(length=2**40)), "truncated: expected 4398046511104 bytes"),
    "a storage of two lengths": (tensor((4,), (1,), data=storage(said=3)), "expected 4 elements once, got 3"),
    "a storage and more": (tensor((4,), (1,), data=storage() + b"."), "expected the end of the file"),
    "a tensor beyond its storage": (
        tensor((5,), (1,)),
        r"expected a tensor inside its storage of 4, got [5] with strides [1] from 0",
    ),
    "a tensor from beyond its storage": (tensor((1,), (1,), 4), "inside its storage of 4"),
    "a tensor with long strides": (tensor((2, 2), (3, 1)), "inside its storage of 4"),
    "a tensor that repeats": (tensor((2**40,), (0,)), "inside its storage of 4"),
    "an empty tensor of huge sizes": (tensor((0, 2**47, 2**47), (0, 0, 0)), "inside its storage of 4"),
    "a size below 0": (tensor((-1,), (1,)), "up to 8 sizes and strides, got [-1]"),
    "a stride below 0": (tensor((1,), (-1,)), "up to 8 sizes and strides, got [-1]"),
    "a size that is a number": (tensor((1.0,), (1,)), "up to 8 sizes and strides, got [1.0]"),
    "a size that is a function": (tensor((DICT,), (1,)), "up to 8 sizes and strides, got [{}]"),
    "a size of many": (tensor((1,) * 9, (1,) * 9), "up to 8 sizes and strides, got [1, 1"),
    "fewer strides": (tensor((1, 1), (1,)), "as many strides as sizes"),
    "an offset below 0": (tensor((1,), (1,), -1), "up to 8 sizes and strides, got [-1]"),
    "hooks": (tensor((1,), (1,), hooks=[1]), "and no hooks, got a storage and"),
    "a tensor of no storage": (
        plain_snapshot({"a": Call(REBUILD, [], 0, (), (), False, DICT)}),
        "expected a storage, sizes",
    ),
    "a parameter of no tensor": (
        plain_snapshot({"a": Call("torch._utils._rebuild_parameter", 1, True, DICT)}),
        "'a': expected one of at most 10000 tensors",
    ),
    "a NumPy object": ({"ema": Call("numpy.dtype", "O8", False, True)}, "numpy.dtype: expected one of"),
    "a NumPy scalar too short": (
        {"ema": Call("numpy._core.multiarray.scalar", Call("numpy.dtype", "f8", False, True), b"1")},
        "unpack requires a buffer of 8 bytes",
    ),
    "a huge frame": (raw(b"\x95" + struct.pack("<Q", 2**62) + b"N."), "truncated"),
    "a huge string": (raw(b"\x8d" + struct.pack("<Q", 2**62) + b"N."), "truncated"),
    "a long integer": (raw(b"\x8a\xff" + b"\x01" * 255 + b"."), "integer: expected at most 16 bytes, got 255"),
    "a longer integer": (raw(b"\x8b" + struct.pack("<I", 2**31 - 1) + b"."), "truncated"),
    "INST": (raw(b"(ios\nsystem\n."), "names 'os.system'"),
    "OBJ": (raw(b"(cos\nsystem\no."), "names 'os.system'"),
    "an extension": (raw(b"\x82\x01."), "unregistered extension code 1"),
    "a buffer from elsewhere": (raw(b"\x97."), "expected a whole pickle"),
    "an unknown memo": (raw(b"h\x07."), "Memo value not found at index 7"),
    "a persistent id": (raw(b"NQ."), "persistent id: expected none in a plain pickle"),
    "a persistent id as text": (raw(b"Pos.system\n."), "persistent id: expected none in a plain pickle"),
    "an empty stack": (raw(b"."), "stack underflow"),
    "no mark": (raw(b"t."), "could not find MARK"),
    "a mark too many": (raw(b"N(N."), SHELL),
    "a key without a value": (raw(b"}(Nu."), "odd number of items"),
    "a key that changes": (raw(b"}]Ns."), "unhashable"),
    "items of a number": (raw(b"K\x01(NNu."), "does not support item assignment"),
    "text that is none": (raw(b"\x8c\x01\xff."), "can't decode byte 0xff"),
    "half a character": (raw(b"}\x8c\x03ema\x8c\x03\xed\xa0\x80s."), SHELL),
    "protocol 0": (pickle.dumps({"ema": 1}, 0), "expected a pickle of protocol 2 to 5"),
    "a page": (b"<html>not found</html>", "expected a pickle of protocol 2 to 5"),
    "more after the end": (dumps({"ema": MODULE}) + b"x", "expected the end of the file"),
    "a zip of nothing": (b"PK\x03\x04" + bytes(40), "File is not a zip file"),
    "no dict": ([MODULE], SHELL),
    "no network": ({"model": MODULE}, SHELL),
    "a network of numbers": ({"ema": 3}, SHELL),
    "keys that are no names": ({"ema": New(LINEAR, {"_modules": {1: None}})}, "module: expected a plain name, got 1"),
    "modules in a list": ({"ema": New(LINEAR, {"_modules": [MODULE]})}, "expected dicts of parameters, buffers and modules"),
    "a module of numbers": ({"ema": New(LINEAR, {"_modules": {"a": 1}})}, "'a.': expected a module"),
    "a parameter of numbers": (plain_snapshot({"a": 1}), "'a': expected one of at most 10000 tensors"),
    "one name twice": (
        {"ema": New(LINEAR, {"_parameters": {"a": torch.ones(1)}, "_buffers": {"a": torch.ones(1)}})},
        "'a': expected one of at most",
    ),
}
MEMORY = "expected a file that fits in memory"
LONG = "a key of 2^100 parts"
#: Of what only the limits of the child stop.
BOMBS: dict[str, tuple[Any, str]] = {
    "nothing": (b"", "expected a file that can be read"),
    "huge bytes": (raw(b"\x8e" + struct.pack("<Q", 2**62) + b"N."), f"{MEMORY}|truncated"),
    "bytes of two terabytes": (raw(b"\x8e" + struct.pack("<Q", 2**41) + b"N."), f"{MEMORY}|truncated"),
    "a memo far away": (raw(b"Nr" + struct.pack("<I", 2**31) + b"."), f"{MEMORY}|{SHELL}"),
    "a memo at 30 million": (raw(b"Nr" + struct.pack("<I", 30_000_000) + b"."), f"{MEMORY}|{SHELL}"),
    "many lists": (raw(b"]" * 6_000_000 + b"."), MEMORY),
    "a deep key": (raw(b"})" + b"\x85" * 1_000_000 + b"Ns."), f"an end by SIGSEGV|{MEMORY}|recursion"),
    "one text, often": (raw(b"]\x8c\xff" + b"x" * 255 + b"q\x000](" + b"h\x00" * 100_000 + b"e."), "fewer objects"),
    "one storage, often": (
        plain_snapshot({f"p{n}": Call(REBUILD, Call(LOAD, SHARED), 0, (4,), (1,), False, DICT) for n in range(100)}),
        "expected storages of the file's size in all, got more",
    ),
    LONG: (raw(b"})" + b"2\x86" * 100 + b"Ns."), "got more time than a file of its size takes"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_gets_one_line(case, here, tmp_path) -> None:
    tree, text = HOSTILE[case]
    assert text in refusal(tmp_path / "a.pkl", tree)


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.full] * (name == LONG)) for name in BOMBS])
def test_a_bomb_gets_one_line(case, tmp_path) -> None:
    tree, text = BOMBS[case]
    assert re.search(text, refusal(tmp_path / "a.pkl", tree))


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({}, "an answer of the reader"),
        ([], "an answer of the reader"),
        (b"[" * 100_000, "an answer of the reader"),
        (b"{", "JSON of the reader"),
        (b"\xff", "an answer of the reader"),
        (b"1" * (unpickling.MAX_ANSWER + 1), "fewer objects"),
        ({"refused": "a\n\x1b[2Jb" + "c" * 5000}, r"^a\?\?\[2Jbc{993}$"),
        ({"storages": [["float32", -1]]}, "storages of the file's size"),
        ({"storages": [["float32", 10**30]]}, "storages of the file's size"),
        ({"storages": [["uint8", 60], ["uint8", 60]]}, "storages of the file's size"),
        ({"storages": [["uint8", 0]] * 100_001}, "storages of the file's size"),
        ({"storages": [["hub", 1]]}, "an answer of the reader"),
        ({"storages": [["uint8", float("inf")]]}, "an answer of the reader"),
        ({"storages": [], "nodes": [["tensor", 0, 0, [], []]]}, "an answer of the reader"),
        ({"storages": [["uint8", 4]], "nodes": [["tensor", 0, 1, [4], [1]]]}, "inside its storage of 4"),
        ({"storages": [["uint8", 4]], "nodes": [["tensor", 0, 0, [True], [1]]]}, "up to 8 sizes"),
        ({"storages": [["uint8", 4]], "nodes": [["tensor", 0, 0, 4, 1]]}, "up to 8 sizes"),
        ({"storages": [], "nodes": []}, "an answer of the reader"),
        ({"storages": [], "nodes": [["list", [[9]]]]}, "an answer of the reader"),
        ({"storages": [], "nodes": [["list", [["os"]]]]}, "an answer of the reader"),
        ({"storages": [], "nodes": [["dict", [{}], [1]]]}, "an answer of the reader"),
        ({"storages": [], "nodes": [["dict", ["a"], []]]}, "JSON of the reader"),
        ({"storages": [], "nodes": [["record", "__class__", None]]}, "expected a plain name"),
        ({"storages": [], "nodes": [["record", 3, None]]}, "expected a plain name"),
        ({"storages": [], "nodes": [["type", ["a"]]]}, "an answer of the reader"),
    ],
)
def test_an_answer_of_the_child_is_not_believed(answer, text) -> None:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    with pytest.raises(pickles.PickleError, match=text) as caught:
        pickles.decoded(io.BytesIO(struct.pack("<Q", len(data)) + data + bytes(100)), 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("os.kill(os.getpid(), 11)", "an end by SIGSEGV"),
        ("os._exit(3)", "an end with status 3"),
        ("os.write(1, bytes(7))", "an end with status 0"),
        ('os.write(1, bytes([40] + [0] * 7) + b\'{"nodes": [], "storages": [["int8", 3]]}\' + b"ab")', "an end with status 0"),
    ],
)
def test_a_child_that_ends_early(program, text, tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"import os\n{program}\n")
    monkeypatch.setattr(unpickling, "__file__", str(script))
    with pytest.raises(pickles.PickleError, match=f"^expected a file that the reader comes to the end of, got {text}$"):
        pickles.read_pickle(b"\x80\x04N.")


def test_what_the_child_can_do(tmp_path) -> None:
    """Once it is confined: no file is opened, written or made longer, no process started, no memory taken beyond the file's."""
    program = f"""
import os, socket, sys
sys.path.append({str(Path(unpickling.__file__).parent)!r})
import unpickling
held = os.open({str(tmp_path / "held")!r}, os.O_CREAT | os.O_WRONLY)
unpickling.confine(1 << 20)
for attempt in (
    lambda: open({str(tmp_path / "made")!r}, "w"),
    lambda: open("/etc/passwd"),
    lambda: socket.socket(),
    lambda: os.pipe(),
    lambda: os.write(held, b"x"),
    lambda: bytearray(1 << 29),
):
    try:
        attempt()
    except (OSError, MemoryError) as error:
        print(type(error).__name__, getattr(error, "errno", None))
    else:
        print("done")
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n") == ["OSError 24"] * 4 + ["OSError 27", "MemoryError None", ""], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ((0, b"PK\x03\x04", b"PK\x03\x05"), "expected a pickle of protocol"),
        ("deflated", "zip: expected uncompressed records"),
        ("twice", "zip: expected uncompressed records, each once"),
        ("no pickle", "expected a zip with data.pkl"),
        ("big", "written on a little-endian machine"),
        ("short", "expected 9 elements of float32"),
    ],
)
def test_zips_that_lie(change, text, tmp_path) -> None:
    data = torch_file(plain_snapshot({"a": torch.ones(9)}), True)
    if isinstance(change, tuple):
        _, old, new = change
        data = data.replace(old, new)
    else:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(info.filename, archive.read(info)) for info in archive.infolist()]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if change == "deflated" else zipfile.ZIP_STORED) as archive:
            for name, content in records:
                if change == "no pickle" and name.endswith("data.pkl"):
                    continue
                content = content[:-1] if change == "short" and "/data/" in name else content
                archive.writestr(name, b"big" if change == "big" and name.endswith("byteorder") else content)
            if change == "twice":
                with pytest.warns(UserWarning, match="Duplicate name"):
                    archive.writestr(*records[0])
        data = out.getvalue()
    assert text in refusal(tmp_path / "a.pkl", data)


def test_every_truncation_is_refused(small_dit, here, tmp_path) -> None:
    for data in (
        dumps(flow_map_snapshot(small_dit, "DiT_T_4")),
        *(torch_file(plain_snapshot({"a": torch.ones(9)}), z) for z in (False, True)),
    ):
        for length in [*range(1, min(len(data), 700), 7), *range(700, len(data), 5003), len(data) - 1]:
            refusal(tmp_path / "a.pkl", data[:length])


def test_what_refers_to_itself_or_repeats_ends_soon(tmp_path) -> None:
    path = tmp_path / "a.pkl"
    fields: dict[str, Any] = {}
    fields["_modules"] = {"a": New(LINEAR, fields)}
    assert "expected a module, at most 32 deep" in refusal(path, {"ema": New(LINEAR, fields)})
    deep: Any = MODULE
    for _ in range(40):
        deep = New(LINEAR, {"_modules": {"a": deep}})
    assert "expected a module, at most 32 deep" in refusal(path, {"ema": deep})
    wide: Any = MODULE  # 2^30 modules, by reference
    for _ in range(30):
        wide = New(LINEAR, {"_modules": {"a": wide, "b": wide}})
    assert "got more objects than one has" in refusal(path, {"ema": wide})
    laugh: Any = [1.0] * 10  # 10^8 numbers, by reference
    for _ in range(7):
        laugh = [laugh] * 10
    assert "got more objects than one has" in refusal(path, {"ema": New(LINEAR, {"laugh": laugh})})
    heavy = torch.ones(2**18)
    assert "expected tensors of about the file's size in all" in refusal(
        path, plain_snapshot({f"a{i}": heavy for i in range(5)})
    )
    loop: list[Any] = []
    loop.append(loop)
    nested = raw(b"\x8c\x03ema" + b"]" * 100_000 + b"a" * 99_999 + b".")
    for tree, text in (({"ema": New(LINEAR, {"loop": loop})}, "expected an IMM network"), (nested, SHELL)):
        assert text in refusal(path, tree)


def test_settings_that_lie(small_dit, tmp_path) -> None:
    def said(text: str, model_type: str = "DiT_T_4", **changes: Any) -> None:
        message = refusal(tmp_path / "a.pkl", flow_map_snapshot(small_dit, model_type, **changes))
        assert text in message

    said("names do not fit the network: missing", "DiT_XL_2")  # 2.7 GB that are never taken
    said('model_type: expected "DiT_SIZE_PATCH"', "SongNet")
    said("settings: patch", "DiT_T_0")
    said("settings: ", "DiT_T_²")
    said("img_resolution: expected 0..4096, got 1000000000", img_resolution=10**9)
    said("label_dim: expected 0..1000000, got -1", label_dim=-1)
    said("img_channels: expected 0..4096, got '4'", img_channels="4")
    said("y_embedder.embedding_table.weight: expected [8, 32], got [6, 32]", label_dim=7)
    said("T: expected a finite number, got 'x'", T="x")
    said("time_scale: expected a finite number, got nan", time_scale=float("nan"))
    said("settings: t_min and t_max", T=1.5)
    said("settings: ", noise_schedule=["fm"])
    said("settings: unknown", temb_type=torch.float32)
    said("expected an IMM network, which takes a second time, got Precond without ['f_type']", f_type=MODULE)


@pytest.mark.parametrize("count", [1_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_mutated_files_are_imported_or_refused_and_do_nothing_else(count, tmp_path) -> None:
    """In a process that ends at any audited event but reading the file and writing the destination."""
    script = Path(__file__).with_name("fuzz_import.py")
    command = [sys.executable, str(script), str(tmp_path), str(count), "1"]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["files"] == counts["accepted"] + counts["refused"] == count
    assert counts["accepted"] > count / 50
    assert counts["refused"] > count / 4


def test_the_command(small_dit, tmp_path) -> None:
    source, dest = written(tmp_path / "a.pkl", flow_map_snapshot(small_dit, "DiT_T_4")), tmp_path / "a.safetensors"
    output = said("import", "--net", source, "--out", dest, "--second-time=identity")
    assert "network: DiT (size T, patch 4, channels 4, resolution 8, num_classes 5), 0.1 M parameters" in output
    assert "second_time identity" in output
    assert "sha256 " in output
    assert checkpoints.load(dest).second_time == "identity"
    call("sample", "--net", dest, "--seeds=0-1", "--out", tmp_path / "images")
    shutil.rmtree(tmp_path / "images")
    dest.unlink()
    written(source, {"ema": Call("os.system", "touch x")})
    result = call("import", "--net", source, "--out", dest, ok=False)
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)
    assert result.output.startswith(f"Error: {source}: refused: the file names 'os.system'")
    assert os.listdir(tmp_path) == ["a.pkl"]
