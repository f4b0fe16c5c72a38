"""mmd_loss: the loss of each group and its gradient to y_t, beside the forms found in training scripts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from harness.case import ISSUE, MATMUL, Case, Claim, Peer, call, compiled
from harness.networks import EPS, loss_of, plain_mmd, trained_with
from imm.functional import mmd_loss
from imm.ops import mmd

TESTS = {"test_mmd.py": ""}
CUDA_TESTS = {"test_triton_mmd.py": "every_size kernel_and_dtype digits split sliced"}

#: (G, M, D). CIFAR-10 and ImageNet latents at M = 4, then larger sets.
CPU_SHAPES = ((256, 4, 3072), (512, 4, 4096), (512, 8, 4096), (32, 16, 16384), (64, 64, 4096))
#: B = G M = 4096 images, 512 of many features, and few.
CUDA_SHAPES = (
    (1024, 4, 4096),
    (1024, 4, 3072),
    (64, 64, 4096),
    (256, 16, 4096),
    (32, 16, 16384),
    (128, 4, 65536),
    (16, 4, 4096),
)
KERNEL = ("laplace", [1.0], EPS, False)
#: Warp instructions a group of the fused kernel at M = 4, counted in its machine code: those of 4096 features, and those
#: that do not depend on them (sums over threads, and the M x M part).
ISSUED = {torch.float32: (18_900, 7_000), torch.bfloat16: (19_900, 7_000)}

USER, EAGER, COMPILED = "imm as a user calls it", "eager broadcast", "torch.compile of the broadcast"
GRAM, COMPILED_GRAM = "bmm Gram", "torch.compile of the bmm Gram"
CLAIMS = (
    Claim(EAGER, USER, at_least=20.0, up_to={"M": 4}),
    Claim(COMPILED, USER, at_least=1.0, up_to={"M": 4}),
    Claim("imm", MATMUL, at_most=1.67),
)


def gram(y_t: Tensor, y_r: Tensor, scale: Tensor) -> Tensor:
    """The same by products: fast, and without the digits of close pairs."""

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        sizes = x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None]
        square = (sizes - 2 * torch.bmm(x, y.transpose(1, 2))).clamp_min(EPS**2)
        return torch.exp(-scale[:, None, None] * square.sqrt() / x.shape[2]).mean((1, 2))

    return loss_of(mean_kernel)(y_t, y_r)


def both(of: Any) -> Peer:
    """The loss, then the gradient of its sum from the slopes that it saved."""

    def step(y_t: Tensor, y_r: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        loss, slopes = of.mmd_loss(y_t, y_r, scale, None, *KERNEL)
        return loss, of.mmd_loss_bwd(torch.ones_like(loss), slopes, y_t, y_r, None, False)

    return call(step)


def fused(y_t: Tensor, y_r: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of flow_map_mmd on particles as they are, without the op layer."""
    from imm_kernels import mmd as kernels

    kernel, bandwidths, eps, unbiased = KERNEL
    return kernels.loss_and_gradient(y_t, y_r, scale, None, None, kernels.Kernel(kernel, tuple(bandwidths), eps, unbiased))


def truth(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Autograd through the broadcast form in float64, some groups at a time for memory; of large sets the reference."""
    _, M, D = inputs[0].shape
    if M > 8:
        return both(mmd)(*(v.double() for v in inputs))()
    groups = max(1, 2**26 // (M * M * D))
    parts = [trained_with(plain_mmd)(*part)() for part in zip(*(v.double().split(groups) for v in inputs), strict=True)]
    return torch.cat([loss for loss, _ in parts]), torch.cat([grad for _, grad in parts])


def case(G: int, M: int, D: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Case:
    def inputs() -> tuple[Any, ...]:
        y_r = torch.randn(G, M, D, device=device)
        y_t = y_r + 0.1 * torch.randn_like(y_r)
        return y_t.to(dtype), y_r.to(dtype), torch.full((G,), D**0.5, device=device)

    products, (features, fixed) = M > 8, ISSUED[dtype]
    peers: dict[str, Peer] = {"imm": both(torch.ops.imm), USER: trained_with(mmd_loss)}
    peers |= {
        COMPILED: compiled(plain_mmd, trained_with),
        COMPILED_GRAM: compiled(gram, trained_with),
        GRAM: trained_with(gram),
    }
    if device.type == "cuda":
        peers["triton"] = call(fused)
    if M <= 16:  # a call of 64 takes five seconds on two cores
        peers["reference"] = both(mmd)
    # [G, M, M, D] of the broadcast, beyond this only measures the memory.
    if (2**30 if device.type == "cuda" else 2**26) >= G * M * M * D:
        peers[EAGER] = trained_with(plain_mmd)
    return Case(
        op="mmd",
        mode="loss + gradient",
        shape={"G": G, "M": M, "D": D},
        dtype=dtype,
        # I/O: read y_t, y_r [G, M, D] and scale [G]; write the gradient [G, M, D] and the loss [G].
        bytes=3 * dtype.itemsize * G * M * D + 8 * G,
        # Directly: subtract, multiply, add per feature, of M (M - 1) / 2 pairs within each set and M^2 across for the
        # distances, and as many for the gradient (M (M - 1) ordered pairs within y_t). As products: three for the distances,
        # two for the gradient.
        flops=10 * G * D * M * M if products else 6 * G * D * (2 * M * M - M),
        inputs=inputs,
        truth=truth,
        # The loss is a small difference of means of size 1.
        tolerances=(1e-3, 1e-4 if dtype == torch.float32 else 1e-2),
        peers=peers,
        late=(COMPILED, COMPILED_GRAM),
        # Products lose the digits of the matched pairs, which are close.
        rough=dict.fromkeys((GRAM, COMPILED_GRAM), 0.1),
        products=products,
        kernel={ISSUE: G * (features * D / 4096 + fixed)} if M == 4 else {},
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    cuda = device.type == "cuda"
    shapes = CUDA_SHAPES if cuda else CPU_SHAPES
    for shape in shapes[:1] if quick else shapes:
        for dtype in (torch.float32, torch.bfloat16) if cuda else (torch.float32,):
            yield case(*shape, device, dtype)
