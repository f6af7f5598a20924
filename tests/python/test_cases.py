"""The committed golden cases are sound: an independent float64 model passes compare.py on each, a faulty one on none.

This judges the data and the arbiter, not an engine; engines are judged by the Rust tests and tools/golden_matrix.sh.
"""
import pathlib
import subprocess
import sys

import pytest
from safetensors.numpy import load_file, save_file

CASES = pathlib.Path(__file__).resolve().parents[1] / "cases"
sys.path.insert(0, str(CASES))

import faults  # noqa: E402  (the path above comes first)
import reference  # noqa: E402


def judge(model_class, case, folder):
    """compare.py on the outputs of this model: exit status and table."""
    expected = load_file(CASES / case / "expected.safetensors")
    out, _ = reference.run(model_class(*reference.read_checkpoint(CASES / case)), expected)
    save_file(out, folder / "out.safetensors")
    command = [sys.executable, CASES / "compare.py", CASES / case, folder / "out.safetensors", "--complete"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("case", faults.CASES)
def test_reference_passes(case, tmp_path):
    status, table = judge(reference.Model, case, tmp_path)
    assert status == 0, table
    assert table.rstrip().splitlines()[-1].startswith("PASS"), table


@pytest.mark.parametrize("fault", [*faults.EVERYWHERE, *faults.ONLY_IN], ids=lambda fault: fault.__name__)
def test_planted_fault_fails(fault, tmp_path):
    status, table = judge(fault, faults.ONLY_IN.get(fault, "first_mla"), tmp_path)
    assert status == 1, table
    assert "rel L2 >" in table, table


@pytest.mark.parametrize("case", faults.CASES)
def test_no_near_ties(case):
    """An engine within the limits chooses the same tokens: margins exceed twice the largest error allowed per logit."""
    greedy, prompt = reference.smallest_margins(load_file(CASES / case / "expected.safetensors"))
    assert min(greedy, prompt) > 2 * 1e-4
