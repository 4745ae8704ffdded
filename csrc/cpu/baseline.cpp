#define ISOBN_SET baseline
#define ISOBN_VECTOR_BYTES 16
#include "kernels.inl"
