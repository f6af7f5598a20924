"""The program's metrics, read out of its source, and where dashboard and alerts use them: prints the table of
deploy/telemetry.md.
    python3 tests/tools/metrics.py
"""
import collections
import json
import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CRATES = ROOT / "crates"
FILES = ROOT / "helm" / "perigee" / "files"
# Who registers which, by the names of the constants in the table.
ROLES = {"router": CRATES / "perigee-router" / "src" / "metrics.rs", "replica": CRATES / "perigee-worker" / "src" / "metrics.rs"}

Metric = collections.namedtuple("Metric", "name kind help labels roles")


def metrics():
    """All of them, in the order of the source."""
    text = (CRATES / "perigee-telemetry" / "src" / "metrics.rs").read_text().split("pub const ALL")[0]
    registered = {role: set(re.findall(r"&table::(\w+)\)", path.read_text())) for role, path in ROLES.items()}
    found = []
    for constant, definition in re.findall(r"pub const (\w+): Metric = (.*?);\n", text, re.DOTALL):
        name, *rest = re.findall(r'"(.*?)"', definition)
        labels = {label: re.findall(r'"(\w+)"', values) for label, values in re.findall(r'\("(\w+)", &\[(.*?)\]\)', definition)}
        kind = re.search(r"MetricKind::(\w+)", definition).group(1).lower()
        explained = next(words for words in rest if " " in words)
        found.append(Metric(name, kind, explained, labels, [role for role in ROLES if constant in registered[role]]))
    return found


def series():
    """Labels and their values (None: any) by the name of each series that Prometheus stores."""
    stored = {}
    for metric in metrics():
        labels = {label: set(values) for label, values in metric.labels.items()}
        if metric.kind == "histogram":
            stored[f"{metric.name}_bucket"] = {**labels, "le": None}
            stored.update({f"{metric.name}_{part}": labels for part in ("sum", "count")})
        else:
            stored[metric.name] = labels
    return stored


def expressions():
    """Where a query is (alert or dashboard), its title, and the query."""
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield "alert", rule["alert"], rule["expr"]
    for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            yield "dashboard", panel["title"], target["expr"]


def uses(metric, place):
    """Titles of the queries of a place that ask for a metric."""
    asks = re.compile(rf"\b{metric.name}(_bucket|_sum|_count)?\b")
    return list(dict.fromkeys(title for where, title, query in expressions() if where == place and asks.search(query)))


def table():
    """Rows of Markdown."""
    rows = ["| metric | kind | labels | meaning | of | dashboard | alerts |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for metric in metrics():
        labels = "; ".join(f"{label}: {', '.join(values)}" for label, values in metric.labels.items())
        columns = [f"`{metric.name}`", metric.kind, labels, metric.help, ", ".join(metric.roles),
                   ", ".join(uses(metric, "dashboard")), ", ".join(uses(metric, "alert"))]
        rows.append(f"| {' | '.join(columns)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
