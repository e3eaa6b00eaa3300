"""What every backend must do, or refuse by name. `pytest tests/backends/conformance -m ""` ends with a table of who did
which."""
