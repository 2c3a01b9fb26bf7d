"""What a training step with norms costs on this machine: the models (``problems``), the steps (``steps``), how they are measured (``measure``), and
``ghostgrad bench`` (``command``). The full run with the peers is ``benchmarks/run.py`` in the repository. Needs no more than ghostgrad itself does."""
