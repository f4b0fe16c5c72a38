"""Every command and its options. What a command does is imported when it runs, so that ``--help`` needs no torch.

The words of choices are those of the library; tests/test_cli_options.py compares them with it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from imm.cli.options import CHECKPOINT, PATH, Number, grid_of, parse_counts, parse_floats

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DEFAULT_METRICS = "fd-efficientnet-lite0,kid-efficientnet-lite0,mmd-pixels"
METRICS = (
    "fid, kid, prdc, is, fd-efficientnet-lite0, kid-efficientnet-lite0, prdc-efficientnet-lite0, "
    "mmd-efficientnet-lite0, mmd-pixels, label-match"
)
LOSSES = ("imm", "fm", "consistency", "shortcut", "progressive", "lagrangian", "meanflow", "energy")
PRESETS = (
    *("cifar10", "imagenet256-ts-a2", "imagenet256-s-a1", "imagenet256-meanflow-b-4", "celebahq256-shortcut"),
    *(f"dit-{size}-{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)),
)
STUDIES = ("all", "axes", "capacity", "factorisation", "losses", "particles", "second-time")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
COUNT = click.IntRange(min=1)


def _run(name: str, /, **options: Any) -> None:
    """``imm.cli.NAME.run``."""
    importlib.import_module(f"imm.cli.{name}").run(**options)


def _option(*names: str, **settings: Any) -> Decorator:
    """A click option that shows its default, if it has one."""
    return click.option(*names, **{"show_default": settings.get("default") is not None, **settings})


def _all(options: Sequence[Decorator]) -> Decorator:
    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class _Grouped(click.Command):
    """A command whose help has its options in groups, by their number in each."""

    groups: Mapping[str, int]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx)) is not None]
        for title, count in {**self.groups, "Other": len(records)}.items():
            with formatter.section(title):
                formatter.write_dl(records[:count])
            records = records[count:]


def _choice(*words: str) -> click.Choice[str]:
    return click.Choice(list(words))


def _data(what: str, required: bool = True) -> Decorator:
    return _option("--data", required=required, type=PATH, metavar="PATH", help=what)


def _out(what: str, metavar: str = "FILE", required: bool = True) -> Decorator:
    return _option("--out", required=required, type=PATH, metavar=metavar, help=what)


NET = _option(
    "--net",
    required=True,
    type=CHECKPOINT,
    metavar="FILE",
    help="Checkpoint (.safetensors), folder of a run (its newest), or hf://USER/REPO.",
)


def _batch(default: int, what: str) -> Decorator:
    return _option("--batch", default=default, type=COUNT, help=what)


def _precision(what: str) -> Decorator:
    return _option("--precision", default="fp32", type=_choice(*PRECISIONS), help=what)


SET = '"mnist5k", a folder, .zip, .npz, CIFAR-10 or MNIST (docs/howto/data.md).'
TRANSFORM = _option(
    "--transform",
    default="none",
    type=_choice("none", "center-crop", "center-crop-dhariwal"),
    help="What is cut out of a picture first; none squeezes what is not square.",
)
CHANNELS = _option(
    "--channels",
    type=_choice("1", "3"),
    callback=lambda context, parameter, value: None if value is None else int(value),
    help="Bring all pictures to one channel (luma) or three. [default: as they are, all grey or all in colour]",
)
SKIP_BROKEN = _option("--skip-broken", is_flag=True, help="Leave out pictures that cannot be read, and list them.")
DEVICE = _option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
#: Of the commands that torchrun starts as well.
OWN_DEVICE = _option("--device", default="auto", help="cpu, cuda or cuda:N; under torchrun cuda is each process's own GPU.")
STEPS = _option("--steps", default=2, type=COUNT, help="Sampling steps.")
SAMPLER = (
    STEPS,
    _option("--kind", default="uniform", type=_choice("uniform", "edm", "eta"), help="Time grid."),
    _option(
        "--mid-eta",
        default="",
        show_default=False,
        metavar="LIST",
        callback=lambda context, parameter, value: parse_floats(value, "mid-eta"),
        help="Noise levels in between, for --kind=eta, such as 1.4.",
    ),
    _option(
        "--method",
        type=_choice("pushforward", "restart", "ddim", "heun"),
        help="The paper's algorithm 2 or 5; ddim and heun for velocities. [default: what belongs to the checkpoint's loss]",
    ),
)


@click.command()
@_option("--out", default="runs/demo", type=PATH, metavar="DIR", help="Where to write; trains in demo-training there.")
@_option("--steps", default=3000, type=COUNT, help="Training steps.")
@_option("--minutes", type=Number(min=0), help="Stop training after this long, whatever --steps says.")
@_option("--seed", default=0, type=click.IntRange(0, 2**63 - 1))
@_precision("Of training.")
@_option("--resume", is_flag=True, help="Resume the run in --out instead of starting afresh.")
@DEVICE
def demo(**options: Any) -> None:
    """Train on real digits from scratch, sample in 1-8 steps from the saved checkpoint, score, report.

    Exits with 1 where the one-step samples are not good: a label match below 80 %, a spread below 60 % of real, or an MMD
    above half of that of the class means.
    """
    _run("demo", **options)


_TRAIN: dict[str, list[Decorator]] = {
    "Data": [
        _data(
            '"mnist5k", a folder of images, .zip, .npz (images or latents), CIFAR-10, MNIST (docs/howto/data.md).',
            required=False,
        ),
        _option("--tokens", type=PATH, metavar="FILE", help="In place of --data: sequences of tokens, .npy or .npz."),
        _option("--resolution", type=click.IntRange(min=4), help="Resize to this side. [default: as they are; mnist5k: 16]"),
        TRANSFORM,
        CHANNELS,
        SKIP_BROKEN,
        _option("--xflip/--no-xflip", default=False, help="Also train on mirrored images (not latents)."),
        _option(
            "--augment",
            default=0.0,
            type=Number(0, 1),
            help="DDPM++: probability of each geometric augmentation; the network is conditioned on it (not latents).",
        ),
    ],
    "Run": [
        _out("Snapshots, state and stats.jsonl. A run found here is resumed.", "DIR"),
        _option("--steps", default=10000, type=COUNT, help="Steps in all."),
        _option("--minutes", type=Number(min=0), help="Stop after this long; run again to resume."),
        _option("--snap", default=500, type=COUNT, help="Steps between saves."),
        _option("--keep", type=COUNT, metavar="N", help="Keep the snapshots of every N steps. [default: only the newest]"),
        _option("--tick", default=50, type=COUNT, help="Steps between rows of stats.jsonl."),
        _option("--seed", default=0, type=click.IntRange(0, 2**63 - 1)),
        _option(
            "--allow-change",
            default="",
            show_default=False,
            metavar="LIST",
            callback=lambda context, parameter, value: [name.replace("-", "_") for name in value.split(",") if name],
            help="Resume although these differ: of lr, warmup, decay, decay-steps, clip, max-skipped, ema, compile.",
        ),
        OWN_DEVICE,
    ],
    "Watching": [
        _option("--log", type=_choice("tensorboard", "wandb"), help="Also log rows, pictures and scores there."),
        _option(
            "--grid",
            default="10x4",
            metavar="WxH|none",
            callback=lambda context, parameter, value: None if value == "none" else grid_of(value),
            help="Pictures of samples at every save, of the average (not of latents).",
        ),
        _option(
            "--eval",
            "metrics",
            metavar="LIST",
            help="Score the average by these metrics of imm eval. The first decides which snapshot is kept as the best.",
        ),
        _option("--eval-every", type=COUNT, metavar="N", help="Steps between scores, a multiple of --snap. [default: --snap]"),
        _option("--eval-images", default=1000, type=click.IntRange(min=2), help="Samples a score, of seeds 0, 1, ..."),
        _option(
            "--eval-steps",
            default="1,2",
            metavar="LIST",
            callback=lambda context, parameter, value: parse_counts(value, "eval-steps"),
            help="Sampling steps of pictures and scores; the first decides which snapshot is the best.",
        ),
        _option("--ref", type=PATH, metavar="PATH", help="What samples are compared with, as in imm eval. [default: --data]"),
        _option("--weights", type=PATH, metavar="FILE", help='Weights of Inception for fid and its kind; or "download".'),
    ],
    "Optimization": [
        _batch(64, "Images a training step, of all processes together."),
        _option(
            "--batch-gpu",
            type=COUNT,
            help="Images of a micro-batch of one process, for less memory; gradients are summed. [default: all]",
        ),
        _option("--lr", default=1e-4, type=Number(), help="Learning rate."),
        _option("--warmup", default=0, type=click.IntRange(min=0), help="Steps of linear growth of the learning rate."),
        _option(
            "--decay",
            default="none",
            type=_choice("none", "cosine", "rsqrt"),
            help="Fall of the learning rate: along half a cosine to 0 at --decay-steps, or as 1 / sqrt(step) after it.",
        ),
        _option("--decay-steps", type=COUNT, help="[default: --steps for cosine]"),
        _option("--clip", type=Number(), metavar="NORM", help="Scale larger gradients to this norm. [default: none]"),
        _option(
            "--max-skipped",
            default=0,
            type=click.IntRange(min=0),
            help="Skip up to so many steps whose gradient is not finite; the next one stops the run.",
        ),
        _option("--optimizer", default="adamw", type=_choice("adamw", "radam")),
        _option("--ema", default=0.9999, type=Number(), help="Beta of the moving average."),
        _option(
            "--ema-lengths",
            default="",
            show_default=False,
            metavar="LIST",
            callback=lambda context, parameter, value: tuple(parse_floats(value, "ema-lengths")),
            help="Also keep power-function averages of these relative lengths, such as 0.05,0.1, for imm ema.",
        ),
        _precision(
            "Of both branches of the loss; bf16 and fp16 by autocast. docs/howto/precision.md has the error of the gradient."
        ),
        _option("--checkpointing", is_flag=True, help="DiT, DDPM++: compute blocks again in the backward, for less memory."),
        _option(
            "--compile",
            is_flag=True,
            help="Compile the network (torch.compile): minutes before the first step, faster steps. Needs a C++ compiler.",
        ),
        _option(
            "--shard",
            default=1,
            type=COUNT,
            metavar="N",
            help="Processes that share one replica of weights, average and optimizer (FSDP2), a divisor of their number.",
        ),
    ],
    "Network": [
        _option(
            "--preset",
            type=_choice(*PRESETS),
            metavar="NAME",
            help="A paper's network, flow map, loss, objective, steps, batch, lr, optimizer, ema, precision, xflip, augment; "
            f"options given beside it win. One of {', '.join(PRESETS)}.",
        ),
        _option(
            "--init",
            type=CHECKPOINT,
            metavar="FILE",
            help="Start from this checkpoint, with its network and flow map.",
        ),
        _option("--network", default="unet", type=_choice("unet", "dit")),
        _option("--width", default=16, type=int, help="U-Net, DDPM++: channels of the first layer."),
        _option("--dropout", default=0.0, type=Number(0, 1, max_open=True), help="U-Net, DDPM++."),
        _option("--size", default="S", type=_choice("S", "B", "L", "XL"), help="DiT: size."),
        _option("--patch", default=2, type=COUNT, help="DiT: side of a patch."),
        _option(
            "--backbone", default="256x4x4", metavar="WxLxH", help="Sequences: features, blocks and heads of the backbone."
        ),
        _option("--head", default="256x3", metavar="WxL", help="Sequences: features and blocks of the head."),
        _option("--latent", type=click.IntRange(min=0), help="Sequences: the head's own noise. [energy: a token's; others: 0]"),
    ],
    "Flow map": [
        _option("--schedule", default="fm", type=_choice("fm", "vp_cosine")),
        _option("--parametrization", default="euler_fm", type=_choice("identity", "simple_edm", "euler_fm")),
        _option("--second-time", default="stride", type=_choice("stride", "identity", "none")),
        _option(
            "--time-scale", type=Number(0, min_open=True), help="Factor on the times that the network sees. [1000; meanflow: 1]"
        ),
        _option("--t-min", default=0.0, type=Number()),
        _option("--t-max", default=0.994, type=Number()),
    ],
    "Objective": [
        _option(
            "--loss", default="imm", type=_choice(*LOSSES), help="docs/learn/losses.md. Options below belong to some of them."
        ),
        _option("--particles", default=4, type=COUNT, help="M, particles a group."),
        _option("--kernel", default="laplace", type=_choice("laplace", "rbf", "imq", "energy")),
        _option("--mapping", default="eta", type=_choice("eta", "t", "log_snr", "inverse_eta"), help="How r(s, t) is found."),
        _option("-k", "k", default=12, type=click.IntRange(1, 30), help="Step exponent of the mapping."),
        _option("-a", "a", default=2, type=int, help="Exponent of alpha in the weighting."),
        _option("-b", "b", default=4.0, type=Number(), help="Shift of the weighting."),
        _option("--min-gap", type=Number(), help="Smallest t - r, such as 1e-4 in half precision. [default: none]"),
        _option("--label-dropout", default=0.1, type=Number(0, 1)),
        _option("--times", type=_choice("uniform", "logit_normal"), help="fm, progressive, lagrangian, meanflow: of t."),
        _option(
            "--fm-share", type=Number(0, 1), help="progressive, lagrangian, meanflow: share of the batch with s = t. [0.75]"
        ),
        _option("--distance", type=_choice("pseudo_huber", "kernel"), help="consistency. [pseudo_huber]"),
        _option("--stage-steps", type=click.IntRange(min=0), help="consistency: steps until the gap halves; 0: -k's. [1000]"),
        _option("--bootstrap", type=Number(0, 1), help="shortcut: share of the batch that learns from halves. [0.25]"),
        _option("--depth", type=COUNT, help="shortcut: the smallest step is 2^-depth. [7]"),
        _option("--derivative", type=_choice("jvp", "difference"), help="meanflow. [jvp]"),
        _option("--step-size", type=Number(), help="meanflow with --derivative=difference: of t. [0.0005]"),
        _option("--improved", is_flag=True, help="meanflow: the improved form."),
        _option("--samples", type=click.IntRange(min=2), help="energy: samples for each image. [4]"),
    ],
}
_Grouped.groups = {title: len(options) for title, options in _TRAIN.items()}


@click.command(cls=_Grouped)
@_all([option for group in _TRAIN.values() for option in group])
@click.pass_context
def train(context: click.Context, **options: Any) -> None:
    """Train a network on images, or on sequences of continuous tokens (docs/learn/tokens.md). Stopped or killed at any moment,
    the same command resumes exactly where it was saved.

    Processes that torchrun starts ("torchrun --nproc-per-node=8 -m imm train ...") share each batch.
    """
    if (options["data"] is None) == (options["tokens"] is None):
        raise click.UsageError("Missing option '--data'." if options["data"] is None else "Give either --data or --tokens.")
    default = click.core.ParameterSource.DEFAULT
    given = {name for name in context.params if context.get_parameter_source(name) is not default}
    _run("train", given=given, **options)


class _Class(click.ParamType):
    """A class's number, its name, or "none"."""

    name = "class"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        return click.IntRange(min=0).convert(value, param, ctx) if re.fullmatch(r"[+-]?\d+", str(value)) else str(value)


