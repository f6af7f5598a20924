"""Hold the licence of every Rust dependency to the list in deny.toml.

Reads `cargo metadata`, so it needs neither cargo-deny nor a network. It trusts the licence field that a crate declares;
cargo-deny also reads the licence files, advisories and duplicate versions.
"""
import json
import pathlib
import re
import subprocess
import sys
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def allowed_by(expression, allow):
    """Whether an SPDX expression can be met with licences of `allow`. AND binds tighter than OR; "/" is an old OR."""
    tokens = re.findall(r"[()]|[^\s()]+", expression.replace("/", " OR "))

    def either():
        met = both()
        while tokens[:1] == ["OR"]:
            tokens.pop(0)
            met = both() or met
        return met

    def both():
        met = single()
        while tokens[:1] == ["AND"]:
            tokens.pop(0)
            met = single() and met
        return met

    def single():
        token = tokens.pop(0)
        if token == "(":
            met = either()
            if tokens.pop(0) != ")":
                raise ValueError("expected )")
            return met
        if tokens[:1] == ["WITH"]:
            token = " ".join([token, *tokens[:2]])
            del tokens[:2]
        return token in allow

    try:
        met = either()
    except (IndexError, ValueError):
        return False
    return met and not tokens


def main():
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    allow, targets = set(rules["licenses"]["allow"]), rules["graph"]["targets"]
    command = ["cargo", "metadata", "--format-version", "1", "--all-features", "--locked",
               *(f"--filter-platform={target}" for target in targets)]
    result = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)} failed with status {result.returncode}")
    foreign = [package for package in json.loads(result.stdout)["packages"] if package["source"] is not None]
    refused = [package for package in foreign if not allowed_by(package["license"] or "", allow)]
    for package in refused:
        print(f"{package['name']} {package['version']}: licence {package['license']!r} is not allowed by deny.toml")
    print(f"{len(foreign)} dependencies, {len(refused)} with a licence outside deny.toml")
    sys.exit(bool(refused))


if __name__ == "__main__":
    main()
