"""The page of results, written from what the harness measured."""

from typing import Any

from benchmarks.harness import quartiles

HEAD = """# Benchmark results

`make bench` writes this page. [README.md](README.md) says how to run it and how to read it. Times are medians of several measurements, with the
quartiles in brackets. The implementations of a row took turns, and `ours is faster by` is the median of the ratios within a turn: above 1, ours
is faster. Results of the rows marked `=` were checked to be equal before any was timed. Peak memory counts the tensors that are alive at once
during a call, beyond those alive before it.
"""


NO_GPU = """No row was measured on a GPU yet. [Rows that wait for a GPU](README.md#rows-that-wait-for-a-gpu) lists those that need one, and what the tests count without it.
"""


def page(groups: dict[str, Any]) -> str:
    """The page of all groups, {name: {"title", "about", "where", "works"}}."""
    on_gpu = any(name.endswith(", cuda") for name in groups)
    return "\n".join([HEAD, *([] if on_gpu else [NO_GPU]), *(section(group) for group in groups.values())])


def section(group: dict[str, Any]) -> str:
    """One group: where it was measured, its table, and the peers that are missing."""
    where = group["where"]
    lines = [f"## {group['title']}", "", group["about"], ""] if group["about"] else [f"## {group['title']}", ""]
    lines += [
        f"{where['date']}, {where['device']}, {where['threads']} thread(s), {where['clock']}, {where['repeats']} measurements, "
        f"load average {where['load']} at the start; Python {where['python']}, torch {where['torch']}, lightning {where['lightning']}.",
        "",
        "| work | implementation | | time, ms | peak, MB | ours is faster by |",
        "|---|---|---|---|---|---|",
    ]
    for work in group["works"]:
        lines += rows(work)
    lines.append("")
    missing = {name: why for work in group["works"] for name, why in work["left_out"].items()}
    lines += [f"{name} was left out: {why}." for name, why in sorted(missing.items())] + [""] * bool(missing)
    return "\n".join(lines)


def rows(work: dict[str, Any]) -> list[str]:
    """A line for each implementation."""
    ours = work["checked"][0]
    lines = []
    for name, times in sorted(work["ms"].items(), key=lambda one: one[0] != ours):
        low, middle, high = quartiles(times)
        ratios = [other / own for other, own in zip(times, work["ms"][ours], strict=True)]
        ratio = (
            ""
            if name == ours
            else f"{quartiles(ratios)[1]:.2f} [{quartiles(ratios)[0]:.2f}, {quartiles(ratios)[2]:.2f}]"
        )
        title = f"{name} ({work['versions'][name]})" if name in work["versions"] else name
        same = "=" if name in work["checked"] and len(work["checked"]) > 1 else ""
        peak = f"{work['peak_mb'][name]:.3g}" if name in work["peak_mb"] else ""
        first = work["work"] if name == ours else ""
        lines.append(f"| {first} | {title} | {same} | {middle:.4g} [{low:.4g}, {high:.4g}] | {peak} | {ratio} |")
    return lines
