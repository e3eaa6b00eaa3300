"""Text in and out of a model: tokenizer, incremental detokenizer, stop strings, chat templates.

Owns everything between characters and token ids. Must not know: arrays, models, the engine. Import the modules
themselves (`tramontane.text.tokenizer`, ...): this package imports nothing, so that starting up stays cheap.
"""
