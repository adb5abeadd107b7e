"""Keeps the fleet as people asked: a pure core, the fleet in memory, durable desired state, and the loop between them."""
