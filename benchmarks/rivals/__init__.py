"""What a user would pick instead: eager PyTorch, CUTLASS's own sparse GEMM, llama.cpp and OpenVINO."""
