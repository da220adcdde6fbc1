"""Words for what went wrong."""

import difflib


def first_line(error):
    return printable(f"{type(error).__name__}: {error}".splitlines()[0])


def printable(text):
    """The text without control characters, which a terminal would obey: they are shown as Python shows them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def hint(word, known, choices):
    """What to say about an unknown word: the nearest known one, or else the choices."""
    close = difflib.get_close_matches(word, known, 1, 0.7) or difflib.get_close_matches(word.lower(), known, 1, 0.7)
    return f"did you mean {close[0]}?" if close else f"choose from {choices}"
