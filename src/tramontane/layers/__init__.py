"""Layers: the parts a decoder is made of, over ops and weights. Must not know: models, the engine, files."""
