"""Every layout that images come in, from small files written here, and what is refused in each."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_pictures import saved
from PIL import Image

from imm.data import ImageData, load
from imm.data.listing import MAX_ARRAY
from imm.pickles import PickleError, read_pickle

RANDOM = np.random.default_rng(0)


def check(data: ImageData, images: np.ndarray, labels) -> None:
    """The same pixels ([N, H, W, C]) and labels, in the same order."""
    np.testing.assert_array_equal(data.pixels.permute(0, 2, 3, 1).numpy(), images)
    assert (None if data.labels is None else data.labels.tolist()) == (None if labels is None else list(labels))


def refused(path, text: str, split: str | None = None) -> None:
    with pytest.raises(ValueError, match=text):
        load(str(path), split=split)


def png(image: np.ndarray) -> bytes:
    return saved(Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image), "PNG")


def write_zip(path: Path, members, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_tar(path: Path, members, mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def tarred(source: Path, name: str = "set.tar") -> Path:
    path = source.parent / name
    with tarfile.open(path, "w") as archive:
        archive.add(source, ".")
    return path


def write_folder(path: Path, members) -> Path:
    for name, content in members:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


WRITERS = {"folder": write_folder, ".zip": write_zip, ".tar.gz": write_tar, ".tgz": write_tar}


def written(tmp_path: Path, kind: str, members) -> Path:
    return WRITERS[kind](tmp_path / ("set" if kind == "folder" else f"set{kind}"), members)


# ---- pictures with dataset.json, in class folders, or loose


@pytest.fixture
def pictures() -> np.ndarray:
    return RANDOM.integers(0, 256, (4, 6, 6, 3), dtype=np.uint8)


def listed(pictures, labels) -> list[tuple[str, bytes]]:
    """EDM's layout, the pictures out of order in the archive."""
    names = [f"00000/img{number:08d}.png" for number in range(len(pictures))]
    members = [(name, png(picture)) for name, picture in zip(names, pictures, strict=True)]
    table = None if labels is None else [[name, label] for name, label in zip(names, labels, strict=True)]
    return [*members[::-1], ("dataset.json", json.dumps({"labels": table}).encode())]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("labels", [[6, 0, 2, 0], None])
def test_dataset_json(kind, labels, pictures, tmp_path) -> None:
    data = load(str(written(tmp_path, kind, listed(pictures, labels))))
    check(data, pictures, labels)
    assert data.num_classes == (7 if labels else 0)
    assert data.source.startswith("4 images in ")


def test_a_deflated_zip(pictures, tmp_path) -> None:
    check(load(str(write_zip(tmp_path / "a.zip", listed(pictures, None), zipfile.ZIP_DEFLATED))), pictures, None)


@pytest.mark.parametrize("kind", WRITERS)
def test_class_folders(kind, pictures, tmp_path) -> None:
    names = ["b/2.png", "b/1.png", "a/deep/3.png", "c/0.png"]
    members = [(name, png(picture)) for name, picture in zip(names, pictures, strict=True)]
    junk = [("a/notes.txt", b"no picture"), ("__MACOSX/a/3.png", b"no picture"), ("b/.1.png", b"no picture")]
    check(load(str(written(tmp_path, kind, members + junk))), pictures[[2, 1, 0, 3]], [0, 1, 1, 2])


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (b"{", "expected JSON, got dataset.json"),
        (b"[" * 200_000, "expected JSON, got dataset.json"),
        (b"[]", r"expected {\"labels\""),
        (b"{}", r"expected {\"labels\""),
        (b'{"labels": {}}', r"expected {\"labels\""),
        (b'{"labels": [["a.png", 0]]}', "each of the 2 images in .*, got 1 labels; one of the two lacks b.png"),
        (b'{"labels": [["a.png", 0], ["b.png", 1], ["c.png", 1]]}', "got 3 labels; one of the two lacks c.png"),
        (b'{"labels": [["a.png", 0], ["a.png", 1]]}', "got two for a.png"),
        (b'{"labels": [["a.png", -1], ["b.png", 1]]}', "classes from 0 to 999999"),
        (b'{"labels": [["a.png", 1.5], ["b.png", 1]]}', "classes from 0 to 999999"),
        (b'{"labels": [["a.png", true], ["b.png", 1]]}', "classes from 0 to 999999"),
        (b'{"labels": [["a.png", [0, 1]], ["b.png", 1]]}', "classes from 0 to 999999"),
        (b'{"labels": [["a.png"]]}', "classes from 0 to 999999"),
        (b'{"labels": [3]}', "classes from 0 to 999999"),
        (b'{"labels": [["a.png", 1000000], ["b.png", 1]]}', "classes from 0 to 999999"),
    ],
)
def test_bad_dataset_json(table, text, pictures, tmp_path) -> None:
    members = [("a.png", png(pictures[0])), ("b.png", png(pictures[1])), ("dataset.json", table)]
    refused(write_zip(tmp_path / "a.zip", members), text)


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "x/../../a.png", "x\\..\\a.png"])
@pytest.mark.parametrize("kind", [".zip", ".tgz"])
def test_names_that_lead_out_are_refused(name, kind, pictures, tmp_path) -> None:
    refused(written(tmp_path, kind, [(name, png(pictures[0]))]), "expected names below .*, got ")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", [".zip", ".tgz"])
