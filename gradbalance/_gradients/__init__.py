"""Reading and writing gradients: the only room that knows DTensor, and the only one with collectives."""
