"""Serving over HTTP: a dynamic batcher above :class:`imm.Sampler`, and the application of ``imm serve`` (extra "serve")."""
