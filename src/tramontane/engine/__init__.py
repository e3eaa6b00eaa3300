"""The engine: sequences, blocks, the schedule and its execution, in tokens.

Must not know: text, files, where requests come from.
"""
