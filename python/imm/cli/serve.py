"""``imm serve``: a checkpoint behind a port."""

from __future__ import annotations

import multiprocessing.connection
import signal
import socket
from pathlib import Path
from typing import Any

import click
import torch

from imm import checkpoints
from imm.backends import PRECISIONS
from imm.checkpoints import read_settings
from imm.cli.options import device_line, pick_device
from imm.cli.sample import decoder
from imm.networks import TokenModel
from imm.sampling.classes import class_names_of, method_of

#: Seconds that requests have to end after a signal.
GRACE = 10


def run(net: str, host: str, port: int, workers: int | None, device: str, **options: Any) -> None:
    """Run ``imm serve``; the arguments are its options."""
    import imm.serving.app  # noqa: F401  (refuses before a port is taken)

    if device in ("auto", "cuda") and torch.cuda.is_available():
        devices = [f"cuda:{index}" for index in range(workers or torch.cuda.device_count())]
    else:
        devices = [device] * (workers or 1)
    for name in devices:
        pick_device(name)
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
    if len(devices) == 1:
        return _serve(listening, net, devices[0], address, **options)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(listening, net, name, address if index == 0 else None, options), daemon=True)
        for index, name in enumerate(devices)
    ]
    for process in processes:
        process.start()
    listening.close()
    stopped = []

    def stop(*_: Any) -> None:
        stopped.append(True)
        for process in processes:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    multiprocessing.connection.wait([process.sentinel for process in processes])
    codes = [process.exitcode for process in processes]
    for process in processes:  # one that dies ends the others: whoever started this starts it again
        process.terminate()
        process.join()
    if not stopped:
        raise click.ClickException(f"a worker ended, exit codes {codes}; the others were stopped")


def _worker(listening: socket.socket, net: str, device: str, address: str | None, options: dict[str, Any]) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    _serve(listening, net, device, address, **options)


def _serve(
    listening: socket.socket,
    net: str,
    device: str,
    address: str | None,
    *,
    steps: list[int],
    batch: int,
    precision: str,
    method: str | None,
    vae: str | None,
    max_images: int,
    queue: int,
    max_wait: float,
    deadline: float,
) -> None:
    import uvicorn

    from imm.serving.app import Settings, create_app

    target = pick_device(device)
    flow_map = checkpoints.load(net).to(target)
    if isinstance(flow_map.network, TokenModel):
        raise ValueError("net: expected a checkpoint of images or latents, got one of sequences")
    extra = read_settings(net, "flow_map").get("extra", {})
    settings = Settings(
        name=Path(net).stem,
        steps=tuple(steps),
        method=method_of(extra, method),
        rows=batch,
        max_images=max_images,
        queue=queue,
        max_wait=1e-3 * max_wait,
        deadline=deadline,
        class_names=class_names_of(extra),
        dtype=PRECISIONS[precision],
        tf32=precision == "tf32",
        decode=None if vae is None else decoder(vae, flow_map.image_shape, target)[0],
    )
    app = create_app(flow_map, settings)
    if address is not None:
        click.echo(
            f"{Path(net).name} on {device_line(target)}, {batch} images a call, steps {','.join(map(str, steps))}: {address}"
        )
    # h11 refuses headers of more than 16 KiB; httptools takes any.
    config = uvicorn.Config(
        app,
        http="h11",
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=30,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
