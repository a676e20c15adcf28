"""PortAISys: from a PyTorch model to a served, measured engine on one Ray cluster."""

__version__ = "0.1.0"
