"""The command ``imm``. A sub-command is imported when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from imm.version import __version__

_COMMANDS = {
    "demo": "Train on real digits from scratch, sample in 1-8 steps, score, report.",
    "train": "Train a network on images.",
    "data": "Convert data sets, encode them as latents, measure them.",
    "sample": "Generate images from a checkpoint.",
    "eval": "Measure images against a reference, and compare what was measured.",
    "ema": "Make a moving average of another length from those that a run stored.",
    "report": "Write one page about a training run.",
    "study": "Run an experiment of the argument for flow maps, with its pictures and criteria.",
    "import": "Turn a published checkpoint (.pkl) into one of ours, without running what is in it.",
    "export": "Compile a checkpoint ahead of time, for generation without Python.",
    "serve": "Serve a checkpoint over HTTP, with a page to try it.",
    "bench": "Time ops beside their baselines (needs a checkout).",
    "doctor": "Print what is installed and which implementation each op uses, and why.",
}


#: What a command needs less memory with.
_LESS_MEMORY = {
    "train": "a smaller --batch-gpu (or --batch), --checkpointing (DiT, DDPM++), --precision=bf16, or a smaller network",
    "sample": "a smaller --batch or --precision=bf16",
    "eval": "a smaller --batch",
    "data": "a smaller --batch (encode), --max-images or --resolution",
}


class _Group(click.Group):
    """Loads the commands when one is asked for and turns expected errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "bench":
            return importlib.import_module("imm.cli.bench").command
        return importlib.import_module("imm.cli.commands").COMMANDS.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, click.exceptions.Exit):  # whoever read the output has seen enough; --help
            raise
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise click.ClickException(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            from imm.training import TrainingError

            if isinstance(error, TrainingError):
                raise click.ClickException(str(error)) from error
            if _is_out_of_memory(error):
                remedy = _LESS_MEMORY.get(ctx.invoked_subcommand or "")
                raise click.ClickException("out of memory" + (f"; try {remedy}" if remedy else "")) from error
            raise


def _is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the host had no memory left; not every such error of torch has a class of its own."""
    import torch

    words = ("DefaultCPUAllocator", "error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


@click.group(cls=_Group)
@click.version_option(__version__, prog_name="imm")
def main() -> None:
    """Inductive Moment Matching: train flow maps, generate in 1-8 steps."""
