"""Triton kernels for the library's low-level operators.

Module ``<op>`` of ``pool``, ``norm`` or ``conv`` holds a function for each low-level operator of
``pooling_ext.ops.<op>``, of the same name and arguments. ``backends.triton_library`` imports it when one of
them is first called.
"""
