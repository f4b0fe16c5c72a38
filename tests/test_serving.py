"""``imm serve``: the batcher, the answers, bad input, a real process under load, and the page in a real browser."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from small import spread

import imm
from imm.pictures import to_uint8
from imm.sampling import Sampler
from imm.serving.batcher import Batcher, Full, Image, Late
from imm.serving.worker import Generator, Sampling

httpx = pytest.importorskip("httpx")
TestClient = pytest.importorskip("fastapi.testclient").TestClient
app = pytest.importorskip("imm.serving.app")
BODY_BYTES, Settings, create_app = app.BODY_BYTES, app.Settings, app.create_app

NAMES = ["cat", "dog", "owl"]
ROWS = 4
PATH = "/v1/images/generations"


def flow_map(classes: int = 3, channels: int = 1) -> imm.FlowMap:
    torch.manual_seed(0)
    return imm.FlowMap(spread(imm.networks.UNet(channels=channels, resolution=8, num_classes=classes, width=8))).eval()


# The batcher ------------------------------------------------------------------------------------------------------------------


class Calls:
    """A sampler that records its calls, and waits for ``go`` before it answers the first."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, images: Sequence[Image]) -> list[int]:
        self.made.append([image.seed for image in images])
        if len(self.made) == 1:
            self.go.wait(5)
        return [10 * image.seed for image in images]


def image(seed: int, steps: int = 1, guidance: float | None = None) -> Image:
    return Image(seed, 0, guidance, steps)


def batched(check: Any, **settings: Any) -> Calls:
    """Run ``check(batcher, calls)`` on a batcher of three rows."""
    calls = Calls()

    async def run() -> None:
        batcher = Batcher([calls], **{"rows": 3, "queue": 8, **settings})
        batcher.start()
        try:
            await check(batcher, calls)
        finally:
            calls.go.set()
            await batcher.stop()

    asyncio.run(run())
    return calls


def test_requests_that_come_during_a_call_share_the_next() -> None:
    async def check(batcher: Batcher, calls: Calls) -> None:
        first = asyncio.create_task(batcher.submit([image(1)]))
        await asyncio.sleep(0.05)
        rest = [asyncio.create_task(batcher.submit([image(s)])) for s in (2, 3, 4, 5)]
        other = asyncio.create_task(batcher.submit([image(6, steps=2), image(7, guidance=1.5)]))
        await asyncio.sleep(0.05)
        assert batcher.waiting == 6
        calls.go.set()
        assert await first == [10]
        assert await asyncio.gather(*rest) == [[20], [30], [40], [50]]
        assert await other == [60, 70]
        assert batcher.waiting == 0

    assert batched(check).made == [[1], [2, 3, 4], [5], [6], [7]]


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    async def check(batcher: Batcher, calls: Calls) -> None:
        first = asyncio.create_task(batcher.submit([image(0)]))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(batcher.submit([image(s) for s in range(1, 8)]))
        await asyncio.sleep(0)
        with pytest.raises(Full) as full:
            await batcher.submit([image(8), image(9)])
        assert full.value.retry_after >= 1
        calls.go.set()
        await first
        assert len(await waiting) == 7

    batched(check)


