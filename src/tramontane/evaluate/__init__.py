"""Evaluation of a loaded model: perplexity. Must not know: the shell, how a backend computes."""
