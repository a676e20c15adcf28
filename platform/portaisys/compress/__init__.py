"""Make a trained model smaller: prune.py and distill.py (model to model), quantize.py (ONNX to ONNX)."""
