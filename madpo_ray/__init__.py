"""Margin-Adaptive DPO (MADPO) on Ray: score margins once, then train DPO weighted by them."""

__version__ = "0.2.0"
