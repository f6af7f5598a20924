"""The King James Version as chapters of plain lines, from Debian's packages bible-kjv and bible-kjv-text, and its three parts.

The program `bible` prints one verse a line, `Ru1:1 Now it came to pass ...`. A chapter is its verses, one a line, without
numbers. Whole books are kept out of training: some to choose the checkpoint by, others to report and to test with.
"""
import re
import subprocess

VALIDATION = ("Jonah", "Mic", "Gal")
HELD_OUT = ("Ruth", "Jas")
VERSE = re.compile(r"([0-9]?[A-Za-z]+)([0-9]+):[0-9]+ (.*)")


def lines(program="bible", folder=None):
    """All verses as the program prints them; `folder` holds bible.data where the package is not installed."""
    where = ["-p", folder] if folder else []
    command = [program, "-f", "-l100000", *where, "gen1:1-rev22:21"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def chapters(verses):
    """Pairs of a book's name and a chapter's text, in order."""
    found = {}
    for verse in verses:
        book, chapter, text = VERSE.fullmatch(verse).groups()
        found.setdefault((book, int(chapter)), []).append(text)
    return [(book, "\n".join(texts) + "\n") for (book, _), texts in found.items()]


def split(pairs):
    """The chapters to train on, to choose by, and to report."""
    return ([text for book, text in pairs if book not in VALIDATION + HELD_OUT],
            [text for book, text in pairs if book in VALIDATION],
            [text for book, text in pairs if book in HELD_OUT])
