"""Fill the tables of Markdown files from CSV files, and their tables of flags from run.py's settings.

From the repository's root: `python -m results.fill`, for all of them or those that are named. With --check nothing is
written: the command exits with code 1 and names the files whose tables are out of date.

A table stands below a comment that names it, `<!-- table NAME -->`. results/tables.json says what is in it; its paths
are relative to results/. There are four kinds:

- {"columns": [..], "lines": {name: "folder/label"}}: columns of a report, of the lines of summary.csv files. Below it
  stands how many arms it compares, and over which epochs and env steps.
- {"csv": file, "where": {column: text}, "columns": {heading: format}}: rows of a CSV file; a format is e.g.
  "{mean:.3g} [{low95:.3g}, {high95:.3g}]".
- {"medians": file, "by": [column, ..]}: medians over seeds of the other columns of a CSV file, with 95% intervals.
- {"claims": [{"says": .., "here": .., "column": .., "pairs": {name: ["folder/label", "folder/label"]}}], "heading":
  "the paper"}: what it says, and how many times as much of a column of summary.csv the first of a pair needs as the
  second, seed by seed.

The table of all flags stands below <!-- flags -->, that of some below <!-- flags alpha inner-steps -->.
"""

import argparse
import json
import math
import re
import sys
from csv import DictReader
from pathlib import Path

import numpy as np

from harness import report
from harness.settings import SETTINGS, shown_default
from harness.text import markdown

ROOT = Path(__file__).parent
PAGES = ("README.md", "docs/flags.md", "results/README.md", "results/arms.md", "results/paper.md")
FIGURE = re.compile(r"!\[[^]]*\]\((.+?\.png)\)")
POWER = 2.8  # 1.96 + 0.84: 80% power at 0.05, two-sided, by a normal's quantiles

# The comment, then the table and the line on its arms if they are there, with the empty lines around them.
MARKED_TABLE = re.compile(
    r"(<!-- (?:flags(?P<flags>( [a-z-]+)*)|table (?P<table>.*)) -->)\n*(?:\|.*\n)*\n*(?:Arms compared: .*\n+)?"
)


def read_summary(folder):
    """{label: {column: values of its runs}} of folder/summary.csv."""
    return report.read_summary((folder / "summary.csv").read_text(encoding="utf-8"))


def line_of(place, root):
    """(label, all labels of its summary) of folder/label. Raises ValueError naming an unknown label."""
    folder, label = place.rsplit("/", 1)
    labels = read_summary(root / folder)
    if label not in labels:
        raise ValueError(f"{folder}/summary.csv has no label {label!r}; it has {', '.join(labels)}")
    return label, labels


def report_table(root, columns, lines):
    """Columns of a report, and the line on its arms. Raises ValueError naming an unknown label or column."""
    rows, arms = [], {}
    for name, place in lines.items():
        label, labels = line_of(place, root)
        cells = report.cells(name, label, labels)
        if unknown := [column for column in columns if column not in cells]:
            raise ValueError(f"unknown column {unknown[0]!r}; there are {', '.join(cells)}")
        arms[name] = labels[label]
        rows.append({column: cells[column] for column in ("algorithm", *columns)})
    return f"{markdown(rows)}\n\n{report.budget(arms)}"


def number(text):
    """The number that a text is, or the text."""
    try:
        return float(text)
    except ValueError:
        return text


def read_rows(path):
    """The rows of a CSV file, a dict each."""
    with open(path, encoding="utf-8", newline="") as lines:
        return list(DictReader(lines))


def csv_table(root, csv, columns, where=None):
    """Rows of a CSV file by formats of their columns. Raises ValueError where a column is missing."""
    rows = [row for row in read_rows(root / csv) if (where or {}).items() <= row.items()]
    try:
        cells = [{key: number(text) for key, text in row.items()} for row in rows]
        shown = [{heading: form.format_map(row) for heading, form in columns.items()} for row in cells]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{csv}: {type(error).__name__}: {error}") from error
    if not shown:
        raise ValueError(f"{csv}: no row has {where}")
    return markdown(shown)


def medians_table(root, medians, by):
    """Medians over seeds of a CSV file's columns, with 95% intervals, for each of the values of the columns `by`."""
    groups = {}
    for row in read_rows(root / medians):
        groups.setdefault(tuple(row[column] for column in by), []).append(row)
    rows = []
    for values, runs in groups.items():
        columns = [column for column in runs[0] if column not in (*by, "seed")]
        shown = {key: report.with_interval([float(run[key]) for run in runs], "{:.2f}".format) for key in columns}
        rows.append(dict(zip(by, values, strict=True)) | shown)
    return markdown(rows)


