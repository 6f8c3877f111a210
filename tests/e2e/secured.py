"""What the suites of TLS, keys and privacy share: certificates of the test's own, keys, and a
server that asks for both."""

import pathlib
import shutil
import subprocess
import tempfile

import harness

DAYS = "30"  # longer than what an alert warns of
SUBJECT_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True,
                   timeout=harness.CALL_SECONDS)


class Authority:
    """Signs certificates into a folder."""

    def __init__(self, folder, name="ca"):
        self.folder = pathlib.Path(folder)
        self.key, self.certificate = self.folder / f"{name}.key", self.folder / f"{name}.pem"
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                "-days", DAYS, "-subj", f"/CN={name}", "-keyout", self.key,
                "-out", self.certificate)

    def issue(self, name):
        """(certificate, key) for localhost."""
        paths = [self.folder / f"{name}.{kind}" for kind in ("crt", "key", "csr", "ext")]
        certificate, key, request, extensions = paths
        extensions.write_text(SUBJECT_NAMES + "\n", encoding="utf-8")
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj",
                f"/CN={name}", "-keyout", key, "-out", request)
        openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key,
                "-CAcreateserial", "-days", DAYS, "-extfile", extensions, "-out", certificate)
        return certificate, key


def new_key(*flags):
    """(the key, its line of the keys file) by `nibble keys new`."""
    made = harness.run_nibble("keys", "new", *flags)
    assert made.returncode == 0, made.stderr
    key, line = made.stdout.strip().split("\n")
    return key, line


class SecuredServer(harness.Server):
    """`nibble serve` with TLS and keys of alice, of bob and of an operator."""

    def __init__(self, model, *flags):
        self.security = pathlib.Path(tempfile.mkdtemp(prefix="nibble-security-"))
        try:
            self.authority = Authority(self.security)
            certificate, key = self.authority.issue("server")
            lines = []
            self.key, line = new_key("--tenant", "alice")
            lines.append(line)
            self.high_key, line = new_key("--tenant", "bob", "--priority", "high")
            lines.append(line)
            self.operator_key, line = new_key("--tenant", "ops", "--admin")
            lines.append(line)
            self.keys_file = self.security / "keys.toml"
            self.keys_file.write_text("[keys]\n" + "\n".join(lines) + "\n", encoding="utf-8")
            super().__init__(model, "--tls-cert", str(certificate), "--tls-key", str(key),
                             "--keys-file", str(self.keys_file), *flags)
        except BaseException:
            shutil.rmtree(self.security, ignore_errors=True)
            raise

    @property
    def ca(self):
        return str(self.authority.certificate)

    def channel(self):
        import grpc  # pylint: disable=import-outside-toplevel
        return grpc.secure_channel(
            self.address, grpc.ssl_channel_credentials(self.authority.certificate.read_bytes()))

    def bearer(self, key=None):
        return [("authorization", f"Bearer {key or self.key}")]

    def close(self):
        super().close()
        shutil.rmtree(self.security, ignore_errors=True)
