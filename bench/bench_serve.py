"""imm serve under open-loop load, beside HTTP alone, one request at a time, and diffusers' pipeline behind the same server.

    python bench/bench_serve.py [--network unet|dit] [--seconds 10] [--steps 1] [--rows 8] [--out FILE.json]

Requests of one image arrive at random (Poisson), at rates that do not depend on the answers. A latency counts from the moment
at which a request was due. The clients run in this process, the server in another; both share the machine. First the
capacities are measured, with eight clients that ask again as soon as they have an answer; then latencies at shares of them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Response

import imm
from imm.pictures import to_uint8
from imm.sampling import Sampler
from imm.serving.app import Generation, png

SERVERS = ("echo", "one at a time", "diffusers", "imm serve")


def make_network(name: str) -> imm.FlowMap:
    """The demo's U-Net or a DiT-S/2 of 4x32x32 latents, with random weights that are not 0."""
    torch.manual_seed(0)
    network = imm.networks.UNet(channels=1, resolution=16, num_classes=10) if name == "unet" else imm.networks.DiT("S", 2)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return imm.FlowMap(network).eval()


def simple_server(kind: str, net: str, steps: int, port: int) -> None:
    """A baseline: the same HTTP server, and one image at a time behind it."""
    flow_map = imm.load(net).eval()
    lock = threading.Lock()
    labels = [0] if flow_map.num_classes else None
    sampler = Sampler(flow_map, steps=steps, rows=1)
    sampler.warmup([1])
    pictures = flow_map.image_shape[0] in (1, 3)

    def payload(x: torch.Tensor) -> bytes:
        return png(to_uint8(x)[0].permute(1, 2, 0).numpy()) if pictures else x.numpy().tobytes()

    pipeline: Any = None
    if kind == "diffusers":
        from imm.integrations.diffusers import IMMPipeline

        pipeline = IMMPipeline.from_flow_map(flow_map)
        pipeline.set_progress_bar_config(disable=True)
    fixed = payload(sampler.sample([0], labels))
    app = FastAPI()

    @app.post("/v1/images/generations")
    def generate(body: Generation) -> Response:
        seeds = body.seeds or [0]
        with lock:
            if kind == "one at a time":
                return Response(payload(sampler.sample(seeds, labels)))
            kwargs = {
                "class_labels": labels,
                "num_inference_steps": steps,
                "seeds": seeds,
                "output_type": "pt" if pictures else "latent",
            }
            images = torch.as_tensor(pipeline(**kwargs).images).float()
            return Response(payload(images * 2 - 1 if pictures else images))

    @app.post("/echo")
    async def echo(body: Generation) -> Response:
        return Response(fixed)

    uvicorn.run(app, port=port, http="h11", log_level="error", access_log=False, timeout_keep_alive=30)


@contextlib.contextmanager
def serving(kind: str, net: str, steps: int, rows: int, port: int) -> Iterator[int]:
    """A server of that kind in a process of its own, once it answers: the process's number."""
    if kind == "imm serve":
        command = [
            "-m",
            "imm",
            "serve",
            f"--net={net}",
            f"--port={port}",
            f"--steps={steps}",
            f"--batch={rows}",
            "--queue=4096",
        ]
    else:
        command = [__file__, f"--server={kind}", f"--net={net}", f"--steps={steps}", f"--port={port}"]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with (
                contextlib.suppress(OSError),
                contextlib.closing(socket.create_connection(("127.0.0.1", port), 0.1)),
            ):
                break
            time.sleep(0.1)
        time.sleep(2.0)
        yield process.pid
    finally:
        process.terminate()
        process.wait(20)


class Clients:
    """Connections to the server that are kept and used again."""

    def __init__(self, port: int, path: str, response_format: str) -> None:
        self.port, self.path, self.response_format = port, path, response_format
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, seed: int) -> int:
        """The status of one request."""
        while self.free and self.free[-1][0].at_eof():  # the server has closed it
            self.free.pop()
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        body = json.dumps({"seeds": [seed], "response_format": self.response_format}).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        self.free.append((reader, writer))
        return int(answer.split()[1])


async def closed_loop(clients: Clients, seconds: float, users: int = 8) -> float:
    """Requests a second with so many clients that ask again at once."""
    done, end = 0, time.perf_counter() + seconds

    async def user() -> None:
        nonlocal done
        while time.perf_counter() < end:
            assert await clients.ask(random.randrange(1 << 31)) == 200
            done += 1

    start = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    return done / (time.perf_counter() - start)


