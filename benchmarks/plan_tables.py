"""What do a 1B, an 8B and a 70B GPT need on 16 to 4,096 chips?

    python benchmarks/plan_tables.py [NAME ...]

Compiles each row with the real compiler (FNML_TPU_PYTHON, FNML_CUDA_PYTHON) and prints docs/plan.md's
table. On two CPU cores a row takes up to six minutes; what was compiled is kept in the user's cache folder.
"""

import sys
from pathlib import Path

from fnml.plan import parse_target
from fnml.recipes import Planner, gpt_config, gpt_size, with_run

ROWS = (
    ("gpt-1b", "v5e:4x4", "data=16", "fsdp", 64),
    ("gpt-1b", "h100:2x8", "data=16", "fsdp", 64),
    ("gpt-1b", "v6e:16x16", "data=256", "fsdp", 512),
    ("gpt-8b", "v5e:4x4", "data=16", "fsdp", 16),
    ("gpt-8b", "v5p:4x4x4", "data=64", "fsdp", 128),
    ("gpt-8b", "h100:8x8", "data=64", "fsdp", 128),
    ("gpt-70b", "v5p:4x4x4", "data=64", "fsdp", 64),
    ("gpt-70b", "h100:8x8", "data=64", "fsdp", 64),
    ("gpt-70b", "h200:8x8", "data=64", "fsdp", 64),
    ("gpt-70b", "v5e:16x16", "data=32,model=8", "fsdp+tensor", 32),
    ("gpt-70b", "v5p:16x16x16", "data=512,model=8", "fsdp+tensor", 1024),
)
COLUMNS = (
    *("model", "target (chips)", "mesh", "rules", "sequences", "memory", "activations", "limit"),
    *("products", "main memory", "links", "network", "step at best", "utilisation at most"),
)


def row(name: str, target: str, mesh: str, rules: str, batch: int, cache: Path) -> list[str]:
    """Plan one row; times are in milliseconds, sizes in GiB."""
    config = with_run(gpt_config(name), batch_size=batch, mesh=mesh, rules=rules)
    plan = Planner(gpt_size, parse_target(target), cache=cache)(config)
    cells = [name, f"{target} ({plan.target.chips:,})", mesh, rules, f"{batch:,}"]
    if plan.refused:
        return [*cells, f"refused: {plan.missing / 2**30:.1f} too much", *[""] * 8]
    memory = plan.memory
    fits = "" if plan.fits else " (too much)"
    times = [f"{1e3 * seconds:,.0f}" if seconds else "" for seconds in plan.roofline]
    return [
        *cells,
        f"{memory.total / 2**30:.1f}{fits}",
        f"{memory.activations / 2**30:.1f}",
        f"{plan.limit / 2**30:.1f}",
        *times,
        f"{1e3 * plan.seconds:,.0f} ({plan.roofline.bound})",
        f"{plan.utilisation:.0%}",
    ]


def main(names: list[str]) -> None:
    """Print the table, a row when it is there."""
    cache = Path.home() / ".cache" / "fnml" / "plan"
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for given in ROWS:
        if not names or given[0] in names:
            print(f"| {' | '.join(row(*given, cache))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
