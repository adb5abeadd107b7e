"""What `ops/bench` runs: the product's processes, the least programs that do the same visible work, and their comparison."""
