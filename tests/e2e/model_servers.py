"""A model hub, a folder of files and a proxy on loopback, which misbehave as they are told."""

import contextlib
import hashlib
import http.server
import json
import re
import select
import socket
import ssl
import threading
import urllib.parse

REVISION = "0123456789abcdef0123456789abcdef01234567"
PIECE = 4096


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers from server.answers: {path: function(handler) or bytes}; counts what was asked."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):  # pylint: disable=arguments-differ
        pass

    def do_GET(self):  # pylint: disable=invalid-name
        path = urllib.parse.unquote(self.path.partition("?")[0])
        with self.server.lock:
            self.server.asked.append((path, dict(self.headers)))
        answer = self.server.answers.get(path)
        if answer is None:
            self.refuse(404)
        elif callable(answer):
            answer(self)
        else:
            self.send(answer)

    def refuse(self, code, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def first(self):
        """The byte that the request begins at."""
        asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        return int(asked[1]) if asked else 0

    def send(self, content, until=None, ranges=True):
        """The content from where it is asked for; only to byte `until`, then the line is cut."""
        first = self.first() if ranges else 0
        if first and first >= len(content):
            self.refuse(416)
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        self.wfile.write(content[first:until])
        if until is not None:
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True

    def do_CONNECT(self):  # pylint: disable=invalid-name
        """As a proxy does."""
        host, port = self.path.rsplit(":", 1)
        with self.server.lock:
            self.server.asked.append((f"CONNECT {self.path}", dict(self.headers)))
        with socket.create_connection((host, int(port)), timeout=10) as there:
            self.send_response(200)
            self.end_headers()
            ends = {self.connection: there, there: self.connection}
            while True:
                for end in select.select(list(ends), [], [], 10)[0]:
                    piece = end.recv(PIECE)
                    if not piece:
                        self.close_connection = True
                        return
                    ends[end].sendall(piece)


class Server(http.server.ThreadingHTTPServer):
    """On a free port of `host`; over TLS with (certificate, key)."""

    daemon_threads = True

    def __init__(self, answers=None, tls=None, host="127.0.0.1"):
        super().__init__((host, 0), Handler)
        self.answers = dict(answers or {})
        self.asked = []
        self.lock = threading.Lock()
        self.scheme = "http"
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self.socket = context.wrap_socket(self.socket, server_side=True,
                                              do_handshake_on_connect=False)
            self.scheme = "https"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_):  # pylint: disable=arguments-differ
        pass

    @property
    def url(self):
        return f"{self.scheme}://{self.server_address[0]}:{self.server_address[1]}"

    def paths(self):
        with self.lock:
            return [path for path, _ in self.asked]

    def headers(self, path):
        with self.lock:
            return [headers for asked, headers in self.asked if asked == path]

    def close(self):
        self.shutdown()
        self.server_close()


def proxy_answers(target):
    """What a proxy answers to requests in clear text for `target`, a Server."""
    def hand_on(handler):
        handler.send(target.answers[urllib.parse.urlparse(handler.path).path])
    return {f"{target.url}{path}": hand_on for path in target.answers}


def hub(files, repo="org/model", large=(), elsewhere=None, **options):
    """A Server that is a hub with one repository. `large` files are kept as the hub keeps large
    ones, and are redirected to the Server `elsewhere`."""
    server = Server(**options)
    siblings = []
    for name, content in files.items():
        entry = {"rfilename": name, "size": len(content), "blobId": git_blob(content)}
        if name in large:
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content),
                            "pointerSize": 130}
        siblings.append(entry)
        path = f"/{repo}/resolve/{REVISION}/{name}"
        server.answers[path] = content
        if name in large and elsewhere is not None:
            elsewhere.answers[f"/store/{name}"] = content
            server.answers[path] = redirect(f"{elsewhere.url}/store/{name}?signature=qzxvsigned")
    page = json.dumps({"id": repo, "sha": REVISION, "siblings": siblings}).encode()
    server.answers[f"/api/models/{repo}/revision/main"] = page
    return server


def redirect(location, code=302):
    return lambda handler: handler.refuse(code, Location=location)


def folder(files, sums=None, **options):
    """A Server of a folder /m/ with its SHA256SUMS."""
    server = Server({f"/m/{name}": content for name, content in files.items()}, **options)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}" for name, content in files.items()]
    server.answers["/m/SHA256SUMS"] = ("\n".join(lines) + "\n" if sums is None else sums).encode()
    return server


@contextlib.contextmanager
def running(*servers):
    try:
        yield servers[0] if len(servers) == 1 else servers
    finally:
        for server in servers:
            server.close()
