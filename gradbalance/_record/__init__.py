"""What the penalty did, step by step: kept on the device, told as numbers, a table and a figure."""

from gradbalance._record.recorder import Recorder

__all__ = ["Recorder"]