def test_names_twice_are_refused(kind, pictures, tmp_path) -> None:
    for second in ("x/a.png", "./x/a.png"):
        members = [("x/a.png", png(pictures[0])), (second, png(pictures[1]))]
        refused(written(tmp_path, kind, members), "got 'x/a.png' twice")


def test_a_tar_made_from_a_folder(pictures, tmp_path) -> None:
    """Its names begin with "./"."""
    check(load(str(tarred(write_folder(tmp_path / "set", listed(pictures, [0, 1, 2, 3]))))), pictures, [0, 1, 2, 3])


@pytest.mark.parametrize("kind", [".zip", ".tar.gz"])
def test_truncated_archives_are_refused(kind, pictures, tmp_path) -> None:
    path = written(tmp_path, kind, listed(pictures, [0, 1, 2, 3]))
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        refused(path, "data: expected ")
    path.write_bytes(b"nothing of the sort" * 100)
    refused(path, "data: expected a whole (zip|tar) file")


def test_damaged_members_are_refused(pictures, tmp_path) -> None:
    path = write_zip(tmp_path / "a.zip", listed(pictures, None))
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(whole)
    refused(path, r"expected a whole zip file, got .*img0000000\d.png.*CRC")
    write_zip(path, listed(pictures, None), zipfile.ZIP_BZIP2)
    refused(path, "expected stored or deflated files")


def test_bombs_are_refused(monkeypatch, pictures, tmp_path) -> None:
    monkeypatch.setattr("imm.data.listing.MAX_FILE", 2**20)
    zeros = [("a.png", bytes(2**20 + 1))]
    for kind in WRITERS:
        refused(written(tmp_path, kind, zeros), "expected files of at most 1048576 bytes, got 1048577 in .*a.png")
    monkeypatch.setattr("imm.data.listing.MAX_FILE", 2**30)
    monkeypatch.setattr("imm.data.listing.MAX_ARRAY", 1000)
    refused(tmp_path / "set.tgz", "expected at most 1000 bytes in 10000 files")


def test_a_tar_header_cannot_ask_for_memory(tmp_path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 2**40
    (tmp_path / "a.tgz").write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    refused(tmp_path / "a.tgz", "expected a whole tar file, .* bytes")


def test_pictures_beyond_pillows_limit_are_refused(monkeypatch, tmp_path) -> None:
    write_zip(tmp_path / "a.zip", [("a.png", png(np.zeros((40, 40, 1), np.uint8)))])
    for limit in (1000, 100):  # pillow warns from its limit on, and raises from twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused(tmp_path / "a.zip", f"expected an image of at most {limit} pixels, got .*a.png")


# ---- CIFAR-10


@pytest.fixture
def cifar() -> dict[str, tuple[np.ndarray, list[int]]]:
    """Twenty training images (four a batch) and six test images."""
    make = lambda n: (RANDOM.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), RANDOM.integers(0, 10, n).tolist())
    return {"train": make(20), "test": make(6)}


def batches(cifar) -> list[tuple[str, np.ndarray, list[int]]]:
    images, labels = cifar["train"]
    parts = [(f"data_batch_{n + 1}", images[4 * n : 4 * n + 4], labels[4 * n : 4 * n + 4]) for n in range(5)]
    return [*parts, ("test_batch", *cifar["test"])]


