"""Has a real Prometheus scrape a small cluster, and evaluates every alert and every query of the dashboard with it.

    .venv/bin/python tests/helm/evaluate.py PERIGEE        needs `prometheus` (Debian's package prometheus) on PATH
"""
import contextlib
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

FILES = pathlib.Path(__file__).resolve().parents[2] / "helm" / "perigee" / "files"
PATIENCE = 60


@contextlib.contextmanager
def running(command, **options):
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask(address, path, **parameters):
    """`data` of an answer of Prometheus' HTTP API; an error of the query is an exception that tells it."""
    url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{path} {parameters}: {error.read().decode()}") from error


def eventually(what, condition):
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, ConnectionError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {PATIENCE} s: {what}")
        time.sleep(0.2)


def queries():
    """Title and query of each of the dashboard's curves, as Grafana would send it."""
    for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            query = target["expr"].replace("$namespace", ".*").replace("$__rate_interval", "1m")
            assert "$" not in query, query
            yield panel["title"], query


def check(perigee, folder):
    with running([perigee, "up", "--json", "--port=0", "--http-port=0"], stdout=subprocess.PIPE, text=True) as cluster:
        places = json.loads(cluster.stdout.readline())
        jobs = {"perigee-router": [places["http"]], "perigee-worker": [each["http"] for each in places["replicas"]]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(FILES / "alerts.yaml")],
            "scrape_configs": [
                {"job_name": job, "static_configs": [{"targets": targets, "labels": {"namespace": "prod"}}]}
                for job, targets in jobs.items()
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        address = f"127.0.0.1:{free_port()}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                   f"--web.listen-address={address}", "--log.level=warn"]
        with running(command):
            targets = sum(map(len, jobs.values()))
            eventually("all targets are scraped",
                       lambda: ask(address, "query", query="sum(up) or vector(0)")["result"][0]["value"][1] == str(targets))
            subprocess.run([perigee, "generate", "--router", places["grpc"], "--prompt", "Hello", "--max-tokens", "8"],
                           check=True, stdout=subprocess.DEVNULL)
            # A rate needs two scrapes, and here one from before the request and one from after it.
            seen = time.time()
            eventually("a scrape after the request", lambda: ask(
                address, "query", query=f"min(timestamp(up)) > {seen + 1}")["result"])
            count = 0
            for title, query in queries():
                count += 1
                if not ask(address, "query", query=query)["result"]:
                    raise SystemExit(f"{title}: no data for {query}")

            def evaluated():
                rules = [rule for group in ask(address, "rules")["groups"] for rule in group["rules"]]
                return rules if rules and all(rule["health"] != "unknown" for rule in rules) else None

            rules = eventually("all rules are evaluated", evaluated)
            for rule in rules:
                if rule["health"] != "ok" or rule["state"] == "firing":
                    raise SystemExit(f"{rule['name']}: {rule['health']}, {rule['state']}: {rule.get('lastError')}")
    print(f"{targets} targets scraped, {count} queries answered, {len(rules)} alerts evaluated")


def main():
    with tempfile.TemporaryDirectory() as folder:
        check(sys.argv[1], pathlib.Path(folder))


if __name__ == "__main__":
    main()
