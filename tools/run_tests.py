#!/usr/bin/env python3
"""What `make test` runs: set-up, release build, all tests, sanitized unit tests, linters and the
end-to-end tests, with a table of times. The last line is "N passed, M failed".

usage: tools/run_tests.py [PHASE...]   (default: all, in order)
"""

import os
import pathlib
import re
import subprocess
import sys
import time
import xml.etree.ElementTree

ROOT = pathlib.Path(__file__).resolve().parent.parent
JOBS = str(os.cpu_count() or 2)


class Phase:
    """One step. `needs` names the phase without which it cannot run."""

    def __init__(self, name, commands, needs=None, count=None):
        self.name = name
        self.commands = commands
        self.needs = needs
        self.count = count  # output, ok → (passed, failed)
        self.seconds = 0.0
        self.passed = 0
        self.failed = 0
        self.state = "not run"


def ctest(preset, *arguments):
    report = ROOT / "build" / preset / f"ctest-{'-'.join(arguments[:2]).strip('-')}.xml"
    # Not --preset: with it ctest 3.25 ignores -LE.
    return ["ctest", "--test-dir", f"build/{preset}", "--output-on-failure", "--output-junit",
            str(report), "--no-tests=error", *arguments], report


def count_junit(report):
    def count(_output, ok):
        if not report.exists():
            return 0, 1
        suite = xml.etree.ElementTree.parse(report).getroot()
        total = int(suite.get("tests", 0))
        failed = int(suite.get("failures", 0))
        return total - failed, max(failed, 0 if ok else 1)
    return count


def count_lint(output, _ok):
    match = re.search(r"^lint: (\d+) passed, (\d+) failed$", output, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else (0, 1)


def phases():
    host, host_report = ctest("release", "-LE", "slow|e2e", "-j", JOBS)
    e2e, e2e_report = ctest("release", "-L", "e2e", "-LE", "slow")
    cuda, cuda_report = ctest("cuda", "-L", "gpu_host")
    asan, asan_report = ctest("asan", "-L", "unit|fuzz|sanitized", "-LE", "slow", "-j", JOBS)
    return [
        Phase("setup", [["bash", "tools/setup"]]),
        Phase("build", [["cmake", "--preset", "release"],
                        ["cmake", "--build", "--preset", "release", "-j", JOBS]], needs="setup"),
        Phase("test", [host], needs="build", count=count_junit(host_report)),
        Phase("e2e", [e2e], needs="build", count=count_junit(e2e_report)),
        Phase("asan-build", [["cmake", "--preset", "asan"],
                             ["cmake", "--build", "--preset", "asan", "-j", JOBS]],
              needs="setup"),
        Phase("asan-test", [asan], needs="asan-build", count=count_junit(asan_report)),
        # Kernels are compiled and linked, and programs refuse to run: there is no GPU here.
        Phase("cuda-build", [["sh", "tools/cuda_toolkit.sh"],
                             ["cmake", "--preset", "cuda"],
                             ["cmake", "--build", "--preset", "cuda", "-j", JOBS]],
              needs="setup"),
        Phase("cuda-test", [cuda], needs="cuda-build", count=count_junit(cuda_report)),
        Phase("lint", [[sys.executable, "tools/lint.py"]], needs="setup",
              count=count_lint),
    ]


def run(command, log):
    """Runs one command, its output on ours and in `log`; (succeeded, output)."""
    print("$ " + " ".join(command), flush=True)
    output = []
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            log.write(line)
            output.append(line)
    return process.returncode == 0, "".join(output)


def run_phase(phase):
    print(f"\n== {phase.name}", flush=True)
    logs = ROOT / "build" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    ok, output = True, ""
    with open(logs / f"{phase.name}.log", "w", encoding="utf-8") as log:
        for command in phase.commands:
            ok, text = run(command, log)
            output += text
            if not ok:
                break
    phase.seconds = time.monotonic() - start
    if phase.count is not None:
        phase.passed, phase.failed = phase.count(output, ok)
    elif not ok:
        phase.failed = 1
    phase.state = "ok" if ok else "FAILED"


def environment():
    """Paths and knobs of every phase."""
    os.environ["PATH"] = os.pathsep.join(
        [str(ROOT / ".cache" / "bin"), str(ROOT / ".venv" / "bin"), os.environ["PATH"]])
    os.environ.setdefault("NINJA_STATUS", "[%f/%t %es] ")
    os.environ.setdefault("UBSAN_OPTIONS", "print_stacktrace=1")
    os.environ.setdefault("ASAN_OPTIONS", "detect_stack_use_after_return=1")


def main():
    environment()
    chosen = phases()
    if sys.argv[1:]:
        unknown = set(sys.argv[1:]) - {phase.name for phase in chosen}
        if unknown:
            print(f"no such phase: {', '.join(sorted(unknown))}; there are "
                  f"{', '.join(phase.name for phase in chosen)}")
            return 2
        chosen = [phase for phase in chosen if phase.name in sys.argv[1:]]
    states = {}
    for phase in chosen:
        if states.get(phase.needs, "ok") == "ok":
            run_phase(phase)
        else:
            phase.failed = 1
        states[phase.name] = phase.state
    print(f"\n{'phase':<12}{'seconds':>9}{'passed':>8}{'failed':>8}  state")
    for phase in chosen:
        print(f"{phase.name:<12}{phase.seconds:>9.1f}{phase.passed:>8}{phase.failed:>8}  "
              f"{phase.state}")
    print(f"{'total':<12}{sum(phase.seconds for phase in chosen):>9.1f}")
    passed = sum(phase.passed for phase in chosen)
    failed = sum(phase.failed for phase in chosen)
    print(f"\n{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
