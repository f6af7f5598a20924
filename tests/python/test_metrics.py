"""The page on telemetry has the table of metrics that follows from the source, and running processes show what it says."""
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
for folder in ("python/serving", "tools"):
    sys.path.insert(0, str(ROOT / "tests" / folder))

import metrics  # noqa: E402  (the paths above come first)
from cluster import Cluster, get  # noqa: E402
from test_serving import binary  # noqa: E402


def test_the_page_has_the_table_of_the_source_the_dashboard_and_the_alerts():
    assert "\n".join(metrics.table()) in (ROOT / "deploy" / "telemetry.md").read_text()


@pytest.fixture(scope="module")
def pages():
    """The text of /metrics by role."""
    with Cluster(binary(), "--replicas", "1", "--tp", "1", "--threads", "1") as running:
        addresses = {"router": running.info["http"], "replica": running.info["replicas"][0]["http"]}
        yield {role: get(address, "/metrics")[1] for role, address in addresses.items()}


@pytest.mark.parametrize("role", ["router", "replica"])
def test_a_process_shows_the_metrics_of_its_role_and_no_others(pages, role):
    found = dict(re.findall(r"^# TYPE (\S+) (\S+)$", pages[role], re.MULTILINE))
    assert found == {metric.name: metric.kind for metric in metrics.metrics() if role in metric.roles}
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", pages[role], re.MULTILINE))
    assert helps == {metric.name: metric.help for metric in metrics.metrics() if role in metric.roles}


@pytest.mark.parametrize("role", ["router", "replica"])
def test_series_have_the_labels_of_the_table_from_the_start(pages, role):
    known = metrics.series()
    seen = {}
    for name, labels in re.findall(r"^(perigee_\w+)(?:\{(.*?)\})? ", pages[role], re.MULTILINE):
        for label, value in re.findall(r'(\w+)="(.*?)"', labels):
            seen.setdefault((name, label), set()).add(value)
    expected = {(name, label): values for name, labels in known.items() for label, values in labels.items()}
    for key, values in seen.items():
        assert expected[key] is None or expected[key] == values, key
    names = {metric.name for metric in metrics.metrics() if role in metric.roles and metric.labels}
    assert names == {re.sub("_(bucket|sum|count)$", "", name) for name, label in seen if label != "le"}
