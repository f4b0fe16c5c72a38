"""``python -m imm`` and ``torchrun -m imm``."""

from imm.cli import main

main(prog_name="imm")
