"""Life inside an optimizer: which one steps, when, and how the steps of some parameters are made shorter or longer."""
