"""The graph: onnx_ir, our fused operators, their shapes and their meaning in numpy."""
