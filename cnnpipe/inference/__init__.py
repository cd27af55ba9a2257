"""The wing that applies a model: needs only onnxruntime, Pillow and NumPy."""
