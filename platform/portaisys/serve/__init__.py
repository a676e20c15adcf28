"""The online half: a published version answering the Open Inference Protocol.

A request's life: app.py (Ray Serve) hands method, path, headers and body to protocol.py, which decodes them into named
arrays; batcher.py gathers them with those of others and runs the engine; the answer goes back the same way.
Nothing in this room knows training, data sets or torch.
"""
