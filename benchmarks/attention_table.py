"""The benchmark's rows as text."""

from __future__ import annotations

from typing import Any

from attention_work import Ceilings

_COLUMNS = ("us", "p10", "p90", "GB/s", "TFLOP/s", "% ceiling", "x best peer", "plan us", "error/bound")
_KEYS = ("us", "p10_us", "p90_us", "gbps", "tflops", "of_ceiling", "times_as_fast_as_best_peer", "plan_us")


def heading(environment: dict[str, Any], ceilings: Ceilings) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rates = f"copy {ceilings.copy_gbps:.0f} GB/s, read {ceilings.read_gbps:.0f} GB/s"
    return f"{environment['device']}\n{versions}\n{rates}, bf16 matmul {ceilings.matmul_tflops:.0f} TFLOP/s"


def table(row: dict[str, Any]) -> str:
    """A row's heading and a line for each implementation; plans made on the host are marked with an h."""
    lines = [_heading(row), f"  {'':18}" + "".join(f"{column:>12}" for column in _COLUMNS)]
    lines += [f"  {line['of']:18}" + _shown(line) for line in row["lines"] if "us" in line]
    gaps: dict[str, list[str]] = {}
    for line in row["lines"]:
        if "us" not in line:
            gaps.setdefault(line["gap"], []).append(line["of"])
    return "\n".join([*lines, *(f"  {', '.join(names)}: {gap}" for gap, names in gaps.items())])


def _heading(row: dict[str, Any]) -> str:
    requests = ", ".join(f"{count} x {new} new of {keys}" for count, new, keys in row["requests"])
    dtype, kv_dtype, page = row["formats"]
    words = f"\n{row['name']}: {requests}; {dtype}, cache {kv_dtype}, page {page}"
    words += f"\n  floor {row['floor_us']:.1f} us ({row['floor_of']})"
    if row["goal"]:
        ((name, value),) = row["goal"].items()
        words += f", goal {'<=' if name == 'us' else '>='} {value:.3g} {name}"
        met = [line["of"] for line in row["lines"] if line.get("meets_goal")]
        words += f": met by {', '.join(met)}" if met else ": not met"
    return f"{words}; {row['seconds']:.1f} s for all of it"


def _shown(line: dict[str, Any]) -> str:
    values = {key: line.get(key) for key in _KEYS}
    values["of_ceiling"] = 100 * line["of_ceiling"]
    cells = [_number(values[key]) for key in _KEYS]
    if "plan_host_us" in line:
        cells[-1] = f"{line['plan_host_us']:.0f} h"
    cells.append(f"{line['error_over_bound']:.2f}")
    notes = [line["note"]] if "note" in line else []
    if "rows" in line:
        notes.append(f"{line['rows_judged']} of {line['rows']} rows judged")
    if not line["agrees"]:
        notes.append(f"disagrees: {line['disagreement']}")
    return "".join(f"{cell:>12}" for cell in cells) + ("  " + "; ".join(notes) if notes else "")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
