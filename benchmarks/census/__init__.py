"""A census of optimizers: which can be scaled by groups, how, and which are refused."""
