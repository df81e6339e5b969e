"""Runnable examples of gradbalance."""
