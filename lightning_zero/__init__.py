"""lightning_zero: ZeRO for PyTorch Lightning in plain PyTorch.

Importing the package registers the strategies `"zero_stage_1"` and `"zero_stage_2"`.
"""
