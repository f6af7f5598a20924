"""The licence check reads SPDX expressions as written: what it lets through can really be met with allowed licences."""
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tools"))

from licences import allowed_by  # noqa: E402  (the path above comes first)

ALLOW = {"MIT", "Apache-2.0", "ISC", "Apache-2.0 WITH LLVM-exception"}


@pytest.mark.parametrize("expression", [
    "MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "(MIT OR GPL-3.0) AND ISC", "Apache-2.0 WITH LLVM-exception OR GPL-3.0",
    "MIT AND (GPL-3.0 OR ISC)", "GPL-3.0 AND ISC OR MIT",
])
def test_allowed(expression):
    assert allowed_by(expression, ALLOW)


@pytest.mark.parametrize("expression", [
    "", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR GPL-3.0) AND GPL-3.0", "MIT WITH LLVM-exception",
    "GPL-3.0 OR ISC AND GPL-2.0", "MIT MIT", "(MIT", "MIT OR",
])
def test_refused(expression):
    assert not allowed_by(expression, ALLOW)
