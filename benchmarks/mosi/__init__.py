"""Does balancing matter on CMU-MOSI? The rows of the paper's study, and ours, over many seeds."""
