"""Backends: whatever can answer a request, behind three methods. Everything above works with any of them."""
