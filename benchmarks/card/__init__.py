"""What has to be run on a GPU, in order (GPU.md), and what builds it on a machine without one."""
