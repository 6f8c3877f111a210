#!/usr/bin/env python3
"""Plants known bugs, one at a time, and shows that the fault checks see them.

usage: run_mutants.py [NUMBER...]   (default: all of mutants/*.patch; about half an hour)

Each patch names the check that must turn red. Works in a copy of the tree under build/mutants; the
last line is "mutants: N of M caught".
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = HERE.parents[2]
COPY = SOURCE / "build" / "mutants"
BUILD = COPY / "build" / "release"
TARGETS = ("nibble", "nibble-worker", "nibble-gateway", "gateway_overload", "fake_worker")
# Checks that are programs of their own and print a line for each bound.
PROGRAMS = {"gateway_overload": [BUILD / "bin" / "gateway_overload"],
            "soak": [sys.executable, HERE / "soak.py"]}
CHECK_SECONDS = 420
JOBS = str(os.cpu_count() or 2)


def run(*words, **options):
    return subprocess.run([str(word) for word in words], check=True, **options)


def copy_tree():
    """Every file that git tracks or would; unchanged files keep their times."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=SOURCE,
                             check=True, capture_output=True).stdout.split(b"\0")
    for name in (os.fsdecode(entry) for entry in listing if entry):
        origin, target = SOURCE / name, COPY / name
        if not origin.is_file():
            continue
        if target.exists() and target.read_bytes() == origin.read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, target)
    for name in (".venv", ".cache"):
        if (SOURCE / name).exists() and not (COPY / name).exists():
            (COPY / name).symlink_to(SOURCE / name)


def build():
    quiet = {"stdout": subprocess.DEVNULL, "cwd": COPY}
    run("cmake", "-S", COPY, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", **quiet)
    run("cmake", "--build", BUILD, "-j", JOBS, "--target", *TARGETS, **quiet)


def run_check(check):
    """What the check prints, or None if it never ends."""
    name, *words = check.split()
    script = ["namespaces.py"] if name.startswith("test_groups") else ["-m", "unittest"]
    command = PROGRAMS[name] if name in PROGRAMS else [sys.executable, *script, name]
    data = os.environ.get("NIBBLE_TEST_DATA", str(SOURCE.parent / "shared" / "data"))
    environment = {**os.environ, "NIBBLE_SOURCE_DIR": str(COPY), "NIBBLE_BINARY_DIR": str(BUILD),
                   "NIBBLE_TEST_DATA": data, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        result = subprocess.run([*command, *words], cwd=HERE, env=environment,
                                capture_output=True, text=True, timeout=CHECK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None
    return result.stdout + result.stderr


def turns_red(check):
    """Whether the check fails, and what it said: where it does, what it failed with."""
    text = run_check(check)
    if text is None:
        return True, "it never ended"
    if check.split()[0] in PROGRAMS:
        broken = re.findall(r"^NOT HELD +(.+)$", text, re.MULTILINE)
        return bool(broken), "; ".join(re.sub(" +", " ", line) for line in broken) or text[-2000:]
    # The check itself, on a server that had come up.
    red = re.search(r"^(FAIL|ERROR): test_", text, re.MULTILINE) is not None
    if not red or "the server ended with" in text:
        return False, text[-2000:]
    # Red for the reason that was planted, or for want of a free core: the line tells.
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Timeout)\w*(?:: .*)?$", text, re.MULTILINE)
    return True, "; ".join(errors)[:200]


def end_what_is_left():
    """What a planted bug leaves behind: processes of the copy's programs, and none else."""
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            program = os.readlink(process / "exe").removesuffix(" (deleted)")
            if pathlib.Path(program).is_relative_to(BUILD):
                os.kill(int(process.name), signal.SIGKILL)
        except (OSError, ProcessLookupError):
            pass


def main():
    wanted = {int(word) for word in sys.argv[1:]}
    patches = [patch for patch in sorted((HERE / "mutants").glob("*.patch"))
               if not wanted or int(patch.name.split("-")[0]) in wanted]
    copy_tree()
    caught = 0
    for patch in patches:
        check = patch.read_text(encoding="utf-8").splitlines()[0].removeprefix("Caught by: ")
        begin = time.monotonic()
        with open(patch, "rb") as text:
            run("patch", "-p1", "--no-backup-if-mismatch", "-s", cwd=COPY, stdin=text)
        try:
            build()
            red, said = turns_red(check)
        finally:
            end_what_is_left()
            copy_tree()
        caught += red
        print(f"{'caught    ' if red else 'NOT CAUGHT'} {patch.stem}: {check} "
              f"({time.monotonic() - begin:.0f} s, load {os.getloadavg()[0]:.1f})\n    {said}",
              flush=True)
    print(f"mutants: {caught} of {len(patches)} caught")
    return 0 if caught == len(patches) else 1


if __name__ == "__main__":
    sys.exit(main())