def flat(images: np.ndarray) -> np.ndarray:
    """[N, 3072], plane by plane, as CIFAR-10 stores them."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1).copy()


def as_pickles(cifar, protocol: int = 2) -> list[tuple[str, bytes]]:
    out = [("batches.meta", b"not looked at")]
    for name, images, labels in batches(cifar):
        batch = {b"batch_label": b"one", b"labels": labels, b"data": flat(images), b"filenames": [b"a.png"] * len(labels)}
        out.append((f"cifar-10-batches-py/{name}", pickle.dumps(batch, protocol)))
    return out


def as_records(cifar) -> list[tuple[str, bytes]]:
    record = lambda images, labels: np.concatenate([np.array(labels, np.uint8)[:, None], flat(images)], 1).tobytes()
    return [(f"cifar-10-batches-bin/{name}.bin", record(*rest)) for name, *rest in batches(cifar)]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("layout", [as_pickles, as_records])
def test_cifar10(kind, layout, cifar, here, tmp_path) -> None:
    path = str(written(tmp_path, kind, layout(cifar)))
    for split, name in ((None, "train"), ("train", "train"), ("test", "test")):
        data = load(path, split=split)
        check(data, *cifar[name])
        assert data.source == f"{len(data)} images in {path} ({name})"
    images, labels = zip(cifar["train"], cifar["test"], strict=True)
    check(load(path, split="all"), np.concatenate(images), labels[0] + labels[1])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar10_pickles_of_every_protocol(protocol, cifar, tmp_path) -> None:
    check(load(str(write_folder(tmp_path, as_pickles(cifar, protocol)))), *cifar["train"])


def test_the_pickles_of_python_2() -> None:
    """Their strings are bytes; the published batches are such files."""
    content = (
        b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x03K\x07eU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\n"
        b"ndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09(K\x03U\x01|"
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06abcdeftbu."
    )
    batch = read_pickle(content)
    assert batch["labels"] == [3, 7]
    np.testing.assert_array_equal(batch["data"].tensor(), np.frombuffer(b"abcdef", np.uint8).reshape(2, 3))


class Hostile:
    """Makes a pickle that writes a file when it is run."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_hostile_pickles_are_refused_and_not_run(protocol, cifar, tmp_path) -> None:
    mark = tmp_path / "run"
    attacks = [
        Hostile(os.system, f"touch {mark}"),
        Hostile(exec, f"open({str(mark)!r}, 'w')"),
        Hostile(open, str(mark), "w"),
        {b"labels": [1], b"data": Hostile(os.mkdir, str(mark))},
    ]
    files = dict(as_pickles(cifar))
    name = "cifar-10-batches-py/data_batch_1"
    for attack in attacks:
        files[name] = pickle.dumps(attack, protocol)
        write_folder(tmp_path / "set", files.items())
        refused(tmp_path / "set", f"expected a pickle of plain data, got {name}")
    assert not mark.exists()
    pickle.loads(pickle.dumps(attacks[2], protocol)).close()  # the attack is a real one
    assert mark.exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.bool_])
def test_arrays(protocol, dtype, here) -> None:
    whole = (RANDOM.integers(0, 256, (2, 3, 4)) % 2).astype(dtype)
    for array in (whole, np.asfortranarray(whole), whole[:, ::2], whole[0, 0, 0], whole[:0], whole[0, 0, 1:2]):
        found = read_pickle(pickle.dumps([array], protocol))[0]
        np.testing.assert_array_equal(found.tensor() if array.shape else found, array)


