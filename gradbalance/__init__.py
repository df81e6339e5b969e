"""Gradient balancing between the branches of a model, for any PyTorch optimizer."""
