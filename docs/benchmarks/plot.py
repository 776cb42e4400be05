"""Draws kernels.png from kernels.json: TFLOP/s by sequence length, causal, ours beside the peers of the same run.

python docs/benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
NAMES = {"ringflash hopper": "ringflash", "cuDNN": "cuDNN", "FlashAttention-3": "FA3", "FlashAttention-4": "FA4"}
LENGTHS = (2048, 8192, 16384, 32768)


def main() -> None:
    """One panel for each head dimension and pass."""
    rows = json.loads((HERE / "kernels.json").read_text())["rows"]
    speeds = {(row["implementation"], row["case"], row["direction"]): row["tflops"] for row in rows}
    figure, panels = plt.subplots(2, 3, figsize=(12, 6.5), sharex=True)
    for column, dim in enumerate((64, 128, 256)):
        for line, (direction, name) in enumerate({"fwd": "forward", "bwd": "backward"}.items()):
            panel = panels[line][column]
            for colour, (implementation, label) in enumerate(NAMES.items()):
                found = [speeds.get((implementation, f"D{dim} causal {n}", direction)) for n in LENGTHS]
                if all(found):
                    width = 2.5 if implementation == "ringflash hopper" else 1.2
                    panel.plot(range(len(LENGTHS)), found, f"C{colour}o-", linewidth=width, label=label)
            panel.set_title(f"head dimension {dim}, {name}")
            panel.set_xticks(range(len(LENGTHS)), [f"{n // 1024}K" for n in LENGTHS])
            panel.set_ylim(0, 1.05 * panel.dataLim.ymax)
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("TFLOP/s")
    panels[1][0].set_ylabel("TFLOP/s")
    panels[0][1].legend(loc="lower right")
    figure.suptitle("Causal attention of 32,768 tokens on one H100, bfloat16, by sequence length")
    figure.tight_layout()
    figure.savefig(HERE / "kernels.png", dpi=90)


if __name__ == "__main__":
    main()
