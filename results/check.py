"""Check that the files of this folder agree with each other.

From the repository's root: `python -m results.check`. Prints one line for each problem and exits with code 1 if there
is one. It takes seconds, because it trains nothing.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from harness.text import span
from results import fill, steps

REPOSITORY = Path(__file__).resolve().parent.parent
# As in run_all.sh: 12 values of β without the δ-step; 5 values of β times 3 of δ with it; 5 seeds of each.
GRID_CELLS = {"fomaml": 12, "directed-fomaml": 15}
GRID_SEEDS = 5


def check_pages(pages):
    """The tables of the Markdown files are up to date."""
    for page in pages:
        try:
            if not fill.is_filled(page):
                yield f"{page}: its tables are out of date; run python -m results.fill {page}"
        except (OSError, ValueError) as error:
            yield f"{page}: {error}"


def check_reports(root):
    """Each experiment with a report.md or a summary.csv of its own has both, and they show the same numbers."""
    folders = {path.parent for name in ("report.md", "summary.csv") for path in root.glob(f"*/{name}")}
    for folder in sorted(folders):
        try:
            text = (folder / "report.md").read_text(encoding="utf-8")
            if not all(table in text for table in fill.report_tables(folder)):
                yield f"{folder / 'report.md'}: its tables differ from those of summary.csv"
        except OSError as error:
            yield f"{folder}: {error}"


def check_experiments(root, names):
    """Each experiment of run_all.sh has a result, a folder with a summary.csv or a .md file; there are no others."""
    for name in sorted(names):
        if not (root / name / "summary.csv").exists() and not (root / f"{name}.md").exists():
            yield f"{root / name}: run_all.sh makes it, but there is no summary.csv"
    for path in sorted(root.glob("**/summary.csv")):
        if path.parent.relative_to(root).as_posix() not in names:
            yield f"{path}: no experiment of run_all.sh makes it"


def list_experiments(script):
    """The names of run_all.sh's experiments, as a set."""
    listed = subprocess.run(["bash", script, "--list"], check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def check_grid(folder):
    """A grid of step sizes is complete."""
    cells = steps.grid_cells(folder)
    for algo, expected in GRID_CELLS.items():
        count = sum(cell.algo == algo for cell in cells)
        if count != expected:
            yield f"{folder}: {count} cells of {algo}, expected {expected}"
    for cell in cells:
        if len(cell.env_steps) != GRID_SEEDS:
            where = f"{cell.algo}, β = {cell.beta:g}, δ = {cell.delta:g}"
            yield f"{folder}: {len(cell.env_steps)} runs of {where}, expected {GRID_SEEDS}"


def check_tuned(grid, tuned):
    """The best cell of a grid, with and without the δ-step, is the one that was run again on other seeds."""
    cells = steps.grid_cells(grid)
    for algo, arm in (("fomaml", "undirected"), ("directed-fomaml", "directed")):
        try:
            runs, best = fill.read_summary(tuned / arm)[algo], steps.best(cells, algo)
        except (OSError, KeyError, ValueError) as error:
            yield f"{tuned / arm}: {error}"
            continue
        if set(zip(runs["beta"], runs["delta"], strict=True)) != {(best.beta, best.delta)}:
            ran = f"β = {span(runs['beta'])}, δ = {span(runs['delta'])}"
            yield f"{tuned / arm}: {ran}, but the grid's best cell is β = {best.beta:g}, δ = {best.delta:g}"


def problems():
    """All checks, as lines; from the repository's root."""
    root = Path("results")
    yield from check_pages([Path("README.md"), Path("docs/flags.md"), root / "README.md"])
    yield from check_reports(root)
    yield from check_experiments(root, list_experiments(root / "run_all.sh"))
    for env in steps.ENVS:
        yield from check_grid(root / "grid" / env)
        yield from check_tuned(root / "grid" / env, root / "tuned" / env)


def main():
    with contextlib.chdir(REPOSITORY):
        lines = list(problems())
    print(*lines, sep="\n", end="\n" * bool(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
