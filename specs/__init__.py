"""The shared vocabulary: desired state, wire messages, names and spec files. Imports nothing of the other packages."""