@click.command()
@NET
@_out("Where to write the images; a run that was stopped is resumed there.", "DIR")
@_option("--seeds", default="0-63", metavar="LIST", help="Image seeds, such as 0-49999 or 0-63,70.")
@_option("--labels", metavar="LIST", help="Classes, repeated over the seeds. [default: all classes in order]")
@_option(
    "--class",
    "one_class",
    type=_Class(),
    metavar="NAME|N|none",
    help="One class for all images, by name or number; none: unconditional.",
)
@_option("--guidance", "--cfg", type=Number(), metavar="W", help="Classifier-free guidance scale. [default: none]")
@_all(SAMPLER)
@_batch(64, "Images a call of the sampler, in each process.")
@_precision("Of the network; bf16 and fp16: a copy with weights of 16 bits.")
@_option("--subdirs", is_flag=True, help="A sub-folder for every thousand seeds.")
@_option(
    "--grid",
    metavar="WxH",
    callback=lambda context, parameter, value: None if value is None else grid_of(value),
    help="Also write grid.png of the first W x H images, such as 8x8.",
)
@_option("--npz", type=PATH, metavar="FILE", help="Also write all images to one file, in the ADM evaluator's layout.")
@_option(
    "--vae",
    type=PATH,
    metavar="PATH|ID",
    help="Decode latents with this AutoencoderKL, those of an earlier run in --out too (needs diffusers).",
)
@OWN_DEVICE
def sample(**options: Any) -> None:
    """Generate images from a checkpoint.

    An image depends on its own seed and label only. The files are the same whatever the number of processes ("torchrun
    --nproc-per-node=8 -m imm sample ...") and however often the run was stopped and started again.
    """
    _run("sample", **options)


