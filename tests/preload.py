"""Imported once by the fork server of `tests.launch`: what every forked rank then finds imported."""

import torch

torch.set_num_threads(1)
