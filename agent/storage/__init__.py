"""Storage drivers, one file each; base.py is the protocol, fake.py a driver of its own kind."""
