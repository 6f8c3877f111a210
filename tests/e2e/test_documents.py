"""What the documents name exists: flags, exit codes, reasons of refusals."""

import pathlib
import re
import subprocess
import unittest

import harness

COMMANDS = ("serve", "fetch", "plan", "inspect", "bench", "quantize", "chat", "generate")
# Flags of other programs that the documents also speak of, and the rank's own (internal).
FOREIGN = {"--rank"}


def read(*parts):
    return harness.SOURCE.joinpath(*parts).read_text(encoding="utf-8")


class DocumentsTest(unittest.TestCase):

    def helps(self):
        programs = [[harness.NIBBLE, command] for command in COMMANDS]
        programs += [[harness.NIBBLE.parent / name] for name in ("nibble-worker", "nibble-gateway")]
        for program in programs:
            answer = subprocess.run([*map(str, program), "--help"], capture_output=True, text=True,
                                    timeout=harness.CALL_SECONDS, check=True)
            yield answer.stdout

    def test_every_flag_that_operations_names_is_one(self):
        flags = {flag for text in self.helps() for flag in re.findall(r"--[a-z][a-z-]*", text)}
        self.assertGreater(len(flags), 40)
        for name in ("OPERATIONS.md", "ARCHITECTURE.md", "SECURITY.md"):
            path = pathlib.Path("docs") / name
            if not (harness.SOURCE / path).exists():
                continue
            for flag in set(re.findall(r"`(--[a-z][a-z-]*)", read(path))) - FOREIGN:
                self.assertIn(flag, flags, f"{path} names a flag that no program has")

    def test_the_table_of_exit_codes_is_the_programs(self):
        codes = {int(code) for code in
                 re.findall(r"kExit\w+ = (\d+)", read("base", "exit_codes.h"))}
        table = read("docs", "OPERATIONS.md").split("## Exit codes")[1].split("\n## ")[0]
        self.assertEqual({int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)},
                         codes)

    def test_the_reasons_in_the_table_of_statuses_are_the_closed_set(self):
        table = read("docs", "OPERATIONS.md").split("## Statuses")[1].split("\n## ")[0]
        rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
        documented = {reason for row in rows for reason in re.findall(r"[A-Z_]{5,}", row[3])}
        given = set(re.findall(r'k\w+ = "([A-Z_]+)"', read("base", "grpc_status.h")))
        self.assertEqual(documented, given)


if __name__ == "__main__":
    unittest.main()
