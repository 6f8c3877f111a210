"""`nibble fetch` against servers that cut lines, lie, refuse and lead elsewhere."""

import hashlib
import os
import pathlib
import random
import signal
import subprocess
import tempfile
import threading
import time
import unittest

import harness
import model_servers as servers
import secured

WEIGHTS = random.Random(7).randbytes(3 << 20)
HALF = len(WEIGHTS) // 2
FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}" * 500,
         "model.safetensors": WEIGHTS}
RESOLVED = f"/org/model/resolve/{servers.REVISION}/"
TOKEN = "hf_qzxvtoken"
CLEAN = {name: "" for name in ("http_proxy", "https_proxy", "HTTPS_PROXY", "all_proxy",
                               "ALL_PROXY", "no_proxy", "NO_PROXY", "HF_TOKEN", "HF_ENDPOINT")}


class FetchTestCase(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="nibble-fetch-")
        self.addCleanup(folder.cleanup)
        self.base = pathlib.Path(folder.name)
        self.out = self.base / "models" / "m"

    def fetch(self, source, *flags, out=None, **env):
        return harness.run_nibble("fetch", source, out or self.out, "--retry-wait", "1ms", *flags,
                                  env={**CLEAN, **env})

    def fetch_hub(self, hub, *flags, **env):
        return self.fetch("hf://org/model", *flags, HF_ENDPOINT=hub.url, **env)

    def assert_fetched(self, answer, files=None, out=None):
        self.assertEqual(answer.returncode, 0, answer.stderr)
        out = out or self.out
        files = FILES if files is None else files
        self.assertEqual(answer.stdout, f"{out}\n")
        self.assertEqual({path.name for path in out.iterdir()},
                         {*files, "SHA256SUMS", ".fetched-from"})
        for name, content in files.items():
            self.assertEqual((out / name).read_bytes(), content, name)
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out,
                       check=True)
        self.assertFalse(out.with_name(f"{out.name}.partial").exists())

    def assert_refused(self, answer, code, *words):
        self.assertEqual(answer.returncode, code, answer.stderr)
        for word in words:
            self.assertIn(word, answer.stderr)
        self.assertEqual(answer.stdout, "")
        self.assertFalse(self.out.exists())


