#!/usr/bin/env python3
"""Runs a test module in a network of its own: the gateway's machine, one for each of two groups and
one for clients, each a network namespace, joined by cables to the gateway's.

usage: namespaces.py MODULE...   (runs `python -m unittest -v MODULE...` on the gateway's machine)

A cable is cut in one direction by giving the sender a neighbour that nobody is: what it sends
vanishes without a word. Needs root; where it is not permitted one line says what did not run.
"""

import os
import pathlib
import shutil
import subprocess
import sys

MACHINES = ("g", "w0", "w1", "c")


def address(machine, of_gateway=False):
    """The machine's address on its cable to the gateway, or the gateway's on the same."""
    return f"10.232.{MACHINES.index(machine)}.{1 if of_gateway else 2}"


def name(machine):
    return os.environ.get("NIBBLE_NETWORK", f"nibble{os.getpid()}") + machine


def inside(machine):
    """The words before a command that runs on the machine."""
    return ["ip", "netns", "exec", name(machine)]


def _ip(*words):
    subprocess.run(["ip", *words], check=True, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def cut(sender, receiver):
    """What `sender` sends to `receiver` vanishes; one of the two is "g"."""
    _neighbour(sender, receiver, "02:00:00:00:00:99")


def heal(sender, receiver):
    other = sender if receiver == "g" else receiver
    interface = f"v{other}" if receiver == "g" else "eth0"
    mac = subprocess.run([*inside(receiver), "cat", f"/sys/class/net/{interface}/address"],
                         check=True, capture_output=True, text=True).stdout.strip()
    _neighbour(sender, receiver, mac)


def _neighbour(sender, receiver, mac):
    other = sender if receiver == "g" else receiver
    interface = "eth0" if receiver == "g" else f"v{other}"
    _ip("-n", name(sender), "neigh", "replace", address(other, of_gateway=receiver == "g"),
        "lladdr", mac, "dev", interface, "nud", "permanent")


def name_address(machine_name, own_address):
    """From now on the gateway's machine resolves the name so."""
    _hosts().write_text(f"127.0.0.1 localhost\n{own_address} {machine_name}\n", encoding="utf-8")


def _hosts():
    """`ip netns exec` shows it as /etc/hosts on the gateway's machine."""
    return pathlib.Path("/etc/netns") / name("g") / "hosts"


def add_address(machine, own_address):
    _ip("-n", name(machine), "addr", "replace", f"{own_address}/24", "dev", "eth0")


def make():
    _hosts().parent.mkdir(parents=True)
    name_address("nobody", "127.0.0.1")
    for machine in MACHINES:
        _ip("netns", "add", name(machine))
        _ip("-n", name(machine), "link", "set", "lo", "up")
    for machine in MACHINES[1:]:
        _ip("link", "add", f"v{machine}", "netns", name("g"), "type", "veth", "peer", "name",
            "eth0", "netns", name(machine))
        for at, interface, own in (("g", f"v{machine}", address(machine, True)),
                                   (machine, "eth0", address(machine))):
            _ip("-n", name(at), "addr", "add", f"{own}/24", "dev", interface)
            _ip("-n", name(at), "link", "set", interface, "up")


def remove():
    shutil.rmtree(_hosts().parent, ignore_errors=True)
    for machine in MACHINES:
        subprocess.run(["ip", "netns", "del", name(machine)], check=False,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main():
    os.environ["NIBBLE_NETWORK"] = f"nibble{os.getpid()}"
    try:
        try:
            make()
        except (OSError, subprocess.CalledProcessError):
            print(f"NOT RUN: {' '.join(sys.argv[1:])} (network namespaces are not permitted here)",
                  file=sys.stderr)
            return 0
        return subprocess.run([*inside("g"), sys.executable, "-m", "unittest", "-v",
                               *sys.argv[1:]], check=False).returncode
    finally:
        remove()


if __name__ == "__main__":
    sys.exit(main())
