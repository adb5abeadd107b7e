"""Tests that need real ZFS. They run inside the guest of ops/lab/zfs, so pytest does not collect them elsewhere."""
