"""Living inside somebody's optimizer: which one steps, and how the steps of a group are scaled."""
