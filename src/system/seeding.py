"""Randomness as a pure function of seed and step, so that no generator state has to be saved or restored.

Before each step the loop seeds every generator from the run's seed and the step's number. A run that resumes at a step
therefore draws what the unbroken run drew there, whatever happened before.
"""

from __future__ import annotations

import random

import numpy as np
import torch

MASK = 2**64 - 1


def mix(*numbers: int) -> int:
    """Hash integers into 63 bits, so that neighbouring seeds and steps give unrelated streams.

    Source: the finaliser of SplitMix64, Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state >> 1


def seed_everything(*numbers: int) -> None:
    """Seed torch (all devices), NumPy and Python from the given numbers."""
    seed = mix(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
