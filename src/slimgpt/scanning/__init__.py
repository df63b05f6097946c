"""How much of a model can be removed: what is lost against how small it gets."""
