"""Loading: from the name of a model to a decoder with its weights. A checkpoint's quirks end here."""