async def arrivals(rate: float, seconds: float) -> AsyncIterator[float]:
    """The moments at which requests are due."""
    due = start = time.perf_counter()
    while due < start + seconds:
        due += random.expovariate(rate)
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        yield due


async def open_loop(clients: Clients, rate: float, seconds: float) -> dict[str, float]:
    """Latencies in milliseconds at a rate, and what was answered."""
    latencies: list[float] = []
    refused = 0

    async def one(due: float) -> None:
        nonlocal refused
        if await clients.ask(random.randrange(1 << 31)) == 200:
            latencies.append(1e3 * (time.perf_counter() - due))
        else:
            refused += 1

    tasks, start = [], time.perf_counter()
    async for due in arrivals(rate, seconds):
        tasks.append(asyncio.create_task(one(due)))
    await asyncio.gather(*tasks)
    spent = time.perf_counter() - start
    p50, p95, p99 = (float(torch.tensor(latencies).quantile(q)) for q in (0.5, 0.95, 0.99))
    return {"offered": rate, "answered": len(latencies) / spent, "p50": p50, "p95": p95, "p99": p99, "refused": refused}


def memory(pid: int) -> float:
    """MB that a process and its children hold."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    lines = [line for one in pids for line in Path(f"/proc/{one}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


async def measure(kind: str, pid: int, port: int, picture: str, seconds: float, rates: list[float]) -> dict[str, Any]:
    clients = Clients(port, "/echo" if kind == "echo" else "/v1/images/generations", picture)
    await closed_loop(clients, 1.0)
    capacity = await closed_loop(clients, seconds)
    alone = await closed_loop(clients, min(seconds, 3.0), users=1)
    print(f"{kind}: {capacity:.0f} images/s with eight clients, {1e3 / alone:.2f} ms alone", flush=True)
    rows = []
    for rate in rates or [0.25 * capacity, 0.5 * capacity, 0.8 * capacity]:
        row = {**await open_loop(clients, rate, seconds), "memory": memory(pid)}
        rows.append(row)
        print(
            "  " + ", ".join(f"{name} {value:.2f}" if name[0] == "p" else f"{name} {value:.0f}" for name, value in row.items()),
            flush=True,
        )
    return {"capacity": capacity, "alone_ms": 1e3 / alone, "rows": rows}


def main() -> None:
    gc.disable()  # a collection in this process is no latency of the server
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("unet", "dit"), default="unet")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="images a call of imm serve")
    parser.add_argument("--only", choices=SERVERS, help="one of the servers")
    parser.add_argument(
        "--rates", type=lambda text: [float(word) for word in text.split(",")], default=[], help="requests a second"
    )
    parser.add_argument("--out", type=Path, help="also write all figures as JSON")
    parser.add_argument("--server", choices=SERVERS, help=argparse.SUPPRESS)
    parser.add_argument("--net", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=8711, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        return simple_server(options.server, options.net, options.steps, options.port)
    flow_map = make_network(options.network)
    sampler = Sampler(flow_map, steps=options.steps, rows=options.rows)
    labels = [0] if flow_map.num_classes else None
    times = []
    for _ in range(50 if options.network == "unet" else 10):
        start = time.perf_counter()
        sampler.sample([0], labels)
        times.append(1e3 * (time.perf_counter() - start))
    found: dict[str, Any] = {
        "sampler_ms": sorted(times)[len(times) // 2],
        "rows": options.rows,
        "threads": torch.get_num_threads(),
    }
    print(f"Sampler(rows={options.rows}).sample of one image: {found['sampler_ms']:.2f} ms", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        net = str(Path(folder) / "net.safetensors")
        imm.checkpoints.save(net, flow_map)
        picture = "b64_json" if options.network == "unet" else "safetensors"
        for index, kind in enumerate(SERVERS if options.only is None else [options.only]):
            with serving(kind, net, options.steps, options.rows, options.port + index) as pid:
                found[kind] = asyncio.run(measure(kind, pid, options.port + index, picture, options.seconds, options.rates))
    if options.out is not None:
        options.out.write_text(
            json.dumps({**found, "machine": os.uname().machine, "options": vars(options) | {"out": None}}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
