#!/usr/bin/env python3
"""Prints the throughput and memory metrics of nibble's /metrics pages, zeros left out.

usage: tools/show_metrics.py HOST:PORT...
"""

import re
import sys
import urllib.request

SHOWN = re.compile(r"^nibble_\w*(?:tokens|memory_bytes|kv_cache_blocks|requests)\w*$")
HIDDEN_SUFFIXES = ("_bucket", "_created")
TIMEOUT_SECONDS = 5


def samples(address):
    """(name, labels, value) of every sample."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=TIMEOUT_SECONDS) as page:
        for line in page.read().decode().splitlines():
            match = re.match(r"^([a-zA-Z_:][\w:]*)(\{.*\})? (\S+)", line)
            if match:
                yield match[1], match[2] or "", float(match[3])


def main():
    for address in sys.argv[1:]:
        print(f"http://{address}/metrics")
        for name, labels, value in samples(address):
            if value and SHOWN.match(name) and not name.endswith(HIDDEN_SUFFIXES):
                print(f"  {name}{labels} {value:.15g}")


if __name__ == "__main__":
    main()
