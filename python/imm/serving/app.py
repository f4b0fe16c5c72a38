"""The HTTP application of ``imm serve``: FastAPI above a :class:`~imm.serving.batcher.Batcher`."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save

try:
    import anyio
    from fastapi import FastAPI, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import HTMLResponse, JSONResponse
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from pydantic import BaseModel, ConfigDict, Field
    from starlette.exceptions import HTTPException
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ImportError('imm serve: expected FastAPI and uvicorn; run: pip install "imm-kernels[serve]"') from error

from imm.pictures import to_pillow
from imm.sampling.classes import find_class
from imm.serving.batcher import Batcher, Full, Image, Late

#: Largest body of a request, in bytes, and the seconds that a client has to send it.
BODY_BYTES, BODY_SECONDS = 65536, 5.0
_LOG = logging.getLogger("imm.serving")
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True)
class Settings:
    """What is served, and how.

    name: what answers call it. classes: number of classes. class_names: their names, or none. pictures: whether images are
    pictures, or latents. steps: the step counts offered, the first by default. rows, queue, max_wait, deadline: as in
    :class:`~imm.serving.batcher.Batcher`. max_images: of a request.
    """

    name: str
    classes: int = 0
    class_names: Sequence[str] = ()
    pictures: bool = True
    steps: tuple[int, ...] = (1, 2, 4, 8)
    rows: int = 8
    max_images: int = 64
    queue: int = 256
    max_wait: float = 0.0
    deadline: float = 30.0


class Generation(BaseModel):
    """The body of a request, the OpenAI images form where it fits."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seeds: list[int] | None = Field(None, description="One image a seed, each in [0, 2^63).")
    seed: int | None = Field(None, description="The first of n seeds in a row; 0 by default.")
    n: int | None = Field(None, description="How many images, with seed; 1 by default.")
    label: int | str | None = Field(None, description='A class by number or name; "none" for unconditional.')
    prompt: str | None = Field(None, description="A class by name, as label.")
    steps: int | None = Field(None, description="One of the step counts that are served.")
    guidance: float | None = Field(None, description="Classifier-free guidance; null for none.")
    response_format: Literal["b64_json", "png", "raw", "safetensors"] = Field(
        "b64_json",
        description="b64_json: PNGs in JSON; png: one image; raw: uint8 [N, H, W, C]; safetensors: the network's floats.",
    )


class _Metrics:
    """What /metrics says of one application."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("imm_requests", "Requests by status.", ["status"], registry=self.registry)
        self.images = Counter("imm_images", "Images that were made.", registry=self.registry)
        self.batch = Histogram("imm_batch_images", "Images of a call.", buckets=_SIZES, registry=self.registry)
        self.call = Histogram("imm_call_seconds", "Seconds of a call of the sampler.", buckets=_BUCKETS, registry=self.registry)
        self.latency = Histogram("imm_request_seconds", "Seconds of a request.", buckets=_BUCKETS, registry=self.registry)
        Gauge("imm_queue_images", "Images that wait.", registry=self.registry).set_function(waiting)

    def on_batch(self, images: int, seconds: float) -> None:
        self.images.inc(images)
        self.batch.observe(images)
        self.call.observe(seconds)


class _Limits:
    """Refuses bodies that are too large or too slow, before anything reads them."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            return await self.app(scope, receive, send)
        body, more = b"", True
        try:
            with anyio.fail_after(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body, more = body + message.get("body", b""), message.get("more_body", False)
                    if len(body) > BODY_BYTES:
                        return await _error(413, f"body: expected at most {BODY_BYTES} bytes, got more")(scope, receive, send)
        except TimeoutError:
            return await _error(408, f"body: expected all of it within {BODY_SECONDS:g} s, got a part")(scope, receive, send)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


def _error(status: int, message: str, **headers: str) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status, headers)