_SPLIT = _option("--split", type=_choice("train", "test", "all"), help="[default: train where the source has splits, else all]")
_RESOLUTION = _option("--resolution", type=COUNT, help="Side to resize to. [default: as they are; mnist5k: 16]")
_MAX_IMAGES = _option("--max-images", type=COUNT, metavar="N", help="N images evenly spaced over the data set.")


@click.group()
def data() -> None:
    """Convert, encode and measure data sets."""


@data.command()
@_data(SET)
@_out("A .zip or .npz file to write, or a new folder.", "PATH")
@_all([_RESOLUTION, TRANSFORM, _SPLIT, _MAX_IMAGES, CHANNELS, SKIP_BROKEN])
def convert(**options: Any) -> None:
    """Write a data set as a zip or folder of PNGs with dataset.json, or as .npz. The same images give the same bytes.

    Stopped, killed or failed, the same command resumes from there.
    """
    importlib.import_module("imm.cli.data").convert(**options)


@data.command()
@_data(SET)
@_out("The .npz file to write.")
@_option("--vae", required=True, type=PATH, metavar="PATH|ID", help="The AutoencoderKL that encodes (needs diffusers).")
@_all([_RESOLUTION, TRANSFORM, _SPLIT, _MAX_IMAGES, _batch(8, "Images a call of the autoencoder."), DEVICE, SKIP_BROKEN])
def encode(**options: Any) -> None:
    """Write the latents of a data set's images, as training takes them: mean and deviation of each, and labels.

    Grey pictures are encoded as three equal channels. Stopped, killed or failed, the same command resumes from there.
    """
    importlib.import_module("imm.cli.data").encode(**options)


