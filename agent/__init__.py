"""One per host, no database: makes the VMs it is asked for from an engine, a storage and a network driver."""
