"""Directories of torch.distributed.checkpoint (DCP), in which FSDP saves, read as segments."""
