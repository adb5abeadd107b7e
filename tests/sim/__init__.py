"""The production controller against simulated agents, network, disk and clock: one event heap, one seed, no real time."""
