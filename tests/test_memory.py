import torch

from src.memory import peak_gib


def test_the_peak_rises_with_what_is_touched_and_stays():
    device = torch.device("cpu")
    before = peak_gib(device)
    block = torch.ones(int((before + 0.25) * 2**30), dtype=torch.uint8)  # more than has ever been resident
    during = peak_gib(device)
    del block
    assert before > 0
    assert during >= before + 0.2
    assert peak_gib(device) >= during