def claims_table(root, claims, heading):
    """What is said, what we find, the ratios, and what ratio these seeds could show."""
    rows = []
    for claim in claims:
        compared = {name: ratio(root, claim["column"], *pair) for name, pair in claim["pairs"].items()}
        rows.append({
            heading: claim["says"],
            "here": claim["here"],
            "numbers": "; ".join(f"{name} {found}" for name, (found, _) in compared.items()),
            "could be shown": "; ".join(power for _, power in compared.values()),
        })  # fmt: skip
    return markdown(rows)


def ratio(root, column, first, second):
    """How many times as much of a column `first` has as `second`, seed by seed: (median and interval; the factor that
    80% of such experiments would show at 0.05, by the SD of its logarithm, infinite ones left out)."""
    values = []
    for place in (first, second):
        label, labels = line_of(place, root)
        values.append(report.by_seed(labels[label], column))
    theirs, ours = values
    pairs = [(theirs[seed], ours[seed]) for seed in theirs if seed in ours]
    logs = [math.log(a / b) for a, b in pairs if math.isfinite(a + b)]
    power = "–"
    if len(logs) > 2:
        power = f"{math.exp(POWER * np.std(logs, ddof=1) / math.sqrt(len(logs))):.2f}×"
    return report.speed_up(theirs, ours), power


KINDS = {"lines": report_table, "csv": csv_table, "medians": medians_table, "claims": claims_table}


def table(name, root=ROOT):
    """The table of this name in root/tables.json. Raises ValueError for what is wrong with it."""
    tables = json.loads((root / "tables.json").read_text(encoding="utf-8"))
    if name not in tables:
        raise ValueError(f"unknown table {name!r}; there are {', '.join(tables)}")
    spec = tables[name]
    kinds = [kind for kind in KINDS if kind in spec]
    if len(kinds) != 1:
        raise ValueError(f"table {name} has not one of {', '.join(KINDS)}")
    try:
        return KINDS[kinds[0]](root, **spec)
    except (TypeError, KeyError) as error:
        raise ValueError(f"table {name}: {type(error).__name__}: {error}") from error


def figures(root=ROOT):
    """The figures that the pages of this folder show."""
    pages = [page.read_text(encoding="utf-8") for page in root.glob("*.md")]
    return sorted({root / link for page in pages for link in FIGURE.findall(page)})


def report_tables(folder):
    """The Markdown tables that folder/report.md should hold."""
    return list(report.tables(read_summary(folder)).values())


def flag_table(names=()):
    """The Markdown table of run.py's flags, by group, or of some, named without their dashes. Raises ValueError."""
    lines = []
    for title, settings in SETTINGS.items():
        lines.append({"flag": f"**{title}**", "default": "", "what it does": ""})
        for setting in settings:
            text = setting.text
            if not all(choice in text for choice in setting.words):
                text = f"{', '.join(setting.words)}: {text}"
            if setting.needs:
                text += f"; needs {setting.needs.words}"
            cells = f"`{setting.flag}`", shown_default(setting), text
            lines.append(dict(zip(lines[0], cells, strict=True)))
    if names:
        rows = {line["flag"]: line for line in lines}
        if unknown := [name for name in names if f"`--{name}`" not in rows]:
            raise ValueError(f"unknown flag {unknown[0]!r}")
        lines = [rows[f"`--{name}`"] for name in names]
    return markdown(lines)


def filled(path):
    """The Markdown file's text with up-to-date tables. Raises ValueError where a comment cannot be read."""

    def replace(match):
        text = flag_table(match["flags"].split()) if match["table"] is None else table(match["table"], ROOT)
        # The empty line at the end keeps the next paragraph from becoming a row of the table.
        return f"{match[1]}\n\n{text}\n\n"

    return MARKED_TABLE.sub(replace, path.read_text(encoding="utf-8"))


def is_filled(path):
    """Whether the file's tables are up to date."""
    path = Path(path)
    return filled(path) == path.read_text(encoding="utf-8")


def fill(path):
    """Rewrite the Markdown file with up-to-date tables."""
    path = Path(path)
    path.write_text(filled(path), encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m results.fill", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE.md", default=PAGES)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    args = parser.parse_args(arguments)
    out_of_date = False
    for name in args.files:
        try:
            if not args.check:
                fill(name)
            elif not is_filled(name):
                out_of_date = True
                print(f"{name}: its tables are out of date; run python -m results.fill {name}", file=sys.stderr)
        except (OSError, ValueError) as error:
            sys.exit(f"results.fill: {name}: {error}")
    if out_of_date:
        sys.exit(1)


if __name__ == "__main__":
    main()
