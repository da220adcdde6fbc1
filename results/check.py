"""Check that the files of this folder agree with each other.

From the repository's root: `python -m results.check`. Prints one line for each problem and exits with code 1 if there
is one. It takes seconds, because it trains nothing.
"""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

from results import fill, protocol

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_RUN = re.compile(r"<!-- not run: (.*) -->")  # in README.md, before the sentence that says it


def check_pages(pages):
    """The tables of the Markdown files are up to date."""
    for page in pages:
        try:
            if not fill.is_filled(page):
                yield f"{page}: its tables are out of date; run python -m results.fill"
        except (OSError, ValueError) as error:
            yield f"{page}: {error}"


def check_experiments(root, names):
    """Each experiment of run_all.sh has a result, or README.md names it as not run; there are no other results."""
    said = NOT_RUN.search((root / "README.md").read_text(encoding="utf-8"))
    not_run = set(said[1].split()) if said else set()
    for name in sorted(names):
        has_result = (root / name / "summary.csv").exists() or (root / f"{name}.csv").exists()
        if not has_result and name not in not_run:
            yield f"{root / name}: run_all.sh makes it, but there is no summary.csv, and README.md does not say so"
        if has_result and name in not_run:
            yield f"{root / name}: README.md says that it was not run"
    for name in sorted(not_run - names):
        yield f"{root / 'README.md'}: {name} is no experiment of run_all.sh"
    for path in sorted(root.glob("**/summary.csv")):
        name = path.parent.relative_to(root).as_posix().removesuffix("/tuning")
        if name not in names:
            yield f"{path}: no experiment of run_all.sh makes it"


def check_figures(root):
    """Each figure that a page shows is there, and there is no other."""
    shown, drawn = set(fill.figures(root)), set(root.glob("**/*.png"))
    for path in sorted(shown - drawn):
        yield f"{path}: there is no such figure; run python -m results.draw"
    for path in sorted(drawn - shown):
        yield f"{path}: no page shows it"


def list_experiments(script):
    """The names of run_all.sh's experiments, as a set."""
    listed = subprocess.run(["bash", script, "--list"], check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def check_protocol():
    """Every configuration and seed is the protocol's, and what is computed from the summaries is up to date."""
    for name in protocol.tested():
        yield from check_runs(name)
    for name, text in protocol.tables().items():
        path = protocol.ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield f"{path}: out of date; run python -m results.protocol"


def check_runs(name):
    """The tuning runs are those of the protocol's configurations, and the test runs those of the chosen ones."""
    family, tried = protocol.FAMILIES[name], protocol.tried(name)
    tuning, tested = protocol.summary_of(name, "tuning"), protocol.summary_of(name)
    expected = {f"{arm}{n}": (arm, sizes) for arm in family.arms if arm != "E" for n, sizes in enumerate(tried, 1)}
    if set(tuning) != set(expected):
        yield f"{name}/tuning: it has not the protocol's configurations"
    tuning_seeds = protocol.seeds_of(family.tuning_seeds)
    for label in sorted(set(tuning) & set(expected)):
        yield from check_line(f"{name}/tuning/{label}", tuning[label], *expected[label], tuning_seeds)
    seeds = protocol.seeds_of(protocol.test_seeds(name))
    if list(tested) != list(family.arms):
        yield f"{name}: it has the arms {', '.join(tested)}"
    for arm, found in tested.items():
        yield from check_line(f"{name}/{arm}", found, arm, protocol.sizes_of(name, arm), seeds)


def check_line(where, found, arm, sizes, seeds):
    """A line's runs have these seeds and step sizes, where the arm has them."""
    if found["seed"] != seeds:
        yield f"{where}: its seeds are {found['seed']}"
    alpha, beta, delta = sizes
    expected = {"beta": beta}
    if arm in protocol.ADAPTING:
        expected["alpha"] = alpha
    if arm in protocol.DIRECTED:
        expected["delta"] = delta
    for key, value in expected.items():
        if set(found[key]) != {value}:
            yield f"{where}: {key} is {set(found[key])}, by the protocol {value:g}"


def problems():
    """All checks, as lines; from the repository's root."""
    root = Path("results")
    yield from check_pages(fill.PAGES)
    yield from check_experiments(root, list_experiments(root / "run_all.sh"))
    yield from check_figures(root)
    yield from check_protocol()


def main():
    with contextlib.chdir(REPOSITORY):
        lines = list(problems())
    print(*lines, sep="\n", end="\n" * bool(lines))
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
