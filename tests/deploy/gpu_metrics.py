#!/usr/bin/env python3
"""What a gateway and a group on GPUs told Prometheus once is told to a real Prometheus again: every
query of every board returns data, every selector of every rule returns series, and no alert fires.

usage: tests/deploy/gpu_metrics.py [FOLDER]   (the recording; tests/deploy/data unless given)
"""

import http.server
import pathlib
import re
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(ROOT / "tests" / "deploy")]

import boards  # noqa: E402  pylint: disable=wrong-import-position
import harness  # noqa: E402  pylint: disable=wrong-import-position
import live_metrics  # noqa: E402  pylint: disable=wrong-import-position

FILES = {"nibble-gateway": "gpu_metrics_gateway.txt", "nibble-worker": "gpu_metrics_worker.txt"}
REPLAY_SECONDS = 15
# Of what was counted while it was recorded, counted again every second.
GROWTH = 0.05
STAMP = "nibble_engine_last_step_timestamp_seconds"


class Page:
    """A recorded /metrics page that goes on: what it counted grows in proportion, its heartbeat
    beats."""

    def __init__(self, text):
        self.begin = time.monotonic()
        self.lines = []  # (text up to the value, value, whether it grows)
        kind = ""
        for line in text.splitlines():
            declared = re.match(r"# TYPE \S+ (\w+)$", line)
            if declared:
                kind = declared[1]
            sample = re.match(r"([a-zA-Z_:][\w:]*(?:\{.*\})?) (\S+)$", line)
            if sample is None:
                self.lines.append((line, None, False))
            else:
                self.lines.append((sample[1], float(sample[2]), kind in ("counter", "histogram")))

    def text(self):
        factor = 1 + GROWTH * (time.monotonic() - self.begin)
        lines = []
        for head, value, grows in self.lines:
            if value is None:
                lines.append(head)
            elif head.startswith(STAMP):
                lines.append(f"{head} {time.time()}")
            else:
                lines.append(f"{head} {value * factor if grows else value!r}")
        return "\n".join(lines) + "\n"


class Replay(http.server.ThreadingHTTPServer):
    """Serves the page on a free port."""

    daemon_threads = True

    def __init__(self, page):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # pylint: disable=invalid-name
                body = page.text().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):  # pylint: disable=arguments-differ
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self):
        return f"127.0.0.1:{self.server_address[1]}"


def recording_faults(pages):
    """It is of GPUs, and of a time when there was work."""
    worker = harness.parse_metrics(pages["nibble-worker"])
    devices = {labels.get("device") for labels, _ in worker.get("nibble_memory_bytes", [])}
    if devices != {"cuda"}:
        yield f"the recording is of devices {sorted(map(str, devices))}"
    for page, name in (("nibble-worker", "nibble_generated_tokens_total"),
                       ("nibble-gateway", "nibble_gateway_generated_tokens_total")):
        found = harness.parse_metrics(pages[page])
        if sum(value for _, value in found.get(name, [])) == 0:
            yield f"the recording has no {name}"


def find_faults(pages):
    replays = {job: Replay(Page(text)) for job, text in pages.items()}
    prometheus = live_metrics.Prometheus({job: replay.address for job, replay in replays.items()})
    try:
        harness.wait_until(prometheus.ready, live_metrics.READY_SECONDS, "Prometheus gets ready")
        time.sleep(REPLAY_SECONDS)
        there = {part for part, text in boards.PARTS.items()
                 if any(re.search(rf"^[^#\n]*{re.escape(text)}", page, re.MULTILINE)
                        for page in pages.values())}
        return [*recording_faults(pages), *live_metrics.board_faults(prometheus, there),
                *live_metrics.rule_faults(prometheus, there)]
    finally:
        prometheus.close()
        for replay in replays.values():
            replay.shutdown()
            replay.server_close()


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "deploy" / "data"
    missing = [name for name in FILES.values() if not (folder / name).exists()]
    if missing:
        print(f"NOT RUN: gpu_metrics (no {' and no '.join(missing)} in {folder.name}; its README "
              "says how they are recorded)")
        return 0
    faults = find_faults({job: (folder / name).read_text(encoding="utf-8")
                          for job, name in FILES.items()})
    print("\n".join(faults))
    print(f"gpu_metrics: {'FAILED' if faults else 'ok'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