@data.command("stats")
@_data(SET)
@_all([_RESOLUTION, TRANSFORM, _SPLIT, CHANNELS, SKIP_BROKEN])
@_out("Also write the numbers there, as JSON.", required=False)
def data_stats(**options: Any) -> None:
    """Print count, shape, classes, channel means and deviations, pixel range and digest of a data set."""
    importlib.import_module("imm.cli.data").stats(**options)


#: Of whatever runs a feature network over a reference.
_OF_FEATURES = (
    _option("--weights", type=PATH, metavar="FILE", help='Published weights of Inception (fid, kid, prdc, is); or "download".'),
    _option("--resolution", type=COUNT, help="Resize a data set. [default: as stored]"),
    _option("--split", metavar="NAME", help="Split of the reference, such as train; if it has none, for the record."),
    TRANSFORM,
    CHANNELS,
    SKIP_BROKEN,
    _batch(64, "Images a call of a feature network, in each process."),
    OWN_DEVICE,
)


@click.group("eval", invoke_without_command=True)
@_data("Images to judge: a folder that imm sample wrote, or a data set.", required=False)
@_option("--ref", type=PATH, metavar="PATH", help="What to compare with: a data set, or statistics (docs/howto/evaluation.md).")
@_option("--metrics", default=DEFAULT_METRICS, metavar="LIST", help=f"Of {METRICS}.")
@_out("Where to write the numbers and their protocol (.json).", required=False)
@_all(_OF_FEATURES)
@click.pass_context
def evaluate(context: click.Context, **options: Any) -> None:
    """Measure how good images are, and write every number with the protocol it was measured by.

    Runs under torchrun as well: the processes share the work, and the numbers stay the same. The metrics are in
    docs/howto/evaluation.md.
    """
    command_line = click.core.ParameterSource.COMMANDLINE
    given = [p.name for p in context.command.params if context.get_parameter_source(p.name or "") is command_line]
    if context.invoked_subcommand is not None:
        if given:
            raise click.UsageError(f"--{given[0]} belongs to imm eval itself, not before {context.invoked_subcommand}")
        return
    for name in ("data", "ref", "out"):
        if options[name] is None:
            raise click.UsageError(f"Missing option '--{name}'.")
    _run("eval", **options)


