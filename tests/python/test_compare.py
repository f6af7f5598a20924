"""compare.py gives the verdicts of cases/verdicts.json: outputs of `tiny` with one edit each.

A Rust test holds the engine's own comparison (crates/perigee-testkit) to the same file.
"""
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

CASES = pathlib.Path(__file__).resolve().parents[1] / "cases"
VERDICTS = json.loads((CASES / "verdicts.json").read_text())


def edited(out, verdict):
    name = verdict.get("tensor")
    if verdict.get("missing"):
        return {other: tensor for other, tensor in out.items() if other != name}
    if name is None:
        return out
    tensor = out[name][:verdict.get("rows")].copy()
    row = slice(None) if "row" not in verdict else verdict["row"]
    place = (row, verdict["column"]) if "column" in verdict else row
    if "scale" in verdict:
        tensor[row] = tensor[row].astype(np.float64) * verdict["scale"]
    if "add" in verdict:
        tensor[place] += np.asarray(verdict["add"], dtype=tensor.dtype)
    if verdict.get("not_a_number"):
        tensor[place] = np.nan
    if "choose" in verdict:
        tensor[row, verdict["choose"]] = tensor[row].max() * np.float32(1.001)
    if verdict.get("reverse"):
        tensor = np.ascontiguousarray(tensor[:, ::-1])
    return out | {name: tensor}


@pytest.mark.parametrize("verdict", VERDICTS, ids=lambda verdict: verdict["what"])
def test_verdict(verdict, tmp_path):
    out = edited(load_file(CASES / "tiny" / "expected.safetensors"), verdict)
    save_file(out, tmp_path / "out.safetensors")
    command = [sys.executable, CASES / "compare.py", CASES / "tiny", tmp_path / "out.safetensors",
               "--dtype", verdict["dtype"], "--complete"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == verdict["passes"], result.stdout + result.stderr
