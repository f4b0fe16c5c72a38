"""Between images and the latents that networks generate, by an AutoencoderKL of diffusers."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from imm.weights import frozen, plain_names

#: Of the latents of the sd-vae-ft autoencoders on ImageNet, a channel each: what the published IMM networks were trained on is
#: (z - mean) * STD / std (paper section I.1).
SD_VAE_MEAN = (0.86488, -0.27787343, 0.21616915, 0.3738409)
SD_VAE_STD = (4.85503674, 5.31922414, 3.93725398, 3.9870003)
STD = 0.5
#: What tells those autoencoders from others: 4 channels, and this factor in their own settings.
SD_VAE_FACTOR = 0.18215


@torch.no_grad()
def decode(latents: Tensor, vae: Any, batch: int = 8) -> Tensor:
    """Images for latents.

    The latents are first given the autoencoder's own scale: by ``vae.config``, ``latents * latents_std / scaling_factor +
    latents_mean`` where it has these three; else, for an sd-vae-ft, the published ``latents * SD_VAE_STD / STD + SD_VAE_MEAN``;
    else ``latents / scaling_factor + shift_factor``.

    Args:
        latents: ``[B, C, h, w]``, floating, as :meth:`imm.Sampler.sample` returns them.
        vae: from :func:`imm.integrations.autoencoder.load_vae`, or any AutoencoderKL of C latent channels; it computes in its
            own dtype.
        batch: latents decoded at a time.

    Returns:
        ``[B, 3, 8 h, 8 w]`` (8: what the autoencoder enlarges by) float32 in [-1, 1], on the autoencoder's device.

    Raises:
        ValueError: latents of another shape or dtype; batch < 1.
    """
    channels = vae.config.latent_channels
    if latents.dim() != 4 or latents.shape[1] != channels or not latents.is_floating_point():
        raise ValueError(f"latents: expected floating [B, {channels}, h, w], got {list(latents.shape)} of {latents.dtype}")
    if batch < 1:
        raise ValueError(f"batch: expected a count >= 1, got {batch}")
    if not len(latents):  # which the autoencoder would refuse
        side = 2 ** (len(vae.config.block_out_channels) - 1)
        return torch.empty(0, vae.config.out_channels, side * latents.shape[2], side * latents.shape[3], device=vae.device)
    scale, shift = (torch.tensor(v, device=vae.device).reshape(1, -1, 1, 1) for v in _scale_and_shift(vae.config))
    images = []
    with frozen(vae):
        for part in latents.split(batch):
            own = part.to(vae.device, torch.float32) * scale + shift
            images.append(vae.decode(own.to(vae.dtype)).sample.float().clamp(-1.0, 1.0))
    return torch.cat(images)


def fingerprint(vae: Any) -> str:
    """What tells autoencoders apart, wherever they came from: a sha256 of the scale that latents get and of all weights.

    Hashed are the line ``imm-vae 1 SCALES SHIFTS``, and of each weight, by their names, a line ``NAME DTYPE SHAPE``
    and its bytes.
    """
    scale, shift = _scale_and_shift(vae.config)
    digest = hashlib.sha256(f"imm-vae 1 {scale} {shift}\n".encode())
    for name, value in sorted(plain_names(vae.state_dict()).items()):
        digest.update(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _scale_and_shift(config: Any) -> tuple[list[float], list[float]]:
    """What to multiply latents by and then to add, a number for each channel or one for all."""
    factor = config.scaling_factor
    # Older versions of diffusers do not have these three settings.
    mean, std, shift = (config.get(name) for name in ("latents_mean", "latents_std", "shift_factor"))
    if mean is not None and std is not None:
        return [s / factor for s in std], list(mean)
    if config.latent_channels == len(SD_VAE_MEAN) and factor == SD_VAE_FACTOR:
        return [s / STD for s in SD_VAE_STD], list(SD_VAE_MEAN)
    return [1.0 / factor], [shift or 0.0]


@torch.no_grad()
def encode(images: Tensor, vae: Any, batch: int = 8) -> tuple[Tensor, Tensor]:
    """The posteriors of images' latents, in the scale that networks learn: what :func:`decode` takes.

    Args:
        images: ``[B, 3, H, W]`` floating in [-1, 1]; H and W multiples of what the autoencoder shrinks by.
        vae: as for :func:`decode`. batch: images encoded at a time.

    Returns:
        Mean and standard deviation, each ``[B, C, H / 8, W / 8]`` (8: what the autoencoder shrinks by) float32 on its device. A
        latent is ``mean + std * n`` for a standard normal n (paper section I.1).

    Raises:
        ValueError: images of another shape or dtype; batch < 1.
    """
    channels, side = vae.config.in_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    whole = images.dim() == 4 and len(images) > 0 and images.shape[1] == channels and images.is_floating_point()
    if not whole or images.shape[2] % side or images.shape[3] % side:
        raise ValueError(
            f"images: expected floating [B, {channels}, H, W] with H and W multiples of {side}, "
            f"got {list(images.shape)} of {images.dtype}"
        )
    if batch < 1:
        raise ValueError(f"batch: expected a count >= 1, got {batch}")
    scale, shift = (torch.tensor(v, device=vae.device).reshape(1, -1, 1, 1) for v in _scale_and_shift(vae.config))
    means, deviations = [], []
    with frozen(vae):
        for part in images.split(batch):
            posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
            means.append((posterior.mean.float() - shift) / scale)
            deviations.append(posterior.std.float() / scale)
    return torch.cat(means), torch.cat(deviations)
