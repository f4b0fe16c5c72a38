"""``imm serve``: a checkpoint behind a port."""

from __future__ import annotations

import gc
import multiprocessing.connection
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import click
import torch

from imm import checkpoints
from imm.checkpoints import read_settings
from imm.cli.options import device_line, pick_device
from imm.networks import TokenModel
from imm.sampling.classes import class_names_of, method_of

#: Seconds that requests have to end after a signal.
GRACE = 10


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Its protocol is named, or asyncio would not switch Nagle's algorithm off: 40 ms an answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    return listening


def run(
    net: str,
    host: str,
    port: int,
    workers: int | None,
    device: str,
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
    """Run ``imm serve``; the arguments are its options."""
    import imm.serving.app as application  # refuses before a port is taken
    from imm.serving.worker import Worker

    flow_map = checkpoints.load(net)
    if isinstance(flow_map.network, TokenModel):
        raise ValueError("net: expected a checkpoint of images or latents, got one of sequences")
    extra = read_settings(net, "flow_map").get("extra", {})
    pictures = flow_map.image_shape[0] in (1, 3)
    if vae is not None and pictures:
        raise ValueError(f"vae: expected a checkpoint of latents, got images of {flow_map.image_shape[0]} channels")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        devices = [f"cuda:{index}" for index in range(workers or torch.cuda.device_count())]
    else:
        devices = [str(pick_device(device))] * (workers or 1)
    listening = listen(host, port)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends gracefully and then raises them again
        signal.signal(number, lambda *_: sys.exit(0))
    threads = max(1, torch.get_num_threads() // len(devices))
    made_by = {"steps": tuple(steps), "rows": batch, "method": method_of(extra, method)}
    running = [Worker(Path(net), name, threads, precision, vae, **made_by) for name in devices]
    try:
        for worker in running:
            worker.ready()
        settings = application.Settings(
            name=Path(net).stem,
            classes=flow_map.num_classes,
            class_names=class_names_of(extra),
            pictures=pictures or vae is not None,
            steps=tuple(steps),
            rows=batch,
            max_images=max_images,
            queue=queue,
            max_wait=1e-3 * max_wait,
            deadline=deadline,
        )
        where = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        many = f"{len(devices)} x " if len(devices) > 1 else ""
        click.echo(
            f"{Path(net).name} on {many}{device_line(torch.device(devices[0]))}, {batch} images a call, "
            f"steps {','.join(map(str, steps))}: {where}"
        )
        _serve(application.create_app(running, settings), listening, running)
    finally:
        for worker in running:
            worker.stop()


def _serve(app: Any, listening: socket.socket, running: list[Any]) -> None:
    """Answer until a signal comes, or a worker dies."""
    import uvicorn

    # h11 refuses headers of more than 16 KiB; httptools takes any.
    settings: dict[str, Any] = {"http": "h11", "log_level": "error", "access_log": False, "server_header": False}
    server = uvicorn.Server(uvicorn.Config(app, **settings, timeout_graceful_shutdown=GRACE, timeout_keep_alive=30))
    died = threading.Event()

    def watch() -> None:
        multiprocessing.connection.wait([worker.process.sentinel for worker in running])
        died.set()
        server.should_exit = True

    threading.Thread(target=watch, daemon=True).start()
    gc.collect()
    gc.freeze()  # a full collection would walk all of torch: 0.1 s in which nobody is answered
    server.run(sockets=[listening])
    if died.is_set():
        raise click.ClickException("a worker died; whoever started this server may start it again")
