"""ZeRO itself, on `torch.distributed`: buckets, collectives, the optimizer on segments. Knows no Lightning, no files."""
