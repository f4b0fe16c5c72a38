"""What measures the op files ``bench/bench_<op>.py``. ``case`` is what these declare; ``networks`` and ``steps`` help. ``gate``
runs an op's tests, ``timing`` has the clocks, ``measure`` takes the figures, ``rows`` keeps and prints them beside the
``environment``. ``plots`` and ``report`` show a run, ``compare`` is about two runs or commits, ``predict`` about floors."""
