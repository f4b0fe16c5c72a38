"""Imports mutated snapshots under an audit hook and a memory limit: ``python fuzz_import.py FOLDER COUNT SEED``.

A process of its own: an audit hook cannot be taken off again. What ``imm.unpickling`` does in a child is done here, where the
hook sees it; some files go through a child first, with the same outcome. Prints a line of JSON; exits with 1 at the first file
that does anything but be imported or be refused in one line.
"""

from __future__ import annotations

import json
import pickletools
import random
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import published_files
import torch

from imm import FlowMap, checkpoints, pickles
from imm.checkpoints import published
from imm.networks import DiT, dit

#: Address space beyond what the process has after one import.
ROOM = 64 << 20
SECONDS = 2.0
#: What an import may do where it writes, and how many of the arguments are paths.
WRITING = {f"os.{name}": 1 for name in ("mkdir", "rmdir", "chmod", "remove", "listdir", "utime")}
WRITING |= {"open": 1, "shutil.rmtree": 1, "os.rename": 2, "os.scandir": 0}
HOSTILE = [
    b"cos\nsystem\n",
    b"\x8c\x02os\x8c\x06system\x93",
    b"\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R",
    b"\x8c\x08builtins\x8c\x07getattr\x93",
    b"(iposix\nsystem\n",
    b"\x8c\x06copyreg\x8c\x0e_reconstructor\x93",
    b"}\x8c\x09__class__Nsb",
    b"\x95" + struct.pack("<Q", 2**62),
    b"\x8e" + struct.pack("<Q", 2**40),
    b"\x8d" + struct.pack("<Q", 2**40),
    b"r" + struct.pack("<I", 2**31),
    b"\x8b" + struct.pack("<i", 2**31 - 1),
    b"(" * 50,
    b"]" * 50 + b"a" * 49,
    b"h\x00" * 40,
]


def originals() -> list[bytes]:
    """Small files of every layout that the reader takes."""
    dit.SIZES["tiny"] = (8, 1, 2)
    torch.manual_seed(0)
    flow_map = FlowMap(DiT("tiny", 4, channels=1, resolution=8, num_classes=2))
    tree = published_files.flow_map_snapshot(flow_map, "DiT_tiny_4", mixed_precision=torch.float16)
    zipped, legacy = (published_files.torch_file(tree, zipped) for zipped in (True, False))
    tree = published_files.flow_map_snapshot(flow_map, "DiT_tiny_4", mixed_precision=torch.float16, T=np.float64(0.994))
    tree["loss_fn"] = published_files.Persistent("Loss", {"a": np.float32(1.0), "k": np.int64(12)})
    tree["dataset_kwargs"] = published_files.New("dnnlib.util.EasyDict", None, {"path": "x", "sizes": [1, (2, 3), {4}]})
    tree["augment_kwargs"] = published_files.record({"p": 0.12, "sizes": [1, None]})
    return [*(published_files.dumps(tree, protocol) for protocol in (4, 3, 5)), legacy, zipped]


def positions(data: bytes) -> list[int]:
    """Where opcodes start, in the part of a file that is one pickle."""
    try:
        return [position for _, _, position in pickletools.genops(data) if position is not None]
    except ValueError:
        return list(range(min(200, len(data))))


def mutated(chance: random.Random, files: list[tuple[bytes, list[int]]]) -> bytes:
    data, starts = chance.choice(files)
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.choice(starts) + chance.choice((0, 0, 1, 2, 5)) if chance.random() < 0.8 else chance.randrange(len(out) + 1)
        kind = chance.randrange(9)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << chance.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        elif kind == 2:
            del out[at : at + chance.choice((1, 2, 8, 100, len(out)))]
        elif kind == 3:
            other, marks = chance.choice(files)
            begin = chance.choice(marks)
            out[at : at + chance.choice((0, 0, 20))] = other[begin : begin + chance.choice((1, 3, 20, 500))]
        elif kind == 4:
            out[at:at] = bytes((chance.choice(list(pickletools.code2op)).encode("latin1")[0],))
        elif kind == 5:
            out[at:at] = chance.choice(HOSTILE)
        elif kind == 6:
            out[at : at + 4] = struct.pack("<I", chance.choice((0, 1, 2**31 - 1, 2**32 - 1, chance.randrange(2**32))))
        elif kind == 7:
            begin = chance.choice(starts)
            out[at:at] = out[begin : begin + chance.choice((1, 10, 200))]
        else:
            begin = chance.choice(starts)
            swapped = bytes(out[begin : begin + 2])
            out[begin : begin + 2], out[at : at + 2] = out[at : at + 2], swapped
    return bytes(out)


