"""The Triton kernels for GPUs: block sizes (config), which launches make up each function (launches), and the kernels
(forward and backward, which share blocks).

Under ``TRITON_INTERPRET=1`` (set before the first import) the same kernels run on CPU tensors, slowly, for tests.
"""