def test_odd_arrays_are_refused(here) -> None:
    array, numbers = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R", np.arange(6)
    odd = {
        b"cnumpy\nload\n.": "the file names 'numpy.load'",
        b"cnumpy\nndarray\n)R.": "the file calls numpy.ndarray",
        b"cnumpy\nndarray\n)\x81.": "expected a whole pickle",
        b"cnumpy\ndtype\nU\x01OK\x00K\x01\x87R.": "numpy.dtype: expected one of",
        b"cnumpy\ndtype\n)R.": "numpy.dtype: expected 3 arguments",
        b"X\xff\xff\xff\x7fabc.": "truncated",
        array + b".": "expected a tensor's elements in the file",
        array + b"}b.": "the file sets attributes of an array",
        array + b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R\x89U\x02abtb.": "expected an array of 3 elements, got 2",
        array + b"(K\x01K\x03\x85K\x05\x89U\x02abtb.": "expected an array of numbers, got 5",
        pickle.dumps(numbers.astype(">i4"), 2)[2:]: "little-endian",
        pickle.dumps(numbers.astype(np.uint64), 2)[2:]: "expected an array of numbers, got the type u8",
        pickle.dumps(numbers.astype(object), 2)[2:]: "numpy.dtype: expected one of",
        pickle.dumps(numbers.astype("S3"), 2)[2:]: "numpy.dtype: expected one of",
    }
    for content, text in odd.items():
        with pytest.raises(PickleError, match=text):
            read_pickle(b"\x80\x02" + content)
    whole = pickle.dumps(np.arange(6, dtype=np.uint8).reshape(2, 3), 2)
    for length in range(1, len(whole)):
        with pytest.raises(PickleError):
            read_pickle(whole[:length])


def test_bad_pickled_batches(cifar, here, tmp_path) -> None:
    files = dict(as_pickles(cifar))
    data = np.zeros((4, 3072), np.uint8)
    for batch, text in (
        ([1], "expected a dict in .*data_batch_3.*, got a list"),
        ({"labels": [1]}, r"an array data \[N, 3072\] of uint8"),
        ({"data": data[:, :-1], "labels": [1] * 4}, r"an array data \[N, 3072\] of uint8"),
        ({"data": data.astype(np.int64), "labels": [1] * 4}, r"an array data \[N, 3072\] of uint8"),
        ({"data": data}, "expected a list of labels in .*, got a NoneType"),
        ({"data": data, "labels": [1] * 3}, "each of the 4 images in .*, got 3"),
        ({"data": data, "labels": [1, 2, 3, 10]}, r"classes 0\.\.9"),
        ({"data": data, "labels": [1, 2, 3, "4"]}, r"classes 0\.\.9"),
        ({"data": data[:0], "labels": []}, "each of the 0 images"),
    ):
        files["cifar-10-batches-py/data_batch_3"] = pickle.dumps(batch, 3)
        refused(write_folder(tmp_path, files.items()), text)
        check(load(str(tmp_path), split="test"), *cifar["test"])  # the other files are not read


def test_bad_records(cifar, tmp_path) -> None:
    files = dict(as_records(cifar))
    name = "cifar-10-batches-bin/data_batch_2.bin"
    for content, text in (
        (files[name][:-1], "records of 3073 bytes .*, got 12291 bytes"),
        (b"\x0a" + files[name][1:], r"classes 0\.\.9 in .*batch_2"),
    ):
        refused(write_zip(tmp_path / "a.zip", {**files, name: content}.items()), text)


@pytest.mark.parametrize("layout", [as_pickles, as_records])
def test_a_missing_or_second_cifar10_is_refused(layout, cifar, tmp_path) -> None:
    members = layout(cifar)
    without = [(name, content) for name, content in members if "data_batch_5" not in name]
    refused(write_folder(tmp_path / "part", without), "expected all of CIFAR-10 in .*, found no .*data_batch_5")
    write_folder(tmp_path / "two" / "a", members)
    shutil.copytree(tmp_path / "two" / "a", tmp_path / "two" / "b")
    refused(tmp_path / "two", "expected CIFAR-10 once")


# ---- MNIST


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def mnist() -> dict[str, tuple[np.ndarray, list[int]]]:
    make = lambda n: (RANDOM.integers(0, 256, (n, 5, 5, 1), dtype=np.uint8), RANDOM.integers(0, 10, n).tolist())
    return {"train": make(7), "test": make(3)}


def as_idx(mnist, suffix: str = "", dot: str = "-") -> list[tuple[str, bytes]]:
    out = []
    for split, name in (("train", "train"), ("test", "t10k")):
        images, labels = mnist[split]
        out += [
            (f"{name}-images{dot}idx3-ubyte", idx(images[..., 0])),
            (f"{name}-labels{dot}idx1-ubyte", idx(np.uint8(labels))),
        ]
    return [(name + suffix, gzip.compress(content) if suffix else content) for name, content in out]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("form", [("", "-"), (".gz", "-"), ("", ".")])
