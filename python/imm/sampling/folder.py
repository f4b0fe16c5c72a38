"""Generation at scale: a folder of images that any number of processes fill and a killed run resumes.

The list of seeds is cut into batches, whatever the number of processes; process k of n makes the batches k, k + n, ... Every
batch is run in the same number of rows and an image has the same row in every run, so that a file has the same bytes however
often the run was stopped and however many processes made it. A file is there as a whole or not at all; one that a machine's
end cut short counts as absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from imm.distributed import Processes
from imm.evaluation.sets import GENERATION_FILE
from imm.files import lock_folder, remove_part, replacing, write_text
from imm.pictures import save_picture, to_picture
from imm.sampling.sampler import Sampler
from imm.sampling.tokens import TokenSampler

if TYPE_CHECKING:
    from filelock import FileLock

#: What made a folder's images, on which machines: a list, which may grow. It moves the last bits of an image at most.
_NOTES = "made_with"
#: Fields that the manifest of latents lacks, and that of pictures decoded from them has.
_DECODING = ("vae", "quantisation")
_WRITERS = 4
#: The last chunk of every PNG: its length, name and checksum.
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"


class ImageFolder:
    """Where the images of a run go: one file a seed, ``SSSSSS.png`` for pictures, else ``SSSSSS.npy``.

    Args:
        root: the folder. pictures: whether images have one or three channels. subdirs: a sub-folder for every thousand seeds.
        decoded: whether the pictures are of latents, which are quantised by another rule.
    """

    def __init__(self, root: Path, *, pictures: bool, subdirs: bool = False, decoded: bool = False) -> None:
        self.root, self.pictures, self.subdirs, self.decoded = root, pictures, subdirs, decoded
        self._lock: FileLock | None = None

    def path(self, seed: int) -> Path:
        """The file of a seed."""
        folder = self.root / f"{seed - seed % 1000:06d}" if self.subdirs else self.root
        return folder / f"{seed:06d}{'.png' if self.pictures else '.npy'}"

    def _latents_path(self, seed: int) -> Path:
        return self.path(seed).with_suffix(".npy")

    def latents(self, seed: int) -> Tensor | None:
        """``[C, H, W]`` float32 that the same run wrote before it decoded; None where there are none."""
        try:
            return torch.from_numpy(np.load(self._latents_path(seed), allow_pickle=False))
        except (OSError, ValueError, EOFError):
            return None

    def has(self, seed: int) -> bool:
        """Whether the image of a seed is there, and whole."""
        path = self.path(seed)
        try:
            if not self.pictures:
                np.load(path, mmap_mode="r", allow_pickle=False)  # compares the size with the header
                return True
            with path.open("rb") as file:
                file.seek(-len(_PNG_END), os.SEEK_END)
                return file.read() == _PNG_END
        except (OSError, ValueError, EOFError):
            return False

    def begin(self, manifest: Mapping[str, Any], seeds: Sequence[int], where: Processes) -> None:
        """Make the folder, or find it as a run with the same manifest left it, or as one that left its latents undecoded.

        Raises:
            ValueError: the folder holds images made in another way or not by this function, or another run writes to it.
        """
        path = self.root / GENERATION_FILE
        expected = json.loads(json.dumps(manifest))
        refusal = f"out: expected a folder that no other run writes to, got {self.root}"
        # A second run would remove what this one is writing.
        self._lock = where.in_first(lambda: lock_folder(self.root), refusal)
        if where.first:
            for part in list(self.root.rglob(".*.part")):  # of a killed run
                remove_part(part)
        if where.first and path.is_file() and not any(self.root.rglob("*.png")) and not any(self.root.rglob("*.npy")):
            path.unlink()  # of a run that made no image
        if where.first and not path.is_file():
            own = (file for seed in seeds for file in (self.path(seed), self._latents_path(seed)))
            present = next((file for file in own if file.exists()), None)
            if present is not None:
                raise ValueError(f"out: expected no images of another origin in {self.root}, got {present.name}")
            _write_json(path, expected)
        if where.first:
            _take_up_decoding(path, expected)
        where.wait()
        found = _read_json(path)
        ours, theirs = _identity(expected), _identity(found)
        unlike = [
            f"{key} {found.get(key)!r} there, {expected.get(key)!r} here"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key)
        ]
        if unlike:
            raise ValueError(f"out: {self.root} holds images of another run ({'; '.join(unlike)}); choose another folder")
        if where.first:
            here = [one for one in expected.get(_NOTES, []) if one not in found.get(_NOTES, [])]
            if here and not all(map(self.has, seeds)):
                _write_json(path, {**found, _NOTES: [*found.get(_NOTES, []), *here]})
            for folder in {self.path(seed).parent for seed in seeds}:
                folder.mkdir(exist_ok=True)
        where.wait()

    def close(self) -> None:
        """Let other runs write to the folder."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._lock.release()

    def write(self, seed: int, image: Tensor) -> None:
        """Write one image ``[C, H, W]``, or sequence ``[T, D]``, atomically."""
        path = self.path(seed)
        if self.pictures:
            save_picture(to_picture(image, decoded=self.decoded), path)
            return
        with replacing(path) as part:
            np.save(part, image.numpy())

    def read(self, seed: int) -> np.ndarray[Any, Any]:
        """A written image: uint8 ``[H, W, C]`` of a picture, else float32 ``[C, H, W]``; of a sequence ``[T, D]``."""
        if not self.pictures:
            return np.load(self.path(seed), allow_pickle=False)
        from PIL import Image

        with Image.open(self.path(seed)) as picture:
            pixels = np.asarray(picture)
        return pixels if pixels.ndim == 3 else pixels[:, :, None]

    def write_npz(self, path: Path, seeds: Sequence[int], labels: Tensor | None) -> None:
        """All images as one array, in the layout that the ADM evaluator reads: ``arr_0`` ``[N, H, W, C]`` uint8 and, with
        classes, ``arr_1`` ``[N]`` int64. Latents are ``[N, C, H, W]`` float32; sequences are ``tokens`` ``[N, T, D]`` float32
        and ``labels``, as ``imm train`` reads them."""
        first = self.read(seeds[0])
        with replacing(path) as part:
            # On disk: 50,000 images of 256 x 256 are 10 GB.
            whole = part.with_name("array.npy")
            array = np.lib.format.open_memmap(whole, mode="w+", dtype=first.dtype, shape=(len(seeds), *first.shape))
            for i, seed in enumerate(seeds):
                array[i] = self.read(seed)
            array.flush()
            values, classes = ("tokens", "labels") if array.ndim == 3 else ("arr_0", "arr_1")
            np.savez(part, **({values: array} if labels is None else {values: array, classes: labels.numpy()}))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"out: expected a readable {path}, got: {error}") from error
    return found