def _images(body: Generation, settings: Settings) -> list[Image]:
    """What a request asks for. Raises ValueError, in one line."""
    num_classes, floats = settings.classes, body.response_format == "safetensors"
    if body.seeds is not None and (body.seed is not None or body.n is not None):
        raise ValueError("seeds: expected either seeds or seed and n, got both")
    count = len(body.seeds) if body.seeds is not None else 1 if body.n is None else body.n
    if not 1 <= count <= settings.max_images:
        raise ValueError(f"{'n' if body.seeds is None else 'seeds'}: expected 1 to {settings.max_images} images, got {count}")
    seeds = body.seeds if body.seeds is not None else [(body.seed or 0) + index for index in range(count)]
    if wrong := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise ValueError(f"seeds: expected integers in [0, 2^63), got {wrong[0]}")
    if body.label is not None and body.prompt is not None:
        raise ValueError("label: expected either label or prompt, got both")
    label: int | str | None = body.prompt if body.label is None else body.label
    if isinstance(label, str) and re.fullmatch("[0-9]{1,9}", label) and label not in settings.class_names:
        label = int(label)
    if isinstance(label, int) and not 0 <= label < max(num_classes, 1):
        raise ValueError(f"label: expected a class in 0..{num_classes - 1}, got {label}")
    number = None if label is None else find_class(label, num_classes, list(settings.class_names), settings.name)
    steps = settings.steps[0] if body.steps is None else body.steps
    if steps not in settings.steps:
        raise ValueError(f"steps: expected one of {', '.join(map(str, settings.steps))}, got {steps}")
    if body.guidance is not None and num_classes == 0:
        raise ValueError("guidance: expected none for a checkpoint without classes")
    if body.guidance is not None and not abs(body.guidance) <= 100:
        raise ValueError(f"guidance: expected a number of at most 100, got {body.guidance}")
    if body.response_format == "png" and count > 1:
        raise ValueError(f"response_format: expected one image for png, got {count}")
    if not floats and not settings.pictures:
        raise ValueError(f"response_format: expected safetensors for latents, got {body.response_format}")
    return [Image(seed, number, body.guidance, steps, floats) for seed in seeds]


def png(picture: np.ndarray[Any, Any]) -> bytes:
    """A picture ``[H, W, C]`` uint8 as a PNG."""
    buffer = io.BytesIO()
    to_pillow(picture).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _answer(body: Generation, images: Sequence[Image], made: Sequence[np.ndarray[Any, Any]]) -> Response:
    """The response in the form that was asked for."""
    if body.response_format == "safetensors":
        tensors = {"images": np.stack(made), "seeds": np.array([image.seed for image in images])}
        return Response(save(tensors), media_type="application/octet-stream")
    if body.response_format == "raw":
        pixels = np.stack(made)
        shape = "x".join(map(str, pixels.shape))
        return Response(pixels.tobytes(), media_type="application/octet-stream", headers={"X-Shape": shape})
    if body.response_format == "png":
        return Response(png(made[0]), media_type="image/png")
    data = [{"b64_json": base64.b64encode(png(p)).decode(), "seed": image.seed} for p, image in zip(made, images, strict=True)]
    return JSONResponse({"created": int(time.time()), "data": data})


async def _gone(request: Request) -> None:
    """Return when the client has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(runs: Sequence[Callable[[Sequence[Image]], Sequence[Any]]], settings: Settings) -> FastAPI:
    """The application above what makes images: each of ``runs`` makes one batch at a time
    (:class:`imm.serving.worker.Worker`, or a :class:`~imm.serving.worker.Generator` of this process)."""
    batcher: Batcher | None = None
    metrics = _Metrics(lambda: 0 if batcher is None else batcher.waiting)
    page = resources.files("imm.serving").joinpath("page.html").read_text(encoding="utf-8")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(
            runs,
            rows=settings.rows,
            queue=settings.queue,
            max_wait=settings.max_wait,
            deadline=settings.deadline,
            on_batch=metrics.on_batch,
        )
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title="imm", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(_Limits)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
        return _error(400, f"{where}: {first['msg']}"[:300])

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _error(500, "the server failed")

    @app.post("/v1/images/generations")
    async def generate(body: Generation, request: Request) -> Response:
        start = time.perf_counter()
        response = await answer(body, request)
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.latency.observe(time.perf_counter() - start)
        response.headers["Server-Timing"] = f"total;dur={1e3 * (time.perf_counter() - start):.2f}"
        return response

    async def answer(body: Generation, request: Request) -> Response:
        assert batcher is not None
        try:
            images = _images(body, settings)
        except ValueError as error:
            return _error(400, str(error))
        work = asyncio.ensure_future(batcher.submit(images))
        gone = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return _error(499, "the client left")
            made = work.result()
        except Full as error:
            return _error(503, str(error), **{"Retry-After": str(round(error.retry_after))})
        except Late:
            return _error(504, f"deadline: expected the image within {settings.deadline:g} s, got a longer queue")
        except asyncio.CancelledError:
            return _error(503, "the server stops")
        except Exception as error:
            _LOG.error("a call of the sampler failed: %s", error)
            return _error(500, "the server failed")
        finally:
            work.cancel()
            gone.cancel()
        small = sum(one.size for one in made) < 1 << 16
        return _answer(body, images, made) if small else await asyncio.to_thread(_answer, body, images, made)

    @app.get("/v1/models")
    async def models() -> Response:
        about = {
            "id": settings.name,
            "object": "model",
            "steps": settings.steps,
            "classes": settings.classes,
            "class_names": list(settings.class_names),
            "max_images": settings.max_images,
            "pictures": settings.pictures,
        }
        return JSONResponse({"object": "list", "data": [about]})

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def measured() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse)
    async def home() -> Response:
        policy = (
            "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        )
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    return app
