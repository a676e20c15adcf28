"""Make a trained model smaller: prune.py with widths.py, and distill.py (model to model), quantize.py (ONNX to ONNX)."""
