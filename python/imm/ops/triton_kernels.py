"""When the kernels of imm_kernels can run. Nothing here imports triton: that happens in the first call that uses one."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from imm.ops.dispatch import Implementation, Request, elsewhere


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def launcher(name: str) -> Callable[..., Any]:
    """A launcher of imm_kernels, as "mmd.loss", imported by its first call."""
    module, _, function = name.partition(".")
    load = functools.cache(lambda: getattr(importlib.import_module(f"imm_kernels.{module}"), function))
    return lambda *args: load()(*args)


def implementation(
    run: Callable[..., Any] | str, *dtypes: torch.dtype, also: Callable[[Request], str | None] = lambda request: None
) -> Implementation:
    """A Triton row of the table, for first tensors of these dtypes (none given: any) that ``also`` has no reason against.

    ``run`` takes the op's arguments; a name is that of a :func:`launcher` that does.
    """

    def refuses(request: Request) -> str | None:
        if reason := elsewhere("cuda", request):
            return reason
        if dtypes and request.dtype not in dtypes:
            return f"supports {', '.join(str(d) for d in dtypes)}, got {request.dtype}"
        return also(request) if _installed() else "triton is not installed"

    return Implementation("triton", launcher(run) if isinstance(run, str) else run, refuses)
