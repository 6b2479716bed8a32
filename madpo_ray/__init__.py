"""Margin-Adaptive DPO (MADPO) on Ray: reward margins scored once, then DPO weighted by them."""

__version__ = "0.1.0"
