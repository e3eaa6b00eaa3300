"""The HTTP server: OpenAI's interface, and what an operator needs, over any backend.

It knows the backends' protocols, types, errors and configuration; never an engine, a model or an array. One module
owns one thing: `app` puts the parts together, `serving` runs them, `service` says whether there is a model and room,
`schemas` and `routes` have a file for each group of endpoints.
"""