def test_a_client_that_leaves_frees_its_place_and_is_not_run() -> None:
    async def check(batcher: Batcher, calls: Calls) -> None:
        first = asyncio.create_task(batcher.submit([image(0)]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(batcher.submit([image(s) for s in range(1, 9)]))
        await asyncio.sleep(0)
        assert batcher.waiting == 8
        gone.cancel()
        await asyncio.sleep(0.01)
        assert batcher.waiting == 0
        stays = asyncio.create_task(batcher.submit([image(s) for s in range(20, 25)]))
        await asyncio.sleep(0)
        calls.go.set()
        await first
        await stays

    assert batched(check).made == [[0], [20, 21, 22], [23, 24]]


def test_an_image_that_waits_too_long_is_given_up() -> None:
    async def check(batcher: Batcher, calls: Calls) -> None:
        first = asyncio.create_task(batcher.submit([image(0)]))
        await asyncio.sleep(0.05)
        late = asyncio.create_task(batcher.submit([image(1)]))
        await asyncio.sleep(0.15)
        calls.go.set()
        assert await first == [0]
        with pytest.raises(Late):
            await late

    assert batched(check, deadline=0.1).made == [[0]]


def test_an_idle_server_waits_for_a_fuller_call_only_when_asked() -> None:
    async def check(batcher: Batcher, calls: Calls) -> None:
        calls.go.set()
        first = asyncio.create_task(batcher.submit([image(0)]))
        await asyncio.sleep(0.02)
        assert await asyncio.gather(first, batcher.submit([image(1)])) == [[0], [10]]

    assert batched(check).made == [[0], [1]]
    assert batched(check, max_wait=0.1).made == [[0, 1]]


def test_an_error_of_a_call_reaches_its_requests_and_no_others() -> None:
    async def run() -> None:
        def fail(images: Sequence[Image]) -> list[int]:
            if any(one.seed == 1 for one in images):
                raise RuntimeError("no")
            return [one.seed for one in images]

        batcher = Batcher([fail], rows=1, queue=4)
        batcher.start()
        results = await asyncio.gather(*(batcher.submit([image(s)]) for s in range(3)), return_exceptions=True)
        await batcher.stop()
        assert (results[0], str(results[1]), results[2]) == ([0], "no", [2])

    asyncio.run(run())


# The answers ------------------------------------------------------------------------------------------------------------------


def served(made_by: imm.FlowMap, rows: int = ROWS, decode: Any = None, **settings: Any) -> Any:
    """A client of the application around a flow map, in this process."""
    sampling = Sampling(rows=rows, decode=decode)
    about = {"classes": made_by.num_classes, "pictures": made_by.image_shape[0] in (1, 3) or decode is not None}
    return TestClient(create_app([Generator(made_by, sampling)], Settings(name="tiny", rows=rows, **about, **settings)))


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with served(flow_map(), class_names=NAMES, max_images=16) as found:
        yield found


def pixels(answer: Any) -> list[np.ndarray]:
    assert answer.status_code == 200, answer.text
    return [np.array(Pictures.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in answer.json()["data"]]


def test_images_are_those_of_the_sampler(client) -> None:
    body = {"seeds": [7, 8, 2**62], "label": "owl", "steps": 2, "guidance": 1.5}
    answer = client.post(PATH, json=body)
    assert [one["seed"] for one in answer.json()["data"]] == body["seeds"]
    assert "total;dur=" in answer.headers["Server-Timing"]
    expected = to_uint8(Sampler(flow_map(), steps=2, rows=ROWS).sample(body["seeds"], [2, 2, 2], 1.5))[:, 0]
    assert all((a == b.numpy()).all() for a, b in zip(pixels(answer), expected, strict=True))
    for other in ({"label": 2}, {"label": "2"}, {"prompt": "owl"}):
        assert (
            client.post(PATH, json={**{k: v for k, v in body.items() if k != "label"}, **other}).json()["data"]
            == answer.json()["data"]
        )


def test_forms_of_an_answer(client) -> None:
    body = {"seed": 5, "n": 3, "label": 1}
    from_json = np.stack(pixels(client.post(PATH, json=body)))
    raw = client.post(PATH, json={**body, "response_format": "raw"})
    assert raw.headers["X-Shape"] == "3x8x8x1"
    assert (np.frombuffer(raw.content, np.uint8).reshape(3, 8, 8) == from_json).all()
    png = client.post(PATH, json={"seed": 6, "label": 1, "response_format": "png"})
    assert (np.array(Pictures.open(io.BytesIO(png.content))) == from_json[1]).all()
    from safetensors.torch import load

    tensors = load(client.post(PATH, json={**body, "response_format": "safetensors"}).content)
    assert (to_uint8(tensors["images"])[:, 0].numpy() == from_json).all()
    assert tensors["seeds"].tolist() == [5, 6, 7]


def test_the_same_seed_gives_the_same_bytes_whatever_it_is_batched_with(client) -> None:
    seeds = list(range(16))
    ask = lambda body: {one["seed"]: one["b64_json"] for one in client.post(PATH, json=body).json()["data"]}
    together = ask({"seeds": seeds, "label": 1})
    alone = {seed: data for s in seeds for seed, data in ask({"seeds": [s], "label": 1}).items()}
    with ThreadPoolExecutor(8) as pool:  # mixed with other classes, steps and guidance
        others = [
            {"seeds": [s], "label": s % 3, "steps": (1, 2)[s % 2], "guidance": (None, 2.0)[s % 2]} for s in range(100, 132)
        ]
        mixed = [{"seeds": [s], "label": 1} for s in seeds]
        answers = list(pool.map(ask, [body for pair in zip(others, mixed * 2, strict=True) for body in pair]))
    for answer in answers[1::2]:
        assert all(together[seed] == data for seed, data in answer.items())
    assert together == alone
    with served(flow_map(), class_names=NAMES) as restarted:
        assert restarted.post(PATH, json={"seeds": seeds, "label": 1}).json()["data"] == [
            {"b64_json": together[s], "seed": s} for s in seeds
        ]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"label": "fox"}, "class: expected a number or a name of tiny"),
        ({"label": 3}, "label: expected a class in 0..2, got 3"),
        ({"label": -1}, "label: expected a class in 0..2, got -1"),
        ({"label": 1, "prompt": "cat"}, "label: expected either label or prompt"),
        ({"seed": -1}, "seeds: expected integers in [0, 2^63), got -1"),
        ({"seeds": [2**63]}, "seeds: expected integers in [0, 2^63)"),
        ({"seed": 2**63 - 1, "n": 2}, "seeds: expected integers in [0, 2^63)"),
        ({"seeds": []}, "seeds: expected 1 to 16 images, got 0"),
        ({"seeds": [1], "n": 1}, "seeds: expected either seeds or seed and n"),
        ({"n": 17}, "n: expected 1 to 16 images, got 17"),
        ({"n": "2"}, "n: "),
        ({"n": True}, "n: "),
        ({"steps": 3}, "steps: expected one of 1, 2, 4, 8, got 3"),
        ({"guidance": 1e9}, "guidance: expected a number of at most 100"),
        ({"response_format": "url"}, "response_format: "),
        ({"response_format": "png", "n": 2}, "response_format: expected one image for png, got 2"),
        ({"size": "8x8"}, "size: "),
        ([1], "body: "),
    ],
)
def test_bad_requests(client, body, text) -> None:
    answer = client.post(PATH, json=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith(text)
    assert "\n" not in message
    assert len(message) <= 400


def test_bad_bodies_and_paths(client, capfd) -> None:
    for content, status in ((b"{", 400), (b"\xff\xfe", 400), (b"", 400), (b"[" * 50000, 400), (b"x" * (BODY_BYTES + 1), 413)):
        answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
        assert (answer.status_code, "\n" in answer.json()["error"]["message"]) == (status, False), content[:5]
    assert client.get(PATH).status_code == 405
    for path in ("/none", "/../../etc/passwd", "/docs"):
        answer = client.get(path)
        assert (answer.status_code, answer.json()["error"]["message"]) == (404, "Not Found")
    assert client.post(PATH, content=b'{"guidance": NaN}').status_code == 400
    assert capfd.readouterr() == ("", "")


def test_metrics_models_and_health(client) -> None:
    client.post(PATH, json={"n": 3})
    text = client.get("/metrics").text
    found = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
    assert found["imm_images_total"] >= 3
    assert found['imm_requests_total{status="200"}'] >= 1
    assert found["imm_queue_images"] == 0
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["steps"], model["class_names"]) == ("tiny", [1, 2, 4, 8], NAMES)
    assert client.get("/health").json() == {"status": "ok"}


