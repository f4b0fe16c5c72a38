"""torch's settings of precision, by present and earlier names: used before a Trainer or an evaluation, and kept."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from imm.backends import repeatable

SETTINGS = (
    "pass",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
)
#: Of one setting: training, features for an evaluation, and the precisions before and after.
PROGRAM = """
import sys, tempfile, torch, imm
from imm.data import ImageData
from imm.evaluation import picture_set
from imm.evaluation.evaluate import extract
from imm.evaluation.networks import FeatureNetwork
from imm.training import TrainConfig, Trainer
backends = torch.backends
def precisions():
    parts = backends, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
    return [of.fp32_precision for of in parts]
def weights():
    torch.manual_seed(0)
    data = ImageData(torch.randint(0, 256, (8, 1, 16, 16), dtype=torch.uint8), None, 0, "x")
    flow_map = imm.FlowMap(imm.networks.UNet(channels=1, resolution=16, num_classes=0, width=8))
    Trainer(imm.IMMObjective(flow_map), data, tempfile.mkdtemp(), TrainConfig(batch=8)).run(2)
    network = FeatureNetwork("x", "0", "p", "p", 4, 0, lambda x: (x.float().flatten(1)[:, :4].contiguous(), None))
    extract(network, picture_set(data.pixels))
    return [p.detach().clone() for p in flow_map.network.parameters()]
expected = weights()
for setting in sys.argv[1:]:
    exec(setting)
    before = precisions()
    same = all(torch.equal(a, b) for a, b in zip(weights(), expected))
    print(setting, "|", same, precisions() == before)
    for of in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul, backends):
        of.fp32_precision = "none"
"""


def test_training_and_evaluation_run_under_every_setting_with_the_same_bits_and_keep_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *SETTINGS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{setting} | True True" for setting in SETTINGS]


@pytest.mark.parametrize("tf32", [True, False])
def test_what_is_set_within(tf32) -> None:
    backends = torch.backends
    with repeatable(tf32=tf32):
        for of in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            assert (of.fp32_precision == "tf32") is tf32
        assert {of.fp32_precision for of in (backends.mkldnn.matmul, backends.mkldnn.conv)} <= {"none", "ieee"}
        assert (backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32) == (tf32, tf32)  # torch.export reads these
        assert not backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        assert not backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        assert (backends.cudnn.deterministic, backends.cudnn.benchmark) == (True, False)
    assert backends.cuda.matmul.allow_bf16_reduced_precision_reduction
