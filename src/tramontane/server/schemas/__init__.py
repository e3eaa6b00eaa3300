"""What clients send and get, as pydantic models: a file for each group of endpoints. The OpenAPI document is these."""
