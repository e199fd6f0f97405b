"""Checkpoint directories of DeepSpeed's: read without it, and written again as ours."""