class HubTest(FetchTestCase):

    def test_what_a_server_needs_comes_from_a_hub(self):
        files = {**FILES, "README.md": b"x", ".gitattributes": b"x", "pytorch_model.bin": b"x",
                 "consolidated.safetensors": b"x", "LICENSE": b"Apache-2.0"}
        elsewhere = servers.Server()
        hub = servers.hub(files, large=("model.safetensors", "pytorch_model.bin"),
                          elsewhere=elsewhere)
        with servers.running(hub, elsewhere):
            answer = self.fetch_hub(hub)
            wanted = {**FILES, "LICENSE": b"Apache-2.0"}
            self.assert_fetched(answer, wanted)
            self.assertEqual((self.out / ".fetched-from").read_text(encoding="utf-8"),
                             f"hf://org/model\n{servers.REVISION}\n")
            count = len(hub.paths()) + len(elsewhere.paths())
            self.assertEqual(count, 1 + len(wanted) + 1)
            # What is whole is left alone: nobody is asked.
            again = self.fetch_hub(hub)
            self.assert_fetched(again, wanted)
            self.assertIn("is there already", again.stderr)
            self.assertEqual(len(hub.paths()) + len(elsewhere.paths()), count)

    def test_the_token_goes_to_the_hub_alone(self):
        for place in ({}, {"host": "127.0.0.2"}):  # another port, another host
            with self.subTest(place=place):
                self.out = self.base / str(len(place))
                elsewhere = servers.Server(**place)
                hub = servers.hub(FILES, large=("model.safetensors",), elsewhere=elsewhere)
                with servers.running(hub, elsewhere):
                    answer = self.fetch_hub(hub, HF_TOKEN=TOKEN)
                    self.assert_fetched(answer)
                    self.assertEqual({headers.get("Authorization") for _, headers in hub.asked},
                                     {f"Bearer {TOKEN}"})
                    self.assertEqual([headers.get("Authorization")
                                      for _, headers in elsewhere.asked], [None])

    def test_neither_token_nor_signed_address_is_written_down(self):
        elsewhere = servers.Server()
        hub = servers.hub(FILES, large=("model.safetensors",), elsewhere=elsewhere)
        elsewhere.answers["/store/model.safetensors"] = lambda handler: handler.refuse(500)
        with servers.running(hub, elsewhere):
            answer = self.fetch_hub(hub, "--tries", "2", HF_TOKEN=TOKEN)
            self.assert_refused(answer, 1, "/store/model.safetensors answered 500")
            for secret in (TOKEN, "qzxv", "signature"):
                self.assertNotIn(secret, answer.stderr)
            for path in self.base.rglob("*"):
                if path.is_file():
                    self.assertNotIn(b"qzxv", path.read_bytes(), path)

    def test_the_token_is_not_sent_in_clear_text_over_a_network(self):
        answer = self.fetch("hf://org/model", HF_TOKEN=TOKEN, HF_ENDPOINT="http://hub.example")
        self.assert_refused(answer, 2, "clear text")
        answer = self.fetch("hf://org/model", HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:1",
                            http_proxy="http://127.0.0.1:1")
        self.assert_refused(answer, 2, "clear text")
        self.assertNotIn(TOKEN, answer.stderr)

    def test_a_revision_is_asked_for_by_name(self):
        hub = servers.hub(FILES)
        hub.answers["/api/models/org/model/revision/pr/1"] = hub.answers.pop(
            "/api/models/org/model/revision/main")
        with servers.running(hub):
            self.assert_fetched(self.fetch("hf://org/model@pr/1", HF_ENDPOINT=hub.url))
            self.assertIn("/api/models/org/model/revision/pr/1", hub.paths())

    def test_each_refusal_is_one_line_that_says_why(self):
        for code, words in ((401, "wants to know who asks"), (403, "wants to know who asks"),
                            (404, "no such thing"), (400, "answered 400")):
            hub = servers.hub(FILES)
            hub.answers["/api/models/org/model/revision/main"] = (
                lambda handler, code=code: handler.refuse(code))
            with self.subTest(code=code), servers.running(hub):
                answer = self.fetch_hub(hub)
                self.assert_refused(answer, 1, words)
                self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)
                self.assertEqual(len(hub.paths()), 1)
                with_token = self.fetch_hub(hub, HF_TOKEN=TOKEN)
                if code in (401, 403):
                    self.assert_refused(with_token, 1, "may not read this")

    def test_a_refusal_without_an_end_is_given_up(self):
        sent = []

        def endless(handler):
            handler.send_response(404)
            handler.end_headers()
            handler.close_connection = True
            try:
                for _ in range(64):
                    sent.append(handler.wfile.write(bytes(1 << 20)))
            except OSError:
                pass

        hub = servers.hub(FILES)
        hub.answers["/api/models/org/model/revision/main"] = endless
        with servers.running(hub):
            self.assert_refused(self.fetch_hub(hub), 1, "answered with no end")
            self.assertLess(len(sent), 32)

    def test_lists_that_are_none_are_refused(self):
        for page in (b"", b"[]", b"{", b'{"sha": "x", "siblings": []}',
                     b'{"sha": "' + servers.REVISION.encode() + b'", "siblings": [{}]}',
                     b'{"sha": "' + servers.REVISION.encode() + b'", "siblings": [1]}',
                     b'{"sha": "' + servers.REVISION.encode() + b'", "siblings": []}',
                     b'{"sha": "' + servers.REVISION.encode() +
                     b'", "siblings": [{"rfilename": "config.json", "size": -1}]}',
                     b"[" * 100000, b"x" * (17 << 20)):
            hub = servers.hub(FILES)
            hub.answers["/api/models/org/model/revision/main"] = page
            with self.subTest(page=page[:40]), servers.running(hub):
                self.assert_refused(self.fetch_hub(hub), 3)


def half_first(let_go):
    """Who asks from the beginning gets half of the weights, and then nothing until let_go."""
    def answer(handler):
        if handler.first():
            handler.send(WEIGHTS)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(WEIGHTS)))
        handler.end_headers()
        handler.wfile.write(WEIGHTS[:HALF])
        handler.wfile.flush()
        let_go.wait(30)
    return answer


