"""The README's curve: reinforcement in the tiny world, seeds 0, 1 and 2 of `make demo`.

python recipes/figure.py docs/curves.png
"""

import json
import sys
from pathlib import Path

PANELS = [
    ("reward/mean", "reward"),
    ("eval/accuracy", "held-out accuracy"),
    ("eval/consistency", "same verdict in both orders"),
]


def main(out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for seed, run in enumerate(("runs/toy", "runs/toy-1", "runs/toy-2")):
        rows = [json.loads(line) for line in Path(run, "grpo", "metrics.jsonl").read_text().splitlines()]
        for axis, (name, title) in zip(axes, PANELS, strict=True):
            points = [(row["step"], row[name]) for row in rows if name in row]
            if name == "reward/mean":  # 128 rollouts a round are noisy; show the mean of eight rounds
                last = [[value for _, value in points[max(0, i - 7) : i + 1]] for i in range(len(points))]
                points = [(step, sum(values) / len(values)) for (step, _), values in zip(points, last, strict=True)]
            mark = "o" if "eval" in name else None
            axis.plot(*zip(*points, strict=True), marker=mark, markersize=3, label=f"seed {seed}")
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("round of 16 pairs x 8 responses", fontsize=8)
            axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
