"""The online half: a published version answering the Open Inference Protocol.

A request's life: http.py (the data port) or app.py (Ray Serve's route) hands method, path, headers and body to protocol.py, or
to fast.py where it has met the like; repository.py knows the models and versions; codec.py decodes the body into named arrays;
batcher.py gathers the arrays with those of others and runs the engine; the answer goes back the same way. core.py holds one replica
together. Nothing in this room knows training, data sets or torch.
"""
