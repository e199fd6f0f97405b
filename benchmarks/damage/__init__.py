"""Whether any damage to a checkpoint goes unnoticed: `python -m benchmarks.damage`."""
