"""Autoencoders of the diffusers library, an extra; :mod:`imm.latents` runs them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from imm.weights import own_memory

INSTALL = 'pip install "imm-kernels[diffusers]"'
NEEDED = f"expected the diffusers library for it; run: {INSTALL}"


def load_vae(source: str | os.PathLike[str]) -> Any:
    """Load an autoencoder, on the CPU, in float32 and evaluation mode.

    Args:
        source: a folder with ``config.json`` and ``diffusion_pytorch_model.safetensors``, as ``AutoencoderKL.save_pretrained``
            writes it; or the name of one on the hub, "owner/name", which diffusers then downloads. Only safetensors are read.

    Returns:
        A ``diffusers.AutoencoderKL`` with weights in memory of its own: it gives the bits of the one that was saved.

    Raises:
        ImportError: diffusers is not installed. FileNotFoundError: neither a folder nor such a name.
        OSError: a folder without those files, a name that the hub does not have, or no way to the hub.
    """
    folder = Path(source)
    if not folder.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"vae: expected a folder that AutoencoderKL.save_pretrained wrote or owner/name, got {source}")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f"vae: {NEEDED}") from error
    try:
        vae = AutoencoderKL.from_pretrained(
            str(source), local_files_only=folder.is_dir(), use_safetensors=True, low_cpu_mem_usage=False
        )
    except OSError as error:
        place = f"the folder {source}" if folder.is_dir() else f"{source}, which is no folder here, on the hub"
        raise OSError(f"vae: expected config.json and safetensors weights in {place}, got: {error}") from error
    own_memory(vae)
    return vae.eval().requires_grad_(False)
