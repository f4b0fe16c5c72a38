"""Every block of Python and shell in the pages runs, every command of the other blocks exists, every link leads somewhere.

A block of ``python`` or ``bash`` runs, page by page, in one folder and one namespace, in order. ``<!-- long -->`` before it
leaves it to ``make test-full``; ``<!-- not run: why -->`` is for what needs the network. A block without a language needs
machines or files that a test does not have: its commands are parsed. Training is cut to a few steps, except in the tutorial in
``make test-full``.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from small import spread

import imm
from imm.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHORT = ["--steps=4", "--batch=8", "--warmup=0", "--tick=2", "--snap=4", "--grid=none"]


class Block(NamedTuple):
    note: str  # "long", "not run: why" or ""
    language: str
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and not self.note.startswith("not run")


def blocks(page: Path) -> list[Block]:
    pattern = r"^(?:<!-- (long|not run: .*) -->\n)?```([\w{}-]*)\n(.*?)^```$"
    return [Block(m[1] or "", m[2], m[3]) for m in re.finditer(pattern, page.read_text(), re.MULTILINE | re.DOTALL)]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$\([^)]*\)|\[[^]]*\]", "X", line), comments=True)
        if words:
            yield words


def imm_words(words: list[str]) -> list[str] | None:
    """What is given to imm in a command, also by torchrun; None for another command."""
    program = Path(words[0]).name
    if program == "imm":
        return words[1:]
    return words[words.index("imm") + 1 :] if words[-1] != "imm" and "-m imm " in " ".join(words) else None


def parse(words: list[str]) -> None:
    """Refuse what imm would refuse before it does anything."""
    command: click.Command = main
    context = click.Context(main, info_name="imm")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None and command is not main:
            break
        assert inner is not None, words
        command, words = inner, words[1:]
    command.make_context(str(command.name), list(words))


def check(words: list[str]) -> None:
    """A command that is not run exists, and so do its options."""
    arguments = imm_words(words)
    program = Path(words[0]).name
    if arguments is not None:
        parse(arguments)
    elif program == "imm_generate":
        source = (ROOT / "csrc" / "tools" / "imm_generate.cpp").read_text()
        assert all(f'"{word.split("=")[0].removeprefix("--")}"' in source or word.split("=")[0] in source for word in words[1:])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program.startswith("python"):
        assert words[1] == "-m" or (ROOT / words[1]).is_file(), words
    else:
        assert program in ("git", "source", "pip", "curl", "export") or words[0].startswith("#"), words


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the pages begin with: images, tokens and a checkpoint of digits."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for where in ("my_images", "photos"):
        for name in ("cat", "dog"):
            (tmp_path / where / name).mkdir(parents=True)
            for index in range(8):
                Image.fromarray(random.integers(0, 256, (40, 48, 3), np.uint8)).save(tmp_path / where / name / f"{index}.png")
    np.savez("digits.npz", tokens=random.normal(size=(32, 4, 3)).astype(np.float32) / 2, labels=np.arange(32) % 10)
    network = spread(imm.networks.UNet(channels=1, resolution=16, num_classes=10, width=8))
    imm.checkpoints.save("net.safetensors", imm.FlowMap(network))
    return tmp_path


@pytest.fixture
def autoencoder(folder: Path) -> None:
    """What the page on diffusers has besides: an autoencoder and a network of its latents."""
    diffusers = pytest.importorskip("diffusers")
    block = {"block_out_channels": (4, 4), "norm_num_groups": 2, "layers_per_block": 1}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(latent_channels=4, sample_size=16, **block, **ends).save_pretrained("vae")
    network = spread(imm.networks.UNet(channels=4, resolution=8, width=8))
    imm.checkpoints.save("latent.safetensors", imm.FlowMap(network))


def run_shell(text: str, as_printed: bool) -> None:
    for words in commands(text):
        arguments = imm_words(words)
        if arguments is None or arguments[0] == "serve":  # a server does not end
            check(words)
        else:
            call(*arguments, *(SHORT if arguments[0] == "train" and not as_printed else []))


def run_page(page: Path, long: bool, as_printed: bool = False) -> None:
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
        if not block.runs or (block.note == "long" and not long):
            continue
        if block.language == "python":
            exec(compile(block.text, str(page), "exec"), namespace)
        else:
            run_shell(block.text, as_printed)


RUNNABLE = [page for page in PAGES if any(block.runs for block in blocks(page))]


@pytest.mark.parametrize("page", RUNNABLE, ids=names(RUNNABLE))
def test_the_blocks_of_a_page_run(page: Path, folder: Path, request: pytest.FixtureRequest) -> None:
    if page.stem == "diffusers":
        request.getfixturevalue("autoencoder")
    torch.manual_seed(0)
    run_page(page, long=False)


LONG = [page for page in PAGES if any(block.note == "long" for block in blocks(page))]


@pytest.mark.full
@pytest.mark.parametrize("page", LONG, ids=names(LONG))
def test_the_long_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    run_page(page, long=True)


@pytest.mark.full
def test_the_tutorial_ends_as_it_says(folder: Path) -> None:
    run_page(ROOT / "docs" / "learn" / "tutorial.md", long=True, as_printed=True)
    scores = json.loads((folder / "one-step.json").read_text())["metrics"]
    assert scores["label-match"] > 0.8


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_the_commands_of_a_page_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language in ("", "bash"):
            for words in commands(block.text):
                check(words)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:")):
            continue
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], (
                f"{page.name}: {target}"
            )


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in PAGES[1:]:
        name = str(page.relative_to(ROOT / "docs").with_suffix(""))
        assert name == "index" or f"\n{name}\n" in index, name


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", ROOT / "docs", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
