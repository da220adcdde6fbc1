"""Numbers and names as tables, figures and messages show them."""

import os
import shlex


def printable(text):
    """The text on one line: line breaks, control characters and such become backslash escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(word):
    """A command's word as a shell takes it; only bash and zsh where it is not printable."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(f"\\x{byte:02x}" for byte in os.fsencode(word)) + "'"


def setting_text(value):
    """A setting's value; of a long list its beginning."""
    if isinstance(value, list):
        text = " ".join(map(setting_text, value))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:56]} .."


def thousands(x):
    """Three digits, with k or M."""
    if x == float("inf"):
        return "∞"
    x = float(f"{x:.3g}")
    if abs(x) >= 1e6:
        return f"{x / 1e6:.3g}M"
    if abs(x) >= 1e3:
        return f"{x / 1e3:.3g}k"
    return f"{x:g}"


def span(values):
    """The lowest and the highest, or the one that all are."""
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def counted(number, noun):
    """1 run, 2 runs."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def markdown(lines):
    """A table of lines, dicts with the same columns."""
    rows = [list(lines[0]), ["---"] * len(lines[0])]
    rows += [[cell.replace("|", "\\|") for cell in line.values()] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
