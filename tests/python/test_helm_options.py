"""What the chart and deploy/ say of the program is true: every option is one of the program's and takes its value, every
metric and label of alerts and dashboard is in the program's table."""
import json
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

for folder in ("helm", "tools"):
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / folder))

import metrics  # noqa: E402  (the paths above come first)
import render  # noqa: E402
from test_serving import ROOT, binary  # noqa: E402

FILES = render.CHART / "files"
# Labels that Prometheus and the operator put on every series.
TARGET_LABELS = {"job", "instance", "namespace"}


def check(file):
    return subprocess.run([binary(), "config", "check", file], capture_output=True, text=True, check=False)


def commands(values):
    """Tables of a configuration file for what the containers are told: command and options."""
    for document in render.documents(render.render(values)):
        spec = document.get("spec", {})
        template = spec.get("template") or spec.get("leaderWorkerTemplate", {}).get("workerTemplate") or {}
        for container in template.get("spec", {}).get("containers", []):
            if container["command"] == ["perigee"]:
                yield container["args"][0], container["args"][1:]
            elif container["command"] == ["perigee-ranks"]:
                yield "worker", [word for word in container["args"][2:] if word != "--"]


@pytest.mark.parametrize("name", render.matrix())
def test_the_program_takes_every_option_of_the_chart(name, tmp_path):
    found = dict(commands(render.matrix()[name]))
    assert set(found) == {"router", "worker"}
    lines = []
    for command, words in found.items():
        lines.append(f"[{command}]")
        for word in words:
            key, equals, value = word.removeprefix("--").partition("=")
            lines.append(f"{key} = {json.dumps(value) if equals else 'true'}")
    file = tmp_path / "options.toml"
    file.write_text("\n".join(lines) + "\n")
    result = check(file)
    assert result.returncode == 0, result.stderr


def test_an_option_that_does_not_exist_would_be_found(tmp_path):
    file = tmp_path / "options.toml"
    file.write_text("[worker]\ntensor-parallel = 2\n")
    assert check(file).returncode != 0


def test_the_program_takes_the_client_options_of_helm_test():
    pod = next(document for document in render.documents(render.render({})) if document["kind"] == "Pod")
    command, *words = pod["spec"]["containers"][0]["args"]
    help_text = subprocess.run([binary(), command, "--help"], capture_output=True, text=True, check=True).stdout
    for word in words:
        assert re.search(rf"{re.escape(word.partition('=')[0])}\b", help_text), word


def test_the_example_configuration_is_good():
    result = check(ROOT / "deploy" / "config" / "perigee.toml")
    assert result.returncode == 0, result.stderr


def faults(expression, series):
    """Series, labels and values of a query that the program does not have."""
    found, grouping = [], set(TARGET_LABELS)
    for name, matchers in re.findall(r"([A-Za-z_]\w*)\s*(?:\{(.*?)\})?", expression):
        if not name.startswith("perigee_"):
            continue
        if name not in series:
            found.append(name)
            continue
        grouping |= set(series[name])
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"(.*?)"', matchers):
            values = series[name].get(label)
            if label not in series[name] and label not in TARGET_LABELS:
                found.append(f"{name}{{{label}}}")
            elif values and operator in ("=", "!=") and value not in values:
                found.append(f'{name}{{{label}="{value}"}}')
    for labels in re.findall(r"\b(?:by|on)\s*\((.*?)\)", expression):
        found.extend(label for label in re.findall(r"\w+", labels) if label not in grouping)
    return found


def test_every_query_asks_for_what_the_program_measures():
    series = metrics.series()
    asked = [(title, expression) for _, title, expression in metrics.expressions()]
    assert len(asked) > 25
    for title, expression in asked:
        assert faults(expression, series) == [], title
        assert "perigee_" in expression or title == "PerigeeTargetDown"


def test_every_metric_is_on_the_dashboard_or_in_an_alert():
    families = metrics.metrics()
    assert len(families) >= 15
    places = ("alert", "dashboard")
    assert [metric.name for metric in families if not any(metrics.uses(metric, place) for place in places)] == []


@pytest.mark.parametrize("expression", [
    "rate(perigee_steps_total[5m])", 'perigee_state_slots{sort="free"}', 'perigee_state_slots{kind="used"}',
    "sum by (rank) (perigee_requests_running)", "perigee_ttft_seconds > 1",
])
def test_a_query_for_what_is_not_there_would_be_found(expression):
    assert faults(expression, metrics.series())


def test_alerts_point_into_the_runbook():
    headings = re.findall(r"^## (.*)$", (ROOT / "deploy" / "runbook.md").read_text(), re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}
    rules = yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["annotations"]["runbook"] for rule in rules} <= anchors