@evaluate.command("stats")
@_data("The reference images (docs/howto/data.md).")
@_out("Where to write (.npz).")
@_option("--features", default="efficientnet-lite0", metavar="LIST", help="Of inception, efficientnet-lite0.")
@_all(_OF_FEATURES)
def reference(**options: Any) -> None:
    """Mean and covariance of a reference's features, for --ref of Frechet distances."""
    importlib.import_module("imm.cli.eval").stats(**options)


@evaluate.command()
@click.argument("first", type=PATH, metavar="A.json")
@click.argument("second", type=PATH, metavar="B.json")
def compare(first: str, second: str) -> None:
    """Two results side by side; exits with 1, saying what differs, where their protocols are not alike."""
    importlib.import_module("imm.cli.eval").compare(first, second)


@click.command()
@_option("--runs", required=True, type=PATH, metavar="DIR", help="A run of imm train --ema-lengths.")
@_option("--length", required=True, type=Number(), help="Relative standard deviation of the wanted average, up to 0.28.")
@_option("--step", type=COUNT, metavar="N", help="The average after N steps. [default: the newest that the run saved]")
@_out("Checkpoint to write (.safetensors).")
def ema(**options: Any) -> None:
    """Make the power-function average of another length, after training.

    Prints the relative error of the profile that the stored averages can make; 0 for one that was tracked.
    """
    _run("ema", **options)


