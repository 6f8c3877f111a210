#!/usr/bin/env python3
"""Runs clang-tidy over nibble's own sources; a file whose text, headers and flags have not changed
since it was last found clean is not looked at again.

usage: tools/tidy.py BUILD_DIR [FILE...]
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
CACHE = CACHE / "nibble" / "tidy"
SOURCES = ("base/", "kernels/cpu/", "services/", "worker/")
INCLUDE = re.compile(rb'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
PROGRESS_SECONDS = 10


def headers_of(source, include_dirs, known):
    """`source` and every project or generated header that it reaches."""
    seen, queue = set(), [source]
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        if path not in known:
            found = []
            for name in INCLUDE.findall(path.read_bytes()):
                for folder in include_dirs:
                    header = folder / name.decode()
                    if header.is_file():
                        found.append(header)
                        break
            known[path] = found
        queue.extend(known[path])
    return sorted(seen)


def key_of(source, flags, tool_version, include_dirs, known):
    digest = hashlib.sha256()
    digest.update(tool_version.encode())
    digest.update((ROOT / ".clang-tidy").read_bytes())
    digest.update(flags.encode())
    for path in headers_of(source, include_dirs, known):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def commands(build):
    """(source, flags without this machine's paths) of nibble's own files."""
    for entry in json.loads((build / "compile_commands.json").read_text(encoding="utf-8")):
        path = pathlib.Path(entry["file"])
        if not path.is_relative_to(ROOT) or path.is_relative_to(build):
            continue
        if not path.relative_to(ROOT).as_posix().startswith(SOURCES):
            continue
        flags = re.sub(r"\s-(?:o|MT|MF)\s\S+", "", entry["command"]).replace(str(ROOT), "")
        yield path, flags.split(" ", 1)[1]


def look_at(tidy, build, source):
    result = subprocess.run(
        [tidy, "-p", str(build), "--quiet", str(source)],
        capture_output=True, text=True, check=False)
    return source, result.returncode, result.stdout


def main():
    build = pathlib.Path(sys.argv[1]).resolve()
    only = {pathlib.Path(name).resolve() for name in sys.argv[2:]}
    tidy = shutil.which("clang-tidy") or shutil.which("clang-tidy-14")
    if tidy is None:
        print("clang-tidy is not installed; tools/setup installs it")
        return 1
    version = subprocess.run([tidy, "--version"], capture_output=True, text=True, check=True).stdout
    include_dirs, known = [ROOT, build / "proto"], {}
    CACHE.mkdir(parents=True, exist_ok=True)
    todo, total = {}, 0
    for source, flags in commands(build):
        if only and source not in only:
            continue
        total += 1
        stamp = CACHE / key_of(source, flags, version, include_dirs, known)
        if not stamp.exists():
            todo[source] = stamp
    failed, done, shown = 0, 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        looks = [pool.submit(look_at, tidy, build, source) for source in todo]
        for look in concurrent.futures.as_completed(looks):
            source, code, output = look.result()
            done += 1
            if code == 0:
                todo[source].touch()
            else:
                failed += 1
                print(output.strip(), flush=True)
            if time.monotonic() - shown > PROGRESS_SECONDS:
                shown = time.monotonic()
                print(f"clang-tidy: {done} of {len(todo)} changed files", flush=True)
    print(f"clang-tidy: {total} files, {len(todo)} looked at, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
