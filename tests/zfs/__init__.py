"""Tests on real ZFS: `test_guest.py` boots the guest of ops/lab/zfs, which runs the `…on_zfs.py` beside it; pytest collects
these nowhere else."""