def test_latents_are_safetensors_or_what_the_autoencoder_makes_of_them() -> None:
    network = flow_map(classes=0, channels=4)
    with served(network, 2) as client:
        assert "expected safetensors for latents" in client.post(PATH, json={}).json()["error"]["message"]
        assert "label: " in client.post(PATH, json={"label": 0}).text or "class: " in client.post(PATH, json={"label": 0}).text
        assert client.post(PATH, json={"response_format": "safetensors"}).status_code == 200
    decode = lambda x: x[:, :3].clamp(-1, 1)
    with served(network, 2, decode) as client:
        assert pixels(client.post(PATH, json={"n": 2}))[1].shape == (8, 8, 3)


# A real process ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("net") / "tiny.safetensors"
    imm.checkpoints.save(path, flow_map(), extra={"data": {"class_names": NAMES}})
    return path


class Server:
    """``imm serve`` in a process; ``address`` once it answers."""

    def __init__(self, net: Path, *options: str) -> None:
        command = [sys.executable, "-m", "imm", "serve", f"--net={net}", "--port=0", "--steps=1,2", "--batch=4", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert "http://127.0.0.1:" in line, line + self.process.stderr.read()  # type: ignore[union-attr]
        self.address = line.split()[-1]
        for _ in range(200):  # the port is taken at once; it answers when every loop is made
            try:
                if httpx.get(f"{self.address}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)

    def ask(self, **body: Any) -> Any:
        return httpx.post(self.address + PATH, json=body, timeout=30)

    def end(self, number: int) -> tuple[int, str]:
        """The exit status and what was logged."""
        self.process.send_signal(number)
        code = self.process.wait(30)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


@pytest.fixture
def server(net) -> Iterator[Server]:
    found = Server(net)
    yield found
    if found.process.poll() is None:
        found.end(signal.SIGKILL)


def test_a_process_serves_survives_bad_clients_and_stops(server) -> None:
    before = server.ask(seeds=[1, 2], label="dog").json()["data"]
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as bomb:  # headers without end
        bomb.sendall(b"GET / HTTP/1.1\r\n" + b"x: " + b"a" * 100_000)
        assert bomb.recv(100).startswith(b"HTTP/1.1 400")
    slow = socket.create_connection((host, int(port)))  # half a request, and nothing more
    slow.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
    left = socket.create_connection((host, int(port)))  # a client that leaves
    body = json.dumps({"n": 64, "steps": 2}).encode()
    left.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    left.close()
    assert server.ask(n=65).status_code == 400
    assert httpx.post(server.address + PATH, content=b"x" * 10_000_000).status_code == 413
    assert server.ask(seeds=[1, 2], label="dog").json()["data"] == before
    assert "imm_images_total" in httpx.get(f"{server.address}/metrics").text
    slow.settimeout(30)
    assert slow.recv(100).startswith(b"HTTP/1.1 408")
    code, logged = server.end(signal.SIGTERM)
    assert (code, logged) == (0, "")


def test_killed_under_load_clients_get_errors_and_a_restart_gives_the_same(server, net) -> None:
    before = {seed: server.ask(seeds=[seed]).content for seed in range(4)}
    strip = lambda content: json.loads(content)["data"]
    errors, wrong = [], []

    def load(index: int) -> None:
        while True:
            try:
                answer = server.ask(seeds=[index % 4])
            except httpx.TransportError as error:
                errors.append(error)
                return
            if answer.status_code == 200 and strip(answer.content) != strip(before[index % 4]):
                wrong.append(answer)

    threads = [threading.Thread(target=load, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    server.end(signal.SIGKILL)
    for thread in threads:
        thread.join(30)
    assert (len(errors), wrong) == (6, [])
    restarted = Server(net)
    assert all(strip(restarted.ask(seeds=[seed]).content) == strip(content) for seed, content in before.items())
    restarted.end(signal.SIGTERM)


def test_several_workers_behind_one_port_give_the_same_bytes(net) -> None:
    found = Server(net, "--workers=2", "--device=cpu")
    answers = [found.ask(seeds=[3]).json()["data"] for _ in range(6)]
    assert all(answer == answers[0] for answer in answers)
    assert found.end(signal.SIGTERM)[0] == 0


def test_a_worker_that_dies_ends_the_server(server) -> None:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 1
    os.kill(int(workers[0]), signal.SIGKILL)
    assert server.process.wait(30) == 1
    assert "a worker died" in server.process.stderr.read()  # type: ignore[union-attr]


def test_a_server_that_is_killed_leaves_no_worker(server) -> None:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    server.end(signal.SIGKILL)
    for _ in range(100):
        if not any(Path(f"/proc/{pid}").exists() for pid in children):
            return
        time.sleep(0.1)
    raise AssertionError(f"still running: {children}")


def test_refusals(net) -> None:
    from command_line import refused

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in refused("serve", "--net", net, f"--port={taken.getsockname()[1]}")
    assert "steps: expected numbers" in refused("serve", "--net", net, "--steps=0", "--port=0")


# The page in a browser --------------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium by chromedriver's WebDriver protocol."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            driver = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.driver = subprocess.Popen(["chromedriver", f"--port={driver.split(':')[-1]}"], stdout=subprocess.DEVNULL)
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-quic"]
        arguments += ["--no-first-run", "--disable-component-update", f"--user-data-dir={folder}", "--window-size=400,800"]
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}
        for _ in range(100):
            try:
                httpx.get(f"{driver}/status")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        answer = httpx.post(f"{driver}/session", json={"capabilities": {"alwaysMatch": wanted}}, timeout=60)
        self.session = f"{driver}/session/{answer.json()['value']['sessionId']}"

    def call(self, path: str, **body: Any) -> Any:
        return httpx.post(f"{self.session}/{path}", json=body, timeout=60).json()["value"]

    def run(self, script: str) -> Any:
        return self.call("execute/sync", script=script, args=[])

    def until(self, script: str) -> Any:
        for _ in range(100):
            if found := self.run(f"return {script}"):
                return found
            time.sleep(0.1)
        raise AssertionError(f"{script} is not so: {self.run('return document.body.innerText')}")

    def close(self) -> None:
        httpx.delete(self.session, timeout=60)
        self.driver.terminate()
        self.driver.wait(20)


@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs chromedriver")
def test_the_page_in_a_browser(server, tmp_path) -> None:
    browser = Browser(tmp_path)
    try:
        browser.call("url", url=f"{server.address}/#class=2&seeds=3-5&steps=2")
        browser.until("document.querySelectorAll('img').length == 3")
        first = browser.run("return [...document.querySelectorAll('img')].map(i => i.src)")
        assert browser.run("return document.querySelector('img').alt") == "2 owl, seed 3, 2 steps"
        assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")  # on a phone nothing sticks out
        assert browser.run(
            "return document.querySelectorAll('input, select').length == document.querySelectorAll('label').length"
        )
        element = browser.call("element", using="css selector", value="#compare")
        browser.call(f"element/{next(iter(element.values()))}/click")
        browser.until("document.querySelectorAll('img').length == 6")
        assert browser.run("return [...document.querySelectorAll('img')].slice(3).map(i => i.src)") == first
        link = browser.run("return location.href")
        assert "steps=all" in link
        browser.call("url", url="about:blank")
        browser.call("url", url=link)
        browser.until("document.querySelectorAll('img').length == 6")
        browser.run("document.getElementById('seeds').value = 'x'; document.getElementById('form').requestSubmit()")
        browser.until("document.getElementById('status').textContent.startsWith('Seeds: expected')")
    finally:
        browser.close()


def test_without_fastapi(tmp_path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ImportError('no')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "imm", "serve", "--net=x.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert (done.returncode, 'pip install "imm-kernels[serve]"' in done.stderr) == (1, True)
