"""The benchmark harness: op files in ``bench/`` declare inputs, peers, bytes and flops; what is here measures them.

``case`` is what an op file declares (``networks`` and ``steps`` help it), ``gate`` runs its tests, ``timing`` is the clocks,
``memory`` the peaks, ``harness`` the measurement, ``rows`` the table and the files,
``environment`` the machine, ``docs`` the page made from committed rows; ``plots`` and ``report`` make figures and the page of
one run; ``machines`` is what machines can do at most, ``predict`` the floors that follow; ``compare`` is about two runs,
``revisions`` about two commits.
"""

from imm.benchmark.case import Case, Claim, load, operations
from imm.benchmark.harness import measure, run

__all__ = ["Case", "Claim", "load", "measure", "operations", "run"]