def _take_up_decoding(path: Path, expected: Mapping[str, Any]) -> None:
    """Let the manifest of latents say that they are decoded, where it is of the same run in all else."""
    found = _read_json(path)
    decoded = {**found, **{key: expected.get(key) for key in _DECODING}}
    if found.get("vae") is None and found != decoded and _identity(decoded) == _identity(expected):
        _write_json(path, decoded)


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two manifests of one run have alike: no notes, and no names of files where there are their digests."""
    own = {key: value for key, value in manifest.items() if key != _NOTES}
    return {key: value["sha256"] if isinstance(value, dict) and "sha256" in value else value for key, value in own.items()}


def batches(count: int, size: int, where: Processes) -> Iterator[slice]:
    """This process's share of the batches of ``size`` that ``count`` seeds are cut into."""
    for start in range(where.rank * size, count, where.world * size):
        yield slice(start, min(start + size, count))


def generate(
    sampler: Sampler | TokenSampler,
    seeds: Sequence[int],
    labels: Tensor | None,
    folder: ImageFolder,
    where: Processes,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
    origin: str = "the network",
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Fill the folder with the images that it lacks.

    Args:
        sampler: with ``rows``, the size of a batch.
        seeds: one an image, without repetition. labels: ``[N]``, or None for an unconditional network.
        folder: after :meth:`ImageFolder.begin`.
        decode: latents ``[B, C, H, W]``, on the network's device or the CPU -> pictures, each from its own latents alone; None:
            what is sampled is written. Latents that are in the folder are not sampled again.
        origin: what samples, for the message where it gives no numbers.
        on_images: called with the number of images that were handed to the writers.

    Raises:
        ValueError: an image that is not finite; it is not written. OSError: an image cannot be written.
    """
    assert sampler.rows is not None
    with ThreadPoolExecutor(_WRITERS) as pool:
        pending: list[Future[None]] = []
        for part in batches(len(seeds), sampler.rows, where):
            absent = [i for i in range(part.start, part.stop) if not folder.has(seeds[i])]
            if not absent:
                continue
            stored = None if decode is None else _stored(folder, [seeds[i] for i in absent])
            if stored is None:
                # The whole batch again: it takes as many rows anyway, and every image has the row that it had.
                whole = sampler.sample(seeds[part], None if labels is None else labels[part])
                images = whole[[i - part.start for i in absent]]
            else:
                images = stored
            _check_finite(images, [seeds[i] for i in absent], origin)
            if decode is not None:
                images = decode(images)
                _check_finite(images, [seeds[i] for i in absent], f"the autoencoder, of latents that are, by {origin}")
            images = images.float().cpu()
            for future in pending:
                future.result()
            pending = [pool.submit(folder.write, seeds[i], image) for i, image in zip(absent, images, strict=True)]
            on_images(len(absent))
        for future in pending:
            future.result()


def _stored(folder: ImageFolder, seeds: Sequence[int]) -> Tensor | None:
    """The latents of all these seeds from the folder, if they are there."""
    found = [latents for seed in seeds if (latents := folder.latents(seed)) is not None]
    return torch.stack(found) if len(found) == len(seeds) else None


def _check_finite(images: Tensor, seeds: Sequence[int], origin: str) -> None:
    """Raise ValueError for NaN and infinity, which a picture would hide as black and white."""
    broken = ~images.isfinite().flatten(1).all(1)
    if bool(broken.any()):
        which = [seed for seed, one in zip(seeds, broken.tolist(), strict=True) if one]
        raise ValueError(
            f"images: expected finite numbers, got NaN or infinity from {origin}, for {len(which)} of {len(seeds)} images "
            f"such as that of seed {which[0]}"
        )


def absent(seeds: Sequence[int], size: int, folder: ImageFolder, where: Processes) -> int:
    """How many images this process has to make."""
    own = (seed for part in batches(len(seeds), size, where) for seed in seeds[part])
    return sum(not folder.has(seed) for seed in own)


def note(device: torch.device) -> dict[str, Any]:
    """What makes images on this machine, for a folder's manifest: a list, to which other machines are added."""
    from imm.version import __version__

    name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {_NOTES: [{"imm": __version__, "torch": torch.__version__, "device": name}]}
