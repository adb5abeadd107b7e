#!/usr/bin/python3 -IS
"""One file for every stand-in: it does what the name says under which it is called."""

import importlib
import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))
COMMANDS = {
    **dict.fromkeys(("ifconfig", "arp", "sysctl", "kldload"), "net"),
    "pfctl": "pf",
    **dict.fromkeys(("bhyve", "bhyvectl", "bhyveload"), "vmm"),
    **dict.fromkeys(("jail", "jls", "jexec", "rctl", "devfs", "mount", "umount", "chflags"), "jails"),
}

if __name__ == "__main__":
    called = os.path.basename(sys.argv[0])
    sys.exit(getattr(importlib.import_module(f"tests.standins.{COMMANDS[called]}"), called)(sys.argv[1:]))
