"""The checkpoint format and its life on disk. Knows no Lightning and, but for `save`, no process group."""
