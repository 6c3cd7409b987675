"""A roofline of one run: ours and the fastest peer of every row, under what the machine reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Point = tuple[float, float]  # flops per byte, TFLOP/s


def points(found: dict[str, Any]) -> dict[str, dict[str, list[Point]]]:
    """Section -> "ours" and "best peer" -> points; rows without flops, and lines that disagree, have none."""
    drawn: dict[str, dict[str, list[Point]]] = {}
    for row in found["rows"]:
        right = [line for line in row["lines"] if "us" in line and line["agrees"]]
        if not row["flops"]:
            continue
        for kind in ("ours", "best peer"):
            lines = [line for line in right if (line["of"].partition("-")[0] == "ours") == (kind == "ours")]
            if lines:
                fastest = max(line["tflops"] for line in lines)
                of_section = drawn.setdefault(row["section"], {"ours": [], "best peer": []})
                of_section[kind].append((row["flops"] / row["bytes"], fastest))
    return drawn


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    copy, matmul = found["ceilings"]["copy_gbps"] / 1e3, found["ceilings"]["matmul_tflops"]
    intensities = [2.0**power for power in range(16)]
    axes.plot(intensities, [min(copy * x, matmul) for x in intensities], color="black", linewidth=1)
    axes.annotate(f"copy {copy * 1e3:.0f} GB/s", (4, copy * 4), rotation=35, va="bottom")
    axes.annotate(f"bf16 matmul {matmul:.0f} TFLOP/s", (intensities[-1], matmul), ha="right", va="bottom")
    colors = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    for color, (section, kinds) in zip(colors, points(found).items(), strict=False):
        for kind, marker in (("ours", "o"), ("best peer", "x")):
            xs, ys = [x for x, _ in kinds[kind]], [y for _, y in kinds[kind]]
            axes.scatter(xs, ys, marker=marker, color=color, label=f"{section}, {kind}", s=28)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("flops per byte of keys and values")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{found['environment']['device']}, {found['environment']['date']}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
