"""The pictures of the pages that no study draws.

python docs/figures.py idea                         docs/images/idea.png
python docs/figures.py digits CHECKPOINT            docs/images/digits.gif, from the checkpoint of imm demo
python docs/figures.py performance RESULTS          docs/images/performance.png, and the table of internals/performance.md
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw, ImageFont

import imm

IMAGES = Path(__file__).parent / "images"
BLUE, ORANGE, GREY = "#1f6fb4", "#d9730d", "#888888"


def idea() -> None:
    """One group of M = 4: states at t and r of the same images and noise, their jumps to s, the kernel matrix of the loss."""
    data, noise = np.array([0.95, 0.3, -0.35, -1.0]), np.array([0.1, 1.5, -1.5, -0.7])
    s, r, t = 0.2, 0.62, 0.82
    at = {time: (1 - time) * data + time * noise for time in (0.0, s, r, t, 1.0)}
    y_r, y_t = at[s] + np.array([0.04, -0.05, 0.05, -0.03]), at[s] + np.array([0.3, -0.3, 0.28, -0.3])
    figure, (axes, matrix) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 1), layout="constrained")
    for x, n in zip(data, noise, strict=True):
        axes.plot([0, 1], [x, n], color=GREY, linewidth=0.8, linestyle=":", zorder=1)
    for time, y, color in ((t, y_t, BLUE), (r, y_r, ORANGE)):
        for start, end in zip(at[time], y, strict=True):
            arrow = {"arrowstyle": "->", "color": color, "linewidth": 1.3, "shrinkA": 4, "shrinkB": 4}
            bend = {"connectionstyle": f"arc3,rad={0.12 if color == BLUE else -0.12}"}
            axes.annotate("", (s, end), (time, start), arrowprops=arrow | bend)
        axes.scatter([time] * 4, at[time], color=color, s=40, zorder=3)
        axes.scatter([s] * 4, y, color=color, s=60, zorder=4, marker="D" if color == BLUE else "o", edgecolor="white")
    axes.scatter([0] * 4, data, color="black", s=40, zorder=3)
    axes.scatter([1] * 4, noise, color=GREY, s=40, zorder=3)
    names = {0.0: "images x", s: "s\n$y_r$ (circles), $y_t$ (diamonds)", r: "r\n$x_r$", t: "t\n$x_t$", 1.0: "noise"}
    axes.set_xticks(list(names), list(names.values()))
    axes.set_yticks([])
    axes.set_xlim(-0.06, 1.06)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Both sets jump to the same time s; only the jump from t learns", fontsize=11)
    both = np.concatenate([y_t, y_r])
    gram = np.exp(-2.5 * np.abs(both[:, None] - both[None]))
    sign = np.ones((8, 8))
    sign[:4, 4:] = sign[4:, :4] = -1
    matrix.imshow(sign * gram, cmap="RdBu", vmin=-1.1, vmax=1.1)
    matrix.set_xticks([1.5, 5.5], ["$y_t$", "$y_r$"])
    matrix.set_yticks([1.5, 5.5], ["$y_t$", "$y_r$"])
    matrix.tick_params(length=0)
    matrix.set_title("kernel of all pairs;\nits signed mean is the loss", fontsize=11)
    figure.savefig(IMAGES / "idea.png", dpi=110, facecolor="white")


def digits(checkpoint: str, steps: tuple[int, ...] = (1, 2, 4, 8), rows: int = 4, scale: int = 3) -> None:
    """The same 10 x 4 seeds in 1, 2, 4 and 8 steps, one call of the network a frame."""
    flow_map = imm.load(checkpoint)
    labels = torch.arange(10).repeat(rows)
    start = imm.sampling.initial_state(flow_map, range(len(labels)), (1, 16, 16))
    states = {}
    for count in steps:
        times = imm.sampling.time_grid(flow_map, count)
        states[count] = [start]
        for index in range(count):
            with torch.no_grad():
                states[count].append(flow_map(states[count][-1], times[index], times[index + 1], labels))
    font = ImageFont.load_default(15)
    frames = []
    for call in range(max(steps) + 1):
        panels = []
        for count in steps:
            x = states[count][min(call, count)].clamp(-1, 1)[:, 0]
            height, width = x.shape[1:]
            picture = x.unflatten(0, (rows, 10)).permute(0, 2, 1, 3).reshape(rows * height, 10 * width)
            panel = Image.new("L", (10 * width * scale // 2 + 10, rows * height * scale // 2 + 26), 255)
            pixels = Image.fromarray(((picture + 1) * 127.5).round().byte().numpy())
            panel.paste(pixels.resize((10 * width * scale // 2, rows * height * scale // 2), Image.Resampling.BICUBIC), (5, 24))
            done = "" if call < count else " (done)"
            ImageDraw.Draw(panel).text((5, 3), f"{count} step{'s' if count > 1 else ''}{done}", fill=0, font=font)
            panels.append(panel)
        frame = Image.new("L", (2 * panels[0].width, 2 * panels[0].height), 255)
        for index, panel in enumerate(panels):
            frame.paste(panel, (panel.width * (index % 2), panel.height * (index // 2)))
        frames.append(frame)
    durations = [900, *[450] * (len(frames) - 2), 2500]
    frames[0].save(IMAGES / "digits.gif", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)


def performance(results: str) -> None:
    """The picture of a results folder of imm bench; its table goes between the page's two marks."""
    sys.path.insert(0, str(IMAGES.parents[1] / "bench"))
    from harness import plots, rows

    found = rows.read(Path(results) / "rows.csv")
    plots.overview(found, IMAGES / "performance.png")
    page = IMAGES.parent / "internals" / "performance.md"
    before, mark, rest = page.read_text().partition("<!-- imm bench: overview -->\n")
    _, _, after = rest.partition(mark)
    page.write_text(f"{before}{mark}\n{rows.overview(found)}\n\n{mark}{after}")


if __name__ == "__main__":
    {"idea": idea, "digits": digits, "performance": performance}[sys.argv[1]](*sys.argv[2:])
