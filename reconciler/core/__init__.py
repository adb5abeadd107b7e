"""The decisions, as pure functions over frozen values: no await, clock, randomness, logging or I/O."""
