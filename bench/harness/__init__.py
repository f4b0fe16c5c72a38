"""The benchmark harness: op files ``bench/bench_<op>.py`` declare inputs, peers, bytes and flops; what is here measures them.

``case`` is what an op file declares; ``networks`` and ``steps`` help it. ``gate`` runs an op's tests, ``timing``
has the clocks, ``measure`` takes the figures, ``rows`` keeps and prints them beside the ``environment``.
``plots`` and ``report`` show a run, ``compare`` is about two runs and two commits. ``predict`` says
what machines can do at most, and the floors that follow.
"""
