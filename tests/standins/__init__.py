"""Stand-ins for FreeBSD's commands and for zfs(8): real executables that keep state and refuse what the manual pages refuse."""
