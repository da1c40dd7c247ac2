"""Plots drawn from run logs and result files, all in one style."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib import font_manager

plt.switch_backend("Agg")  # draw into files; no display needed
# After the default font, those of Linux, Windows and macOS that have Chinese, Japanese and Korean: for names of files.
# (Of a collection matplotlib reads the first face: JP in Debian's fonts-noto-cjk, which has the Chinese signs too.)
CJK = ["Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei"]
CJK += ["PingFang SC", "Hiragino Sans GB", "Heiti TC", "Arial Unicode MS"]
if not any(font.name in CJK for font in font_manager.fontManager.ttflist):  # matplotlib's list may be older than a font
    for path in set(font_manager.findSystemFonts()) - {font.fname for font in font_manager.fontManager.ttflist}:
        font_manager.fontManager.addfont(path)
there = {font.name for font in font_manager.fontManager.ttflist}
plt.rcParams["font.family"] = ["DejaVu Sans", *(name for name in CJK if name in there)]


def plot_loss(runs: dict[str, list[dict]], path: str | Path, title: str) -> None:
    """Draw training loss (line) and held-out loss (dots) against optimizer steps into `path`.

    `runs` maps a label to the rows of a metrics.jsonl (`run_log.read_rows`).
    """
    figure, axes = plt.subplots(figsize=(7, 4))
    for label, rows in runs.items():
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held_out = [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]
        (line,) = axes.plot(*zip(*train, strict=True), label=label)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), "o", color=line.get_color())
    dots = "; dots: held out" * (len(axes.lines) > len(runs))
    axes.set(xlabel="optimizer step", ylabel=f"loss (nats a token){dots}", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    save_plot(figure, axes, path)


def plot_bars(values: dict[str, float], path: str | Path, title: str, unit: str) -> None:
    """Draw one horizontal bar a label, with its value written beside it, into `path`."""
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.4 * len(values)))
    bars = axes.barh(list(values), list(values.values()))
    axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{round(value, 6):.3g}", padding=3)
    axes.invert_yaxis()  # first label on top
    axes.margins(x=0.18)
    axes.set(xlabel=unit, title=title)
    save_plot(figure, axes, path)


def save_plot(figure, axes, path: str | Path) -> None:
    """Write one pair of axes, with grid and legend, into `path`."""
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
