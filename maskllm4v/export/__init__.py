"""Folded models on their way out: packed files, ONNX graphs, sparse kernels; and the check that they are N:M sparse."""
