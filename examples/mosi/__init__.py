"""The reference consumer: multimodal sentiment analysis on CMU-MOSI."""
