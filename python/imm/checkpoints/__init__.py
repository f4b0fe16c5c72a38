"""Checkpoints: one safetensors file with JSON settings. Nothing in a file is ever executed."""

from imm.checkpoints.format import FORMAT_VERSION, CheckpointError, load, read_file, read_settings, save, write_file
from imm.checkpoints.hub import model_card, push_to_hub
from imm.checkpoints.published import from_published, import_published, read_published

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "from_published",
    "import_published",
    "load",
    "model_card",
    "push_to_hub",
    "read_file",
    "read_published",
    "read_settings",
    "save",
    "write_file",
]
