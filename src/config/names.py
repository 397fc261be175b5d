"""What the methods are called for people, and their colours."""

from __future__ import annotations

LABELS = {"simclr": "SimCLR", "nnclr": "NNCLR", "kmclr": "KMCLR"}
COLOURS = {"simclr": "#404040", "nnclr": "#d55e00", "kmclr": "#0072b2"}  # Okabe and Ito: safe for the colour-blind