def test_mnist(kind, form, mnist, tmp_path) -> None:
    path = str(written(tmp_path, kind, [(f"data/{name}", content) for name, content in as_idx(mnist, *form)]))
    check(load(path), *mnist["train"])
    check(load(path, split="test"), *mnist["test"])
    assert len(load(path, split="all")) == 10


def test_one_idx_file(mnist, tmp_path) -> None:
    write_folder(tmp_path, as_idx(mnist, ".gz"))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    check(load(str(path)), *mnist["test"])
    refused(path, "expected all for .*, which has no splits, got train", split="train")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    refused(path, "expected the labels t10k-labels-idx1-ubyte beside")


def test_bad_idx(mnist, tmp_path) -> None:
    images, labels = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    files = dict(as_idx(mnist))
    whole = files[images]
    packed = gzip.compress(whole)
    for change, text in (
        ({images: whole[:-1]}, r"expected 175 bytes for \[7, 5, 5\] in train-images.*, got 174"),
        ({images: whole + b"x"}, "expected 175 bytes .*, got 176"),
        ({images: whole[:10]}, "expected an IDX file of 3-dimensional uint8"),
        ({images: b""}, "expected an IDX file of 3-dimensional uint8"),
        ({images: whole[:4] + b"\xff" * 12}, "expected 79228162458924105385300197375 bytes"),
        ({images: whole[:4] + bytes(12)}, "expected 0 bytes"),
        ({images: files[labels]}, "expected an IDX file of 3-dimensional uint8"),
        ({images: b"\0\0\x0d" + whole[3:]}, "expected an IDX file of 3-dimensional uint8"),
        ({images: packed[:-12]}, "expected a whole gzip file, got .*, which ends early"),
        ({images: packed[:12] + b"\xff\xff\xff" + packed[15:]}, "expected a whole gzip file"),
        ({labels: idx(np.zeros(6, np.uint8))}, "expected 7 labels in train-labels-idx1-ubyte .*, got 6"),
    ):
        refused(write_folder(tmp_path / "a", {**files, **change}.items()), text)
    only_test = [(name, content) for name, content in files.items() if name.startswith("t10k")]
    refused(write_folder(tmp_path / "b", only_test), "expected one of test that .* has, got train")
    write_folder(tmp_path / "c", [*files.items(), *as_idx(mnist, ".gz")])
    refused(tmp_path / "c", "expected one file of images a split")


def test_a_gzip_bomb_is_refused(monkeypatch, mnist, tmp_path) -> None:
    files = dict(as_idx(mnist))
    files["train-images-idx3-ubyte"] = gzip.compress(bytes(10**6))
    monkeypatch.setattr("imm.data.arrays.MAX_FILE", 1000)
    refused(write_folder(tmp_path, files.items()), "expected at most 1000 bytes in train-images-idx3-ubyte")


# ---- npz


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("arr_0", "arr_1")])
def test_npz(images, labels, pictures, tmp_path) -> None:
    """Under our names, and under ADM's."""
    path = tmp_path / "a.npz"
    np.savez(path, **{images: pictures, labels: np.array([3, 1, 0, 2])})
    check(load(str(path)), pictures, [3, 1, 0, 2])
    np.savez_compressed(path, **{images: pictures[..., 0]})
    check(load(str(path)), pictures[..., :1], None)


def test_an_npz_header_cannot_ask_for_memory(pictures, tmp_path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**40, 8, 8, 3)})
    path = write_zip(tmp_path / "a.npz", [("images.npy", header.getvalue() + bytes(100))])
    refused(path, "images has 100 bytes for ")
    write_zip(path, [("images.npy", bytes(100))])
    refused(path, "expected a whole .npz file of numbers")
    write_zip(path, [("images.npy", header.getvalue().replace(b"3), }", b"3 , }"))])  # Python source that has no end
    refused(path, "expected a whole .npz file of numbers")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"")
        archive.infolist()[0].file_size = MAX_ARRAY + 1
    refused(path, "images.npy is larger than")


# ---- splits


def test_splits(pictures, tmp_path) -> None:
    path = write_zip(tmp_path / "a.zip", listed(pictures, None))
    assert len(load(str(path), split="all")) == 4
    refused(path, "expected all for .*, which has no splits, got test", split="test")
    refused(path, "expected one of train, test, all, got 'validation'", split="validation")
