"""When the kernels of imm_kernels can run. Nothing here imports triton: that happens in the first call that uses one."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from imm.ops.dispatch import Implementation, Request, elsewhere


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def implementation(
    run: Callable[..., Any], *dtypes: torch.dtype, also: Callable[[Request], str | None] = lambda request: None
) -> Implementation:
    """A Triton row of the table, for first tensors of these dtypes (none given: any) that ``also`` has no reason against."""

    def refuses(request: Request) -> str | None:
        if reason := elsewhere("cuda", request):
            return reason
        if dtypes and request.dtype not in dtypes:
            return f"supports {', '.join(str(d) for d in dtypes)}, got {request.dtype}"
        return also(request) if _installed() else "triton is not installed"

    return Implementation("triton", run, refuses)
