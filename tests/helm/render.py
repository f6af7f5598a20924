"""Renders the chart with Helm for each values file of this folder and for the chart's own values-cpu.yaml.

Run as a program, it writes what it renders to expected/, which tests/python/test_helm_chart.py compares with:
    .venv/bin/python tests/helm/render.py
"""
import pathlib

import helm_python as helm
import yaml

HERE = pathlib.Path(__file__).resolve().parent
CHART = HERE.parents[1] / "helm" / "perigee"
EXPECTED = HERE / "expected"
RELEASE, NAMESPACE = "demo", "prod"


def matrix():
    """Values by name: one for each way to install the chart."""
    files = {"cpu": CHART / "values-cpu.yaml"}
    files.update((path.stem, path) for path in sorted((HERE / "values").glob("*.yaml")))
    return {name: yaml.safe_load(path.read_text()) for name, path in files.items()}


def render(values):
    """Manifests by the path of their template, and the notes among them; raises helm.HelmError."""
    with helm.Chart.load(CHART) as chart:
        return chart.render(values, name=RELEASE, namespace=NAMESPACE)


def documents(manifests):
    """The objects of rendered manifests."""
    texts = (text for path, text in sorted(manifests.items()) if not path.endswith("NOTES.txt"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def as_text(manifests):
    """Rendered manifests as one text, without blank lines and without the dashboard, which is a file of the chart."""
    parts = []
    for path, text in sorted(manifests.items()):
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        if path.endswith("/dashboard.yaml") and lines:
            lines = lines[:lines.index("  perigee.json: |") + 1]
        if lines:
            parts.append("\n".join([f"--- # {path}", *lines]))
    return "\n".join(parts) + "\n"


def main():
    EXPECTED.mkdir(exist_ok=True)
    for path in EXPECTED.glob("*.yaml"):
        path.unlink()
    for name, values in matrix().items():
        (EXPECTED / f"{name}.yaml").write_text(as_text(render(values)))


if __name__ == "__main__":
    main()