@click.command()
@click.argument("folder", type=PATH, metavar="RUN")
@_out("The page to write (.html). [default: report.html in RUN]", required=False)
def report(**options: Any) -> None:
    """Write one self-contained page of a training run: curves, samples over time, scores, settings, environment."""
    _run("report", **options)


@click.command()
@click.argument("name", type=_choice(*STUDIES), metavar="NAME")
@_out("Where to write; axes and losses, stopped, are resumed there. [default: runs/study-NAME]", "DIR", required=False)
@_option("--quick", is_flag=True, help="Less of it; of axes and losses only to see that they run: their figures say nothing.")
@DEVICE
def study(**options: Any) -> None:
    """Run a study. Writes rows, figures and one page; exits with 1 where a criterion fails.

    all: every study on one page, losses in a short form. About a quarter of an hour on one core; --quick, without axes
    and losses, takes one minute.

    axes: continuous tokens, a sequence outside and refinement inside. About ten minutes on two cores.

    capacity: DDIM with the exact velocity against the exact flow map. About a minute.

    factorisation: strings, by masked diffusion at its optimum and by a flow map whose tokens share their noise. About a minute.

    losses: every loss with the same network, data, batch, seeds and protocol. About an hour on two cores.

    particles: IMM with 1 to 16 particles, over the gap between t and r. About five minutes.

    second-time: the same network with and without s, by several losses. About two minutes.
    """
    _run("study", **options)


@click.command("import")
@_option("--net", required=True, type=PATH, metavar="FILE", help="Published snapshot (.pkl).")
@_out("Checkpoint to write (.safetensors).")
@_option("--second-time", type=_choice("stride", "identity", "none"), help="Of the network. [default: what the snapshot says]")
def import_(**options: Any) -> None:
    """Turn a published checkpoint into one of ours. Nothing in the file is run, and none of its names is imported."""
    _run("import_", **options)


@click.command()
@NET
@_out("Package to write (.pt2).")
@_batch(1, "Images a call of the package.")
@_option("--guided", is_flag=True, help="For runs with a guidance scale.")
@_all(SAMPLER)
@_option(  # no tf32: that is a setting of the process that runs the package
    "--precision", type=_choice("fp32", "bf16", "fp16"), help="Of the network. [default: the checkpoint's]"
)
@DEVICE
def export(**options: Any) -> None:
    """Compile a checkpoint's network and its sampling run into one file, which imm_generate runs without Python."""
    _run("export", **options)


@click.command()
@NET
@_option("--host", default="127.0.0.1", help="Where to listen; 0.0.0.0 for all interfaces.")
@_option("--port", default=8000, type=click.IntRange(0, 65535), help="0: any that is free.")
@_option(
    "--steps",
    default="1,2,4,8",
    metavar="LIST",
    callback=lambda context, parameter, value: parse_counts(value, "steps"),
    help="Step counts that requests may ask for; the first is the default.",
)
@_batch(8, "Images a call of the sampler: every call runs in as many rows.")
@_option("--max-images", default=64, type=COUNT, help="Images of one request.")
@_option("--queue", default=256, type=COUNT, help="Images that wait; more get 503.")
@_option("--max-wait", default=0.0, type=Number(min=0), help="Milliseconds that an idle server waits for a fuller call.")
@_option("--deadline", default=30.0, type=Number(min=0), help="Seconds that an image may wait before it gets 504.")
@_option(
    "--method", type=_choice("pushforward", "restart", "ddim", "heun"), help="[default: what belongs to the checkpoint's loss]"
)
@_option("--vae", type=PATH, metavar="PATH|ID", help="Decode latents with this AutoencoderKL.")
@_precision("Of a copy of the network.")
@_option("--workers", type=COUNT, help="Processes behind the port. [default: one a GPU; one on the CPU]")
@DEVICE
def serve(**options: Any) -> None:
    """Serve a checkpoint over HTTP: POST /v1/images/generations, and a page to try it. docs/howto/serve.md"""
    _run("serve", **options)


@click.command()
def doctor() -> None:
    """Print what is installed and which implementation each op uses, and why."""
    _run("doctor")


COMMANDS: dict[str, click.Command] = {
    "demo": demo,
    "train": train,
    "data": data,
    "sample": sample,
    "eval": evaluate,
    "ema": ema,
    "report": report,
    "study": study,
    "import": import_,
    "export": export,
    "serve": serve,
    "doctor": doctor,
}
