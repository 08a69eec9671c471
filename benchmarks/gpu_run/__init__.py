"""The first minutes on a machine with a GPU: ``python -m benchmarks.gpu_run first`` (or ``second``).

A run is a list of steps (:mod:`.steps`). Each has processes and a time limit of its own and depends on no
other; what fails, hangs or crashes is noted and the run goes on (:mod:`.runner`). Every result is a line of
JSON in ``results.jsonl`` as it comes, and ``summary.md`` (:mod:`.summary`) is made anew after each step. What
runs in the steps' processes is in :mod:`.worker` and :mod:`.parts`.
"""
