#define ISOBN_SET avx2
#define ISOBN_VECTOR_BYTES 32
#include "kernels.inl"
