"""Checkpoints on a hub by ``huggingface_hub`` (extra "hub"): ``hf://USER/REPO`` names one, and a model card describes it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imm.checkpoints.format import CheckpointError, read_settings

PREFIX = "hf://"
#: What a repository's checkpoint is called where the name of a file does not follow.
FILE = "net.safetensors"


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError('hf://: expected huggingface_hub; run: pip install "imm-kernels[hub]"') from error
    return huggingface_hub


def fetch(name: str) -> Path:
    """The local file of ``hf://USER/REPO[@REVISION][/FILE.safetensors]``, downloaded where it is not there.

    Raises:
        ValueError: another name. ImportError: no huggingface_hub. CheckpointError: the hub does not have it, or
            does not answer.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([\w./-]+\.safetensors))?", name)
    if match is None:
        raise ValueError(f"checkpoint: expected hf://USER/REPO[@REVISION][/FILE.safetensors], got {name!r}")
    repository, revision, file = match.groups()
    hub = _hub()
    try:
        return Path(hub.hf_hub_download(repository, file or FILE, revision=revision))
    except (hub.errors.HfHubHTTPError, hub.errors.EntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{name}: {str(error).splitlines()[0]}") from error


def model_card(path: str | Path, scores: Mapping[str, Any] | None = None) -> str:
    """A model card in Markdown: what a checkpoint's settings say, how to sample from it, and scores of ``imm eval``.

    Args:
        path: the checkpoint. scores: what ``imm eval`` wrote, with ``metrics`` and ``protocol``.
    """
    settings = dict(read_settings(path, "flow_map"))
    extra = settings.pop("extra", None) or {}
    lines = ["---", "library_name: imm", "tags: [flow-map, inductive-moment-matching, few-step-generation]", "---", ""]
    lines += [
        f"# {Path(path).stem}",
        "",
        "A flow map, for few-step generation with [imm](https://arxiv.org/abs/2503.07565).",
        "",
    ]
    lines += ["```python", "import imm", "", 'flow_map = imm.load("hf://USER/REPO")']
    lines += ["images = imm.Sampler(flow_map, steps=2).sample(seeds=range(4))", "```", ""]
    for title, part in (("Settings", settings), ("Training", extra)):
        if part:
            lines += [f"## {title}", "", "```json", json.dumps(part, indent=2, default=str), "```", ""]
    if scores:
        lines += ["## Scores", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in _flat(scores.get("metrics", {}))]
        lines += ["", "```json", json.dumps(scores.get("protocol", {}), indent=2), "```", ""]
    return "\n".join(lines)


def _flat(metrics: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in metrics.items():
        found += _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else [(before + name, value)]
    return found


def push_to_hub(path: str | Path, repository: str, *, scores: Mapping[str, Any] | None = None, private: bool = False) -> str:
    """Upload a checkpoint and its model card, in one commit. Returns the address.

    Args:
        path: the checkpoint. repository: "USER/REPO", made where it is not there. scores: as in :func:`model_card`.
        private: whether a new repository is.

    Raises:
        CheckpointError: no checkpoint of a flow map. ImportError: no huggingface_hub. Whatever the hub raises.
    """
    card = model_card(path, scores).replace("USER/REPO", repository)
    hub = _hub()
    api = hub.HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    add = hub.CommitOperationAdd
    files = [add(path_in_repo=FILE, path_or_fileobj=str(path)), add(path_in_repo="README.md", path_or_fileobj=card.encode())]
    return str(api.create_commit(repository, files, commit_message=f"Upload {Path(path).name}").commit_url)
