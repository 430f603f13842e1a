"""What a user would pick instead: eager PyTorch, and CUTLASS's own sparse GEMM."""
