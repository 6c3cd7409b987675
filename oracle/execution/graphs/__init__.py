"""Capturing work once and replaying it: on a GPU with CUDA graphs, on a CPU by an emulation of them."""
