"""ZeRO itself, on `torch.distributed`: buckets, collectives, steps on segments. Knows no Lightning and no files."""
