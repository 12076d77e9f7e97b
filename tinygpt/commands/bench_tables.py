"""What `bench` has measured, as tables for people."""

from __future__ import annotations

from typing import Any

from tinygpt.errors import one_line


def tables(result: dict[str, Any]) -> str:
    """The result as tables."""
    c, machine, results = (result[key] for key in ("conditions", "machine", "results"))
    works = list(next(iter(results.values()), {"works": {}})["works"])
    limits = f"{machine['gb_per_s']:.1f} GB/s", f"{machine['gflop_per_s']:.0f} GFLOP/s"
    speeds, shares = [["tokens/s", *works]], [["of the machine's", *limits, "peak memory"]]
    for name, one in results.items():
        speeds.append([name, *(f"{one['works'][work]['tokens_per_s']:.1f}" for work in works)])
        rates = (f"{one[key]:.1f} ({one[f'{key}_share']:.0%})" for key in machine)
        shares.append([name, *rates, f"{one['peak_memory_bytes'] / 1e9:.2f} GB"])
    ratios = [["times as fast as", *works]]
    for name, peers in result["ratios"].items():
        for peer, ratio in peers.items():
            ratios.append([f"{name} / {peer}", *(f"{ratio[work]:.2f}" for work in works)])
    where = f"{c['threads']} threads of {c['cpu']} (load before: {c['load_before']})"
    parts = [f"{one_line(c['model'])}: {where}, tinygrad on {c['device']}"]
    parts += [_table(rows) for rows in (speeds, shares, ratios) if len(rows) > 1]
    if first := result["first_token"]:
        cold, warm = first["cold_s"], first["warm_s"]
        parts.append(f"a new process's first token: cold caches {cold:.2f} s, warm {warm:.2f} s")
    parts += [f"failed: {name}: {reason}" for name, reason in result["failures"].items()]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line) for line in lines)
