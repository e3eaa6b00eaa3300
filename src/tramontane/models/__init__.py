"""Models: a family's configuration as data, and the one decoder that obeys it. Must not know: files, the engine."""
