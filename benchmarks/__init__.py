"""The benchmarks of isobn_kernels: ``python -m benchmarks``, in the root of a checkout. No part of the package."""
