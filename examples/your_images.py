"""Your own images: a folder with one sub-folder per class, trained on and sampled from with the command line's pieces.

Without --data it paints a folder of coloured discs and squares first, so that it runs as it is.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw


def paint(folder: Path, count: int = 64) -> None:
    """Discs and squares of many sizes and colours, 16x16."""
    for name in ("disc", "square"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture = Image.new("RGB", (16, 16), (20, 20, 30))
            r, colour = 2 + i % 5, (80 + 40 * (i % 4), 60 + 30 * (i % 6), 255 - 25 * (i % 8))
            box = (8 - r, 8 - r, 7 + r, 7 + r)
            draw = ImageDraw.Draw(picture)
            draw.ellipse(box, fill=colour) if name == "disc" else draw.rectangle(box, fill=colour)
            picture.save(folder / name / f"{i:03d}.png")


def imm(*arguments: str) -> None:
    """The command ``imm`` of this environment."""
    subprocess.run([sys.executable, "-c", "from imm.cli import main; main()", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="a folder of images, one sub-folder per class")
    parser.add_argument("--out", default="runs/your_images")
    parser.add_argument("--steps", default="1500")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = options.data
        if data is None:
            data = str(Path(scratch) / "shapes")
            paint(Path(data))
        outdir = Path(options.out)
        training = ("--resolution=16", "--batch=64", "--lr=2e-3", "--warmup=100", "--ema=0.998", "-a", "1")
        imm("train", f"--data={data}", f"--out={outdir}", f"--steps={options.steps}", *training)
        snapshot = sorted(outdir.glob("snapshot-*.safetensors"))[-1]
        imm("sample", f"--net={snapshot}", "--seeds=0-31", "--steps=2", f"--out={outdir / 'samples'}", "--grid=8x4")


if __name__ == "__main__":
    main()
