"""``imm train --tokens``: the loss of sequences, its parts and processes, the command line, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from command_line import call, refused
from small import spread

from imm import FlowMap, checkpoints, package
from imm.data import ImageData, digest, load_tokens
from imm.distributed import Processes
from imm.networks import NETWORKS, TokenModel, UNet
from imm.objectives import OBJECTIVES, TRAIN_BACKBONE, SequenceObjective
from imm.training import TrainConfig, Trainer
from imm.training.sharding import Shards

T, D = 6, 4
BACKBONE = {"token_dim": D, "features": 16, "depth": 1, "heads": 2, "max_tokens": T, "num_classes": 3}
OPTIONS = ["--backbone=16x1x2", "--head=16x1", "--batch=8", "--tick=1", "--lr=1e-3", "--device=cpu"]


def objective(loss: str = "energy", **settings) -> SequenceObjective:
    torch.manual_seed(0)
    network = TokenModel(BACKBONE, {"width": 16, "depth": 1, "latent_dim": D if loss == "energy" else 0, "frequencies": 8})
    return SequenceObjective(OBJECTIVES[loss](FlowMap(spread(network, 0.2)), **settings))


def sequences(count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 0.5 * torch.randn(count, T, D, generator=generator), torch.arange(count) % 3


@pytest.fixture
def data(tmp_path):
    x, labels = sequences(24)
    path = tmp_path / "tokens.npz"
    np.savez(path, tokens=x.numpy(), labels=labels.numpy())
    return path


@pytest.mark.parametrize("loss", sorted(OBJECTIVES))
def test_the_loss_is_the_heads_over_all_tokens_and_trains_the_backbone_where_it_may(loss) -> None:
    whole = objective(loss, label_dropout=0.3)
    (x, labels), M = sequences(), whole.particles
    draws = whole.draw(x, labels, torch.Generator().manual_seed(2))
    found, stats = whole(x, labels, draws=draws)
    found.backward()
    network: TokenModel = whole.flow_map.network  # type: ignore[assignment]
    for name, parameter in network.backbone.named_parameters():
        learns = parameter.grad is not None and bool(parameter.grad.any())
        assert learns is (loss in TRAIN_BACKBONE), name
    assert network.head.final.weight.grad is not None

    z = network.backbone(x, draws.labels)
    rows = [(block * M + m, n) for block in range(len(x) // M) for n in range(T) for m in range(M)]
    pick = lambda values: torch.stack([values[b, n] for b, n in rows])
    expected, _ = whole.objective(pick(x), cond=pick(z), draws=draws.tokens)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert len({b for b, _ in rows[:M]}) == M  # a group has M sequences
    assert stats["nonfinite"] == 0
    assert bool((draws.labels == 3).any()), "a label was dropped"


@pytest.mark.parametrize("loss", ["energy", "imm"])
def test_parts_and_processes_have_the_draws_and_the_gradient_of_the_batch(loss, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("imm.training.trainer.shard", lambda network, *arguments: Shards(network))
    x, labels = sequences(16)
    gradients, draws = [], []

    class Alone(Processes):
        def largest(self, number: int) -> int:
            return number

    places = [(Processes(), None), (Processes(), 4), (Alone(0, 2), None), (Alone(1, 2), None)]
    for i, (where, batch_gpu) in enumerate(places):
        config = TrainConfig(batch=16, batch_gpu=batch_gpu, lr=1e-3)
        own = objective(loss, label_dropout=0.5)
        trainer = Trainer(own, ImageData(x, labels, 3, "sequences"), tmp_path / str(i), config, where=where)
        own.register_forward_pre_hook(lambda module, args, named: draws.append(named["draws"]), with_kwargs=True)
        trainer._step()
        gradients.append([p.grad.clone() for p in own.parameters() if p.grad is not None])
        trainer.close()
    whole, parts, first, second = gradients
    for a, b, c, d in zip(whole, parts, first, second, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close((c + d) / 2, a, rtol=1e-4, atol=1e-6)
    assert [one if one is None else len(one.labels) for one in draws] == [None, 4, 4, 4, 4, 8, 8]


def test_a_run_resumes_exactly_is_sampled_and_its_samples_are_data(data, tmp_path) -> None:
    command = ["train", f"--tokens={data}", *OPTIONS, "--loss=energy"]
    output = call(*command, "--steps=3", f"--out={tmp_path / 'run'}").output
    assert "24 sequences" in output
    assert "TokenModel" in output
    for steps in (2, 3):
        call(*command, f"--steps={steps}", f"--out={tmp_path / 'parts'}")
    nets = [tmp_path / name / "snapshot-0000003.safetensors" for name in ("run", "parts")]
    one, other = map(checkpoints.load, nets)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.parametrization.name == "identity"

    sample = ["sample", f"--net={nets[0]}", "--seeds=0-8", "--labels=0-2", "--steps=2", "--guidance=1.5", "--batch=4"]
    output = call(*sample, f"--out={tmp_path / 'samples'}", f"--npz={tmp_path / 'made.npz'}").output
    assert "wrote 9 sequences" in output
    made = load_tokens(str(tmp_path / "made.npz"))
    assert made.shape == (T, D)
    assert made.num_classes == 3
    files = [np.load(tmp_path / "samples" / f"{seed:06d}.npy") for seed in range(9)]
    assert np.array_equal(np.stack(files), made.pixels.numpy())
    (tmp_path / "samples" / "000005.npy").unlink()
    assert "wrote 1 sequences" in call(*sample, f"--out={tmp_path / 'samples'}").output
    assert np.array_equal(np.load(tmp_path / "samples" / "000005.npy"), files[5])
    call("train", f"--tokens={tmp_path / 'made.npz'}", *OPTIONS, "--loss=fm", "--steps=1", f"--out={tmp_path / 'fm'}")

    init = tmp_path / "fm" / "snapshot-0000001.safetensors"
    head = ["--batch=8", "--lr=1e-3", "--loss=imm", f"--init={init}", f"--out={tmp_path / 'imm'}"]
    call("train", f"--tokens={data}", *head, "--steps=2", "--ema=0.5")
    before, after = checkpoints.load(init).network, checkpoints.load(tmp_path / "imm" / "snapshot-0000002.safetensors").network
    same = {name: torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items()}
    assert all(equal for name, equal in same.items() if name.startswith("backbone."))
    assert not same["head.final.weight"]


def test_sequences_are_exported(data, tmp_path, monkeypatch) -> None:
    call("train", f"--tokens={data}", *OPTIONS, "--loss=energy", "--steps=1", f"--out={tmp_path / 'run'}")
    net, found = tmp_path / "run" / "snapshot-0000001.safetensors", {}
    monkeypatch.setattr(package, "export_tokens", lambda sampler, path, **settings: found.update(settings, sampler=sampler))
    output = call("export", f"--net={net}", f"--out={tmp_path / 'x.pt2'}", "--batch=2", "--steps=1", "--guided").output
    assert "2 sequences at a time" in output
    assert (found["rows"], found["guided"], found["sampler"].max_tokens) == (2, True, T)
    assert "precision: expected fp32" in refused("export", f"--net={net}", f"--out={tmp_path / 'x.pt2'}", "--precision=bf16")


def test_what_does_not_fit_is_refused_in_one_line(data, tmp_path) -> None:
    out = f"--out={tmp_path / 'run'}"
    train = lambda *options: refused("train", f"--tokens={data}", *OPTIONS, out, *options)
    assert "loss: expected fm or energy, which train the backbone, or --init" in train("--loss=imm")
    assert "resolution: expected no such option for sequences" in train("--loss=fm", "--resolution=8")
    assert "width: expected no such option for sequences" in train("--loss=fm", "--width=8")
    assert "backbone: expected 3 sizes such as 256x4x4, got '16'" in train("--loss=fm", "--backbone=16")
    assert "eval: expected pictures, got sequences" in train("--loss=fm", "--eval=mmd-pixels")
    assert "augment: expected no such option" in train("--loss=fm", "--augment=0.5")
    assert "latent_dim: expected 0 for FlowMatching" in train("--loss=fm", "--latent=2")
    assert "Give either --data or --tokens" in refused("train", f"--tokens={data}", f"--data={data}", out)
    assert "Missing option '--data'" in refused("train", out)
    assert "backbone: expected no such option for images" in refused("train", "--data=mnist5k", "--backbone=16x1x2", out)
    assert not (tmp_path / "run").exists()

    call("train", f"--tokens={data}", *OPTIONS, "--loss=fm", "--steps=1", f"--out={tmp_path / 'fm'}")
    net = tmp_path / "fm" / "snapshot-0000001.safetensors"
    assert "data: expected sequences, by --tokens" in refused("train", "--data=mnist5k", f"--init={net}", "--loss=fm", out)
    longer = tmp_path / "longer.npy"
    np.save(longer, np.zeros((8, T + 1, D), np.float32))
    wanted = refused("train", f"--tokens={longer}", f"--init={net}", "--loss=fm", "--batch=8", out)
    assert f"tokens: expected [N, 1..{T}, {D}]" in wanted
    assert "head: expected no such option beside --init" in refused(
        "train", f"--tokens={data}", f"--init={net}", "--loss=fm", "--head=8x1", out
    )
    images = tmp_path / "images.safetensors"
    checkpoints.save(images, FlowMap(UNet(resolution=8, width=8, multipliers=(1, 2))))
    assert "data: expected images, by --data" in refused("train", f"--tokens={data}", f"--init={images}", "--loss=fm", out)
    sample = lambda *options: refused("sample", f"--net={net}", f"--out={tmp_path / 'samples'}", *options)
    assert "precision: expected fp32 or tf32 for sequences" in sample("--precision=bf16")
    assert "grid: expected" in sample("--grid=2x2")
    with pytest.raises(TypeError, match="network: expected a TokenModel, got UNet"):
        SequenceObjective(OBJECTIVES["fm"](FlowMap(UNet(resolution=8, width=8, multipliers=(1, 2)))))
    with pytest.raises(ValueError, match=rf"x: expected floating \[B, 1..{T}, {D}\]"):
        objective()(torch.zeros(4, T, D + 1))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 8, 8, 1), np.uint8)}, "expected an .npz file with an array called tokens"),
        ({"tokens": np.zeros((2, 8), np.float32)}, r"expected \[N, T, D\] of float16 or float32"),
        ({"tokens": np.zeros((2, 8, 4))}, r"expected \[N, T, D\] of float16 or float32, got \[2, 8, 4\] of float64"),
        ({"tokens": np.full((2, 8, 4), np.nan, np.float32)}, "expected finite values"),
        ({"tokens": np.zeros((2, 8, 4), np.float32), "labels": np.zeros(3, int)}, r"expected labels \[2\] of integers"),
    ],
)
def test_files_of_other_arrays_are_refused(arrays, message, tmp_path) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_tokens(str(tmp_path / "x.npz"))


def test_an_npy_file_has_no_labels_and_a_digest_of_its_own(tmp_path) -> None:
    x, labels = sequences()
    np.save(tmp_path / "x.npy", x.numpy())
    found = load_tokens(str(tmp_path / "x.npy"))
    assert found.labels is None
    assert torch.equal(found.pixels, x)
    assert digest(found) == digest(x)
    assert digest(x) not in (digest(x, labels), digest(x.reshape(12, T, D, 1)))
    for name, error in (("none.npy", FileNotFoundError), ("x.txt", ValueError)):
        (tmp_path / "x.txt").touch()
        with pytest.raises(error, match=r"tokens: expected an \.npy or \.npz file"):
            load_tokens(str(tmp_path / name))
    (tmp_path / "x.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"tokens: expected a whole \.npy file"):
        load_tokens(str(tmp_path / "x.npy"))


def test_a_checkpoint_holds_the_backbone_too(tmp_path) -> None:
    flow_map = objective().flow_map
    checkpoints.save(tmp_path / "x.safetensors", flow_map)
    again = checkpoints.load(tmp_path / "x.safetensors")
    assert type(again.network) is NETWORKS["TokenModel"]
    for a, b in zip(flow_map.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