class BrokenLineTest(FetchTestCase):

    def test_a_cut_line_is_taken_up_where_it_broke(self):
        cuts = [len(WEIGHTS) // 3, 2 * len(WEIGHTS) // 3]

        def cut(handler):
            later = [at for at in cuts if at > handler.first()]
            handler.send(WEIGHTS, until=later[0] if later else None)

        for kind in ("hub", "folder"):
            with self.subTest(kind=kind):
                self.out = self.base / kind
                server = servers.hub(FILES) if kind == "hub" else servers.folder(FILES)
                path = RESOLVED + "model.safetensors" if kind == "hub" else "/m/model.safetensors"
                server.answers[path] = cut
                with servers.running(server):
                    # What brings something new is no failed try.
                    answer = (self.fetch_hub(server, "--tries", "2") if kind == "hub"
                              else self.fetch(f"{server.url}/m", "--tries", "2"))
                    self.assert_fetched(answer)
                    ranges = [headers.get("Range") for headers in server.headers(path)]
                    self.assertEqual(ranges, [None, *[f"bytes={at}-" for at in cuts]])

    def test_a_line_that_stalls_is_given_up_and_taken_up(self):
        let_go = threading.Event()
        server = servers.hub(FILES)
        server.answers[RESOLVED + "model.safetensors"] = half_first(let_go)
        with servers.running(server):
            answer = self.fetch_hub(server, "--stall-timeout", "1s")
            let_go.set()
            self.assert_fetched(answer)

    def test_a_killed_fetch_leaves_no_model_and_the_next_goes_on(self):
        let_go = threading.Event()
        hub = servers.hub(FILES)
        hub.answers[RESOLVED + "model.safetensors"] = half_first(let_go)
        part = self.out.parent / "m.partial" / "model.safetensors.part"
        with servers.running(hub):
            process = subprocess.Popen(
                [str(harness.NIBBLE), "fetch", "hf://org/model", str(self.out)],
                env={**os.environ, **CLEAN, "HF_ENDPOINT": hub.url}, stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
            harness.wait_until(lambda: part.exists() and part.stat().st_size == HALF, 20,
                               "half of it is there")
            process.send_signal(signal.SIGKILL)
            process.wait()
            let_go.set()
            self.assertFalse(self.out.exists())
            asked = len(hub.paths())
            self.assert_fetched(self.fetch_hub(hub))
            self.assertEqual(hub.headers(RESOLVED + "model.safetensors")[1]["Range"],
                             f"bytes={HALF}-")
            # The list and the file that was missing; what was whole was looked through here.
            self.assertEqual(len(hub.paths()) - asked, 2)

    def test_a_server_that_knows_no_ranges_begins_again(self):
        tries = []

        def without_ranges(handler):
            tries.append(1)
            handler.send(WEIGHTS, until=None if len(tries) > 1 else 1000, ranges=False)

        hub = servers.hub(FILES)
        hub.answers[RESOLVED + "model.safetensors"] = without_ranges
        with servers.running(hub):
            self.assert_fetched(self.fetch_hub(hub))

    def test_busy_servers_are_asked_again_and_not_for_ever(self):
        for code in (429, 500, 503):
            asked = []

            def busy(handler, code=code, asked=asked):
                asked.append(1)
                if len(asked) <= 2:
                    handler.refuse(code, Retry_After="0")
                else:
                    handler.send(WEIGHTS)

            with self.subTest(code=code):
                self.out = self.base / str(code)
                hub = servers.hub(FILES)
                hub.answers[RESOLVED + "model.safetensors"] = busy
                with servers.running(hub):
                    self.assert_fetched(self.fetch_hub(hub))
                    hub.answers[RESOLVED + "model.safetensors"] = (
                        lambda handler, code=code: handler.refuse(code))
                    self.out = self.base / f"{code}-never"
                    before = len(hub.paths())
                    answer = self.fetch_hub(hub, "--tries", "3")
                    self.assert_refused(answer, 1, f"answered {code}")
                    self.assertEqual(hub.paths()[before:].count(RESOLVED + "model.safetensors"), 3)

    def test_what_a_server_asks_to_wait_is_waited(self):
        asked = []

        def busy(handler):
            asked.append(time.monotonic())
            if len(asked) == 1:
                handler.refuse(429, Retry_After="1")
            else:
                handler.send(WEIGHTS)

        hub = servers.hub(FILES)
        hub.answers[RESOLVED + "model.safetensors"] = busy
        with servers.running(hub):
            answer = self.fetch_hub(hub)
            self.assert_fetched(answer)
            self.assertIn("again in 1s", answer.stderr)
            self.assertGreaterEqual(asked[1] - asked[0], 1)

    def test_a_hub_that_is_not_there_is_one_line_at_the_end(self):
        answer = self.fetch("hf://org/model", "--tries", "2", HF_ENDPOINT="http://127.0.0.1:1")
        self.assert_refused(answer, 1, "http://127.0.0.1:1/api/models/org/model/revision/main")


class WrongBytesTest(FetchTestCase):

    def test_wrong_bytes_never_become_a_model(self):
        wrong = bytearray(WEIGHTS)
        wrong[12345] ^= 1
        for name, content in (("model.safetensors", bytes(wrong)), ("config.json", b"[" + FILES[
                "config.json"][1:])):
            for kind in ("hub", "folder"):
                server = servers.hub(FILES, large=("model.safetensors",)) if kind == "hub" else (
                    servers.folder(FILES))
                server.answers[RESOLVED + name if kind == "hub" else f"/m/{name}"] = content
                self.out = self.base / kind / name
                with self.subTest(name=name, kind=kind), servers.running(server):
                    answer = (self.fetch_hub(server) if kind == "hub"
                              else self.fetch(f"{server.url}/m"))
                    self.assert_refused(answer, 3, name, "is not what was announced")

    def test_another_length_than_announced_is_refused(self):
        for content in (WEIGHTS + b"x", WEIGHTS[:-1]):
            hub = servers.hub(FILES)
            hub.answers[RESOLVED + "model.safetensors"] = content
            with self.subTest(length=len(content)), servers.running(hub):
                self.assert_refused(self.fetch_hub(hub), 3, "model.safetensors has",
                                    f"it was to have {len(WEIGHTS)}")

    def test_damaged_remains_of_an_earlier_fetch_are_fetched_again(self):
        partial = self.out.parent / "m.partial"
        for remains in ({"model.safetensors.part": b"x" * 1000},
                        {"model.safetensors": WEIGHTS[:-1] + b"?"},
                        {"model.safetensors.part": WEIGHTS + b"beyond"},
                        {"config.json": FILES["config.json"], "evil.so": b"x"}):
            partial.mkdir(parents=True)
            for name, content in remains.items():
                (partial / name).write_bytes(content)
            server = servers.folder(FILES)
            with self.subTest(remains=list(remains)), servers.running(server):
                self.assert_fetched(self.fetch(f"{server.url}/m"))
            for path in self.out.iterdir():
                path.unlink()
            self.out.rmdir()

    def test_lists_with_names_that_lead_elsewhere_are_refused(self):
        good = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n"
                       for name, content in FILES.items())
        some = "0" * 64
        for sums in (f"{some}  ../evil\n{good}", f"{some}  /etc/passwd\n{good}",
                     f"{some}  .ssh\n{good}", f"{some}  a/b\n{good}", f"{some} config.json\n",
                     f"{some[1:]}  config.json\n", f"{some}  config.json\n{good}",
                     f"{some}  model.safetensors\n", "", "<html>", f"{some}  x.part\n{good}"):
            server = servers.folder(FILES, sums=sums)
            with self.subTest(sums=sums[:80]), servers.running(server):
                self.assert_refused(self.fetch(f"{server.url}/m"), 3, "SHA256SUMS")
                self.assertEqual(server.paths(), ["/m/SHA256SUMS"])
        self.assertEqual(list(self.base.rglob("evil")), [])


class FolderTest(FetchTestCase):

    def test_other_things_under_the_name_are_not_touched(self):
        server = servers.folder(FILES)
        with servers.running(server):
            self.out.mkdir(parents=True)
            (self.out / "mine").write_text("x", encoding="utf-8")
            answer = self.fetch(f"{server.url}/m")
            self.assertEqual(answer.returncode, 2)
            self.assertIn("was not fetched from", answer.stderr)
            self.assertEqual([path.name for path in self.out.iterdir()], ["mine"])
            self.assertEqual(server.paths(), [])
            (self.out / "mine").unlink()
            self.assert_fetched(self.fetch(f"{server.url}/m"))
            # Another source is another model.
            other = self.fetch(f"{server.url}/other")
            self.assertEqual(other.returncode, 2, other.stderr)

    def test_two_fetches_of_one_folder_are_one(self):
        begun, go_on = threading.Event(), threading.Event()

        def slow(handler):
            begun.set()
            go_on.wait(30)
            handler.send(WEIGHTS)

        server = servers.folder(FILES)
        server.answers["/m/model.safetensors"] = slow
        with servers.running(server):
            command = [str(harness.NIBBLE), "fetch", f"{server.url}/m", str(self.out)]
            options = {"env": {**os.environ, **CLEAN}, "stdin": subprocess.DEVNULL,
                       "stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            with subprocess.Popen(command, **options) as first:
                begun.wait(20)
                with subprocess.Popen(command, **options) as second:
                    self.assertIn("another process fetches it", second.stderr.readline())
                    go_on.set()
                    answers = [subprocess.CompletedProcess([], process.wait(30),
                                                           process.stdout.read(),
                                                           process.stderr.read())
                               for process in (first, second)]
            for answer in answers:
                self.assert_fetched(answer)
            self.assertEqual(len(server.paths()), 1 + len(FILES))

    def test_a_folder_that_was_fetched_can_be_fetched_from(self):
        server = servers.folder(FILES)
        with servers.running(server):
            self.assert_fetched(self.fetch(f"{server.url}/m"))
        copy = servers.Server({f"/x/{path.name}": path.read_bytes()
                               for path in self.out.iterdir()})
        with servers.running(copy):
            out = self.base / "copy"
            self.assert_fetched(self.fetch(f"{copy.url}/x", out=out), out=out)

    def test_bad_sources_are_one_line_before_anybody_is_asked(self):
        for source, words in (("oci://r/x", "image volume"), ("s3://b/x", "it is no source"),
                              ("hf://x", "allowed"), ("hf://a/b/c", "allowed"),
                              ("hf://a/../b", "allowed"), ("hf://a/b@", "allowed"),
                              ("https://u:p@h/x", "no user"), ("https://h/x?y=1", "no ?"),
                              ("https:///x", "host")):
            with self.subTest(source=source):
                answer = self.fetch(source)
                self.assert_refused(answer, 2, words)
                self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)


class TransportTest(FetchTestCase):

    def setUp(self):
        super().setUp()
        self.authority = secured.Authority(self.base)
        self.tls = self.authority.issue("server")
        self.trust = {"SSL_CERT_FILE": str(self.authority.certificate)}

    def test_https_wants_a_certificate_that_holds(self):
        with servers.running(servers.folder(FILES, tls=self.tls)) as server:
            answer = self.fetch(f"{server.url}/m")
            self.assert_refused(answer, 1, "certificate")
            self.assertEqual(len(answer.stderr.strip().splitlines()), 1, answer.stderr)
            self.assertEqual(server.paths(), [])
            self.assert_fetched(self.fetch(f"{server.url}/m", **self.trust))
        self.out = self.base / "elsewhere"
        with servers.running(servers.folder(FILES, tls=self.tls, host="127.0.0.2")) as server:
            self.assert_refused(self.fetch(f"{server.url}/m", **self.trust), 1, "another name")
            self.assertEqual(server.paths(), [])

    def test_https_never_leads_to_clear_text(self):
        plain = servers.Server({"/store": WEIGHTS})
        hub = servers.hub(FILES, tls=self.tls)
        hub.answers[RESOLVED + "model.safetensors"] = servers.redirect(f"{plain.url}/store")
        with servers.running(hub, plain):
            self.assert_refused(self.fetch_hub(hub, HF_TOKEN=TOKEN, **self.trust), 1,
                                "which is not https")
            self.assertEqual(plain.paths(), [])

    def test_a_ring_of_redirects_ends(self):
        hub = servers.hub(FILES)
        path = RESOLVED + "model.safetensors"
        hub.answers[path] = servers.redirect("model.safetensors", 307)
        with servers.running(hub):
            self.assert_refused(self.fetch_hub(hub), 1, "leads on more than 10 times")
            self.assertEqual(hub.paths().count(path), 11)

    def test_proxies_of_the_environment_are_used(self):
        plain, secure = servers.folder(FILES), servers.folder(FILES, tls=self.tls)
        proxy = servers.Server(servers.proxy_answers(plain))
        with servers.running(plain, secure, proxy):
            where = proxy.url.replace("http://", "http://user:p%40ss@")
            self.assert_fetched(self.fetch(f"{plain.url}/m", http_proxy=where))
            self.assertEqual(plain.paths(), [])
            self.assertEqual(len(proxy.paths()), 1 + len(FILES))
            self.assertEqual(proxy.asked[0][1]["Proxy-Authorization"], "Basic dXNlcjpwQHNz")
            out = self.base / "secure"
            answer = self.fetch(f"{secure.url}/m", out=out, https_proxy=proxy.url, **self.trust)
            self.assert_fetched(answer, out=out)
            self.assertIn(f"CONNECT {secure.url.removeprefix('https://')}", proxy.paths())
            count = len(proxy.paths())
            out = self.base / "exempt"
            self.assert_fetched(self.fetch(f"{plain.url}/m", out=out, http_proxy=proxy.url,
                                           no_proxy="example.com, 127.0.0.1"), out=out)
            self.assertEqual(len(proxy.paths()), count)

    def test_a_proxy_of_another_kind_is_named_without_its_password(self):
        answer = self.fetch("http://127.0.0.1:1/m", http_proxy="socks5://u:qzxv@h:1")
        self.assert_refused(answer, 2, "http_proxy names a proxy of another kind")
        self.assertNotIn("qzxv", answer.stderr)


if __name__ == "__main__":
    unittest.main()
