#define ISOBN_SET avx512
#define ISOBN_VECTOR_BYTES 64
#include "kernels.inl"
