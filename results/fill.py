"""Fill the tables of Markdown files from summary.csv files, and their tables of flags from run.py's settings.

From the repository's root: `python -m results.fill README.md docs/flags.md results/README.md`. With --check
nothing is written: the command exits with code 1 and names the files whose tables are out of date.

A table stands below a comment that names its columns and its lines. Below it stands how many arms it compares, and over
which epochs and env steps. A line is {name: folder/label}; the folder is
relative to the Markdown file and holds a summary.csv, the label is one of that file's labels:

<!-- report {"columns": ["epochs to convergence"], "lines": {"fomaml": "cartpole-pg/fomaml"}} -->

The table of all flags stands below <!-- flags -->, that of some below <!-- flags alpha inner-steps -->.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from harness import report
from harness.settings import SETTINGS, shown_default
from harness.text import markdown

# The comment, then the table and the line on its arms if they are there, with the empty lines around them.
MARKED_TABLE = re.compile(
    r"(<!-- (?:flags(?P<flags>( [a-z-]+)*)|report (?P<report>.*)) -->)\n*(?:\|.*\n)*\n*(?:Arms compared: .*\n+)?"
)


def read_summary(folder):
    """{label: {column: values of its runs}} of folder/summary.csv."""
    return report.read_summary((folder / "summary.csv").read_text(encoding="utf-8"))


def report_tables(folder):
    """The Markdown tables that folder/report.md should hold."""
    return list(report.tables(read_summary(folder)).values())


def table(columns, lines, root):
    """The Markdown table with these columns, and the line on its arms; lines: {name: folder/label}, folders relative to
    root.

    Raises ValueError naming an unknown label or column.
    """
    rows, arms = [], {}
    for name, place in lines.items():
        folder, label = place.rsplit("/", 1)
        labels = read_summary(root / folder)
        if label not in labels:
            raise ValueError(f"{folder}/summary.csv has no label {label!r}; it has {', '.join(labels)}")
        cells = report.cells(name, label, labels)
        if unknown := [column for column in columns if column not in cells]:
            raise ValueError(f"unknown column {unknown[0]!r}; there are {', '.join(cells)}")
        arms[name] = labels[label]
        rows.append({column: cells[column] for column in ("algorithm", *columns)})
    return f"{markdown(rows)}\n\n{report.budget(arms)}"


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
        if match["report"] is None:
            return f"{match[1]}\n\n{flag_table(match['flags'].split())}\n\n"
        try:
            wanted = json.loads(match["report"])
            columns, lines = wanted["columns"], wanted["lines"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'expected {{"columns": [..], "lines": {{..}}}} in {match[1][:60]} ..') from error
        # The empty line at the end keeps the next paragraph from becoming a row of the table.
        return f"{match[1]}\n\n{table(columns, lines, path.parent)}\n\n"

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
    parser.add_argument("files", nargs="+", metavar="FILE.md")
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
