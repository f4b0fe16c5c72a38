"""Latents in EDM2's layout: a file an image, ``img-mean-std-XXXXXXXX.npy``, and ``dataset.json``, in a zip or a folder.

A file is ``[2 C, h, h]``: the means of the autoencoder's posterior, then its standard deviations, as an sd-vae-ft gives them.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from imm.data.arrays import Arrays, read_header
from imm.data.listing import Files, open_files
from imm.data.sources import LABELS_FILE, listed_labels
from imm.latents import SD_VAE_MEAN, SD_VAE_STD, STD
from imm.pictures import SUFFIXES

_NAME = re.compile(r"(.*/)?img-mean-std-\d+\.npy")
_CHANNELS = len(SD_VAE_MEAN)


def read(path: Path) -> Arrays | None:
    """The posteriors in a zip or a folder in the scale that networks learn, by their names; None where there are none.

    Raises:
        ValueError: pictures beside them, a broken file or one of another shape or dtype than the first, values that are not
            finite, negative deviations; labels that are not one for each.
    """
    if not (path.is_dir() or (path.is_file() and path.name.lower().endswith(".zip"))):
        return None
    with open_files(path) as files:
        names = [name for name in files.names if _NAME.fullmatch(name)]
        if not names:
            return None
        picture = next((name for name in files.names if name.lower().endswith(SUFFIXES)), None)
        if picture is not None:
            raise ValueError(f"data: expected images or latents in {path}, got {picture} beside {names[0]}")
        listed = LABELS_FILE in files.names
        deep = None if listed else next((name for name in files.names if name.endswith(f"/{LABELS_FILE}")), None)
        if deep is not None:
            raise ValueError(f"data: expected {LABELS_FILE} at the top of {path}, got {deep}")
        labels, class_names = listed_labels(files, names) if listed else (None, None)
        scale = (STD / np.array(SD_VAE_STD, np.float32))[:, None, None]
        shift = np.array(SD_VAE_MEAN, np.float32)[:, None, None]
        first = _values(files, names[0])
        means, deviations = (np.empty((len(names), _CHANNELS, *first.shape[1:]), first.dtype) for _ in range(2))
        for number, name in enumerate(names):
            values = _values(files, name)
            if (values.shape, values.dtype) != (first.shape, first.dtype):
                raise ValueError(
                    f"data: expected {list(first.shape)} of {first.dtype} as in {names[0]}, "
                    f"got {list(values.shape)} of {values.dtype} in {name} of {path}"
                )
            means[number] = (values[:_CHANNELS] - shift) * scale
            deviations[number] = values[_CHANNELS:] * scale
    return Arrays(means, labels, class_names, [], deviations)


def _values(files: Files, name: str) -> NDArray[np.floating]:
    """The array of a file, checked; no pickle is run."""
    content = files.read(name)
    file = io.BytesIO(content)
    try:
        # The header first: numpy takes the memory that it asks for before it reads.
        shape, fortran, dtype = read_header(file)
        whole = len(shape) == 3 and shape[0] == 2 * _CHANNELS and shape[1] == shape[2] > 0 and not fortran
        if not whole or dtype not in (np.float16, np.float32):
            raise ValueError(f"{list(shape)} of {dtype}{' in column order' if fortran else ''}")
        values = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape)
    except (ValueError, SyntaxError, TypeError, KeyError) as error:  # numpy reads the header as Python source
        text = f"[{2 * _CHANNELS}, h, h] of float16 or float32, means and deviations of an sd-vae-ft"
        raise ValueError(f"data: expected {text}, got {name} of {files.path}: {error}") from error
    if not np.isfinite(values).all() or (values[_CHANNELS:] < 0).any():
        raise ValueError(f"data: expected finite means and deviations >= 0, got others in {name} of {files.path}")
    return values