def imported(source: Path, target: Path) -> str:
    """ "accepted", "refused" in one line, or what else became of it."""
    try:
        checkpoints.import_published(source, target)
        return "accepted"
    except checkpoints.CheckpointError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 2000 else f"a message that is no line: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"


def main(folder: Path, count: int, seed: int) -> None:
    for path in folder.iterdir():
        path.unlink()
    source, target = folder / "in.pkl", folder / "out.safetensors"
    part = folder / ".out.safetensors.part"
    places = [str(part), *(str(part / name) for name in ("mode", target.name)), "mode", target.name]  # rmtree's by their names
    files = originals()
    for data in files:
        source.write_bytes(data)
        published_files.read_here(source.open("rb"), ("ema",))  # imports zipfile
        checkpoints.read_published(source)
    source.write_bytes(files[0])
    checkpoints.import_published(source, target)
    watching = writing = False
    seen: list[str] = []  # what the hook ends, in case that someone takes its exception for a refusal's
    save = published.save

    def saving(*args: Any, **kwargs: Any) -> None:
        nonlocal writing
        writing = True
        save(*args, **kwargs)
        writing = False

    published.save = saving

    def hook(event: str, args: tuple[object, ...]) -> None:
        if not watching or event == "builtins.id":
            return
        # Python's own words where a huge bytearray (BYTEARRAY8) gets no memory.
        if event == "sys.excepthook" and "deallocated bytearray" in str(args[2]):
            return
        # safetensors takes a tensor's bytes through ctypes; the file's objects are gone by then.
        if writing and (event.startswith("ctypes.") or event == "object.__setattr__"):
            return
        if event == "open" and args[1] in ("r", "rb") and str(args[0]) == str(source):
            return
        # The destination is written in a private folder beside it; what is done there names that folder or a file in it.
        if writing and event in WRITING and all(str(path) in (str(target), *places) for path in args[: WRITING[event]]):
            return
        seen.append(f"audit: {event} {args!r}"[:300])
        raise RuntimeError(seen[-1])

    sys.addaudithook(hook)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    chance, tree = random.Random(seed), [(data, positions(data)) for data in files]
    counts = {"files": 0, "accepted": 0, "refused": 0, "slowest": 0.0, "children": min(300, count // 50)}
    in_child = pickles._read
    for number in range(count):
        data = mutated(chance, tree)
        source.write_bytes(data)
        target.unlink(missing_ok=True)
        pickles._read = in_child
        expected_outcome = imported(source, target) if number < counts["children"] else None
        target.unlink(missing_ok=True)
        pickles._read = published_files.read_here
        watching, begin = True, time.process_time()
        outcome = imported(source, target)
        outcome = seen.pop() if seen else outcome
        watching = writing = False
        seconds = time.process_time() - begin
        left = sorted(path.name for path in folder.iterdir())
        expected = ["in.pkl", "out.safetensors"] if outcome == "accepted" else ["in.pkl"]
        same = expected_outcome in (None, outcome)
        if outcome not in ("accepted", "refused") or left != expected or seconds > SECONDS or not same:
            (folder / "case.pkl").write_bytes(data)
            done = f"{outcome} ({expected_outcome} in a child), {seconds:.2f} s, left {left}"
            sys.exit(f"file {number} of seed {seed}, kept as case.pkl: {done}")
        counts[outcome] += 1
        counts["files"] += 1
        counts["slowest"] = max(counts["slowest"], round(seconds, 3))
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
