#!/usr/bin/env python3
"""The status page in a real browser, over the metrics of a gateway and of a group under load.

usage: tests/deploy/status_page.py [FOLDER]   (pictures go to FOLDER; needs chromium and a model)
"""

import concurrent.futures
import http.server
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "e2e"), str(ROOT / "tests" / "deploy")]

import harness  # noqa: E402  pylint: disable=wrong-import-position
import live_metrics  # noqa: E402  pylint: disable=wrong-import-position

CLIENTS = 4
WATCHED_SECONDS = 7
BROWSER_SECONDS = 60
# Quiet: a browser looks for updates and much else, which is not there.
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars"]
# The browser takes its picture when everything has loaded, so something loads for as long as the
# page is to be watched; then the page's text is sent back.
FRAME = """<!doctype html><style>body {margin: 0} iframe {border: 0; width: 100vw; height: 100vh}
</style><iframe id="page" src="/"></iframe><script>
const slow = new Image();
slow.onload = slow.onerror = () => {
  const request = new XMLHttpRequest();
  request.open("POST", "/seen", false);
  request.send(document.getElementById("page").contentDocument.body.innerText);
};
slow.src = "/slow";
document.body.append(slow);
slow.style.display = "none";
</script>"""


class Stage(http.server.BaseHTTPRequestHandler):
    """Passes on the page and the metrics of the process at `address`, and frames them."""

    address, seen = "", ""

    def answer(self, kind, body):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):  # pylint: disable=invalid-name
        if self.path == "/":
            self.answer("text/html; charset=utf-8",
                        harness.http_get(self.address, "/")[1].encode())
        elif self.path == "/metrics":
            self.answer("text/plain", harness.http_get(self.address, "/metrics")[1].encode())
        elif self.path == "/slow":
            time.sleep(WATCHED_SECONDS)
            self.answer("text/plain", b"")
        else:
            self.answer("text/html; charset=utf-8", FRAME.encode())

    def do_POST(self):  # pylint: disable=invalid-name
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).seen = body.decode()
        self.answer("text/plain", b"")

    def log_message(self, *_):  # pylint: disable=arguments-differ
        pass


def look(browser, address, picture):
    """The text of the page after a while, and a picture of it."""
    stage = type("StageOf", (Stage,), {"address": address})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), stage)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = tempfile.mkdtemp(prefix="nibble-browser-")
    try:
        subprocess.run([browser, *FLAGS, f"--user-data-dir={profile}", "--window-size=1240,900",
                        f"--screenshot={picture}",
                        f"http://127.0.0.1:{server.server_address[1]}/frame"],
                       check=True, timeout=BROWSER_SECONDS, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    finally:
        server.shutdown()
        shutil.rmtree(profile, ignore_errors=True)
    return stage.seen


def faults(which, text, wanted):
    for pattern in wanted:
        if not re.search(pattern, text):
            yield f"{which}: nothing like {pattern!r} in:\n{text}"
    for unwanted in ("no answer", "NaN", "undefined", "unknown"):
        if unwanted in text:
            yield f"{which}: {unwanted!r} in:\n{text}"


def watch(server, browser, folder):
    """Looks at both processes while clients call."""
    model = re.escape(harness.find_model().name)
    number = r"[1-9][\d,.]*"
    wanted = {
        "metrics": [r"\bready\b", rf"{number}\s+tokens/s, last minute", model,
                    r"g0\s+ready\s+closed",
                    r"(ms|s|–)\s+first token", r"OK\s+length\s+\d", r"refused invalid\s+\d"],
        "worker_metrics": [r"\bready\b", rf"{number}\s+tokens/s, last minute",
                           rf"{model}, gemm, 2 ranks", r"0\s+up\s+[\d.]+",
                           r"1\s+up\s+[\d.]+", r"MiB", r"of the KV cache"],
    }
    enough = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for client in range(CLIENTS):
            pool.submit(live_metrics.client, server, client, enough.is_set)
        try:
            harness.wait_until(
                lambda: server.metric("nibble_gateway_requests_total", code="OK") >= CLIENTS,
                harness.CALL_SECONDS, "requests are answered")
            for which, patterns in wanted.items():
                text = look(browser, server.addresses[which], folder / f"status-{which}.png")
                yield from faults(which, text, patterns)
        finally:
            enough.set()


def main():
    browser, model = shutil.which("chromium"), harness.find_model()
    if browser is None or model is None:
        print("NOT RUN: status_page (needs chromium and a model)")
        return 0
    folder = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else harness.BUILD)
    harness.make_stubs()
    server = harness.Server(model, "--tp", "2", "--context", "2048")
    try:
        found = list(watch(server, browser, folder))
    finally:
        server.close()
    print("\n".join(found))
    print(f"status_page: {'FAILED' if found else 'ok'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
