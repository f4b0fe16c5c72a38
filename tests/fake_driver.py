"""A driver of Triton without a GPU, for a child process: what the launchers ask for is compiled for sm_90, and recorded.

Everything up to PTX is the real thing, from JITFunction.run with its specialisation to the choice of shared memory. PTX is
assembled for bench/aot_report.py only, and the launch itself, whose arguments need a device, does nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

#: Set in the child process that has the driver.
VARIABLE = "IMM_FAKE_DRIVER"
ACTIVE = VARIABLE in os.environ
MULTIPROCESSORS = 132
SHARED = 227 * 1024  # bytes that a program may have


@dataclass(frozen=True)
class Launch:
    """kernel: "module.function". types: of the arguments by name (:func:`flat`), "constexpr" for None, 1 and what is given as
    such. aligned: those that the compiler knows to be divisible by 16. given: the arguments themselves."""

    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    maxnreg: int | None
    signature: dict[str, Any]
    aligned: frozenset[str]
    values: dict[str, Any]

    @property
    def types(self) -> dict[str, str]:
        return flat(self.signature)

    @property
    def given(self) -> dict[str, Any]:
        return flat(self.values)


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """Values by argument; those of a named tuple by argument and field, "t.y"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        fields = value._asdict() if hasattr(value, "_fields") else None
        found |= {name: value} if fields is None else {f"{name}.{field}": v for field, v in fields.items()}
    return found


def places(names: list[str], signature: dict[str, Any]) -> dict[tuple[int, ...], str]:
    """The names of :func:`flat` by where Triton has them: (argument,) or (argument, field)."""
    found: dict[tuple[int, ...], str] = {}
    for i, name in enumerate(names):
        fields = getattr(signature[name], "_fields", None)
        found |= {(i,): name} if fields is None else {(i, j): f"{name}.{field}" for j, field in enumerate(fields)}
    return found


def install(arch: int = 90, said: dict[bytes, str] | None = None) -> list[Launch]:
    """Make it this process's driver; the list gets every launch from here on. said: gets what the assembler says of each
    cubin, and nothing is taken from Triton's cache; None: nothing is assembled. The device has the number of its architecture.
    """
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    launches: list[Launch] = []

    def launcher(source: Any, metadata: Any) -> Callable[..., None]:
        function = source.fn.fn
        names = places(source.fn.arg_names, source.signature)
        aligned = frozenset(names[place] for place, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes)

        def launch(
            x: int, y: int, z: int, stream: int, function_: int, packed: Any, extra: Any, enter: Any, leave: Any, *given: Any
        ) -> None:
            launches.append(
                Launch(
                    f"{function.__module__.removeprefix('imm_kernels.')}.{function.__name__}",
                    (x, y, z),
                    metadata.num_warps,
                    metadata.shared,
                    metadata.maxnreg,
                    source.signature,
                    aligned,
                    dict(zip(source.fn.arg_names, given, strict=True)),
                )
            )

        return launch

    properties = {"max_shared_mem": SHARED, "multiprocessor_count": MULTIPROCESSORS, "max_num_regs": 65536, "warpSize": 32}
    fake = SimpleNamespace(
        launcher_cls=launcher,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),  # module, function, registers, spills, threads
            unload_module=lambda module: None,
        ),
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
    )
    assemble = getattr(CUDABackend.make_cubin, "assemble", CUDABackend.make_cubin)

    def make_cubin(*given: Any) -> bytes:
        if said is None:
            return b"not assembled"
        with contextlib.redirect_stdout(io.StringIO()) as output:
            cubin: bytes = assemble(*given)
        said[cubin] = output.getvalue()
        return cubin

    make_cubin.assemble = assemble
    CUDABackend.make_cubin = make_cubin
    if said is not None:
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
    driver.set_active(fake)
    torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
    return launches
