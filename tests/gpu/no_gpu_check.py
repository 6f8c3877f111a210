#!/usr/bin/env python3
"""Programs of a CUDA build where there is no GPU: one clear line, exit 4, nothing left running.

  no_gpu_check.py FOLDER_OF_PROGRAMS
"""

import os
import pathlib
import re
import subprocess
import sys

REASON = re.compile(r"no NVIDIA driver on this machine|the NVIDIA driver shows no GPU")


def refused(name, command):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True,
                         timeout=60, env=environment, start_new_session=True)
    lines = [line for line in run.stderr.splitlines() if REASON.search(line)]
    holds = run.returncode == 4 and len(lines) == 1
    print(f"{'ok  ' if holds else 'FAIL'} {name}: exit {run.returncode}: {run.stderr.strip()}")
    return holds


def main():
    programs = pathlib.Path(sys.argv[1])
    holds = [refused("bench", [programs / "nibble", "bench", "--random", "smollm2", "--device",
                               "cuda"]),
             refused("bench of two ranks", [programs / "nibble", "bench", "--random", "smollm2",
                                            "--device", "cuda", "--tp", "2"])]
    default = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"
    data = pathlib.Path(os.environ.get("NIBBLE_TEST_DATA", default))
    model = data / "models" / "smollm2-135m-awq-gemm-g64"
    if not model.exists():
        print(f"NOT RUN: worker and serve (no {model.name} under NIBBLE_TEST_DATA)")
        return 0 if all(holds) else 1
    worker = [programs / "nibble-worker", "--model", model, "--device", "cuda", "--listen",
              "127.0.0.1:0", "--metrics-listen", ""]
    holds.append(refused("worker", worker))
    holds.append(refused("worker of two ranks", [*worker, "--tp", "2"]))
    holds.append(refused("serve", [programs / "nibble", "serve", model, "--device", "cuda",
                                   "--port", "0", "--metrics-listen", "127.0.0.1:0",
                                   "--worker-metrics-listen", "127.0.0.1:0"]))
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
