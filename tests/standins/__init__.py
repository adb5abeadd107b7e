"""Stand-ins for FreeBSD's commands: real executables that keep state and refuse what the manual pages refuse."""
