// The name of the instruction set that a source is compiled for, with TRAMONTANE_<ISA> and its compiler flags.
#if defined(TRAMONTANE_AVX2) || defined(TRAMONTANE_AVX512)
#include <immintrin.h>
#elif defined(TRAMONTANE_NEON)
#include <arm_neon.h>
#endif

#if defined(TRAMONTANE_AVX512) && defined(__AVX512BF16__)  // attention alone
#define ISA avx512_bf16
#elif defined(TRAMONTANE_AVX512)
#define ISA avx512
#define ISA_NAME "avx512"
#elif defined(TRAMONTANE_AVX2)
#define ISA avx2
#define ISA_NAME "avx2"
#elif defined(TRAMONTANE_NEON)
#define ISA neon
#define ISA_NAME "neon"
#else
#define ISA plain
#define ISA_NAME "plain"
#endif
