"""Benchmarks of wanoffload: one harness with named cases, run as ``python -m benchmarks``.

The way through the files: ``__main__`` reads the command line, a case (``steps``, ``memory``,
``wrapping``, ``micro``) measures rows, ``harness`` stores them so that a run can be resumed, and
``tables`` prints what is stored. ``models`` and ``contenders`` say what is measured, ``timing``,
``link`` and ``machine`` with what.
"""
