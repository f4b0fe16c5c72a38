"""What makes images for the server: a flow map's samplers, in a process of its own.

The process has its own interpreter lock. In one process with HTTP, every operation of a network would wait for the lock while
requests are read and answers written.
"""

from __future__ import annotations

import gc
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imm import checkpoints
from imm.backends import PRECISIONS, repeatable
from imm.flow_map import FlowMap
from imm.pictures import to_uint8
from imm.sampling import Sampler
from imm.serving.batcher import Image

#: Of one image: uint8 ``[H, W, C]``, or float32 ``[C, H, W]`` where floats were asked for.
Result = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Sampling:
    """How images are made. steps: the step counts offered. rows: most images of a call, and the rows of every call. dtype: of
    the network. decode: latents to pictures, or None."""

    steps: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 8
    method: str = "pushforward"
    dtype: torch.dtype | None = None
    decode: Callable[[Tensor], Tensor] | None = None


class Generator:
    """The samplers of a flow map, one for each number of steps; on CUDA every loop is captured before the first request."""

    def __init__(self, flow_map: FlowMap, sampling: Sampling) -> None:
        self.flow_map, self.decode = flow_map, sampling.decode
        make = lambda steps: Sampler(flow_map, steps=steps, method=sampling.method, dtype=sampling.dtype, rows=sampling.rows)
        self.samplers = {steps: make(steps) for steps in sampling.steps}
        for steps in self.samplers:
            for guidance in (None, 1.0) if flow_map.num_classes else (None,):
                self([Image(0, None, guidance, steps, floats=True)])

    def __call__(self, images: Sequence[Image]) -> list[Result]:
        """The images of one call, all of one kind."""
        classes, (first, *_) = self.flow_map.num_classes, images
        labels = [classes if image.label is None else image.label for image in images] if classes else None
        guidance = None if first.guidance is None else torch.tensor([image.guidance for image in images], dtype=torch.float64)
        x = self.samplers[first.steps].sample([image.seed for image in images], labels, guidance)
        x = (x if self.decode is None else self.decode(x)).float().cpu()
        pixels = to_uint8(x, decoded=self.decode is not None).permute(0, 2, 3, 1).contiguous().numpy() if x.dim() == 4 else None
        return [x[i].numpy() if image.floats or pixels is None else pixels[i] for i, image in enumerate(images)]


def _main(
    connection: Connection, net: str, device: str, threads: int, precision: str, vae: str | None, options: dict[str, Any]
) -> None:
    """The process: says that it is ready, or why not, then answers calls until the server closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which closes the connection
    torch.set_num_threads(threads)
    try:
        flow_map = checkpoints.load(net).to(device).eval()
        decode = None
        if vae is not None:
            from imm import latents
            from imm.integrations.autoencoder import load_vae

            model = load_vae(vae).to(device)
            decode = lambda x: latents.decode(x, model, batch=1)
        with repeatable(tf32=precision == "tf32"):
            generator = Generator(flow_map, Sampling(**options, dtype=PRECISIONS[precision], decode=decode))
            gc.freeze()  # a full collection would walk all of torch: 0.1 s
            connection.send(None)
            while True:
                try:
                    images = connection.recv()
                except EOFError:
                    return
                try:
                    connection.send(generator(images))
                except Exception as error:
                    connection.send(f"{type(error).__name__}: {error}")
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
    finally:
        connection.close()


class Worker:
    """A process that makes images; calling it makes one batch.

    Args:
        net: a checkpoint. device: "cpu" or "cuda:N". threads: of torch. precision, vae: as in ``imm sample``. options: the
            other fields of :class:`Sampling`.
    """

    def __init__(self, net: Path, device: str, threads: int, precision: str, vae: str | None, **options: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, str(net), device, threads, precision, vae, options)
        self.process = context.Process(target=_main, args=arguments, name=f"imm-{device}", daemon=True)
        self.process.start()
        theirs.close()

    def ready(self) -> None:
        """Wait for it. Raises RuntimeError with the reason where it cannot serve."""
        try:
            reason = self.connection.recv()
        except EOFError:
            reason = "the process ended"
        if reason is not None:
            raise RuntimeError(f"worker on {self.process.name.removeprefix('imm-')}: {reason}")

    def __call__(self, images: Sequence[Image]) -> list[Result]:
        self.connection.send(images)
        answer = self.connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def stop(self) -> None:
        """Close the connection, which ends the process after its call."""
        self.connection.close()
        self.process.join(5)
        self.process.kill()
