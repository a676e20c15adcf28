"""A black-box suite of the Open Inference Protocol, for any server.

    pytest tests/conformance --url http://127.0.0.1:8000 [--grpc 127.0.0.1:8001] [--model NAME]

Without --url it starts a server of ours and checks both its paths, the data port and a route behind an ASGI server. What a server
does not list among the extensions of `/v2` is skipped with that reason. Imports nothing of the platform unless it starts our own.
"""
