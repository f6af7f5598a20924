"""The committed vectors of perigee-text's tiktoken tests are what the `tiktoken` package says."""
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/tools"))

import tiktoken_vectors


def test_committed_vectors_are_those_of_the_package():
    for file, content in tiktoken_vectors.files().items():
        assert (ROOT / "crates/perigee-text/tests/tiktoken" / file).read_text() == content, file
