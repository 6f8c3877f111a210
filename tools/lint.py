#!/usr/bin/env python3
"""Every check that needs no running program. Prints a line per check and what a failed one said.

usage: tools/lint.py [BUILD_DIR]   (clang-tidy reads BUILD_DIR/compile_commands.json)
"""

import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv" / "bin"
SHOWN_LINES_MAX = 60


def files(*patterns):
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns],
        cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(name for name in set(listing.splitlines()) if (ROOT / name).is_file())


def shell_scripts():
    scripts = files("*.sh", ".ci/run")
    for name in files("tools/*"):
        path = ROOT / name
        if path.suffix == "" and path.read_bytes().startswith(b"#!/usr/bin/env bash"):
            scripts.append(name)
    return sorted(set(scripts))


def checks(build):
    cpp = [name for name in files("*.h", "*.cc", "*.cu", "*.cuh")]
    rust = ["--manifest-path", "services/text/Cargo.toml"]
    yield "arrows", [sys.executable, "tools/check_arrows.py"], ROOT
    yield "tree", [sys.executable, "tools/check_tree.py"], ROOT
    yield "clang-format", [VENV / "clang-format", "--dry-run", "-Werror", *cpp], ROOT
    yield "buf lint", [VENV / "buf", "lint"], ROOT / "proto"
    yield "API page", [VENV / "python", "tools/gen_api.py", "--check"], ROOT
    yield "GPU page", [sys.executable, "tools/bench/gpu_page.py", "--check"], ROOT
    yield "shellcheck", [VENV / "shellcheck", *shell_scripts()], ROOT
    yield "deploy", [VENV / "python", "tests/deploy/lint_deploy.py"], ROOT
    if (ROOT / "services/text/Cargo.toml").exists():
        yield "cargo fmt", ["cargo", "fmt", *rust, "--check"], ROOT
        yield "cargo clippy", ["cargo", "clippy", *rust, "--release", "--all-targets", "--locked",
                               "--quiet", "--", "-D", "warnings"], ROOT
    if build is not None:
        yield "clang-tidy", [sys.executable, "tools/tidy.py", build], ROOT


def main():
    build = sys.argv[1] if len(sys.argv) > 1 else None
    passed, failed = 0, 0
    for name, command, folder in checks(build):
        start = time.monotonic()
        command = [str(word) for word in command]
        if shutil.which(command[0]) is None:
            result_ok, output = False, f"{command[0]} is not installed; tools/setup installs it"
        else:
            result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, text=True, check=False)
            result_ok, output = result.returncode == 0, result.stdout.strip()
        seconds = time.monotonic() - start
        print(f"{'ok    ' if result_ok else 'FAILED'} {name} ({seconds:.1f} s)", flush=True)
        if not result_ok:
            lines = output.splitlines()
            print("\n".join(lines[:SHOWN_LINES_MAX]), flush=True)
            if len(lines) > SHOWN_LINES_MAX:
                print(f"… and {len(lines) - SHOWN_LINES_MAX} more lines", flush=True)
        passed += result_ok
        failed += not result_ok
    print(f"lint: {passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
